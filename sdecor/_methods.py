"""The methods behind `sdecor.saliency.attribute`, one function each, named as in its registry.

Each takes a model in evaluation mode, images, their classes and the most rows of a forward pass, then its options by
name. Those that are slow (but guided_ig) get one image at a time. Random numbers come from torch's global CPU state.
"""

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

from sdecor.models import layer as find_layer
from sdecor.saliency import _classes, _one_pass, pixel_score, superpixels

ONE_PASS = ("gradient", "absolute", "input_x_gradient", "gradcam")  # these take the predicted class by themselves

# The modules that captum has a rescale rule for, less Softmax, whose rule mixes the images of a batch.
_RESCALED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d)


def gradient(model: nn.Module, x: Tensor, y: Tensor | None, rows: int) -> Tensor:
    return _one_pass(model, x, y)[1]


def absolute(model: nn.Module, x: Tensor, y: Tensor | None, rows: int) -> Tensor:
    return pixel_score(gradient(model, x, y, rows))


def input_x_gradient(model: nn.Module, x: Tensor, y: Tensor | None, rows: int) -> Tensor:
    return x * gradient(model, x, y, rows)


def smoothgrad(model: nn.Module, x: Tensor, y: Tensor, rows: int, *, samples: int = 25, noise: float = 0.15) -> Tensor:
    draws = torch.randn(samples, *x.shape[1:]).to(x) * (noise * (x.max() - x.min()))
    total = torch.zeros_like(x)
    for part in draws.split(rows):  # captum's NoiseTunnel would draw other numbers for another number of rows
        total += gradient(model, x + part, y.expand(len(part)), rows).sum(0)
    return total / samples


def integrated_gradients(
    model: nn.Module, x: Tensor, y: Tensor, rows: int, *, steps: int = 50, baseline: Any = 0.0
) -> Tensor:
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    result: Tensor = method.attribute(x, baseline, target=y, n_steps=steps, internal_batch_size=rows)
    return result


def guided_ig(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: int,
    *,
    steps: int = 50,
    fraction: float = 0.25,
    max_dist: float = 0.02,
    baseline: Any = 0.0,
) -> Tensor:
    start, end = baseline.flatten(1).double(), x.flatten(1).double()
    gap = end - start
    length = gap.abs().sum(1, keepdim=True)
    rank = int(fraction * (gap.shape[1] - 1)) + 1
    here, total = start.clone(), torch.zeros_like(gap)
    for step in range(1, steps + 1):
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


def deeplift(model: nn.Module, x: Tensor, y: Tensor, rows: int, *, baseline: Any = 0.0) -> Tensor:
    from captum.attr import DeepLift

    model = _rescalable(model, x)
    parts = zip(*(v.split(max(1, rows // 2)) for v in (x, baseline, y)), strict=True)  # a row each for the baselines
    with _hooks(_of_kinds(model), _own_input, before=True):
        return torch.cat([DeepLift(model).attribute(a.clone(), b.clone(), target=t) for a, b, t in parts])


def _rescalable(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with each module of `_RESCALED` used once, if all its other parts are affine."""
    calls: Counter[nn.Module] = Counter()

    def straight(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls[module] += 1
        return inputs[0].clone() if output.shape == inputs[0].shape else F.interpolate(inputs[0], output.shape[2:])

    with torch.no_grad(), _hooks(_of_kinds(model), straight):
        a, b = torch.randn(2, 1, *x.shape[1:]).to(x)
        values = torch.stack([model(v) for v in (a + b, a, b, torch.zeros_like(a))])
    bend = (values[0] - values[1] - values[2] + values[3]).abs().max()
    names = ", ".join(kind.__name__ for kind in _RESCALED)
    if bend > torch.finfo(x.dtype).eps ** 0.5 * values.abs().max():
        raise ValueError(
            f"deeplift needs every nonlinearity of {type(model).__name__} to be one of the modules {names}; it has "
            "another one, or a function such as F.relu"
        )
    for module in calls:
        if isinstance(module, nn.MaxPool2d) and (
            module.dilation not in (1, (1, 1)) or torch.tensor(module.stride).lt(torch.tensor(module.kernel_size)).any()
        ):
            raise ValueError(f"deeplift has no rule for windows that overlap, as in {module}")
    if max(calls.values(), default=0) <= 4:  # once in each of the four passes
        return model
    try:
        return _unrolled(model)
    except Exception as error:
        reused = ", ".join(name for name, module in model.named_modules() if calls[module] > 4)
        raise ValueError(f"deeplift needs one module per use, but {reused} is used more than once") from error


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


def guided_backprop(model: nn.Module, x: Tensor, y: Tensor, rows: int) -> Tensor:
    from captum.attr import GuidedBackprop

    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    calls: list[nn.Module] = []
    with torch.enable_grad(), _hooks(relus, lambda module, *_: calls.append(module)):
        pending = [model(x[:1].clone().requires_grad_()).grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        pending += new
    found = sum(node.name() == "ReluBackward0" for node in seen)
    if not calls or found > len(calls):
        problem = "applies ReLU as a function" if found else "has none"
        raise ValueError(f"guided_backprop needs ReLUs that are modules (nn.ReLU); {type(model).__name__} {problem}")
    with _hooks(relus, _own_input, before=True):
        result: Tensor = GuidedBackprop(model).attribute(x, target=y)
    return result


def gradcam(model: nn.Module, x: Tensor, y: Tensor | None, rows: int, *, layer: str = "") -> Tensor:
    found: list[Tensor] = []
    norm: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            found[:] = norm or found
        elif isinstance(module, nn.LayerNorm):
            norm[:] = [output]
        if layer or (_is_map(output) and not _is_embedding(module)):
            found[:] = [output]

    with torch.enable_grad(), _hooks([find_layer(model, layer)] if layer else model.modules(), keep):
        logits = model(x.clone().requires_grad_())
        if not found:
            raise ValueError(f"gradcam found no feature map in {type(model).__name__}; name a layer=")
        chosen = logits.gather(1, _classes(logits, y).unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(chosen, found, allow_unused=True)
    if slope is None:
        raise ValueError("gradcam: the logits do not depend on the chosen layer; name another layer=")
    maps, slope = (_as_map(v.detach(), x) for v in (found[0], slope))
    cam = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    return F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.kernel_size[0] == module.stride[0]


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


def occlusion(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: int,
    *,
    window: int | None = None,
    stride: int | None = None,
    baseline: Any = 0.0,
) -> Tensor:
    from captum.attr import Occlusion

    side = min(x.shape[2:])
    window = max(1, round(side / 6)) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window <= side:
        raise ValueError(f"need 1 <= stride <= window <= {side}, got window={window} and stride={stride}")
    result: Tensor = Occlusion(model).attribute(
        x,
        (x.shape[1], window, window),
        (x.shape[1], stride, stride),
        baselines=baseline,
        target=y,
        perturbations_per_eval=rows,
    )
    return result[:, 0]


def rise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: int,
    *,
    samples: int = 1000,
    grid: int = 7,
    keep: float = 0.5,
    baseline: Any = 0.0,
) -> Tensor:
    h, w = x.shape[2:]
    cell = -(-h // grid), -(-w // grid)
    coarse = (torch.rand(samples, 1, grid, grid) < keep).to(x)
    shift = (torch.rand(samples, 2) * torch.tensor(cell)).long().tolist()
    total = torch.zeros_like(x[:, 0])
    for start in range(0, samples, rows):
        size = [(grid + 1) * side for side in cell]
        large = F.interpolate(coarse[start : start + rows], size, mode="bilinear", align_corners=False)
        masks = torch.stack([m[:, i : i + h, j : j + w] for m, (i, j) in zip(large, shift[start:], strict=False)])
        with torch.no_grad():
            probability = model(baseline + (x - baseline) * masks).softmax(1)[:, y]
        total += (probability[..., None] * masks[:, 0]).sum(0)
    return total / (samples * keep)


def feature_ablation(
    model: nn.Module, x: Tensor, y: Tensor, rows: int, *, segments: Any = 64, baseline: Any = 0.0
) -> Tensor:
    from captum.attr import FeatureAblation

    return _by_region(FeatureAblation(model), x, y, rows, segments, baseline)


def kernel_shap(
    model: nn.Module, x: Tensor, y: Tensor, rows: int, *, segments: Any = 64, samples: int = 500, baseline: Any = 0.0
) -> Tensor:
    from captum.attr import KernelShap

    return _by_region(KernelShap(model), x, y, rows, segments, baseline, n_samples=samples)


def shapley_sampling(
    model: nn.Module, x: Tensor, y: Tensor, rows: int, *, segments: Any = 64, samples: int = 10, baseline: Any = 0.0
) -> Tensor:
    from captum.attr import ShapleyValueSampling

    return _by_region(ShapleyValueSampling(model), x, y, rows, segments, baseline, n_samples=samples)


def _by_region(method: Any, x: Tensor, y: Tensor, rows: int, segments: Any, baseline: Tensor, **more: int) -> Tensor:
    labels = segments if isinstance(segments, Tensor) else superpixels(x, segments)
    values, labels = labels.unique(return_inverse=True)
    if len(values) < 2:
        raise ValueError("segments must have at least two regions in each image")
    result: Tensor = method.attribute(
        x, baselines=baseline, target=y, feature_mask=labels.unsqueeze(1), perturbations_per_eval=rows, **more
    )
    return result[:, 0]


def _of_kinds(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in _RESCALED]


def _own_input(module: nn.Module, inputs: Any) -> Any:
    # captum replaces the gradient of a module's input for whatever else uses that tensor, such as a shortcut, and too
    # late for another nonlinearity that made it: without a copy, DeepLIFT of ReLU and pooling in a row is wrong
    return (inputs[0].clone(),)


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook) if before else m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
