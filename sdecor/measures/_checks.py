"""Checks that the measures share; they raise ValueError."""

from __future__ import annotations

import torch
from torch import Tensor

from sdecor.registers import Between

INSIDE, POSITIVE = Between(0, 1, ends=False), Between(0, ends=False)


def non_negative(saliency: Tensor) -> Tensor:
    """Check a saliency (B, H, W) and give it as (B, H * W) in float64."""
    if saliency.ndim != 3:
        raise ValueError(f"saliency must have shape (B, H, W), got {tuple(saliency.shape)}")
    if saliency.shape[1:].numel() == 0:
        raise ValueError(f"saliency has no pixels: its shape is {tuple(saliency.shape)}")
    flat = saliency.detach().flatten(1).double()
    require_finite(flat, "saliency")
    if (flat < 0).any():
        least = f"its smallest value is {flat.min().item():.4g}"
        raise ValueError(f"saliency must be non-negative, {least}; pass its absolute value")
    return flat


def shares(saliency: Tensor) -> Tensor:
    """Check a saliency (B, H, W) and give each pixel's share of its map, (B, H * W) in float64; NaN for zeros."""
    flat = non_negative(saliency)
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
    if mask.shape != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the maps have {tuple(shape)}; both must be (B, H, W)")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold only 0 and 1 (or be boolean); threshold it first")
    return mask.bool().flatten(1)


def require_images(images: Tensor, target: Tensor | None = None, **positive: float) -> None:
    """Require images (B, C, H, W), if there is a `target`, a class for each, and numbers above 0."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    if target is not None and (target.shape != images.shape[:1] or target.is_floating_point()):
        got = f"shape {tuple(target.shape)} of {target.dtype}"
        raise ValueError(f"target must be {len(images)} whole numbers, got {got}")
    for name, value in positive.items():
        POSITIVE.check(name, value)
