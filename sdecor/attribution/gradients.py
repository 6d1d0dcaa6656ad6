"""The input gradient, and means of it: over noise, or along a path from a baseline to the image."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import Module

from sdecor.registers import ATTRIBUTIONS, Between
from sdecor.saliency import logits_and_gradient, pixel_score

attribution = ATTRIBUTIONS.register
Count = Annotated[int, Between(1)]
Share = Annotated[float, Between(0, 1)]
Value = float | Tensor


def by_captum(kind: str, model: Module, x: Tensor, y: Tensor, **how: Any) -> Tensor:
    """What captum's method of that name gives; captum is imported when it is first needed."""
    import captum.attr

    result: Tensor = getattr(captum.attr, kind)(model).attribute(x, target=y, **how)
    return result


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
    model: Module, x: Tensor, y: Tensor, rows: int, *, samples: Count = 25, noise: Annotated[float, Between(0)] = 0.15
) -> Tensor:
    """Mean gradient over copies of the image with Gaussian noise.

    There are `samples` copies; the noise has `noise` times the image's own range of values as its standard deviation.
    """
    draws = torch.randn(samples, *x.shape[1:]).to(x) * (noise * (x.max() - x.min()))
    total = torch.zeros_like(x)
    for part in draws.split(rows):  # captum's NoiseTunnel would draw other numbers for another number of rows
        total += gradient(model, x + part, y.expand(len(part)), rows).sum(0)
    return total / samples


@attribution(label="Integrated gradients", source="arXiv:1703.01365", slow=True)
def integrated_gradients(
    model: Module, x: Tensor, y: Tensor, rows: int, *, steps: Count = 50, baseline: Value = 0.0
) -> Tensor:
    """Mean gradient at `steps` points of the straight line from `baseline` to the image, times the way of each pixel.

    Its sum is the change of the logit along the line, up to the error of the steps.
    """
    how = {"n_steps": steps, "internal_batch_size": rows}
    return by_captum("IntegratedGradients", model, x, y, baselines=baseline, **how)


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
    `max_dist` of its way from where it would be on the straight line.
    """
    start, end = torch.as_tensor(baseline).flatten(1).double(), x.flatten(1).double()
    gap = end - start
    length = gap.abs().sum(1, keepdim=True)
    rank = int(fraction * (gap.shape[1] - 1)) + 1
    here, total = start.clone(), torch.zeros_like(gap)
    for step in range(1, steps + 1):  # each needs the one before: here a batch holds different images
        slope = gradient(model, here.to(x.dtype).view_as(x), y, rows).flatten(1).double()
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
