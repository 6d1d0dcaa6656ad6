"""A quick backward pass to the images through the first convolution: there a saliency map on a CPU takes its time.

The gradient of a convolution by its input is a convolution with as many outputs as the images have channels, one or
three: a vector unit computes eight or sixteen and throws the others away. Here a square of neighbouring pixels counts
as so many outputs, and their kernel as so much larger, zero where a pixel does not look. The sums and their order stay
the same, and with them the bits, as far as the kernels of the library allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def gradient_by_input(g: Tensor, weight: Tensor, padding: tuple[int, int], shape: torch.Size, block: int) -> Tensor:
    """Gradient of a convolution of stride 1 by its input, a square of `block` pixels a side at once.

    Of the gradient `g` by the output ``(B, K, H', W')``, the weight ``(K, C, h, w)``, the padding by zeros, and the
    shape of the input ``(B, C, H, W)``, which the result has; it is differentiable by `g` and `weight`.
    """
    (channels, h, w), (high, wide) = weight.shape[1:], shape[2:]
    kernel, rest, places = weight.flip(2, 3).transpose(0, 1), block - 1, range(block)
    moved = [F.pad(kernel, (i, rest - i, j, rest - j)) for j in places for i in places]
    top, left = h - 1 - padding[0], w - 1 - padding[1]
    g = F.pad(g, (left, left + -wide % block, top, top + -high % block))
    kernels = torch.stack(moved, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    squares = F.conv2d(g, kernels, stride=block).unflatten(1, (channels, block, block))
    rows: Tensor = squares.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    return rows[:, :, :high, :wide]


class _Convolution(torch.autograd.Function):
    """A convolution whose backward pass goes to the images, or to the weights, but never to both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], mode: FirstConvolution
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.mode, ctx.biased = padding, mode, bias is not None
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.mode.to_images:
            block = 4 if x.shape[1] == 1 else 2
            return gradient_by_input(grads[0], weight, ctx.padding, x.shape, block), None, None, None, None
        sizes, wanted = [len(weight)] if ctx.biased else None, [False, True, ctx.biased]
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grads[0], x, weight, sizes, [1, 1], ctx.padding, [1, 1], False, [0, 0], 1, wanted
        )
        return None, of_weight, of_bias, None, None


class FirstConvolution(TorchFunctionMode):
    """While it is active, convolutions of these very images are given the quick backward pass, where it pays.

    The images ``(B, C, H, W)`` are a leaf that requires a gradient. It pays on a CPU, for at most four channels, and
    kernels of stride 1 that are larger than a pixel. Of the graph made meanwhile, what is differentiated under `slope`
    goes to the images, and all else to the weights.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.to_images = images, False

    @contextmanager
    def slope(self) -> Iterator[None]:
        """Differentiate by the images."""
        self.to_images = True
        try:
            yield
        finally:
            self.to_images = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and args and args[0] is self.images and not kwargs:
            x, weight, *rest = args
            defaults: list[Any] = [None, (1, 1), (0, 0), (1, 1), 1]
            bias, stride, padding, dilation, groups = rest + defaults[len(rest) :]
            plain = isinstance(padding, tuple) and (stride, dilation, groups) == ((1, 1), (1, 1), 1)
            small = x.shape[1] <= 4 and x.dtype == weight.dtype and 1 < max(weight.shape[2:]) <= 7
            fits = plain and all(p < k for p, k in zip(padding, weight.shape[2:], strict=True))
            fits = fits and all(t is None or t.grad_fn is None for t in (weight, bias))  # made of the images, perhaps
            if fits and small and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
                return _Convolution.apply(x, weight, bias, padding, self)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
