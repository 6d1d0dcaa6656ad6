"""Checks that the measures share; they raise ValueError."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdecor.registers import Between
from sdecor.saliency import WHOLE
from sdecor.whitening import require_tensors

INSIDE, POSITIVE = Between(0, 1, ends=False), Between(0, ends=False)


def non_negative(saliency: Tensor) -> Tensor:
    """Check a saliency (B, H, W) and give it as (B, H * W)."""
    require_tensors(saliency=saliency)
    if saliency.ndim != 3:
        raise ValueError(f"saliency must have shape (B, H, W), got {tuple(saliency.shape)}")
    if saliency.shape[1:].numel() == 0:
        raise ValueError(f"saliency has no pixels: its shape is {tuple(saliency.shape)}")
    flat = saliency.detach().flatten(1)
    low, high = flat.aminmax() if len(flat) else (torch.zeros(()), torch.zeros(()))
    if not (low >= 0 and high < math.inf):
        require_finite(flat, "saliency")
        least = f"its smallest value is {low.item():.4g}"
        raise ValueError(f"saliency must be non-negative, {least}; pass its absolute value")
    return flat.byte() if flat.dtype == torch.bool else flat


def by_chunks(score: Callable[..., Tensor], chunk: int | None, *rows: Tensor) -> Tensor:
    """What `score` gives for `chunk` rows at a time of tensors (B, n), (B,): float64, or bool, as they reach it.

    None takes about two million values at a time, 40 maps of 224 by 224 pixels. No row is alone if there are others:
    of one row all threads make a sum, which rounds otherwise.
    """
    count, values = rows[0].shape
    if chunk is not None:
        Between(1).check("chunk", chunk)
    number = -(-count // (chunk or max(1, 2**21 // max(1, values))))
    pieces = zip(*(part.tensor_split(min(number, count // 2)) for part in rows), strict=True) if number > 1 else [rows]
    found = [score(*(p if p.dtype == torch.bool else p.double() for p in piece)) for piece in pieces]
    return torch.cat(found) if number > 1 else found[0]


def shares(flat: Tensor) -> Tensor:
    """Each pixel's share of its map, of maps (b, n) of float64; NaN for zeros."""
    scaled = flat / flat.amax(1, keepdim=True)  # first by the peak: the sum of very large values would overflow
    return scaled / scaled.sum(1, keepdim=True)


def require_finite(values: Tensor, name: str) -> None:
    """Say how many rows of `values` (B, ...) hold NaN or infinity, if any do."""
    bad = (~values.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        kind = "NaN" if values.isnan().any() else "infinity"
        raise ValueError(f"{name} has {kind} in {len(bad)} of {len(values)} rows (the first is row {int(bad[0])})")


def binary(mask: Tensor, shape: torch.Size) -> Tensor:
    """Check an object mask against the shape of the maps and give it as bool, (B, H * W)."""
    require_tensors(mask=mask)
    if mask.shape != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the maps have {tuple(shape)}; both must be (B, H, W)")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold only 0 and 1 (or be boolean); threshold it first")
    return mask.bool().flatten(1)


def require_images(images: Tensor, target: Tensor | None = None, *, floating: bool = True, **positive: float) -> None:
    """Require images (B, C, H, W), if there is a `target`, a class for each, and numbers above 0."""
    require_tensors(images=images, **({} if target is None else {"target": target}))
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    if floating and not images.is_floating_point():
        raise ValueError(f"images must be of a floating type, as the model takes them, got {images.dtype}")
    if target is not None:
        if target.shape != images.shape[:1] or target.dtype not in WHOLE:
            got = f"shape {tuple(target.shape)} of {target.dtype}"
            raise ValueError(f"target must be {len(images)} whole numbers, got {got}")
    for name, value in positive.items():
        POSITIVE.check(name, value)
