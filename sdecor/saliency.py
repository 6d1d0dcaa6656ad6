"""The input gradient, and the score of a pixel that is made of it: what to mask, and what to measure.

A score is a registered function that asks by the names of its parameters for ``gradient`` ``(B, C, H, W)``, ``images``
``(B, C, H, W)`` or ``generator``, and gives ``(B, H, W)``; the lowest scores are masked first.

A model is any classifier ``(B, C, H, W) -> (B, K)`` of two classes or more; its mode and flags are restored. Logits are
``(B, K)``, images `x` ``(B, C, H, W)``, a target class indices ``(B,)``, or one class for all images, where None takes
the predicted class. Others are a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sdecor.first_convolution import FirstConvolution
from sdecor.processes import drawn
from sdecor.registers import SCORES
from sdecor.whitening import require_tensors

score = SCORES.register
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  #: Types of class indices.


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, parameters asking for no gradient, nothing done in place; restore it all afterwards."""
    held = (*checked_model(model).parameters(), *model.buffers())
    if any(tensor.is_inference() for tensor in held if not nn.parameter.is_lazy(tensor)):
        made = f"{type(model).__name__} was made under torch.inference_mode, which bars gradients for good"
        raise ValueError(f"{made}; make it outside, and load its state_dict into that")
    flags: list[tuple[Any, str, bool]] = [(p, "requires_grad", p.requires_grad) for p in model.parameters()]
    plain = (m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule))
    flags += [(m, "inplace", True) for m in plain if getattr(m, "inplace", False) is True]
    with same_mode(model):
        try:
            model.eval()
            for owner, flag, _ in flags:
                setattr(owner, flag, False)
            yield
        finally:
            for owner, flag, value in flags:
                setattr(owner, flag, value)


@contextmanager
def same_mode(model: nn.Module) -> Iterator[None]:
    """Put every module back in the mode it had, by its own ``train``: some do more there, such as merging weights."""
    before = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:  # a module around others comes before them
            if module.training != mode:
                module.train(mode)


def checked_model(model: Any) -> nn.Module:
    """The model, if it is a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def input_gradient(
    logits: Tensor, x: Tensor, target: Tensor, *, retain_graph: bool = False, create_graph: bool = False
) -> Tensor:
    """Gradient of the sum of the samples' target logits by the input that they were computed from, which requires one.

    It is each sample's own (Simonyan et al. 2013, arXiv:1312.6034). Where a sample's logit depends on the others of the
    batch, as under batch normalization in training mode, it holds what a sample does to their logits too.

    `retain_graph` keeps the graph, so that a loss of the same forward pass can still be differentiated; `create_graph`
    keeps it too, and makes the gradient itself differentiable, which is a constant otherwise.
    """
    how: dict[str, Any] = {"retain_graph": retain_graph or create_graph, "create_graph": create_graph}
    chosen = differentiable(logits).gather(1, target.unsqueeze(1)).sum()
    with torch.autocast(x.device.type, enabled=False):  # else float32 parts of the graph go backward in half precision
        slope: Tensor | None = torch.autograd.grad(chosen, x, allow_unused=True, **how)[0]
    return slope if slope is not None else differentiable(logits, cut=True)  # which raises


def differentiable(logits: Tensor, *, cut: bool = False) -> Tensor:
    """The logits, if they have a graph that is not `cut`; a ValueError if the model did that."""
    if cut or not logits.requires_grad:
        raise ValueError("the logits of this model cannot be differentiated: it detaches something on the way to them")
    return logits


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
    return drawn(torch.rand, images[:, 0].shape, generator=generator, device=device).to(images.device)


def pixel_score(attribution: Tensor, kind: str = "absolute") -> Tensor:
    """One number per pixel ``(B, H, W)``, by a score that needs nothing but the gradient.

    The attribution is ``(B, C, H, W)``, or ``(B, H, W)`` of a method that scores whole pixels.
    """
    require_tensors(attribution=attribution)
    channels = attribution.unsqueeze(1) if attribution.ndim == 3 else attribution
    channels = channels if channels.is_floating_point() else channels.double()
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
    """Logits and input gradient of a trained model, in evaluation mode, from one forward pass; both detached."""
    with torch.inference_mode(False), torch.enable_grad(), frozen_eval(model):
        target = checked_images(x, target)
        leaf = x.detach().clone().requires_grad_()
        with quick_slope(model, leaf) as slope:
            logits = logits_of(model, leaf)
        with slope():
            return logits.detach(), input_gradient(logits, leaf, classes_of(logits, target))


def checked_images(x: Tensor, target: Any = None) -> Tensor | None:
    """Check images, which must be finite, and a target before a forward pass; the target as int64 on their device."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor of images (B, C, H, W), got {type(x).__name__}; pass torch.as_tensor(x)")
    if x.ndim != 4 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"x must be floating images (B, C, H, W), not empty; got {x.dtype} of shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x has NaN or infinity")
    return None if target is None else checked_target(x, target)


def checked_target(x: Tensor, target: Any) -> Tensor:
    """Classes of images, one for each or one for all, as int64 on their device."""
    try:
        classes = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"target must be class indices, integers of shape ({len(x)},); got {target!r}") from None
    if classes.dtype not in WHOLE or classes.shape not in (x.shape[:1], ()):
        got = f"{classes.dtype} of shape {tuple(classes.shape)}"
        raise ValueError(f"target must be class indices, integers of shape ({len(x)},); got {got}")
    return classes.to(x.device, torch.int64, copy=True).expand(len(x))


def logits_of(model: nn.Module, x: Tensor, *, finite: bool = True) -> Tensor:
    """What a classifier gives for images: a floating tensor ``(B, K)``, K >= 2, finite unless told otherwise.

    Every function that needs logits gets them here, so that no other output is taken for a score in silence.
    """
    try:
        output = model(x)
    except RuntimeError as error:
        own = next(model.parameters(), x)
        if (own.dtype, own.device) == (x.dtype, x.device):
            raise
        have, want = (f"{t.dtype} on {t.device}" for t in (x, own))
        raise ValueError(f"the images are {have}, the model is {want}; convert one of them with .to()") from error
    return checked_logits(output, len(x), finite=finite)


def checked_logits(output: Any, rows: int, *, finite: bool = True) -> Tensor:
    """The output of a model, if it is what `logits_of` says."""
    wanted = "model must return logits (B, K)"
    if not isinstance(output, Tensor):
        raise ValueError(f"{wanted} as a tensor, it returned a {type(output).__name__}; wrap it to return that alone")
    if output.ndim != 2 or len(output) != rows or not output.is_floating_point():
        raise ValueError(f"{wanted}, it returned {output.dtype} of shape {tuple(output.shape)} for {rows} images")
    if output.shape[1] < 2:
        binary = "of one logit z, torch.cat([torch.zeros_like(z), z], 1) has the same probabilities"
        raise ValueError(f"{wanted} of two classes or more, it returned {output.shape[1]}; {binary}")
    if finite and not output.isfinite().all():
        bad = int((~output.isfinite().all(1)).sum())
        raise ValueError(f"{wanted} that are finite, it returned NaN or infinity for {bad} of {rows} images")
    return output


def classes_of(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """The target, checked against the logits, as an index out of range would end CUDA for the whole process."""
    if target is None:
        return logits.argmax(1)
    if len(bad := target[(target < 0) | (target >= logits.shape[1])]):
        raise ValueError(f"target must lie in 0 to {logits.shape[1] - 1}, got {int(bad[0])}")
    return target
