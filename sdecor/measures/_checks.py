"""Checks that the measures share."""

from __future__ import annotations

import torch
from torch import Tensor


def non_negative(attribution: Tensor) -> Tensor:
    """Check a non-negative attribution (B, H, W) and give it as (B, H * W) in float64."""
    if attribution.ndim != 3:
        raise ValueError(f"attribution must have shape (B, H, W), got {tuple(attribution.shape)}")
    if attribution.shape[1:].numel() == 0:
        raise ValueError(f"attribution has no pixels: its shape is {tuple(attribution.shape)}")
    flat = attribution.detach().flatten(1).double()
    require_finite(flat, "attribution")
    if (flat < 0).any():
        raise ValueError(
            f"attribution must be non-negative, its smallest value is {flat.min().item():.4g}; pass its absolute value"
        )
    return flat


def shares(attribution: Tensor) -> Tensor:
    """Check a non-negative attribution (B, H, W) and give each pixel's share of its map, (B, H * W) in float64.

    A map of zeros has no shares: its row is NaN.
    """
    flat = non_negative(attribution)
    scaled = flat / flat.amax(1, keepdim=True)  # first by the peak: the sum of very large values would overflow
    return scaled / scaled.sum(1, keepdim=True)


def require_finite(values: Tensor, name: str) -> None:
    """Raise a ValueError that says how many rows of `values` (B, ...) hold NaN or infinity."""
    bad = ~values.isfinite().flatten(1).all(1)
    if bad.any():
        kind = "NaN" if values.isnan().any() else "infinity"
        first = int(bad.nonzero()[0])
        raise ValueError(f"{name} has {kind} in {int(bad.sum())} of {len(bad)} rows (the first is row {first})")


def binary(mask: Tensor, shape: torch.Size) -> Tensor:
    """Check an object mask against the attribution's shape and give it as bool, (B, H * W)."""
    if mask.shape != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, attribution has {tuple(shape)}; both must be (B, H, W)")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold only 0 and 1 (or be boolean); threshold it first")
    return mask.bool().flatten(1)


def require_fraction(value: float, name: str = "fraction") -> None:
    """Raise a ValueError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {value}")
