"""Runs a model on images of which more and more is replaced: what the measures of faithfulness share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.masking import impute, replacement
from sdecor.measures._checks import require_finite, require_images
from sdecor.registers import FILLS, Between, OneOf
from sdecor.saliency import frozen_eval

ORDERS = ("most", "least", "random")
OUTPUTS = ("probability", "logit", "correct")


def check(
    images: Tensor,
    target: Tensor,
    score: Tensor,
    batch_size: int,
    *,
    order: str = "most",
    fractions: Sequence[float] = (),
    patch: int = 1,
    names: tuple[str, str] = ("target", "attribution"),
) -> None:
    """Raise a ValueError for arguments that do not fit; `names` are those of `target` and `score` in the message."""
    require_images(images, target, names[0])
    count, _, height, width = images.shape
    if score.shape != (count, height, width):
        raise ValueError(f"{names[1]} has shape {tuple(score.shape)}, these images need {(count, height, width)}")
    OneOf(ORDERS).check("order", order)
    for fraction in fractions:
        Between(0, 1).check("fractions", fraction)
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide images of {height} x {width} pixels")
    Between(1).check("batch_size", batch_size)
    require_finite(score, names[1])


def require_class(target: Tensor, logits: Tensor, name: str) -> None:
    """Raise a ValueError unless every target is a class of the model."""
    lowest, highest = int(target.min()), int(target.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise ValueError(f"{name} must lie in 0..{logits.shape[1] - 1}, got {lowest}..{highest}")


def broadcast(fill: Tensor, images: Tensor, name: str) -> Tensor:
    """Give `fill` the shape of `images`."""
    try:
        return fill.broadcast_to(images.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(fill.shape)}, images {tuple(images.shape)}; it must broadcast to that"
        ) from None


def uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Numbers in [0, 1) on `device`, drawn on that of the generator, so that they do not depend on where they go."""
    return torch.rand(shape, generator=generator, device=generator.device if generator else "cpu").to(device)


def places(score: Tensor, order: str, shuffle: Tensor) -> Tensor:
    """Place of each pixel in the order of replacement, whole numbers from 0, which is replaced first.

    Args:
        score: (B, n).
        order: one of `ORDERS`.
        shuffle: permutations (B, n) that order pixels of equal score, and all of them for `"random"`.

    Returns:
        (B, n) whole numbers.
    """
    if order != "random":  # a stable sort of the shuffled pixels leaves equal ones in random order
        by_score = score.gather(1, shuffle).argsort(dim=1, stable=True, descending=order == "most")
        shuffle = shuffle.gather(1, by_score)
    first_to_last = torch.arange(score.shape[1], device=score.device).expand_as(shuffle)
    return torch.empty_like(shuffle).scatter_(1, shuffle, first_to_last)


def common_rank(
    attribution: Tensor, order: str, patch: int, device: torch.device, generator: torch.Generator | None
) -> Callable[[slice], Tensor]:
    """Rank as `outputs` asks for it, of whole patches, with one shuffle for all images."""
    patches = attribution.shape[1] // patch, attribution.shape[2] // patch
    shuffle = uniform((1, patches[0] * patches[1]), generator, device).argsort(1)

    def rank(part: slice) -> Tensor:
        score = attribution[part].to(device)
        if patch > 1:
            score = F.avg_pool2d(score.double(), patch)
        ranks = places(score.flatten(1), order, shuffle.expand(len(score), -1)).view(1, -1, 1, *patches)
        return ranks.repeat_interleave(patch, 3).repeat_interleave(patch, 4) if patch > 1 else ranks

    return rank


def fills(images: Tensor, fill: str | Tensor, value: float, generator: torch.Generator | None) -> tuple[Tensor, bool]:
    """What is put in place of a pixel, of the shape of `images`, and whether it is to be added to the imputed pixel."""
    if isinstance(fill, Tensor):
        return broadcast(fill, images, "fill"), False
    if fill == "linear":
        blank = torch.zeros_like(images[:1])
        return impute(blank, blank[:, 0] == 0, generator=generator).expand(images.shape), True
    if fill not in FILLS:
        raise ValueError(f"unknown fill {fill!r}; known: {', '.join((*FILLS, 'linear'))}, or a tensor")
    generator = generator or torch.default_generator
    return replacement(images, fill, value=value, common=True, generator=generator), False


def outputs(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    rank: Callable[[slice], Tensor],
    spans: Sequence[tuple[int, int]],
    fill: tuple[Tensor, bool],
    output: str,
    batch_size: int,
    name: str = "target",
) -> Tensor:
    """Output of the target class for every image and every span of replaced pixels.

    Args:
        model: classifier; modes and flags are restored.
        images: (B, C, H, W).
        target: (B,).
        rank: gives the places of the pixels of some images, (1 or S, b or 1, 1, H, W).
        spans: S pairs; a pixel is replaced if first <= rank < last.
        fill: as from `fills`.
        output: one of `OUTPUTS`.
        batch_size: rows per forward pass; where images are few, several spans go into one.
        name: of `target` in the message.

    Returns:
        (B, S) float64.
    """
    OneOf(OUTPUTS).check("output", output)
    new, linear = fill
    first, last = torch.tensor(spans, device=images.device).view(-1, 2, 1, 1, 1, 1).unbind(1)
    result = torch.empty(len(images), len(spans), dtype=torch.float64, device=images.device)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            x, put, chosen = images[part], new[part], target[part].to(images.device)
            ranks = rank(part)
            ranks = ranks.expand(len(spans), *ranks.shape[1:])
            at_once = max(1, batch_size // len(x))
            for j in range(0, len(spans), at_once):
                some = slice(j, j + at_once)
                replaced = (ranks[some] >= first[some]) & (ranks[some] < last[some])
                batch = torch.where(replaced, put, x)  # (spans, images, C, H, W)
                if linear:
                    holes = replaced[:, :, 0].expand(-1, len(x), -1, -1)
                    whole = x.expand(batch.shape).flatten(0, 1)  # solved to well below the noise that is added
                    batch = impute(whole, holes.flatten(0, 1), noise=0, tolerance=1e-4).view(batch.shape)
                    batch += put * replaced
                logits = model(batch.flatten(0, 1))
                require_class(target, logits, name)
                value = logits.argmax(1) if output == "correct" else logits.double()
                value = value.view(len(batch), len(x), -1)
                if output == "probability":
                    value = value.softmax(2)
                picked = value[..., 0] == chosen if output == "correct" else value[:, torch.arange(len(x)), chosen]
                result[part, some] = picked.double().T
    return result


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two float64 tensors (B, n); NaN where either is constant up to rounding."""
    value = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), eps=0)
    for rows in (a, b):
        constant = rows.amax(1) - rows.amin(1) <= 1e-12 * rows.abs().amax(1)
        value = value.masked_fill(constant, math.nan)
    return value


def shifted(draws: Iterator[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The next draws of noise (n, C or 1, H, W) for images that come n times in a row each, and the images less it."""
    noise = next(draws)
    change = noise.repeat(len(x) // len(noise), 1, 1, 1).expand_as(x)
    return change, x - change
