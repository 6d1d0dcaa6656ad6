"""How concentrated an attribution is: Gini index, entropy, effective support, mass of the highest pixels; how rough.

All take a non-negative attribution (B, H, W), do not change when a map is multiplied by a positive number, and are NaN
for a map of zeros. None but `total_variation` changes when the pixels are permuted: to the others scattered pixels are
as sharp as a blob of them. None knows where the object is: one bright pixel in a corner is as sharp as a map can be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdecor.measures._checks import require_fraction, shares


def gini(attribution: Tensor) -> Tensor:
    """Gini index of each map: 0 for a constant map, 1 - 1 / (H * W) for a single pixel; higher is sharper.

    Args:
        attribution: non-negative, (B, H, W).

    Returns:
        (B,) float64 in [0, 1); NaN for a map of zeros.

    Raises:
        ValueError: another shape, or negative, NaN or infinite values.

    Source: Hurley and Rickard 2009, doi:10.1109/TIT.2009.2027527 (arXiv:0811.4706).

    Example:
        >>> gini(torch.tensor([[[0.0, 0.0], [0.0, 3.0]]])).item()
        0.75
    """
    share = shares(attribution).sort(dim=1).values
    n = share.shape[1]
    weight = (n - torch.arange(1, n + 1, dtype=torch.float64, device=share.device) + 0.5) / n
    return (1 - 2 * share @ weight).clamp(0, 1)


def entropy(attribution: Tensor) -> Tensor:
    """Shannon entropy of each map's shares over log(H * W): 1 for a constant map, 0 for one pixel; lower is sharper.

    Args:
        attribution: non-negative, (B, H, W).

    Returns:
        (B,) float64 in [0, 1]; NaN for a map of zeros, and for maps of one pixel, where the largest entropy is zero.

    Raises:
        ValueError: another shape, or negative, NaN or infinite values.

    Source: Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x, divided by its largest value.

    Example:
        >>> entropy(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])).item()
        0.5
    """
    share = shares(attribution)
    n = share.shape[1]
    if n == 1:
        return torch.full_like(share[:, 0], math.nan)
    return (-torch.xlogy(share, share).sum(1) / math.log(n)).clamp(0, 1)


def effective_support(attribution: Tensor) -> Tensor:
    """Effective number of pixels that share a map, over H * W: 1 for a constant map; lower is sharper.

    The number is 1 / sum(p^2) for the shares p (the inverse participation ratio, Hill's number of order 2): m equal
    pixels give m. The entropy is the logarithm of Hill's number of order 1, over log(H * W).

    Args:
        attribution: non-negative, (B, H, W).

    Returns:
        (B,) float64 in [1 / (H * W), 1]; NaN for a map of zeros.

    Raises:
        ValueError: another shape, or negative, NaN or infinite values.

    Source: Hill 1973, doi:10.2307/1934352, divided by its largest value.

    Example:
        >>> effective_support(torch.tensor([[[2.0, 2.0], [0.0, 0.0]]])).item()
        0.5
    """
    share = shares(attribution)
    n = share.shape[1]
    return (1 / (n * share.square().sum(1))).clamp(1 / n, 1)


def total_variation(attribution: Tensor) -> Tensor:
    """How much neighbouring pixels differ, over the largest value possible: 0 for a constant map; lower is smoother.

    The sum over pairs of 4-neighbours of the absolute difference of their shares (anisotropic), over 4: what a single
    pixel away from the border gives. It depends on where the pixels are: scattering them raises it.

    Args:
        attribution: non-negative, (B, H, W).

    Returns:
        (B,) float64 in [0, 1]; NaN for a map of zeros.

    Raises:
        ValueError: another shape, or negative, NaN or infinite values.

    Source: Rudin, Osher and Fatemi 1992, doi:10.1016/0167-2789(92)90242-F, of the map of shares.

    Example:
        >>> total_variation(torch.tensor([[[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]])).item()
        1.0
    """
    share = shares(attribution).view(attribution.shape)
    down, right = (share.diff(dim=dim).abs().sum((1, 2)) for dim in (1, 2))
    return ((down + right) / 4).clamp(max=1)


def top_mass(attribution: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of each map's total that its highest pixels hold; higher is sharper, `fraction` is a constant map's value.

    Args:
        attribution: non-negative, (B, H, W).
        fraction: share of the pixels to count, in (0, 1); `fraction * H * W` is rounded to a whole number, at least 1.

    Returns:
        (B,) float64 in (0, 1]; NaN for a map of zeros.

    Raises:
        ValueError: another shape, negative, NaN or infinite values, or a fraction outside (0, 1).

    Example:
        >>> top_mass(torch.tensor([[[4.0, 2.0], [1.0, 1.0]]]), fraction=0.5).item()
        0.75
    """
    require_fraction(fraction)
    share = shares(attribution)
    return share.topk(max(1, round(fraction * share.shape[1])), dim=1).values.sum(1).clamp(max=1)
