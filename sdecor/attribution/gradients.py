"""The input gradient, and means of it: over noise, or along a path from a baseline to the image."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from sdecor.registers import ATTRIBUTIONS, Between
from sdecor.saliency import differentiable, input_gradient, logits_and_gradient, logits_of, pixel_score, quick_slope

attribution = ATTRIBUTIONS.register
Count = Annotated[int, Between(1)]
Samples = Annotated[int, Between(2)]  # one alone says nothing of its error
Share = Annotated[float, Between(0, 1)]
Value = float | Tensor


class Rough(Warning):
    """Of the map of an image: how large its error is, what it says, and the option that lowers it."""


def rough(error: Tensor, limit: float, what: str, option: str) -> None:
    """Have `attribute` say of how many images the error, ``(B,)`` or a scalar, is above a limit."""
    for value in error[error > limit].tolist():
        warnings.warn(Rough(value, what, option), stacklevel=2)


def noisy(error: Tensor, result: Tensor) -> None:
    """Have `attribute` say so if half of a map is noise, by its expected `error`: another seed's map is unlike it."""
    rough(error.norm() / result.norm(), 0.5, "noise is expected to be more than half of the map", "samples")


def incomplete(missing: Tensor, change: Tensor) -> None:
    """Have `attribute` say so if sums are off by a tenth; it takes what `missed` gives."""
    rough(missing / change.abs(), 0.1, "the sum is more than a tenth off the change of the logit", "steps")


def signs(samples: int) -> Tensor:
    """Factors ``(2, samples)`` for a sum, and for one with signs that change, in which noise alone is left."""
    factors = torch.ones(2, samples)
    factors[1, 1::2] = -1
    factors[1, samples - samples % 2 :] = 0
    return factors


def sums_like(x: Tensor) -> Tensor:
    """Zeros for two sums of maps, of at least single precision."""
    return x.new_zeros(2, x.numel(), dtype=torch.promote_types(x.dtype, torch.float32))


def missed(result: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How far the sums of maps ``(B, ...)`` are from the changes of the logits, beyond rounding, and these, ``(B,)``.

    The logits ``(2 B, K)`` are those of the images, and then of their baselines.
    """
    ends = logits.detach().gather(1, y.repeat(2).unsqueeze(1)).view(2, -1).double()
    change, flat = ends[0] - ends[1], result.detach().flatten(1).double()
    rounding = torch.finfo(result.dtype).eps ** (2 / 3) * (flat.abs().sum(1) + ends.abs().sum(0))
    return ((flat.sum(1) - change).abs() - rounding).clamp(min=0), change


def by_captum(kind: str, model: Module, x: Tensor, y: Tensor, **how: Any) -> Tensor:
    """What captum's method of that name gives; captum is imported when it is first needed."""
    import captum.attr

    method = getattr(captum.attr, kind)(model)
    try:
        result: Tensor = method.attribute(x, target=y, **how)
    except RuntimeError:
        differentiable(logits_of(model, x[:1].clone().requires_grad_()))  # if that is why, in plain words
        raise
    return result


def slopes(model: Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient, of many images that a method makes of one, which needs no checks any more."""
    leaf = x.detach().requires_grad_()
    with quick_slope(model, leaf) as slope:
        logits = logits_of(model, leaf)
    with slope():
        return input_gradient(logits, leaf, y.expand(len(x)))


@attribution(label="Gradient", source="arXiv:1312.6034", predicts=True)
def gradient(model: Module, x: Tensor, y: Tensor | None, rows: int) -> Tensor:
    """Gradient of the logit: what the smallest change of a pixel does to it."""
    return logits_and_gradient(model, x, y)[1]


@attribution(label="Absolute gradient", source="arXiv:1312.6034", per_channel=False, predicts=True)
def absolute(model: Module, x: Tensor, y: Tensor | None, rows: int) -> Tensor:
    """Magnitude of the gradient, summed over the channels of a pixel."""
    return pixel_score(gradient(model, x, y, rows))


@attribution(label="Input x gradient", source="arXiv:1605.01713", predicts=True)
def input_x_gradient(model: Module, x: Tensor, y: Tensor | None, rows: int) -> Tensor:
    """Gradient times the pixel's value, to first order what the pixel adds to that of an image of zeros."""
    return x * gradient(model, x, y, rows)


@attribution(label="SmoothGrad", source="arXiv:1706.03825", slow=True)
def smoothgrad(
    model: Module, x: Tensor, y: Tensor, rows: int, *, samples: Samples = 25, noise: Annotated[float, Between(0)] = 0.15
) -> Tensor:
    """Mean gradient over copies of the image with Gaussian noise.

    There are `samples` copies; the noise has `noise` times the image's own range of values as its standard deviation.
    """
    sums, deviation = sums_like(x), noise * (x.max() - x.min())
    for factors in signs(samples).to(x).split(rows, 1):
        draws = torch.empty(factors.shape[1], *x.shape[1:])
        for draw in draws:  # one by one, so that they are the same for every number of rows
            draw.normal_()
        part = x + draws.to(x) * deviation
        sums += factors @ slopes(model, part, y).flatten(1)
    noisy(sums[1], sums[0])
    return (sums[0] / samples).view_as(x)


@attribution(label="Integrated gradients", source="arXiv:1703.01365", slow=True)
def integrated_gradients(
    model: Module, x: Tensor, y: Tensor, rows: int, *, steps: Count = 50, baseline: Value = 0.0
) -> Tensor:
    """Mean gradient at `steps` points of the straight line from `baseline` to the image, times the way of each pixel.

    Its sum is the change of the logit along the line, up to the error of the steps, which are those of Gauss and
    Legendre.
    """
    start = torch.as_tensor(baseline)
    total, way = x.new_zeros(x.numel()), x - start
    nodes, weights = (torch.from_numpy(v / 2).to(x) for v in np.polynomial.legendre.leggauss(steps))
    for places, factors in zip((nodes + 0.5).split(rows), weights.split(rows), strict=True):
        along = torch.addcmul(start, places.view(-1, 1, 1, 1), way)
        total += factors @ slopes(model, along, y).flatten(1)
    result = total.view_as(x) * way
    with torch.no_grad():
        incomplete(*missed(result, torch.cat([logits_of(model, v) for v in torch.cat([x, start]).split(rows)]), y))
    return result


@attribution(label="Guided integrated gradients", source="arXiv:2106.09788", slow=True, single=False)
def guided_ig(
    model: Module,
    x: Tensor,
    y: Tensor,
    rows: int,
    *,
    steps: Count = 50,
    fraction: Share = 0.25,
    max_dist: Share = 0.02,
    baseline: Value = 0.0,
) -> Tensor:
    """Integrated gradients along a path that moves the pixels with the smallest gradients first.

    In each of `steps` steps from `baseline` the share `fraction` of the values moves; none may be farther than
    `max_dist` of its way from where it would be on the straight line. The path looks for kinks of the network: its sum
    can miss the change of the logit by half of it, and more steps need not help.
    """
    start, end = torch.as_tensor(baseline).flatten(1).double(), x.flatten(1).double()
    gap = end - start
    length = gap.abs().sum(1, keepdim=True)
    rank = int(fraction * (gap.shape[1] - 1)) + 1
    here, total = start.clone(), torch.zeros_like(gap)
    for step in range(1, steps + 1):  # each needs the one before: here a batch holds different images
        slope = slopes(model, here.to(x.dtype, copy=True).view_as(x), y).flatten(1).double()
        low = start + gap * max(step / steps - max_dist, 0.0)
        high = start + gap * min(step / steps + max_dist, 1.0)
        wanted = length * (1 - step / steps)  # L1 distance to the image that the step is to leave
        before, cost = here, slope.abs()
        going = torch.ones_like(length, dtype=torch.bool)
        while True:
            behind = (here - start).abs() < (low - start).abs()
            here = torch.where(going & behind, low, here)
            excess = (end - here).abs().sum(1, keepdim=True) - wanted
            going = going & (excess > 1e-9 * (1 + wanted))
            if not going.any():
                break
            cost = cost.masked_fill(here == high, math.inf)
            chosen = going & (cost <= cost.kthvalue(rank, 1, keepdim=True).values) & (cost < math.inf)
            reach = ((high - here).abs() * chosen).sum(1, keepdim=True)
            share = (excess / reach).nan_to_num(0.0).clamp(0, 1)
            here = torch.where(chosen, here.lerp(high, share), here)
            going = going & (reach > 0)
        total += (here - before) * slope
    return total.view_as(x)
