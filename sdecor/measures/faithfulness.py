"""Whether the pixels that a map ranks high are those that the model uses.

Pixels are replaced in order of the map and the output of one class is read: `perturbation_curve`. Scores of a curve are
functions of it, so that one run of the model, `curves`, serves all of them: `faithfulness`. What is left when pixels
are replaced is no natural image, and the answer depends on the fill: report which one was used.

Functions that run a model share their arguments:

- ``model``: classifier of ``images`` (B, C, H, W), as it takes them and on its device; modes and flags are restored;
- ``target``: class whose output is read, whole numbers, (B,); ``output``: its `"probability"`, its `"logit"`, or
  `"correct"`, which is 1 where it is the prediction and else 0;
- ``attribution`` or ``saliency``: any sign, higher is more salient, (B, H, W); equal values come in random order;
- ``fill``: name in `sdecor.registers.FILLS`, or `"linear"` (`sdecor.masking.impute`), or a tensor that broadcasts to
  `images`; ``fill_value`` is that of `"constant"`;
- ``batch_size``: rows per forward pass; the result does not depend on it up to rounding in the model;
- ``generator``: source of noise and order, the same for all images; torch's global CPU generator by default.

They raise ValueError for shapes that do not fit, numbers out of range, NaN and infinity, unknown names, and a target
that is no class of the model. Scores are (B,) float64; those of a curve are in [0, 1], or [-1, 1], if it is one of
probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.masking import cells, impute, replacement
from sdecor.measures._checks import INSIDE, require_finite, require_images
from sdecor.measures.case import measure, quantity
from sdecor.registers import FILLS, Between, OneOf
from sdecor.saliency import frozen_eval, logits_of
from sdecor.whitening import require_tensors

ORDERS = ("most", "least", "random")
STEPS = tuple(i / 10 for i in range(11))
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
Spans = Sequence[tuple[int, int]]
Fill = tuple[Tensor, bool]
_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "probability": lambda logits, target: logits.softmax(1).gather(1, target[:, None])[:, 0],
    "logit": lambda logits, target: logits.gather(1, target[:, None])[:, 0],
    "correct": lambda logits, target: logits.argmax(1) == target,
}


def perturbation_curve(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    attribution: Tensor,
    *,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    order: str = "most",
    own_order: bool = False,
    insert: bool = False,
    fractions: Sequence[float] = STEPS,
    patch: int = 1,
    grid: int | None = None,
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Output of the target class, (B, len(fractions)) float64, while a growing share of the image is replaced.

    The `order` is that of the `"most"` or `"least"` salient pixels first, or `"random"`; with `own_order` each image
    has a random order of its own. With `insert`, pixels of the replaced image are put back instead. The `fractions`, in
    [0, 1], are rounded to a whole number of pixels, or of patches, ranked by their mean: squares of side `patch`, or
    those of a `grid` of so many by so many, which are as even as `sdecor.masking.cells` can make them.
    Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820 (arXiv:1509.06321).
    """
    _check(images, target, attribution, batch_size)
    for fraction in fractions:
        Between(0, 1).check("fractions", fraction)
    new = _fill(images, fill, fill_value, generator)
    size = _patches(images, patch, grid)
    ranks = _ranks(attribution.to(images.device), order, own_order, size, generator, batch_size)
    count = math.prod(size)
    spans = [(k, count) if insert else (0, k) for k in (round(f * count) for f in fractions)]
    return _outputs(model, images, target, ranks, spans, new, output, batch_size)


@quantity("most", "least", "back", "removed", "kept")
def curves(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    saliency: Tensor,
    *,
    fill: str | Tensor = "uniform",
    fill_value: float = 0.0,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The curves that the scores below take, from one run in which no perturbed image is seen twice.

    Those at `STEPS` are (B, 11): ``most`` and ``least``, the most or least salient pixels replaced first, and ``back``,
    the most salient put back first. Those at `SHARES` are (B, 6): ``removed``, the most salient replaced, after the
    whole image, and ``kept``, all but the most salient replaced, before the whole image.
    """
    _check(images, target, saliency, batch_size, "saliency")
    count = images.shape[2:].numel()
    removed = {f: (0, round(f * count)) for f in (*STEPS, *SHARES)}
    kept = {f: (k, count) if k < count else (0, 0) for f, (_, k) in removed.items()}
    spans = list(dict.fromkeys([*removed.values(), *kept.values()]))
    new = _fill(images, fill, fill_value, generator)
    ranks = _ranks(saliency.to(images.device), "most", False, _patches(images), generator, batch_size)
    values = _outputs(model, images, target, ranks, spans, new, "probability", batch_size)

    def at(of: dict[float, tuple[int, int]], fractions: Sequence[float]) -> Tensor:
        return values[:, [spans.index(of[f]) for f in fractions]]

    runs = {"most": at(removed, STEPS), "least": at(kept, STEPS[::-1]), "back": at(kept, STEPS)}
    return {**runs, "removed": at(removed, (0, *SHARES)), "kept": at(kept, (*SHARES, 1))}


@measure("deletion", better="lower", low=0, high=1)
def deletion(most: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area under the curve (B, F) of replacing the most salient pixels first, at `fractions` from 0 to 1.

    Source: Petsiuk et al. 2018 (arXiv:1806.07421).
    """
    return _area(most, fractions, "most")


@measure("insertion", better="higher", low=0, high=1)
def insertion(back: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area under the curve of putting the most salient pixels back first (`insert=True`), else as `deletion`."""
    return _area(back, fractions, "back")


@measure("area between curves", better="higher", low=-1, high=1)
def area_between(most: Tensor, least: Tensor, fractions: Sequence[float] = STEPS) -> Tensor:
    """Area between the curves of replacing the least and the most salient pixels first, as in `deletion`.

    It is 0 on average for a random order; with one fill and no ties it is `insertion` less `deletion`.
    Source: Schulz et al. 2020 (arXiv:2001.00396), without its scaling by the two ends.
    """
    return _area(least, fractions, "least") - _area(most, fractions, "most")


@measure("comprehensiveness", better="higher", low=-1, high=1)
def comprehensiveness(removed: Tensor) -> Tensor:
    """Mean drop of the output when the most salient pixels are replaced, of a curve (B, 1 + F) at `(0, *SHARES)`.

    Source: DeYoung et al. 2020 (arXiv:1911.03429), its shares of 1, 5, 10, 20 and 50 %.
    """
    return (removed[:, :1] - removed[:, 1:]).double().mean(1)


@measure("sufficiency", better="lower", low=-1, high=1)
def sufficiency(kept: Tensor) -> Tensor:
    """Mean drop of the output when only the most salient pixels are kept, of a curve (B, F + 1) at `(*SHARES, 1)`."""
    return comprehensiveness(kept.flip(-1))


@measure("monotonicity", better="higher", low=0, high=1)
def monotonicity(most: Tensor) -> Tensor:
    """Share of steps at which the output does not rise as the most salient pixels are replaced first.

    Source: Arya et al. 2019 (arXiv:1909.03012), which asks whether this is 1, pixel by pixel.
    """
    return (most.diff(dim=1) <= 0).double().mean(1)


def faithfulness(
    model: nn.Module, images: Tensor, target: Tensor, saliency: Tensor, **options: Any
) -> dict[str, Tensor]:
    """All scores above by name, from one run of `curves`, which takes the options."""
    found: dict[str, Any] = curves(model, images, target, saliency, **options)
    scores = deletion, insertion, area_between, comprehensiveness, sufficiency, monotonicity
    return {f.__name__: f(**{name: found[name] for name in signature(f).parameters if name in found}) for f in scores}


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
    `draws` of noise, from `seed`, are normal with standard deviation `noise`, in units of `images`, and common to all.
    `normalize` scales each attribution by the factor that fits best, since many methods leave the scale open. With n
    draws the error is low by about a share 1 / n then, and one would always fit.
    Source: Yeh et al. 2019 (arXiv:1901.09392), as in captum.
    """
    from captum.metrics import infidelity as of_captum  # takes seconds to import

    Between(1 + normalize).check("draws", draws)
    require_tensors(attribution=attribution)
    weight = attribution.unsqueeze(1) if attribution.ndim == 3 else attribution
    _check(images, target, weight.sum(1), batch_size)
    drawn = torch.randn(draws, *weight.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    drawn = noise * drawn.to(images.device)
    weight = _broadcast(weight * weight.shape[1] / images.shape[1], images, "attribution")
    result = torch.empty(len(images), dtype=torch.float64, device=images.device)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            x, w, chosen = images[part], weight[part].to(images.device, torch.float64), target[part].to(images.device)
            at_once = min(draws, max(1, batch_size // len(x)))
            moved = partial(_shifted, iter(drawn.split(at_once)))
            given = {"n_perturb_samples": draws, "max_examples_per_batch": at_once * len(x), "normalize": normalize}
            result[part] = of_captum(partial(_logits, model, target), moved, x, w, target=chosen, **given)
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
    output: str = "probability",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pearson's correlation of the saliency in a set of pixels with the drop of the output without them.

    `sets` says how many are drawn, common to all images, and `share`, in (0, 1), how much of the pixels each holds. It
    is in [-1, 1], higher is better; NaN where all sets have the same sum of saliency or the same output. Its standard
    error is about ``(1 - r ** 2) / sqrt(sets)``; two sets always give 1 or -1, so there are at least three.
    Source: Bhatt, Weller and Moura 2020 (arXiv:2005.00631).
    """
    _check(images, target, saliency, batch_size, "saliency")
    Between(3).check("sets", sets)
    INSIDE.check("share", share)
    height, width = images.shape[2:]
    new = _fill(images, fill, 0.0, generator)
    ranks = _uniform((sets + 1, height * width), generator, images.device).argsort(1)
    size = round(share * height * width)
    spans = [(0, 0), *[(0, size)] * sets]  # the whole image first
    values = _outputs(model, images, target, ranks.view(-1, 1, 1, height, width), spans, new, output, batch_size)
    sums = saliency.to(images.device).flatten(1).double() @ (ranks[1:] < size).double().T
    return _pearson(sums, values[:, :1] - values[:, 1:])


def _check(images: Tensor, target: Tensor, score: Tensor, batch_size: int, name: str = "attribution") -> None:
    require_images(images, target)
    require_tensors(**{name: score})
    needed = (len(images), *images.shape[2:])
    if score.shape != needed:
        raise ValueError(f"{name} has shape {tuple(score.shape)}, these images need {needed}")
    Between(1).check("batch_size", batch_size)
    require_finite(score, name)


def _logits(model: nn.Module, target: Tensor, x: Tensor) -> Tensor:
    """Logits of `x` in float64, if every `target` is a class of the model."""
    logits = logits_of(model, x).double()
    lowest, highest = int(target.min()), int(target.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise ValueError(f"target must lie in 0..{logits.shape[1] - 1}, got {lowest}..{highest}")
    return logits


def _broadcast(fill: Tensor, images: Tensor, name: str) -> Tensor:
    try:
        return fill.broadcast_to(images.shape)
    except RuntimeError:
        shapes = f"{name} has shape {tuple(fill.shape)}, images {tuple(images.shape)}"
        raise ValueError(f"{shapes}; it must broadcast to that") from None


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Numbers in [0, 1) on `device`, drawn on that of the generator, so that they do not depend on where they go."""
    return torch.rand(shape, generator=generator, device=generator.device if generator else "cpu").to(device)


def _places(score: Tensor, order: str, shuffle: Tensor) -> Tensor:
    """Place (B, n) of each pixel of `score` (B, n) in the order of replacement, from 0, which is replaced first.

    The permutations `shuffle`, (B, n), order pixels of equal score, and all of them if the order is random.
    """
    OneOf(ORDERS).check("order", order)
    if order != "random":  # a stable sort of the shuffled pixels leaves equal ones in random order
        by_score = score.gather(1, shuffle).argsort(dim=1, stable=True, descending=order == "most")
        shuffle = shuffle.gather(1, by_score)
    return torch.empty_like(shuffle).scatter_(1, shuffle, torch.arange(score.shape[1]).to(shuffle).expand_as(shuffle))


def _patches(images: Tensor, patch: int = 1, grid: int | None = None) -> tuple[int, int]:
    """How many patches there are along the height and along the width."""
    height, width = images.shape[2:]
    if grid is not None:
        Between(1, min(height, width)).check("grid", grid)
        return grid, grid
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide images of {height} x {width} pixels")
    return height // patch, width // patch


def _ranks(
    score: Tensor,
    order: str,
    own_order: bool,
    size: tuple[int, int],
    generator: torch.Generator | None,
    batch_size: int,
) -> Tensor:
    """Places (1, B, 1, H, W) as `_outputs` takes them, of whole patches, `size` of them along each axis."""
    of = [cells(pixels, count, score.device) for pixels, count in zip(score.shape[1:], size, strict=True)]
    single = score.shape[1:] == size
    rows, columns = (F.one_hot(at).double() / at.bincount() for at in of)

    def means(some: Tensor) -> Tensor:
        return (some if single else rows.mT @ some @ columns).flatten(1)

    draws = _uniform((len(score) if own_order else 1, math.prod(size)), generator, score.device)
    places = [
        _places(means(some.double()), order, shuffle.argsort(1).expand(len(some), -1))
        for some, shuffle in zip(score.split(batch_size), draws.expand(len(score), -1).split(batch_size), strict=True)
    ]
    ranks = torch.cat(places).view(1, -1, 1, *size)
    return ranks if single else ranks[..., of[0], :][..., of[1]]


def _fill(images: Tensor, fill: str | Tensor, value: float, generator: torch.Generator | None) -> Fill:
    """What is put in place of a pixel, of the shape of `images`, and whether it is to be added to the imputed pixel."""
    if isinstance(fill, Tensor):
        return _broadcast(fill.to(images), images, "fill"), False
    if fill == "linear":
        blank = torch.zeros_like(images[:1])
        return impute(blank, blank[:, 0] == 0, generator=generator).expand(images.shape), True
    if not isinstance(fill, str) or fill not in FILLS:
        given = repr(fill) if isinstance(fill, str) else f"of type {type(fill).__name__}"
        raise ValueError(f"unknown fill {given}; known: {', '.join((*FILLS, 'linear'))}, or a tensor")
    generator = generator or torch.default_generator
    return replacement(images, fill, value=value, common=True, generator=generator), False


def _outputs(
    model: nn.Module, x: Tensor, target: Tensor, ranks: Tensor, spans: Spans, fill: Fill, output: str, batch_size: int
) -> Tensor:
    """Output of the target class for every image and each of S spans of replaced pixels, (B, S) float64.

    A pixel is replaced if ``first <= rank < last`` for the pair of the span, its rank being one of `ranks`,
    (1 or S, 1 or B, 1, H, W). Where images are few, several spans go into one forward pass.
    """
    OneOf(_OUTPUTS).check("output", output)
    new, linear = fill
    first, last = torch.tensor(spans, device=x.device).view(-1, 2, 1, 1, 1, 1).unbind(1)
    ranks = ranks.expand(len(spans), len(x), *ranks.shape[2:])
    result = torch.empty(len(x), len(spans), dtype=torch.float64, device=x.device)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            whole, put, chosen = x[part], new[part], target[part].to(x.device)
            at_once = max(1, batch_size // len(whole))
            for j in range(0, len(spans), at_once):
                some = slice(j, j + at_once)
                replaced = (ranks[some, part] >= first[some]) & (ranks[some, part] < last[some])
                batch = torch.where(replaced, put, whole).flatten(0, 1)  # from (spans, images, C, H, W)
                if linear:  # solved to well below the noise that is added
                    images, holes = whole.repeat(len(replaced), 1, 1, 1), replaced.flatten(0, 1)[:, 0]
                    batch = impute(images, holes, noise=0, tolerance=1e-4) + (put * replaced).flatten(0, 1)
                values = _OUTPUTS[output](_logits(model, target, batch), chosen.repeat(len(replaced)))
                result[part, some] = values.view(len(replaced), len(whole)).double().T
    return result


def _area(curve: Tensor, fractions: Sequence[float], name: str) -> Tensor:
    if curve.ndim != 2 or curve.shape[1] != len(fractions):
        wanted = f"(B, {len(fractions)}), one column per share"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(curve.shape)}")
    return torch.trapezoid(curve.double(), torch.tensor(fractions, dtype=torch.float64, device=curve.device), dim=1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two float64 tensors (B, n); NaN where either is constant up to rounding."""
    value = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), eps=0)
    for rows in (a, b):
        constant = rows.amax(1) - rows.amin(1) <= 1e-12 * rows.abs().amax(1)
        value = value.masked_fill(constant, math.nan)
    return value


def _shifted(draws: Iterator[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The next draws of noise (n, C or 1, H, W) for images that come n times in a row each, and the images less it."""
    noise = next(draws)
    change = noise.repeat(len(x) // len(noise), 1, 1, 1).expand_as(x)
    return change, x - change
