"""Whether the pixels that a map ranks high are those that the model uses.

Pixels are replaced in order of the map and the output of one class is read: `perturbation_curve`. Scores of a curve are
functions of it, so that one run of the model, `curves`, serves all of them: `faithfulness`. What is left when pixels
are replaced is no natural image, and the answer depends on the fill: report which one was used.

Functions that run a model share their arguments, which `perturbation_curve` describes; modes and flags of the model are
restored. They raise ValueError for shapes that do not fit, numbers out of range, NaN and infinity, unknown names, and a
target that is no class of the model. Scores are (B,) float64; those of a curve are in [0, 1], or [-1, 1], if it is one
of probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdecor.measures import _perturbation as shared
from sdecor.measures._checks import INSIDE
from sdecor.measures.case import measure, quantity
from sdecor.registers import Between
from sdecor.saliency import frozen_eval

ORDERS = shared.ORDERS
STEPS = tuple(i / 10 for i in range(11))
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


def masked_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    score: Tensor,
    fractions: Sequence[float],
    replacement: Tensor,
    *,
    order: str = "most",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whether the model is still right when a growing share of pixels is replaced in order of saliency.

    With `order="most"` a steeper fall means a more faithful ranking, with `"least"` a later one; compare both with
    `"random"`, which does not look at the score. Arguments are those of `perturbation_curve`, but for the true `labels`
    (B,), the `score` of any sign (B, H, W), and what to put in place of a pixel, which broadcasts to `images`. Each
    image has its own random order.

    Returns:
        (len(fractions), B) float32, 1 where the prediction is the label and 0 where not; `.mean(1)` is the accuracy.

    Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820 (arXiv:1509.06321), region perturbation, pixel by pixel.
    """
    shared.check(images, labels, score, batch_size, order=order, fractions=fractions, names=("labels", "score"))
    fill = shared.broadcast(replacement, images, "replacement"), False
    size = images.shape[2:]

    def rank(part: slice) -> Tensor:
        some = score[part].flatten(1).to(images.device)
        shuffle = shared.uniform(some.shape, generator, images.device).argsort(1)
        return shared.places(some, order, shuffle).view(1, -1, 1, *size)

    spans = [(0, round(f * size.numel())) for f in fractions]
    return shared.outputs(model, images, labels, rank, spans, fill, "correct", batch_size, name="labels").T.float()


def perturbation_curve(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    attribution: Tensor,
    *,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    order: str = "most",
    insert: bool = False,
    fractions: Sequence[float] = STEPS,
    patch: int = 1,
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Output of the target class while a growing share of the image is replaced, or put back, in order of attribution.

    Args:
        model: classifier of images (B, C, H, W); evaluated in eval mode.
        images: (B, C, H, W), as the model takes them, on the model's device.
        target: class whose output is read, whole numbers, (B,).
        attribution: any sign, higher is more salient, (B, H, W). Equal values come in one random order for all images.
        fill: name in `sdecor.registers.FILLS`, or `"linear"` (`sdecor.masking.impute`), or a tensor that broadcasts to
            `images`. Noise is common to all images.
        fill_value: for `fill="constant"`.
        order: `"most"` or `"least"` salient first, or `"random"`, the same for all images.
        insert: start from the replaced image and put pixels back, instead of replacing them.
        fractions: shares in [0, 1] that are replaced or put back, rounded to a whole number of pixels or patches.
        patch: side of the square patches that are ranked by their mean attribution and go together; divides H and W.
        output: `"probability"`, `"logit"`, or `"correct"`, which is 1 where the prediction is the target.
        batch_size: rows per forward pass; the result does not depend on it up to rounding in the model.
        generator: source of noise and order, on any device; torch's global CPU generator by default.

    Returns:
        (B, len(fractions)) float64.

    Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820 (arXiv:1509.06321).
    """
    shared.check(images, target, attribution, batch_size, order=order, fractions=fractions, patch=patch)
    count = images.shape[2:].numel() // patch**2
    spans = [(k, count) if insert else (0, k) for k in (round(f * count) for f in fractions)]
    new = shared.fills(images, fill, fill_value, generator)
    rank = shared.common_rank(attribution, order, patch, images.device, generator)
    return shared.outputs(model, images, target, rank, spans, new, output, batch_size)


@quantity("most", "least", "back", "removed", "kept")
def curves(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    saliency: Tensor,
    *,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    patch: int = 1,
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The curves that the scores below take, from one run in which no perturbed image is seen twice.

    Returns:
        At `STEPS`, (B, 11): ``most`` and ``least``, the most or least salient pixels replaced first, and ``back``, the
        most salient put back first. At `SHARES`, (B, 6): ``removed``, the most salient replaced, after the whole image,
        and ``kept``, all but the most salient replaced, before the whole image.
    """
    shared.check(images, target, saliency, batch_size, patch=patch, names=("target", "saliency"))
    count = images.shape[2:].numel() // patch**2
    removed = {f: (0, round(f * count)) for f in (*STEPS, *SHARES)}
    kept = {f: (k, count) if k < count else (0, 0) for f, (_, k) in removed.items()}
    spans = list(dict.fromkeys([*removed.values(), *kept.values()]))
    new = shared.fills(images, fill, fill_value, generator)
    rank = shared.common_rank(saliency, "most", patch, images.device, generator)
    values = shared.outputs(model, images, target, rank, spans, new, output, batch_size)

    def at(of: dict[float, tuple[int, int]], fractions: Sequence[float]) -> Tensor:
        return values[:, [spans.index(of[f]) for f in fractions]]

    back = at(kept, STEPS)
    runs = {"most": at(removed, STEPS), "least": back.flip(1), "back": back}
    return {**runs, "removed": at(removed, (0, *SHARES)), "kept": at(kept, (*SHARES, 1))}


@measure("deletion", better="lower", low=0, high=1)
def deletion(most: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area under the curve of replacing the most salient pixels first, by trapezoids; lower is better.

    The curve is (B, F), with a column for each of the `fractions`, from 0 to 1.

    Source: Petsiuk et al. 2018 (arXiv:1806.07421).

    Example:
        >>> deletion(torch.tensor([[1.0, 0.5, 0.0]]), [0.0, 0.5, 1.0]).item()
        0.5
    """
    return _area(most, fractions, "most")


@measure("insertion", better="higher", low=0, high=1)
def insertion(back: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area under the curve of putting the most salient pixels back first (`insert=True`); higher is better.

    The curve, shares and source are as in `deletion`.
    """
    return _area(back, fractions, "back")


@measure("area between curves", better="higher", low=-1, high=1)
def area_between(most: Tensor, least: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area between the curves of replacing the least and the most salient pixels first; higher is better.

    It is 0 on average for a random order. Replacing the least salient first passes through the images of putting the
    most salient back first, in reverse: with one fill and no ties this is `insertion` less `deletion`. The curves are
    as in `deletion`.

    Source: Schulz et al. 2020 (arXiv:2001.00396), without its scaling by the two ends.
    """
    return _area(least, fractions, "least") - _area(most, fractions, "most")


@measure("comprehensiveness", better="higher", low=-1, high=1)
def comprehensiveness(removed: Tensor) -> Tensor:
    """Mean drop of the output when the most salient pixels are replaced; higher is better.

    The curve is (B, 1 + F), at `(0, *SHARES)`: the whole image comes first.

    Source: DeYoung et al. 2020 (arXiv:1911.03429), its shares of 1, 5, 10, 20 and 50 %.

    Example:
        >>> comprehensiveness(torch.tensor([[1.0, 0.5, 0.0]])).item()
        0.75
    """
    return (removed[:, :1] - removed[:, 1:]).double().mean(1)


@measure("sufficiency", better="lower", low=-1, high=1)
def sufficiency(kept: Tensor) -> Tensor:
    """Mean drop of the output when only the most salient pixels are kept; lower is better.

    The curve is (B, F + 1), with `insert=True` at `(*SHARES, 1)`: the whole image comes last. The source is that of
    `comprehensiveness`.
    """
    return comprehensiveness(kept.flip(-1))


@measure("monotonicity", better="higher", low=0, high=1)
def monotonicity(most: Tensor) -> Tensor:
    """Share of steps at which the output does not fall as pixels come back, least salient first; higher is better.

    Read backwards, that is the curve of replacing the most salient first, (B, F) at equally spaced shares: the share of
    its steps that do not rise.

    Source: Arya et al. 2019 (arXiv:1909.03012), which asks whether this is 1, pixel by pixel.

    Example:
        >>> monotonicity(torch.tensor([[1.0, 0.5, 0.7, 0.0, 0.0]])).item()
        0.75
    """
    return (most.diff(dim=1) <= 0).double().mean(1)


def faithfulness(
    model: nn.Module, images: Tensor, target: Tensor, saliency: Tensor, **options: Any
) -> dict[str, Tensor]:
    """All scores above by name, from one run of `curves`, which takes the options."""
    found = curves(model, images, target, saliency, **options)
    return {
        "deletion": deletion(found["most"]),
        "insertion": insertion(found["back"]),
        "area_between": area_between(found["most"], found["least"]),
        "comprehensiveness": comprehensiveness(found["removed"]),
        "sufficiency": sufficiency(found["kept"]),
        "monotonicity": monotonicity(found["most"]),
    }


@measure("infidelity", better="lower", low=0, high=math.inf)
def infidelity(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    attribution: Tensor,
    *,
    noise: float = 0.1,
    draws: int = 50,
    normalize: bool = True,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Mean squared error of the attribution as a linear model of how the logit answers to small noise; lower is better.

    The attribution is signed, (B, C, H, W), or (B, H, W) for noise that is the same in all channels of a pixel. The
    noise is normal with standard deviation `noise`, in units of `images`; its `draws`, from `seed`, are common to all
    images. `normalize` scales each attribution by the factor that fits best, since many methods leave the scale open.

    Returns:
        (B,) float64, at least 0, in squared logits; a map of zeros gets the mean square of the change of the logit.

    Source: Yeh et al. 2019 (arXiv:1901.09392), as in captum.
    """
    from captum.metrics import infidelity as of_captum  # takes seconds to import

    Between(1).check("draws", draws)
    weight = attribution.unsqueeze(1) if attribution.ndim == 3 else attribution
    shared.check(images, target, weight.sum(1), batch_size)
    drawn = torch.randn(draws, *weight.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    drawn = noise * drawn.to(images.device)
    weight = shared.broadcast(weight * weight.shape[1] / images.shape[1], images, "attribution")
    result = torch.empty(len(images), dtype=torch.float64, device=images.device)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            x, chosen = images[part], target[part].to(images.device)
            shared.require_class(chosen, model(x[:1]), "target")
            at_once = min(draws, max(1, batch_size // len(x)))
            result[part] = of_captum(
                lambda x: model(x).double(),
                partial(shared.shifted, iter(drawn.split(at_once))),
                x,
                weight[part].to(x.device, torch.float64),
                target=chosen,
                n_perturb_samples=draws,
                max_examples_per_batch=at_once * len(x),
                normalize=normalize,
            )
    return result.clamp(min=0)  # captum's sum of squares, multiplied out, can round to less


@measure("faithfulness correlation", better="higher", low=-1, high=1)
def faithfulness_correlation(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    saliency: Tensor,
    *,
    sets: int = 100,
    share: float = 0.2,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Correlation of the saliency, of any sign, in a set of pixels with the drop of the output without them.

    Higher is better. `sets` says how many are drawn, common to all images, and `share` how much of the pixels each
    holds, in (0, 1).

    Returns:
        Pearson's correlation over the sets, (B,) float64 in [-1, 1]; NaN where all have the same sum of saliency or the
        same output.

    Source: Bhatt, Weller and Moura 2020 (arXiv:2005.00631).
    """
    shared.check(images, target, saliency, batch_size, names=("target", "saliency"))
    Between(2).check("sets", sets)
    INSIDE.check("share", share)
    height, width = images.shape[2:]
    new = shared.fills(images, fill, fill_value, generator)
    ranks = shared.uniform((sets + 1, height * width), generator, images.device).argsort(1)
    size = round(share * height * width)
    spans = [(0, 0), *[(0, size)] * sets]  # the whole image first
    shaped = ranks.view(-1, 1, 1, height, width)
    values = shared.outputs(model, images, target, lambda _: shaped, spans, new, output, batch_size)
    sums = saliency.to(images.device).flatten(1).double() @ (ranks[1:] < size).double().T
    return shared.pearson(sums, values[:, :1] - values[:, 1:])


def _area(curve: Tensor, fractions: Sequence[float], name: str) -> Tensor:
    if curve.ndim != 2 or curve.shape[1] != len(fractions):
        columns = f"(B, {len(fractions)}), one column per share"
        raise ValueError(f"{name} must have shape {columns}, got {tuple(curve.shape)}")
    return torch.trapezoid(curve.double(), torch.tensor(fractions, dtype=torch.float64, device=curve.device), dim=1)
