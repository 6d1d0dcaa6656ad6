"""How concentrated a map is: Gini index, entropy, mass of the highest pixels, effective support; how rough.

All take a non-negative saliency (B, H, W) and give (B,) float64 in [0, 1], NaN for a map of zeros. They raise
ValueError for another shape and for negative, NaN or infinite values. They do not change when a map is multiplied by a
positive number. None but `total_variation` changes when the pixels are permuted: to the others scattered pixels are as
sharp as a blob of them. None knows where the object is: one bright pixel in a corner is as sharp as a map can be.

They take `chunk` maps at a time, two at least, None as many as have two million pixels: memory depends on that, the
result does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdecor.measures._checks import INSIDE, by_chunks, non_negative, shares
from sdecor.measures.case import measure
from sdecor.registers import Between


@measure("Gini", better="higher", low=0, high=1)
def gini(saliency: Tensor, *, chunk: int | None = None) -> Tensor:
    """Gini index: 0 for a constant map, 1 - 1 / (H * W) for a single pixel; higher is sharper.

    Source: Hurley and Rickard 2009, doi:10.1109/TIT.2009.2027527 (arXiv:0811.4706).
    """

    def index(share: Tensor) -> Tensor:
        n = share.shape[1]
        weight = (n - torch.arange(1, n + 1, dtype=torch.float64, device=share.device) + 0.5) / n
        return (1 - 2 * (share.sort(dim=1).values * weight).sum(1)).clamp(0, 1)

    return _of_shares(index, saliency, chunk)


@measure("entropy", better="lower", low=0, high=1)
def entropy(saliency: Tensor, *, chunk: int | None = None) -> Tensor:
    """Shannon entropy of the shares over log(H * W): 1 for a constant map, 0 for one pixel; lower is sharper.

    NaN for maps of one pixel, where the largest entropy is zero.
    Source: Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x, divided by its largest value.
    """
    return _of_shares(lambda p: (-torch.xlogy(p, p).sum(1) / math.log(p.shape[1])).clamp(0, 1), saliency, chunk)


@measure("top-10 % mass", better="higher", low=0, high=1)
def top_mass(saliency: Tensor, fraction: float = 0.1, *, chunk: int | None = None) -> Tensor:
    """Share of the total that the highest pixels hold; higher is sharper, `fraction` is a constant map's value.

    The `fraction`, in (0, 1), times H * W is rounded to a whole number of pixels, at least 1.
    """
    INSIDE.check("fraction", fraction)

    def mass(share: Tensor) -> Tensor:
        return share.topk(max(1, round(fraction * share.shape[1])), dim=1).values.sum(1).clamp(max=1)

    return _of_shares(mass, saliency, chunk)


@measure("effective support", better="lower", low=0, high=1)
def effective_support(saliency: Tensor, *, chunk: int | None = None) -> Tensor:
    """Effective number of pixels that share a map, over H * W: 1 for a constant map; lower is sharper.

    The number is 1 / sum(p^2) for the shares p (the inverse participation ratio): m equal pixels give m.
    Source: Hill 1973, doi:10.2307/1934352, number of order 2 divided by its largest value.
    """

    def support(share: Tensor) -> Tensor:
        n = share.shape[1]
        return (1 / (n * share.square().sum(1))).clamp(1 / n, 1)

    return _of_shares(support, saliency, chunk)


@measure("total variation", better="lower", low=0, high=1)
def total_variation(saliency: Tensor, *, chunk: int | None = None) -> Tensor:
    """How much neighbouring pixels differ, over the largest value possible: 0 for a constant map; lower is smoother.

    The sum over pairs of 4-neighbours of the absolute difference of their shares (anisotropic), over 4: what a single
    pixel away from the border gives. Scattering the pixels raises it.
    Source: Rudin, Osher and Fatemi 1992, doi:10.1016/0167-2789(92)90242-F, of the map of shares.
    """

    def roughness(share: Tensor) -> Tensor:
        maps = share.unflatten(1, saliency.shape[1:])
        down, right = (maps.diff(dim=dim).abs().sum((1, 2)) for dim in (1, 2))
        total: Tensor = down + right
        return (total / 4).clamp(max=1)

    return _of_shares(roughness, saliency, chunk)


def sublattice_gini(saliency: Tensor, *, period: int = 2, chunk: int | None = None) -> Tensor:
    """Mean Gini index of the sublattices: the pixels whose row and column leave the same remainders modulo `period`.

    A pattern of that period, such as a network of that stride gives its gradients whatever the picture shows (Odena,
    Dumoulin and Olah 2016, doi:10.23915/distill.00003), raises `gini` and does not enter here. Patterns of a longer
    period do. NaN where a sublattice is all zeros. The `period` is 1 or larger, at most the shorter side.
    """
    non_negative(saliency)
    Between(1, min(saliency.shape[1:])).check("period", period)
    rows = [saliency[:, row::period] for row in range(period)]
    return torch.stack([gini(r[..., column::period], chunk=chunk) for r in rows for column in range(period)]).mean(0)


def _of_shares(score: Callable[[Tensor], Tensor], saliency: Tensor, chunk: int | None) -> Tensor:
    """A score of the pixels' shares (b, H * W) of each map."""
    return by_chunks(lambda flat: score(shares(flat)), chunk, non_negative(saliency))
