"""Gradient saliency: the input gradient of a class logit, from the same forward pass that gives the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SCORES = ("absolute", "signed")


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode with parameters that ask for no gradient, and restore every flag afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)


def input_gradient(logits: Tensor, x: Tensor, target: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Gradient of each sample's target logit with respect to its own input.

    Args:
        logits: ``(B, K)``, computed from `x`.
        x: Input ``(B, C, H, W)`` that requires a gradient.
        target: Class indices ``(B,)``.
        retain_graph: Keep the graph, so that a loss of the same forward pass can still be differentiated.

    Returns:
        ``(B, C, H, W)``, detached, in logits per unit of input.

    Source:
        Simonyan et al. 2013 (arXiv:1312.6034).
    """
    chosen = logits.gather(1, target.unsqueeze(1)).sum()
    with torch.autocast(x.device.type, enabled=False):  # else float32 parts of the graph go backward in half precision
        return torch.autograd.grad(chosen, x, retain_graph=retain_graph)[0]


def pixel_score(gradient: Tensor, kind: str = "absolute") -> Tensor:
    """One number per pixel from a gradient per channel.

    Args:
        gradient: ``(B, C, H, W)``.
        kind: ``absolute`` sums magnitudes, so that channels of opposite sign cannot cancel; ``signed`` sums the values,
            as the public code of saliency-guided training does, so that the lowest scores are counter-evidence.

    Returns:
        Scores ``(B, H, W)``; non-negative for ``absolute``.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind == "absolute":
        norm: Tensor = torch.linalg.vector_norm(gradient, ord=1, dim=1)  # a third of the time of abs().sum(1)
        return norm
    if kind == "signed":
        return gradient.sum(1)
    raise ValueError(f"unknown score '{kind}'; known: {', '.join(SCORES)}")


def logits_and_gradient(model: nn.Module, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and input gradient of a trained model, in evaluation mode, from one forward pass.

    Args:
        model: Any classifier ``(B, C, H, W) -> (B, K)``. Its mode and flags are restored.
        x: Images ``(B, C, H, W)``; not modified.
        target: Class indices ``(B,)``; None takes the predicted class.

    Returns:
        Detached logits ``(B, K)`` and gradient ``(B, C, H, W)``.
    """
    with frozen_eval(model), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = model(leaf)
        gradient = input_gradient(logits, leaf, logits.argmax(1) if target is None else target)
    return logits.detach(), gradient
