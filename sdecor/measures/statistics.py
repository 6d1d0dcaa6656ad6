"""Mean, spread and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdecor.measures._checks import require_fraction


class Summary(NamedTuple):
    """Mean and standard deviation."""

    mean: float
    sd: float


class Difference(NamedTuple):
    """Mean difference and its confidence interval."""

    mean: float
    low: float
    high: float


def summary(values: Sequence[float] | Tensor) -> Summary:
    """Mean and standard deviation (of a sample: divided by n - 1) over seeds.

    Args:
        values: one number per seed, (n,).

    Returns:
        Mean and standard deviation; that of a single value is NaN.

    Raises:
        ValueError: no values, another shape, or values that are NaN or infinite.

    Example:
        >>> summary([1.0, 2.0, 3.0])
        Summary(mean=2.0, sd=1.0)
    """
    numbers = _numbers(values, "values")
    return Summary(numbers.mean().item(), numbers.std().item() if len(numbers) > 1 else math.nan)


def paired_difference(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, confidence: float = 0.95) -> Difference:
    """Mean of a - b over seeds, with the interval of the paired t test.

    Args:
        a: one number per seed, (n,).
        b: one number per seed, (n,), in the same order of seeds.
        confidence: probability that the interval covers the true mean if differences are normal, in (0, 1).

    Returns:
        Mean, low and high end; the ends are NaN for a single pair, where there is no spread to judge by, and equal the
        mean if all differences are equal.

    Raises:
        ValueError: no values, lengths that differ, values that are NaN or infinite, or a confidence outside (0, 1).

    Source: Student 1908, doi:10.2307/2331554.

    Example:
        >>> [round(value, 3) for value in paired_difference([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])]
        [1.0, -1.484, 3.484]
    """
    from scipy.special import stdtrit

    require_fraction(confidence, "confidence")
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} values and b has {len(second)}; pairs need one of each per seed")
    mean, sd = summary(first - second)
    half = float(stdtrit(len(first) - 1, (1 + confidence) / 2)) * sd / math.sqrt(len(first))
    return Difference(mean, mean - half, mean + half)


def _numbers(values: Sequence[float] | Tensor, name: str) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"{name} must hold at least one number, one per seed, got shape {tuple(numbers.shape)}")
    bad = (~numbers.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} must be finite, got {numbers[bad[0]].item()} at position {bad[0]}")
    return numbers
