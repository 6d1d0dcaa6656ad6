"""Attribution: which pixels a class logit depends on, by the input gradient and a dozen other methods.

A method is a function that is entered with ``@attribution``. It gets

- ``model``, in evaluation mode, its parameters asking for no gradient, nothing done in place;
- ``x``, images ``(B, C, H, W)``, detached: as many as go into a forward pass, or one at a time if it is ``single``, as
  slow methods are that do not say otherwise, and fills its passes with variants of that one;
- ``y``, their classes ``(B,)``: None stands for the predicted ones if it ``predicts`` them in a pass of its own;
- ``rows``, the most rows of a forward pass,

and then its options by name, which are its keyword-only parameters. Two of them mean the same everywhere: `baseline` is
what a pixel is replaced with, a number or a tensor broadcastable to the images, in their units, and arrives in the
images' shape; `segments` is about how many superpixels to cut an image into, or label maps ``(B, H, W)`` of one's own.
Of any tensor each image has its own row. Random numbers come from torch's global state on the CPU, which every
call finds at the seed. The result is signed, ``(B, C, H, W)``, or ``(B, H, W)`` if the method is not ``per_channel``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdecor.attribution import gradients, modules, perturbation  # noqa: F401 - they fill the register
from sdecor.models import uncompiled
from sdecor.registers import ATTRIBUTIONS
from sdecor.saliency import checked_images, classes_of, frozen_eval, logits_of

__all__ = ["ATTRIBUTIONS", "attribute", "attribution", "superpixels"]

log = logging.getLogger("sdecor")
attribution = ATTRIBUTIONS.register
superpixels = perturbation.superpixels


def attribute(
    model: nn.Module,
    x: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    method: str = "gradient",
    *,
    batch_size: int = 64,
    progress: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """How much each pixel contributes to a class logit: detached, with the dtype and device of `x`.

    Model, images and target are as in `sdecor.saliency`; ``sdecor list attributions NAME`` shows the `options`. A
    forward pass has at most `batch_size` rows. An image's result does not depend on that, or on the images beside it,
    up to rounding: random draws start from `seed` for each image, and torch's global state is left as it was.
    `progress` shows a bar; None shows one on a terminal, for slow methods. What is unknown or impossible is a
    ValueError, and so is a model that the method would be wrong for. If half of a map is likely to be noise, or a sum
    that should be the change of the logit is a tenth off, the logger ``sdecor`` warns of it, once a call.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> attribute(model, torch.rand(3, 1, 2, 2), method="integrated_gradients", steps=8).shape
        torch.Size([3, 1, 2, 2])
    """
    entry = ATTRIBUTIONS[method]
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with torch.inference_mode(False):
        target = checked_images(x, target)
    options = _for_images(entry.checked(options), x)
    model = uncompiled(model)  # whose modules can be hooked
    images = 1 if (entry.slow if entry.single is None else entry.single) else batch_size
    hidden = (None if entry.slow else True) if progress is None else not progress
    parts = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen_eval(model),
        torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []),
        warnings.catch_warnings(record=True) as said,
        tqdm(total=len(x), desc=entry.title, unit="image", leave=False, disable=hidden) as bar,
    ):
        warnings.simplefilter("ignore")  # captum announces its hooks
        warnings.simplefilter("always", gradients.Rough)
        if target is not None and not entry.predicts:
            with torch.no_grad():
                classes_of(logits_of(model, x[:1].detach().clone()), target)
        for start in range(0, len(x), images):
            rows = slice(start, start + images)
            part, chosen = x[rows].detach().clone(), None if target is None else target[rows]
            if target is None and not entry.predicts:
                with torch.no_grad():
                    chosen = classes_of(logits_of(model, part))
            here = {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}
            torch.manual_seed(seed)
            result = entry.function(model, part, chosen, batch_size, **here).detach().to(x.dtype)
            if result.shape != (part.shape if entry.per_channel else part[:, 0].shape):
                wanted = "(B, C, H, W), or say per_channel=False" if entry.per_channel else "(B, H, W)"
                got = f"{tuple(result.shape)} for images {tuple(part.shape)}"
                raise ValueError(f"attribution '{method}' must give {wanted}; it gave {got}")
            parts.append(result)
            bar.update(len(part))
    if errors := [w.message.args for w in said if isinstance(w.message, gradients.Rough)]:
        worst, of, option = max(errors)
        log.warning(
            "%s: %s in %d of %d images, at most %.0f %%; more %s lower it",
            *(method, of, len(errors), len(x), 100 * worst, option),
        )
    return torch.cat(parts)


def _for_images(options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The options, what belongs to single images as a tensor with a row for each."""
    if "baseline" in options:
        baseline = _tensor("baseline", options["baseline"], x.device, x.dtype).detach()
        try:
            options["baseline"] = baseline.expand(x.shape)
        except RuntimeError:
            shape = tuple(baseline.shape)
            raise ValueError(f"baseline of shape {shape} cannot be broadcast to x, {tuple(x.shape)}") from None
        if not baseline.isfinite().all():
            raise ValueError("baseline has NaN or infinity")
    if not isinstance(options.get("segments", 0), int):
        options["segments"] = labels = _tensor("segments", options["segments"], x.device)
        if labels.is_floating_point() or labels.shape != x[:, 0].shape:
            wanted, got = tuple(x[:, 0].shape), f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"segments must be integer labels of shape {wanted}; got {got}")
    return options


def _tensor(name: str, value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`value` as a tensor; a number arrives in `dtype` as it is."""
    try:
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number or a tensor, got {type(value).__name__}") from None
