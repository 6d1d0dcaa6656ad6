"""Methods that look into a model: they hook its modules, and so see only what modules do."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.attribution.gradients import Value, by_captum, missed
from sdecor.models import channels_first
from sdecor.models import layer as find_layer
from sdecor.registers import ATTRIBUTIONS
from sdecor.saliency import classes_of, differentiable, logits_of

attribution = ATTRIBUTIONS.register

# The modules that captum has a rescale rule for, less Softmax, whose rule mixes the images of a batch.
_RESCALED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d)


@attribution(label="DeepLIFT", source="arXiv:1704.02685")
def deeplift(model: nn.Module, x: Tensor, y: Tensor, rows: int, *, baseline: Value = 0.0) -> Tensor:
    """What each pixel's difference from `baseline` adds to that of the logit, by the rescale rule of each nonlinearity.

    The sum is the difference of the logits, which is checked. Every nonlinearity must be a module that has a rule.
    """
    kind, start = type(model).__name__, torch.as_tensor(baseline)
    if x.dtype in (torch.float16, torch.bfloat16):  # too coarse for the check
        model, x, start = copy.deepcopy(model).float(), x.float(), start.float()
    model, count = _rescalable(model, x), max(1, rows // 2)  # a row each for the baselines
    logits: list[Tensor] = []
    keep = _hooks([model], lambda module, inputs, output: logits.append(output))
    results = []
    off = torch.autocast(x.device.type, enabled=False)
    with _hooks(_rescaled(model), _own_input, before=True), keep, off:
        for a, b, t in zip(*(v.split(count) for v in (x, start, y)), strict=True):
            results.append(by_captum("DeepLift", model, a.clone(), t, baselines=b.clone()))
            missing, change = missed(results[-1], logits.pop(), t)
            for i in (~(missing == 0)).nonzero().flatten().tolist():
                wanted = f"one of the modules {', '.join(kind.__name__ for kind in _RESCALED)}"
                other = "it has another one, or a function such as F.relu"
                got = f"a map sums to {results[-1][i].sum().item():.4g}, its logit changes by {change[i].item():.4g}"
                raise ValueError(f"deeplift needs every nonlinearity of {kind} to be {wanted}; {other}: {got}")
    return torch.cat(results)


def _rescaled(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in _RESCALED]


def _rescalable(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with each module of `_RESCALED` used once; what a pass of one image calls decides."""
    calls: Counter[nn.Module] = Counter()
    with torch.no_grad(), _hooks(_rescaled(model), lambda module, *_: calls.update([module])):
        model(x[:1].clone())
    for pool in (module for module in calls if isinstance(module, nn.MaxPool2d)):
        if pool.dilation not in (1, (1, 1)) or (torch.tensor(pool.stride) < torch.tensor(pool.kernel_size)).any():
            raise ValueError(f"deeplift has no rule for windows that overlap, as in {pool}")
    reused = [name for name, module in model.named_modules() if calls[module] > 1]
    try:
        return _unrolled(model) if reused else model
    except Exception as error:
        raise ValueError(
            f"deeplift needs one module per use, but {', '.join(reused)} is used more than once"
        ) from error


def _unrolled(model: nn.Module) -> nn.Module:
    """A model that shares the parameters of this one, with a module of `_RESCALED` of its own for each use."""
    from torch import fx

    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        if node.op == "call_module" and type(module := traced.get_submodule(node.target)) in _RESCALED:
            node.target = f"once_{node.name}"
            traced.add_submodule(node.target, copy.deepcopy(module))
    traced.recompile()
    return traced


@attribution(label="Grad-CAM", source="arXiv:1610.02391", per_channel=False, predicts=True)
def gradcam(model: nn.Module, x: Tensor, y: Tensor | None, rows: int, *, layer: str = "") -> Tensor:
    """Feature maps of a layer, weighted with their mean gradients, summed, and enlarged to the image where positive.

    `layer` is a name in the model's `named_modules()`; empty, it is the last one that gives feature maps.
    """
    found: list[tuple[nn.Module, Tensor, int]] = []
    norm: list[tuple[nn.Module, Tensor, int]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if layer and not isinstance(output, Tensor):
            raise ValueError(
                f"gradcam needs a layer that gives feature maps, '{layer}' gives a {type(output).__name__}"
            )
        if isinstance(module, nn.MultiheadAttention):
            found[:] = norm or found
        elif isinstance(module, nn.LayerNorm):
            norm[:] = [(module, output, output._version)]
        embedding = isinstance(module, nn.Conv2d) and 1 < module.kernel_size[0] == module.stride[0]
        if layer or (_is_map(output) and not embedding):
            found[:] = [(module, output, output._version)]
        return output.clone() if layer else None

    with _hooks([find_layer(model, layer)] if layer else model.modules(), keep):
        logits = logits_of(model, x.clone().requires_grad_())
    if not found:
        raise ValueError(f"gradcam found no feature map in {type(model).__name__}; name a layer=")
    module, output, version = found[0]
    if output._version != version:  # what came behind worked in place
        return gradcam(model, x, y, rows, layer=next(name for name, m in model.named_modules() if m is module))
    chosen = differentiable(logits).gather(1, classes_of(logits, y).unsqueeze(1)).sum()
    (slope,) = torch.autograd.grad(chosen, output, allow_unused=True)
    if slope is None:
        raise ValueError("gradcam: the logits do not depend on the chosen layer; name another layer=")
    maps, slope = (_as_map(channels_first(v.detach(), module, x), x) for v in (output, slope))
    cam = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    return F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1


def _as_map(output: Tensor, x: Tensor) -> Tensor:
    """Tokens (B, N, C), without one that is no patch, as (B, C, h, w) of the image's proportions."""
    if output.ndim == 3:
        tall, wide = x.shape[2:]
        for tokens in (output, output[:, 1:]):
            h = round(math.sqrt(tokens.shape[1] * tall / wide))
            if h and h * h * wide == tokens.shape[1] * tall:
                output = tokens.transpose(1, 2).unflatten(2, (h, -1))
                break
    if not _is_map(output):
        raise ValueError(f"gradcam needs a layer that gives feature maps (B, C, h, w), it gives {tuple(output.shape)}")
    return output


@attribution(label="Guided backpropagation", source="arXiv:1412.6806")
def guided_backprop(model: nn.Module, x: Tensor, y: Tensor, rows: int) -> Tensor:
    """Gradient that each ReLU lets back only where it is positive. Every ReLU must be an ``nn.ReLU``."""
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    calls: set[Any] = set()  # nodes of the graph
    ends: list[Tensor] = []
    with (
        _hooks(relus, _own_input, before=True),
        _hooks(relus, lambda module, inputs, output: calls.add(output.grad_fn)),
        _hooks([model], lambda module, inputs, output: ends.append(output)),
    ):
        result = by_captum("GuidedBackprop", model, x, y)
    pending, seen = [ends[-1].grad_fn], set()
    while pending:
        if (node := pending.pop()) is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    found = {n for n in seen if n.name() == "ReluBackward0" or getattr(n, "_saved_min", None) == 0}  # or clamp(min=0)
    if not found & calls or found - calls:
        problem = "applies ReLU as a function" if found else "has none"
        raise ValueError(f"guided_backprop needs ReLUs that are modules (nn.ReLU); {type(model).__name__} {problem}")
    return result


def _own_input(module: nn.Module, inputs: Any) -> Any:
    # captum replaces the gradient of a module's input for whatever else uses that tensor, such as a shortcut, and too
    # late for another nonlinearity that made it: without a copy, DeepLIFT of ReLU and pooling in a row is wrong
    own = inputs[0].clone()
    if torch.is_grad_enabled() and not own.requires_grad:  # a constant, which captum hooks like all others
        own.requires_grad_()
    return (own,)


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook) if before else m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
