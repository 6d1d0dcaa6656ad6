"""Whether the pixels that an attribution ranks high are those that the model uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdecor.measures._checks import require_finite
from sdecor.saliency import frozen_eval

ORDERS = ("most", "least", "random")


@torch.no_grad()
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
        generator: source of the random order, on any device; torch's global CPU generator by default.

    Returns:
        (len(fractions), B) float32, 1 where the prediction is the label and 0 where not; `.mean(1)` is the accuracy.

    Raises:
        ValueError: shapes that do not fit, a fraction outside [0, 1], NaN scores, an unknown order, or a label that is
            no class of the model.

    Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820 (arXiv:1509.06321), region perturbation, pixel by pixel.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    count, _, height, width = images.shape
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(f"labels must be {count} whole numbers, got shape {tuple(labels.shape)} of {labels.dtype}")
    if score.shape != (count, height, width):
        raise ValueError(f"score has shape {tuple(score.shape)}, these images need {(count, height, width)}")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fractions must lie in [0, 1], got {fraction}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    require_finite(score, "score")
    try:
        replacement = replacement.broadcast_to(images.shape)
    except RuntimeError:
        raise ValueError(
            f"replacement has shape {tuple(replacement.shape)}, images {tuple(images.shape)}; it must broadcast to that"
        ) from None

    correct = torch.empty(len(fractions), count, device=images.device)
    lowest, highest = (int(labels.min()), int(labels.max())) if count else (0, 0)
    with frozen_eval(model):
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            target = labels[part].to(images.device)
            rank = _ranks(score[part].flatten(1).to(images.device), order, generator).view(-1, 1, height, width)
            for i, fraction in enumerate(fractions):
                replace = rank < round(fraction * height * width)
                logits = model(torch.where(replace, replacement[part], images[part]))
                if lowest < 0 or highest >= logits.shape[1]:
                    raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}, got {lowest}..{highest}")
                correct[i, part] = (logits.argmax(1) == target).float()
    return correct


def _ranks(score: Tensor, order: str, generator: torch.Generator | None) -> Tensor:
    """Place of each pixel in the order of replacement, (B, n) whole numbers from 0, which is replaced first."""
    device = generator.device if generator is not None else torch.device("cpu")
    shuffle = torch.rand(score.shape, generator=generator, device=device).to(score.device).argsort(1)
    if order != "random":  # a stable sort of the shuffled pixels leaves equal ones in random order
        by_score = score.gather(1, shuffle).argsort(dim=1, stable=True, descending=order == "most")
        shuffle = shuffle.gather(1, by_score)
    places = torch.arange(score.shape[1], device=score.device).expand_as(shuffle)
    return torch.empty_like(shuffle).scatter_(1, shuffle, places)
