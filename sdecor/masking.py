"""Masking: choose the least salient pixels of each image and replace them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FILLS = ("uniform", "mean", "constant", "blur")


def lowest(score: Tensor, fraction: float) -> Tensor:
    """Mark the lowest-scoring share of each image's pixels.

    Args:
        score: ``(B, H, W)``.
        fraction: Share to mark, strictly between 0 and 1. Exactly ``round(fraction * H * W)`` pixels are marked,
            whatever ties there are (a ReLU network gives many gradients of exactly 0); which of the tied ones is not
            specified.

    Returns:
        Boolean ``(B, H, W)``, True where a pixel is to be replaced.

    Raises:
        ValueError: If `fraction` is outside (0, 1).

    Example:
        >>> lowest(torch.tensor([[[3., 1.], [2., 0.]]]), 0.5)
        tensor([[[False,  True],
                 [False,  True]]])
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    flat = score.flatten(1)
    count = round(fraction * flat.shape[1])
    if flat.device.type == "cpu" and flat.dtype == torch.float32 and count:  # several times as fast as topk, if no ties
        values = flat.detach().numpy()
        marked = values <= np.partition(values, count - 1, axis=1)[:, count - 1 : count]
        if np.count_nonzero(marked) == count * len(marked):
            return torch.from_numpy(marked).view_as(score)
    index = flat.topk(count, largest=False, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, index, True).view_as(score)


def replacement(
    x: Tensor, kind: str = "uniform", *, value: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """What masked pixels are replaced with.

    Args:
        x: Images ``(B, C, H, W)``; not modified.
        kind: ``uniform`` noise between the least and the greatest value of the same image and channel; ``mean`` of the
            image and channel; ``constant``, the given `value`; ``blur``, a Gaussian blur of sigma ``H / 10``.
        value: For ``constant``, in the units of `x` (0 is the mean pixel of normalized images).
        generator: Source of the noise, on the device of `x`.

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind == "uniform":
        low, high = x.flatten(2).amin(2), x.flatten(2).amax(2)  # twice as fast as aminmax
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.addcmul(low[..., None, None], noise, (high - low)[..., None, None], out=noise)
    if kind == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    if kind == "constant":
        return torch.full_like(x, value)
    if kind == "blur":
        from torchvision.transforms.functional import gaussian_blur

        sigma = x.shape[-2] / 10
        widest = min(x.shape[-2:]) - 1 + min(x.shape[-2:]) % 2  # a kernel no wider than the image
        blurred: Tensor = gaussian_blur(x, [min(2 * round(2 * sigma) + 1, widest)] * 2, [sigma, sigma])
        return blurred
    raise ValueError(f"unknown fill '{kind}'; known: {', '.join(FILLS)}")


def masked(x: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Put `fill` where `mask` is True.

    Args:
        x: Images ``(B, C, H, W)``; not modified.
        mask: Boolean ``(B, H, W)``.
        fill: Tensor of the shape of `x`, as from `replacement`.

    Returns:
        Images ``(B, C, H, W)``.
    """
    return torch.where(mask.unsqueeze(1), fill, x)
