"""Whether the pixels that an attribution ranks high are those that the model uses.

Pixels are replaced in order of the attribution and the output of one class is read: `perturbation_curve`. Scores of a
curve are functions of it, so that one run of the model serves all of them; `faithfulness` is that run. What is left
when pixels are replaced is no natural image, and the answer depends on the fill: report which one was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sdecor.measures import _perturbation as shared
from sdecor.measures._checks import require_fraction
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
    `"random"`, which does not look at the score.

    Args:
        model: classifier of images (B, C, H, W); evaluated in eval mode, each module's own mode is restored.
        images: (B, C, H, W), as the model takes them, on the model's device.
        labels: true classes, whole numbers, (B,).
        score: saliency of each pixel, any sign, (B, H, W).
        fractions: shares of pixels to replace, each in [0, 1]; times H * W it is rounded to a whole number of pixels.
        replacement: what to put in place of a pixel, of a shape that broadcasts to that of `images`.
        order: `"most"` salient first, `"least"` salient first, or `"random"`; pixels of equal score come in any order.
        batch_size: images per forward pass. The result does not depend on it, nor on the device when `generator` is a
            CPU one, up to rounding in the model.
        generator: source of each image's own random order, on any device; torch's global CPU generator by default.

    Returns:
        (len(fractions), B) float32, 1 where the prediction is the label and 0 where not; `.mean(1)` is the accuracy.

    Raises:
        ValueError: shapes that do not fit, a fraction outside [0, 1], NaN scores, an unknown order, or a label that is
            no class of the model.

    Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820 (arXiv:1509.06321), region perturbation, pixel by pixel.
    """
    shared.check(images, labels, score, batch_size, order=order, fractions=fractions, names=("labels", "score"))
    fill = shared.broadcast(replacement, images, "replacement"), False
    size = images.shape[2:]

    def rank(part: slice) -> Tensor:
        some = score[part].flatten(1).to(images.device)
        return shared.places(some, order, shared.uniform(some.shape, generator, images.device).argsort(1)).view(
            1, -1, 1, *size
        )

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
        model: classifier of images (B, C, H, W); evaluated in eval mode, modes and flags are restored.
        images: (B, C, H, W), as the model takes them, on the model's device.
        target: class whose output is read, whole numbers, (B,).
        attribution: any sign, higher is more salient, (B, H, W). Equal values come in one random order for all images.
        fill: one of `sdecor.masking.FILLS`, or `"linear"` (`sdecor.masking.impute`), or a tensor that broadcasts to
            `images`. Noise is common to all images.
        fill_value: for `fill="constant"`.
        order: `"most"` or `"least"` salient first, or `"random"`, the same for all images.
        insert: start from the replaced image and put pixels back, instead of replacing them.
        fractions: shares in [0, 1] that are replaced or put back, rounded to a whole number of pixels or patches.
        patch: side of the square patches that are ranked by their mean attribution and go together; divides H and W.
        output: `"probability"`, `"logit"`, or `"correct"`, which is 1 where the prediction is the target.
        batch_size: rows per forward pass; the result does not depend on it up to rounding in the model.
        generator: source of noise and order, on any device.

    Returns:
        (B, len(fractions)) float64.

    Raises:
        ValueError: shapes that do not fit, a share outside [0, 1], NaN, an unknown name, or a target that is no class.

    Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820 (arXiv:1509.06321).
    """
    shared.check(images, target, attribution, batch_size, order=order, fractions=fractions, patch=patch)
    count = images.shape[2:].numel() // patch**2
    spans = [(k, count) if insert else (0, k) for k in (round(f * count) for f in fractions)]
    new = shared.fills(images, fill, fill_value, generator)
    rank = shared.common_rank(attribution, order, patch, images.device, generator)
    return shared.outputs(model, images, target, rank, spans, new, output, batch_size)


def deletion(curve: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area under the curve of replacing the most salient pixels first; lower is better.

    Args:
        curve: (B, F) from `perturbation_curve`.
        fractions: those of the curve, from 0 to 1.

    Returns:
        (B,) float64, by trapezoids; in [0, 1] for probabilities.

    Raises:
        ValueError: a curve that has not one column per share.

    Source: Petsiuk et al. 2018 (arXiv:1806.07421).

    Example:
        >>> deletion(torch.tensor([[1.0, 0.5, 0.0]]), [0.0, 0.5, 1.0]).item()
        0.5
    """
    shared.require_columns(curve, fractions)
    return torch.trapezoid(curve.double(), torch.tensor(fractions, dtype=torch.float64, device=curve.device), dim=1)


def insertion(curve: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area under the curve of putting the most salient pixels back first (`insert=True`); higher is better.

    Arguments, result, errors and source are those of `deletion`.
    """
    return deletion(curve, fractions)


def area_between(most: Tensor, least: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area between the curves of replacing the least and the most salient pixels first; higher is better.

    Replacing the least salient first passes through the images of putting the most salient back first, in reverse: with
    one fill and no ties this is `insertion` less `deletion`.

    Arguments and errors are as in `deletion`, for curves with `order="most"` and `order="least"`.

    Returns:
        (B,) float64; in [-1, 1] for probabilities, 0 on average for a random order.

    Source: Schulz et al. 2020 (arXiv:2001.00396), without its scaling by the two ends.
    """
    return deletion(least, fractions) - deletion(most, fractions)


def comprehensiveness(curve: Tensor) -> Tensor:
    """Mean drop of the output when the most salient pixels are replaced; higher is better.

    Args:
        curve: (B, 1 + F), from `perturbation_curve` at `(0, *SHARES)`: the whole image comes first.

    Returns:
        (B,) float64; in [-1, 1] for probabilities.

    Source: DeYoung et al. 2020 (arXiv:1911.03429), its shares of 1, 5, 10, 20 and 50 %.

    Example:
        >>> comprehensiveness(torch.tensor([[1.0, 0.5, 0.0]])).item()
        0.75
    """
    return (curve[:, :1] - curve[:, 1:]).double().mean(1)


def sufficiency(curve: Tensor) -> Tensor:
    """Mean drop of the output when only the most salient pixels are kept; lower is better.

    Args:
        curve: (B, F + 1), from `perturbation_curve` with `insert=True` at `(*SHARES, 1)`: the whole image comes last.

    Returns, errors and source are those of `comprehensiveness`.
    """
    return comprehensiveness(curve.flip(-1))


def monotonicity(curve: Tensor) -> Tensor:
    """Share of steps at which the output does not fall as pixels come back, least salient first; higher is better.

    Read backwards, that is the curve of replacing the most salient first: the share of its steps that do not rise.

    Args:
        curve: (B, F), from `perturbation_curve` with `order="most"` at equally spaced shares.

    Returns:
        (B,) float64 in [0, 1].

    Source: Arya et al. 2019 (arXiv:1909.03012), which asks whether this is 1, pixel by pixel.

    Example:
        >>> monotonicity(torch.tensor([[1.0, 0.5, 0.7, 0.0, 0.0]])).item()
        0.75
    """
    return (curve.diff(dim=1) <= 0).double().mean(1)


def faithfulness(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    attribution: Tensor,
    *,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    patch: int = 1,
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """All scores above, each (B,) float64, from one run in which no perturbed image is seen twice.

    Arguments and errors are those of `perturbation_curve`; the shares are `STEPS` and, for two of the scores, `SHARES`.
    """
    shared.check(images, target, attribution, batch_size, patch=patch)
    count = images.shape[2:].numel() // patch**2
    removed = {f: (0, round(f * count)) for f in (*STEPS, *SHARES)}
    kept = {f: (k, count) if k < count else (0, 0) for f, (_, k) in removed.items()}
    spans = list(dict.fromkeys([*removed.values(), *kept.values()]))
    new = shared.fills(images, fill, fill_value, generator)
    rank = shared.common_rank(attribution, "most", patch, images.device, generator)
    values = shared.outputs(model, images, target, rank, spans, new, output, batch_size)
    most = values[:, [spans.index(removed[f]) for f in STEPS]]
    back = values[:, [spans.index(kept[f]) for f in STEPS]]
    return {
        "deletion": deletion(most),
        "insertion": insertion(back),
        "area_between": area_between(most, back.flip(1)),
        "comprehensiveness": comprehensiveness(values[:, [spans.index(removed[f]) for f in (0, *SHARES)]]),
        "sufficiency": sufficiency(values[:, [spans.index(kept[f]) for f in (*SHARES, 1)]]),
        "monotonicity": monotonicity(most),
    }


def faithfulness_correlation(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    attribution: Tensor,
    *,
    samples: int = 100,
    share: float = 0.2,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Correlation of the attribution in a set of pixels with the drop of the output without them; higher is better.

    Arguments and errors are those of `perturbation_curve`, but for `samples`, how many sets are drawn, common to all
    images, and `share`, how much of the pixels each holds, in (0, 1).

    Returns:
        Pearson's correlation over the sets, (B,) float64 in [-1, 1]; NaN where all have the same sum of attribution or
        the same output.

    Source: Bhatt, Weller and Moura 2020 (arXiv:2005.00631).
    """
    shared.check(images, target, attribution, batch_size)
    shared.require_at_least(samples, 2, "samples")
    require_fraction(share, "share")
    height, width = images.shape[2:]
    new = shared.fills(images, fill, fill_value, generator)
    ranks = shared.uniform((samples + 1, height * width), generator, images.device).argsort(1)
    size = round(share * height * width)
    spans = [(0, 0), *[(0, size)] * samples]  # the whole image first
    shaped = ranks.view(-1, 1, 1, height, width)
    values = shared.outputs(model, images, target, lambda _: shaped, spans, new, output, batch_size)
    sums = attribution.to(images.device).flatten(1).double() @ (ranks[1:] < size).double().T
    return shared.pearson(sums, values[:, :1] - values[:, 1:])


def infidelity(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    attribution: Tensor,
    *,
    noise: float = 0.1,
    samples: int = 50,
    normalize: bool = True,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Mean squared error of the attribution as a linear model of how the logit answers to small noise; lower is better.

    The first three arguments, `batch_size` and errors are those of `perturbation_curve`. The attribution is signed,
    (B, C, H, W), or (B, H, W) for noise that is the same in all channels of a pixel. The noise has standard deviation
    `noise`, in units of `images`; `samples` draws of it, from `seed`, are common to all images. `normalize` scales each
    attribution by the factor that fits best, since many methods leave the scale open.

    Returns:
        (B,) float64, at least 0, in squared logits; a map of zeros gets the mean square of the change of the logit.

    Source: Yeh et al. 2019 (arXiv:1901.09392), as in captum.
    """
    from captum.metrics import infidelity as of_captum  # takes seconds to import

    shared.require_at_least(samples, 1, "samples")
    weight = attribution.unsqueeze(1) if attribution.ndim == 3 else attribution
    shared.check(images, target, weight.sum(1), batch_size)
    draws = torch.randn(samples, *weight.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    draws = noise * draws.to(images.device)
    weight = shared.broadcast(weight * weight.shape[1] / images.shape[1], images, "attribution")
    result = torch.empty(len(images), dtype=torch.float64, device=images.device)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            x, chosen = images[part], target[part].to(images.device)
            shared.require_class(chosen, model(x[:1]), "target")
            at_once = min(samples, max(1, batch_size // len(x)))
            result[part] = of_captum(
                lambda x: model(x).double(),
                partial(shared.shifted, iter(draws.split(at_once))),
                x,
                weight[part].to(x.device, torch.float64),
                target=chosen,
                n_perturb_samples=samples,
                max_examples_per_batch=at_once * len(x),
                normalize=normalize,
            )
    return result.clamp(min=0)  # captum's sum of squares, multiplied out, can round to less
