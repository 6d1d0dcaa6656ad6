"""The input gradient, and the score of a pixel that is made of it: what to mask, and what to measure.

A score is a registered function that asks by the names of its parameters for ``gradient`` ``(B, C, H, W)``, ``images``
``(B, C, H, W)`` or ``generator``, and gives ``(B, H, W)``; the lowest scores are masked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sdecor.first_convolution import FirstConvolution
from sdecor.registers import SCORES

score = SCORES.register


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, parameters asking for no gradient, nothing done in place; restore it all afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    inplace: list[Any] = [m for m, _ in modes if getattr(m, "inplace", False) is True]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for m in inplace:
            m.inplace = False
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        for m in inplace:
            m.inplace = True


def input_gradient(
    logits: Tensor, x: Tensor, target: Tensor, *, retain_graph: bool = False, create_graph: bool = False
) -> Tensor:
    """Gradient of each sample's target logit with respect to its own input.

    It is the gradient of the sum of these logits. Where a sample's logit depends on the others of the batch, as under
    batch normalization in training mode, it holds what a sample does to their logits too.

    Args:
        logits: ``(B, K)``, computed from `x`.
        x: Input ``(B, C, H, W)`` that requires a gradient.
        target: Class indices ``(B,)``.
        retain_graph: Keep the graph, so that a loss of the same forward pass can still be differentiated.
        create_graph: Make the gradient itself differentiable; this keeps the graph too.

    Returns:
        ``(B, C, H, W)`` in logits per unit of input; a constant, unless `create_graph`.

    Source:
        Simonyan et al. 2013 (arXiv:1312.6034).
    """
    chosen = logits.gather(1, target.unsqueeze(1)).sum()
    with torch.autocast(x.device.type, enabled=False):  # else float32 parts of the graph go backward in half precision
        keep = retain_graph or create_graph
        return torch.autograd.grad(chosen, x, retain_graph=keep, create_graph=create_graph)[0]


@score
def absolute(gradient: Tensor) -> Tensor:
    """Sum of magnitudes over the channels, so that those of opposite sign cannot cancel; not negative."""
    norm: Tensor = torch.linalg.vector_norm(gradient, ord=1, dim=1)  # a third of the time of abs().sum(1)
    return norm


@score
def signed(gradient: Tensor) -> Tensor:
    """Sum over the channels, as in the public code of saliency-guided training; the lowest are counter-evidence."""
    return gradient.sum(1)


@score
def random(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers, which look at nothing: the mask made of them hides pixels at random."""
    device = images.device if generator is None else generator.device
    return torch.rand(images[:, 0].shape, generator=generator, device=device).to(images.device)


def pixel_score(attribution: Tensor, kind: str = "absolute") -> Tensor:
    """One number per pixel from an attribution.

    Args:
        attribution: ``(B, C, H, W)``, or ``(B, H, W)`` of a method that scores whole pixels.
        kind: Name of a score that needs nothing but the gradient.

    Returns:
        Scores ``(B, H, W)``.

    Raises:
        ValueError: If `kind` is unknown, or needs something else.
    """
    channels = attribution.unsqueeze(1) if attribution.ndim == 3 else attribution
    result: Tensor = SCORES[kind].ask({"gradient": channels})
    return result


@contextmanager
def quick_slope(model: nn.Module, x: Tensor) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Make the graph of a forward pass of `x` within this context, and differentiate by `x` within what it yields."""
    if hasattr(model, "_orig_mod"):  # what is compiled has its own backward pass
        yield nullcontext
        return
    with FirstConvolution(x) as first:
        yield first.slope


def logits_and_gradient(model: nn.Module, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and input gradient of a trained model, in evaluation mode, from one forward pass.

    Args:
        model: Any classifier ``(B, C, H, W) -> (B, K)``. Its mode and flags are restored.
        x: Images ``(B, C, H, W)``; not modified.
        target: Class indices ``(B,)``; None takes the predicted class.

    Returns:
        Detached logits ``(B, K)`` and gradient ``(B, C, H, W)``.

    Raises:
        ValueError: As `checked_images` and `classes_of`.
    """
    target = checked_images(x, target)
    with frozen_eval(model), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        with quick_slope(model, leaf) as slope:
            logits = model(leaf)
        with slope():
            return logits.detach(), input_gradient(logits, leaf, classes_of(logits, target))


def checked_images(x: Tensor, target: Tensor | None = None) -> Tensor | None:
    """Check images ``(B, C, H, W)`` and a target before a forward pass; the target as int64 on their device.

    Raises:
        ValueError: If they are no images, or not finite, or the target is not one class index for each of them.
    """
    if x.ndim != 4 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"x must be floating images (B, C, H, W), not empty; got {x.dtype} of shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x has NaN or infinity")
    if target is None:
        return None
    if target.dtype == torch.bool or target.is_floating_point() or target.shape != x.shape[:1]:
        got = f"{target.dtype} of shape {tuple(target.shape)}"
        raise ValueError(f"target must be class indices, integers of shape ({len(x)},); got {got}")
    return target.to(x.device, torch.int64)


def classes_of(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """The target, or the predicted class; an index out of range would end CUDA for the whole process.

    Raises:
        ValueError: If the logits are not ``(B, K)``, or a target is no class of theirs.
    """
    if logits.ndim != 2:
        raise ValueError(f"model must return logits (B, K), it returned shape {tuple(logits.shape)}")
    if target is None:
        return logits.argmax(1)
    bad = target[(target < 0) | (target >= logits.shape[1])]
    if len(bad):
        raise ValueError(f"target must lie in 0 to {logits.shape[1] - 1}, got {int(bad[0])}")
    return target
