"""Masking: choose the least salient pixels of each image and replace them, or fill them in from their neighbours.

Images `x` are ``(B, C, H, W)``, masks boolean ``(B, H, W)``, True where a pixel is to be replaced; no argument is
modified. A generator may live on any device. A fill is a registered function that asks by the names of its parameters
for some of the arguments of `replacement`. What is unknown or impossible is a ValueError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from sdecor.processes import drawn
from sdecor.registers import FILLS
from sdecor.whitening import require_tensors

fill = FILLS.register


def lowest(score: Tensor, fraction: float) -> Tensor:
    """Mark the share `fraction` of each image's pixels with the lowest score ``(B, H, W)``.

    Exactly ``round(fraction * H * W)`` pixels are marked, whatever ties there are (a ReLU network gives many gradients
    of exactly 0); which of the tied ones is not specified.

    Example:
        >>> lowest(torch.tensor([[[3., 1.], [2., 0.]]]), 0.5)
        tensor([[[False,  True],
                 [False,  True]]])
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    require_tensors(score=score)
    flat = (score.byte() if score.dtype == torch.bool else score).flatten(1)
    count = round(fraction * flat.shape[1])
    if flat.device.type == "cpu" and flat.dtype == torch.float32 and count:  # several times as fast as topk, if no ties
        values = flat.detach().numpy()
        marked = values <= np.partition(values, count - 1, axis=1)[:, count - 1 : count]
        if np.count_nonzero(marked) == count * len(marked):
            return torch.from_numpy(marked).view_as(score)
    index = flat.topk(count, largest=False, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, index, True).view_as(score)


def cells(pixels: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of `count` stretches, as even as can be, each of so many pixels in a row lies in, ``(pixels,)`` from 0."""
    return torch.arange(pixels, device=device) * count // pixels


def replacement(
    x: Tensor, kind: str = "uniform", *, value: float = 0.0, common: bool = False, generator: Generator | None = None
) -> Tensor:
    """What masked pixels are replaced with: a tensor of the shape of `x`, by the fill `kind`.

    `value` is for ``constant``, in the units of `x` (0 is the mean pixel of normalized images). With `common`, every
    image has the same noise, scaled to its range, so that its fill does not depend on the images beside it.
    """
    require_tensors(x=x)
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating type, got {x.dtype}")
    filled: Tensor = FILLS[kind].ask({"x": x, "value": value, "common": common, "generator": generator})
    return filled


@fill
def uniform(x: Tensor, common: bool, generator: Generator | None) -> Tensor:
    """Noise between the least and the greatest value of the same image and channel."""
    flat, kind = x.contiguous().flatten(2), torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse
    low, high = (end[..., None, None].to(kind) for end in (flat.amin(2), flat.amax(2)))  # twice as fast as aminmax
    device = x.device if generator is None else generator.device
    how: dict[str, Any] = {"generator": generator, "device": device, "dtype": kind}
    noise = (torch.rand(x.shape[1:], **how) if common else drawn(torch.rand, x.shape, **how)).to(x.device)
    span = high - low
    return (torch.addcmul(low, noise, span) if common else torch.addcmul(low, noise, span, out=noise)).to(x.dtype)


@fill
def mean(x: Tensor) -> Tensor:
    """The mean of the image and channel."""
    return x.mean((2, 3), keepdim=True).expand_as(x)


@fill
def constant(x: Tensor, value: float) -> Tensor:
    """One value everywhere."""
    return torch.full_like(x, value)


@fill
def blur(x: Tensor) -> Tensor:
    """A Gaussian blur of sigma ``H / 10``."""
    from torchvision.transforms.functional import gaussian_blur

    sigma, side = x.shape[-2] / 10, min(x.shape[-2:])
    kernel = min(2 * round(2 * sigma) + 1, side - 1 + side % 2)  # no wider than the image
    blurred: Tensor = gaussian_blur(x, [kernel, kernel], [sigma, sigma])
    return blurred


def masked(x: Tensor, mask: Tensor, filling: Tensor) -> Tensor:
    """Images with `filling`, a tensor of their shape as from `replacement`, where `mask` is True."""
    require_tensors(x=x, mask=mask, filling=filling)
    if mask.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, these images need {(x.shape[0], *x.shape[2:])}")
    kinds = {(t.device.type, t.dtype, t.requires_grad) for t in (x, filling)}
    if kinds == {("cpu", torch.float32, False)}:  # torch.where branches at every pixel, and guesses half of them wrong
        new, old = filling.view(torch.int32), x.view(torch.int32)
        return (new ^ old).bitwise_and_(-mask.unsqueeze(1).int()).bitwise_xor_(old).view(torch.float32)
    return torch.where(mask.unsqueeze(1), filling, x)


def impute(
    x: Tensor, mask: Tensor, *, noise: float = 0.01, tolerance: float = 1e-10, generator: Generator | None = None
) -> Tensor:
    """Fill masked pixels in smoothly from those around them, so that the mask's shape tells a model little.

    Every masked pixel is the weighted mean of its neighbours, masked or not (1/6 for each of the four beside it, 1/12
    for each diagonal one, in proportion at the border), solved in float64 to a relative residual of `tolerance`, plus
    Gaussian `noise` of that standard deviation, common to all images: the noisy linear imputation of Rong et al. 2022
    (arXiv:2202.00449). An image that is masked whole becomes the mean of each of its channels.
    """
    require_tensors(x=x, mask=mask)
    if mask.shape != (expected := (x.shape[0], *x.shape[2:])) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean of shape {expected}, got {tuple(mask.shape)} of {mask.dtype}")
    size = len(x) if x.is_cuda else 2**16 // x.shape[1:].numel()  # on a CPU as many images as its cache holds
    parts = zip(x.split(max(size, 1)), mask.unsqueeze(1).split(max(size, 1)), strict=True)
    out = torch.cat([_harmonic(a.double(), b, tolerance) for a, b in parts]).to(x.dtype)
    if noise:
        device = x.device if generator is None else generator.device
        jitter = noise * torch.randn(x.shape[1:], generator=generator, device=device, dtype=x.dtype).to(x.device)
        out += jitter * mask.unsqueeze(1)
    return torch.where(mask.unsqueeze(1), out, x)


def _harmonic(x: Tensor, mask: Tensor, tolerance: float) -> Tensor:
    """Solve for the masked pixels, each row times its pixel's sum of weights: symmetric and positive definite."""
    known = ~mask | mask.all(3, keepdim=True).all(2, keepdim=True)
    mean = torch.where(known, x, 0).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    degree, inside = _spread(torch.ones_like(x[:1, :1])), mask.double()
    residual = _spread((x - mean).masked_fill(mask, 0)).mul_(inside)
    solution, direction = torch.zeros_like(x), residual.clone()
    square = (residual * residual).sum((2, 3), keepdim=True)
    enough = tolerance**2 * square
    while (active := square > enough).any():  # conjugate gradients, of each image and channel by itself
        image = (degree * direction).sub_(_spread(direction)).mul_(inside)
        step = torch.where(active, square / (direction * image).sum((2, 3), keepdim=True), 0)
        solution.addcmul_(step, direction)
        residual.addcmul_(-step, image)
        before, square = square, (residual * residual).sum((2, 3), keepdim=True)
        direction.mul_(torch.where(active, square / before, 0)).add_(residual)
    return solution + mean


def _spread(x: Tensor) -> Tensor:
    """12 times the weighted sum of neighbours, plus 4 times the pixel itself, which makes the kernel separable."""
    rows = 2 * x
    rows[..., 1:, :] += x[..., :-1, :]
    rows[..., :-1, :] += x[..., 1:, :]
    both = 2 * rows
    both[..., 1:] += rows[..., :-1]
    both[..., :-1] += rows[..., 1:]
    return both
