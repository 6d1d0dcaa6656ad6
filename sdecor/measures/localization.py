"""How much of an attribution lies on the object, given the object's mask.

All are NaN for an empty mask and for a map of zeros: nothing can be said about either. A constant map scores
`chance_level`, against which every value is to be read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdecor.measures._checks import binary, shares


def relevance_mass(attribution: Tensor, mask: Tensor) -> Tensor:
    """Share of each map's total that lies on the object; higher is better.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in [0, 1]; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Arras, Osman and Samek 2022, doi:10.1016/j.inffus.2021.11.008 (arXiv:2003.07258).

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
        >>> relevance_mass(attribution, torch.tensor([[[1, 0], [1, 0]]])).item()
        0.75
    """
    share = shares(attribution)
    inside = binary(mask, attribution.shape)
    return _unless_empty((share * inside).sum(1).clamp(max=1), inside)


def pointing_game(attribution: Tensor, mask: Tensor) -> Tensor:
    """1 where the map's highest pixel lies on the object, else 0; among equally high pixels the share of them on it.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in [0, 1], higher is better; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Zhang et al. 2018, doi:10.1007/s11263-017-1059-x (arXiv:1608.00507), without its tolerance of 15 pixels.

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [0.0, 3.0]]])
        >>> pointing_game(attribution, torch.tensor([[[1, 0], [1, 0]]])).item()
        0.5
    """
    share = shares(attribution)
    inside = binary(mask, attribution.shape)
    peaks = share == share.amax(1, keepdim=True)  # never true in a map of zeros, whose shares are NaN: 0 / 0 below
    return _unless_empty((peaks & inside).sum(1).double() / peaks.sum(1), inside)


def chance_level(mask: Tensor) -> Tensor:
    """Share of the image that the object covers: the relevance mass and pointing game of a constant map.

    Args:
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in (0, 1]; NaN for an empty mask.

    Raises:
        ValueError: a mask of another shape or not binary.
    """
    return relevance_mass(torch.ones(mask.shape, device=mask.device), mask)


def _unless_empty(value: Tensor, inside: Tensor) -> Tensor:
    return value.masked_fill(~inside.any(1), math.nan)
