"""Attribution: which pixels a class logit depends on, by the input gradient and a dozen other methods."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCORES = ("absolute", "signed")


@dataclass(frozen=True)
class Attribution:
    """A method of `attribute`.

    Args:
        title: Name for figures.
        source: Where it is published.
        per_channel: Whether it scores channels, ``(B, C, H, W)``, or whole pixels, ``(B, H, W)``.
        slow: Whether it takes dozens of forward passes or more for an image.
    """

    title: str
    source: str
    per_channel: bool = True
    slow: bool = False


ATTRIBUTIONS = {
    "gradient": Attribution("Gradient", "arXiv:1312.6034"),
    "absolute": Attribution("Absolute gradient", "arXiv:1312.6034", per_channel=False),
    "input_x_gradient": Attribution("Input x gradient", "arXiv:1605.01713"),
    "smoothgrad": Attribution("SmoothGrad", "arXiv:1706.03825", slow=True),
    "integrated_gradients": Attribution("Integrated gradients", "arXiv:1703.01365", slow=True),
    "guided_ig": Attribution("Guided integrated gradients", "arXiv:2106.09788", slow=True),
    "deeplift": Attribution("DeepLIFT", "arXiv:1704.02685"),
    "gradcam": Attribution("Grad-CAM", "arXiv:1610.02391", per_channel=False),
    "guided_backprop": Attribution("Guided backpropagation", "arXiv:1412.6806"),
    "occlusion": Attribution("Occlusion", "arXiv:1311.2901", per_channel=False, slow=True),
    "rise": Attribution("RISE", "arXiv:1806.07421", per_channel=False, slow=True),
    "feature_ablation": Attribution("Superpixel ablation", "arXiv:2009.07896", per_channel=False, slow=True),
    "kernel_shap": Attribution("Kernel SHAP", "arXiv:1705.07874", per_channel=False, slow=True),
    "shapley_sampling": Attribution("Shapley value sampling", "doi:10.1016/j.cor.2008.04.004", False, slow=True),
}

# What numbers the options of the methods may be, both ends included.
_LIMITS = {
    "samples": (1, 10**9),
    "steps": (1, 10**9),
    "noise": (0, 10**9),
    "fraction": (0, 1),
    "max_dist": (0, 1),
    "grid": (1, 10**4),
    "window": (1, 10**4),
    "stride": (1, 10**4),
    "keep": (0.001, 1),
    "segments": (2, 10**9),
}


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


def input_gradient(logits: Tensor, x: Tensor, target: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Gradient of each sample's target logit with respect to its own input.

    It is the gradient of the sum of these logits. Where a sample's logit depends on the others of the batch, as under
    batch normalization in training mode, it holds what a sample does to their logits too.

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


def pixel_score(attribution: Tensor, kind: str = "absolute") -> Tensor:
    """One number per pixel from an attribution.

    Args:
        attribution: ``(B, C, H, W)``, or ``(B, H, W)`` of a method that scores whole pixels.
        kind: ``absolute`` sums magnitudes, so that channels of opposite sign cannot cancel; ``signed`` sums the values,
            as the public code of saliency-guided training does, so that the lowest scores are counter-evidence.

    Returns:
        Scores ``(B, H, W)``; non-negative for ``absolute``.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in SCORES:
        raise ValueError(f"unknown score '{kind}'; known: {', '.join(SCORES)}")
    if attribution.ndim == 3:
        return attribution.abs() if kind == "absolute" else attribution
    if kind == "signed":
        return attribution.sum(1)
    norm: Tensor = torch.linalg.vector_norm(attribution, ord=1, dim=1)  # a third of the time of abs().sum(1)
    return norm


def logits_and_gradient(model: nn.Module, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and input gradient of a trained model, in evaluation mode, from one forward pass.

    Args:
        model: Any classifier ``(B, C, H, W) -> (B, K)``. Its mode and flags are restored.
        x: Images ``(B, C, H, W)``; not modified.
        target: Class indices ``(B,)``; None takes the predicted class.

    Returns:
        Detached logits ``(B, K)`` and gradient ``(B, C, H, W)``.

    Raises:
        ValueError: As `attribute`.
    """
    target = _checked(x, target)
    with frozen_eval(model):
        return _one_pass(model, x, target)


def attribute(
    model: nn.Module,
    x: Tensor,
    target: Tensor | None = None,
    method: str = "gradient",
    *,
    batch_size: int = 64,
    progress: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """How much each pixel contributes to a class logit, by one of `ATTRIBUTIONS`.

    An image's result does not depend on the images beside it, on their order or on `batch_size`: random draws start
    from `seed` for each image.

    ==================== =============================================================================
    method               options
    ==================== =============================================================================
    gradient             none; ``absolute`` sums its magnitudes over channels
    input_x_gradient     none
    smoothgrad           ``samples=25``, ``noise=0.15`` (share of the image's own range of values)
    integrated_gradients ``steps=50``, ``baseline=0.0``
    guided_ig            ``steps=50``, ``fraction=0.25``, ``max_dist=0.02``, ``baseline=0.0``
    deeplift             ``baseline=0.0``; every nonlinearity must be a module with a rescale rule
    gradcam              ``layer=""`` (name of a layer; empty: the last feature map)
    guided_backprop      none; every ReLU must be an ``nn.ReLU``
    occlusion            ``window`` (a sixth of the image), ``stride`` (half the window), ``baseline=0.0``
    rise                 ``samples=1000``, ``grid=7``, ``keep=0.5``, ``baseline=0.0``; of the probability
    feature_ablation     ``segments=64`` (or label maps ``(B, H, W)``, see `superpixels`), ``baseline=0.0``
    kernel_shap          as feature_ablation, and ``samples=500``
    shapley_sampling     as feature_ablation, and ``samples=10``
    ==================== =============================================================================

    Args:
        model: Any classifier ``(B, C, H, W) -> (B, K)``. Its mode and flags are restored.
        x: Images ``(B, C, H, W)``; not modified.
        target: Class indices ``(B,)``; None takes the predicted class.
        method: Key of `ATTRIBUTIONS`.
        batch_size: Most rows in a forward pass.
        progress: Show a bar; None shows one on a terminal, for slow methods.
        seed: For methods that draw; torch's global state is left as it was.
        **options: Of the method. A `baseline` (what a pixel is replaced with) is a number or a tensor broadcastable to
            `x`, in the units of `x`.

    Returns:
        ``(B, C, H, W)``, or ``(B, H, W)`` for methods that are not `per_channel`; signed, detached, with the dtype
        and device of `x`. See `pixel_score`.

    Raises:
        ValueError: Unknown method or option, bad values, or a model that the method would be wrong for.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> attribute(model, torch.rand(3, 1, 2, 2), method="integrated_gradients", steps=8).shape
        torch.Size([3, 1, 2, 2])
    """
    from tqdm import tqdm

    from sdecor import _methods

    if method not in ATTRIBUTIONS:
        raise ValueError(f"unknown method '{method}'; known: {', '.join(ATTRIBUTIONS)}")
    run = getattr(_methods, method)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    target = _checked(x, target)
    options = _checked_options(method, inspect.signature(run), options, x)
    model = getattr(model, "_orig_mod", model)  # hooks need the modules of a compiled model
    slow = ATTRIBUTIONS[method].slow
    # a slow method fills its forward passes with variants of one image; each step of guided_ig needs the last
    images = 1 if slow and method != "guided_ig" else batch_size
    hidden = (None if slow else True) if progress is None else not progress
    parts = []
    with (
        frozen_eval(model),
        torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []),
        warnings.catch_warnings(),
        tqdm(total=len(x), desc=ATTRIBUTIONS[method].title, unit="image", leave=False, disable=hidden) as bar,
    ):
        warnings.simplefilter("ignore")  # captum announces its hooks
        for start in range(0, len(x), images):
            rows = slice(start, start + images)
            part, chosen = x[rows].detach().clone(), None if target is None else target[rows]
            if method not in _methods.ONE_PASS:
                with torch.no_grad():
                    chosen = _classes(model(part if chosen is None else part[:1]), chosen)
            here = {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}
            torch.manual_seed(seed)
            parts.append(run(model, part, chosen, batch_size, **here).detach().to(x.dtype))
            bar.update(len(part))
    return torch.cat(parts)


def superpixels(x: Tensor, segments: int = 64) -> Tensor:
    """Cut each image into connected regions of similar colour.

    Args:
        x: Images ``(B, C, H, W)`` in any units.
        segments: About how many regions.

    Returns:
        Labels ``(B, H, W)`` int64, from 0 without gaps in each image, on the device of `x`.

    Raises:
        ValueError: If `x` is no batch of finite images.

    Source:
        SLIC, Achanta et al. 2012 (doi:10.1109/TPAMI.2012.120).
    """
    import numpy as np
    from skimage.segmentation import slic

    _checked(x)
    pixels = x.detach().permute(0, 2, 3, 1).double().cpu().numpy()
    compactness = 30 if x.shape[1] == 3 else 0.3  # lightness in Lab goes to 100, grey to 1
    labels = [slic(p, segments, compactness, sigma=1, start_label=0, channel_axis=-1) for p in pixels]
    return torch.from_numpy(np.stack(labels)).to(x.device, torch.int64)


def _checked(x: Tensor, target: Tensor | None = None) -> Tensor | None:
    """Check what can be checked before a forward pass; the target as int64 on the device of `x`."""
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


def _classes(logits: Tensor, target: Tensor | None) -> Tensor:
    """The target, or the predicted class; an index out of range would end CUDA for the whole process."""
    if logits.ndim != 2:
        raise ValueError(f"model must return logits (B, K), it returned shape {tuple(logits.shape)}")
    if target is None:
        return logits.argmax(1)
    bad = target[(target < 0) | (target >= logits.shape[1])]
    if len(bad):
        raise ValueError(f"target must lie in 0 to {logits.shape[1] - 1}, got {int(bad[0])}")
    return target


def _checked_options(method: str, signature: inspect.Signature, options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """Options with a value each; what belongs to single images as a tensor with a row for each."""
    known = {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{method} has no option '{name}'; it has: {', '.join(known) or 'none'}")
        if name in _LIMITS and not isinstance(value, Tensor) and value is not known[name]:
            low, high = _LIMITS[name]
            kind, types = ("number", int | float) if isinstance(known[name], float) else ("whole number", int)
            if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
                raise ValueError(f"{name} must be a {kind} from {low:g} to {high:g}, got {value!r}")
    merged = known | options
    if "baseline" in merged:
        baseline = torch.as_tensor(merged["baseline"]).to(x)
        try:
            merged["baseline"] = baseline.detach().expand(x.shape)
        except RuntimeError:
            shape = tuple(baseline.shape)
            raise ValueError(f"baseline of shape {shape} cannot be broadcast to x, {tuple(x.shape)}") from None
        if not baseline.isfinite().all():
            raise ValueError("baseline has NaN or infinity")
    labels = merged.get("segments")
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.shape != x[:, 0].shape:
            wanted, got = tuple(x[:, 0].shape), f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"segments must be integer labels of shape {wanted}; got {got}")
        merged["segments"] = labels.to(x.device)
    return merged


def _one_pass(model: nn.Module, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = model(leaf)
        return logits.detach(), input_gradient(logits, leaf, _classes(logits, target))
