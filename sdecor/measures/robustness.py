"""How much an explanation changes when the image hardly does, and how far two maps agree.

An explanation is a function of images (B, C, H, W) and target (B,) that returns an attribution (B, ...), for example
`lambda x, t: pixel_score(attribute(model, x, t, "gradient"))`. It is to explain each image by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sdecor.measures._checks import require_finite
from sdecor.saliency import frozen_eval, logits_and_gradient, pixel_score

Explain = Callable[[Tensor, Tensor], Tensor]


def max_sensitivity(
    explain: Explain,
    images: Tensor,
    target: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Largest change of the explanation under small noise, relative to the explanation; lower is better.

    Args:
        explain: explanation of images and target, (B, ...).
        images: (B, C, H, W), as the model takes them.
        target: class whose output is explained, (B,).
        radius: half width of the noise, uniform in [-radius, radius] per value, in units of `images`.
        samples: draws of noise, the same for every image of every call with this seed. More find larger changes.
        batch_size: rows per call of `explain`; the result does not depend on it.
        seed: of the noise; torch's random state is left alone.

    Returns:
        (B,) float64, at least 0: max over samples of ``|explain(x + noise) - explain(x)| / |explain(x)|`` in the
        Euclidean norm; NaN where the explanation of the image is zero.

    Raises:
        ValueError: shapes that do not fit, numbers that are not positive, or an explanation with NaN or infinity.

    Source: Yeh et al. 2019, arXiv:1901.09392.

    Example:
        >>> images, target = torch.ones(1, 1, 4, 4), torch.tensor([0])
        >>> max_sensitivity(lambda x, t: torch.ones_like(x), images, target).item()
        0.0
    """
    before, change, _ = _changes(explain, images, target, radius, samples, batch_size, seed)
    return change.amax(1) / torch.where(before > 0, before, torch.nan)


def local_lipschitz(
    explain: Explain,
    images: Tensor,
    target: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Largest change of the explanation under small noise, per change of the image; lower is better.

    A lower bound of the explanation's Lipschitz constant around each image. Unlike `max_sensitivity`, whose arguments
    and noise it shares, it scales with the explanation: compare explanations of one scale only.

    Returns:
        (B,) float64, at least 0: max over samples of ``|explain(x + noise) - explain(x)| / |noise|`` in the Euclidean
        norm; NaN where the noise is too small to change the image's floating point numbers.

    Raises:
        ValueError: shapes that do not fit, numbers that are not positive, or an explanation with NaN or infinity.

    Source: Alvarez-Melis and Jaakkola 2018, arXiv:1806.08049.

    Example:
        >>> local_lipschitz(lambda x, t: 2 * x, torch.zeros(1, 1, 4, 4), torch.tensor([0])).item()
        2.0
    """
    _, change, distance = _changes(explain, images, target, radius, samples, batch_size, seed)
    return (change / distance).amax(1)


def attack(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    softplus_beta: float = 5.0,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Find images close by that the model classifies alike but whose gradient map differs; see `explanation_shift`.

    Projected signed steps raise 1 - cosine similarity of `pixel_score(input gradient)`, from a small random start,
    since at the image itself it has no slope. ReLU has no second derivative: while a step is computed, every call of it
    (`nn.ReLU`, `F.relu`, `torch.relu`) gives a softplus. The model as it is judges the step: one that changes the
    predicted class is not taken, and that image's next is half as long. The largest shift on the way is kept.

    Args:
        model: classifier of images (B, C, H, W); its mode and flags are restored.
        images: (B, C, H, W), as the model takes them, on the model's device.
        target: class whose gradient is attacked, (B,).
        epsilon: largest change of any value, in units of `images`, which are not held to a range.
        steps: number of steps.
        step_size: change of each value in one step; None for epsilon / 2.
        softplus_beta: sharpness of the softplus; larger is closer to ReLU, smaller sees further.
        batch_size: images per forward pass; the result does not depend on it, up to rounding.
        seed: of the random start, the same for all images.

    Returns:
        (B, C, H, W) within `epsilon` of `images`; the image itself where nothing better was found.

    Raises:
        ValueError: shapes that do not fit, numbers that are not positive, or a model whose input gradient does not
            depend on the input once ReLU is smooth (linear, or piecewise linear by something else than ReLU).

    Source: Ghorbani et al. 2019, arXiv:1710.10547; the softplus is that of Dombrowski et al. 2019, arXiv:1906.07983.
    """
    size = epsilon / 2 if step_size is None else step_size
    _check(
        images, target, epsilon=epsilon, steps=steps, step_size=size, softplus_beta=softplus_beta, batch_size=batch_size
    )

    def judged(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, gradient = _chunked(partial(logits_and_gradient, model), batch_size, x, target)
        return logits.argmax(1), pixel_score(gradient)

    images = images.detach()
    label, reference = judged(images)
    current = best = images
    candidate = images + epsilon / 100 * _noise(images, 1, seed)
    step = torch.full((len(images), 1, 1, 1), size, dtype=images.dtype, device=images.device)
    largest = torch.zeros_like(step, dtype=torch.float64)
    for i in range(steps + 1):
        if i > 0:
            (direction,) = _chunked(partial(_uphill, model, softplus_beta), batch_size, current, target, reference)
            if i == 1 and len(images) and not direction.any():
                raise ValueError(
                    f"the input gradient of this {type(model).__name__} does not depend on the input, ReLU smoothed; "
                    "a model with ReLU or smooth activations can be attacked"
                )
            candidate = torch.clamp(current + step * direction, images - epsilon, images + epsilon)
        found, score = judged(candidate)
        keep = (found == label).view(-1, 1, 1, 1)
        gain = 1 - _cosine(score, reference).view(-1, 1, 1, 1)
        better = keep & (gain > largest)
        largest, best = torch.where(better, gain, largest), torch.where(better, candidate, best)
        current, step = torch.where(keep, candidate, current), torch.where(keep, step, step / 2)
    return best


def explanation_shift(explain: Explain, images: Tensor, adversarial: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity of the explanations of each image and of its changed copy; lower is better.

    Args:
        explain: explanation of images and target, (B, ...); it is called once for all images, then for all copies.
        images: (B, C, H, W), as the model takes them.
        adversarial: (B, C, H, W), for example from `attack`.
        target: class whose output is explained, (B,).

    Returns:
        (B,) float64, in [0, 1] for non-negative maps, else in [0, 2]; NaN where one of the two is zero.

    Raises:
        ValueError: shapes that differ, or an explanation with NaN or infinity.

    Source: Dombrowski et al. 2019, arXiv:1906.07983, use other distances of the same pair of maps.

    Example:
        >>> images, target = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([0])
        >>> explanation_shift(lambda x, t: x, images, images.flip(3), target).item()
        1.0
    """
    if images.shape != adversarial.shape:
        raise ValueError(f"adversarial has shape {tuple(adversarial.shape)}, images have {tuple(images.shape)}")
    _check(images, target)
    return 1 - _cosine(_explained(explain, images, target), _explained(explain, adversarial, target))


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps, ties given their average rank; higher is more alike.

    Args:
        a: maps of any sign, (B, H, W).
        b: maps of any sign, (B, H, W).

    Returns:
        (B,) float64 in [-1, 1]; NaN where a map is constant.

    Raises:
        ValueError: shapes that differ, or NaN or infinite values.

    Source: Spearman 1904, doi:10.2307/1412159.

    Example:
        >>> a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> spearman(a, a.exp()).item(), spearman(a, -a).item()
        (1.0, -1.0)
    """
    _check_maps(a, b)
    return _cosine(_centred_ranks(a), _centred_ranks(b))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two maps, each divided by its own maximum; higher is more alike.

    Args:
        a: non-negative maps, at least 7 by 7 pixels, (B, H, W).
        b: non-negative maps, (B, H, W).

    Returns:
        (B,) float64 in [-1, 1], of scikit-image with a window of 7 by 7 and a data range of 1; NaN where a map is zero.

    Raises:
        ValueError: shapes that differ, maps that are too small, or negative, NaN or infinite values.

    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861.

    Example:
        >>> a = torch.rand(1, 8, 8)
        >>> round(ssim(a, 3 * a).item(), 6)
        1.0
    """
    from skimage.metrics import structural_similarity

    _check_maps(a, b)
    if min(a.shape[1:]) < 7:
        raise ValueError(f"a and b must have at least 7 by 7 pixels, got {tuple(a.shape[1:])}")
    if (a < 0).any() or (b < 0).any():
        raise ValueError("a and b must be non-negative; pass their absolute values")
    pair = [(m.detach().double() / m.detach().double().amax((1, 2), keepdim=True)).cpu().numpy() for m in (a, b)]
    measure: Callable[..., float] = partial(structural_similarity, win_size=7, data_range=1.0)
    return torch.tensor(list(map(measure, *pair)), dtype=torch.float64, device=a.device)


def _changes(
    explain: Explain, images: Tensor, target: Tensor, radius: float, samples: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of each explanation (B,), and of its change and of the image's under each sample of noise (B, samples)."""
    # captum's sensitivity_max takes all images into every call, and does not give the distance
    _check(images, target, radius=radius, samples=samples, batch_size=batch_size)
    images, noise = images.detach(), radius * _noise(images, samples, seed)
    (before,) = _chunked(lambda *part: (_explained(explain, *part),), batch_size, images, target)

    def change(row: Tensor) -> tuple[Tensor, Tensor]:
        image = row // samples
        moved = images[image] + noise[row % samples]
        after = _explained(explain, moved, target[image])
        return (after - before[image]).norm(dim=1), (moved - images[image]).flatten(1).double().norm(dim=1)

    rows = torch.arange(len(images) * samples, device=images.device)
    changes, distances = _chunked(change, batch_size, rows)
    return before.norm(dim=1), changes.view(-1, samples), distances.view(-1, samples)


def _noise(images: Tensor, samples: int, seed: int) -> Tensor:
    """Uniform in [-1, 1], (samples, C, H, W), the same on every device."""
    draws = torch.rand(samples, *images.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * draws - 1).to(images)


def _chunked(function: Callable[..., Iterable[Tensor]], batch_size: int, *rows: Tensor) -> list[Tensor]:
    parts = [function(*part) for part in zip(*(r.split(batch_size) for r in rows), strict=True)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _explained(explain: Explain, images: Tensor, target: Tensor) -> Tensor:
    """The explanation as float64 rows (B, n)."""
    result = explain(images, target)
    if len(result) != len(images):
        raise ValueError(f"explain gave shape {tuple(result.shape)} for {len(images)} images; it must be (B, ...)")
    require_finite(result, "the result of explain")
    return result.detach().flatten(1).double()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the rows, (B,) float64; NaN for a row of zeros."""
    first, second = a.flatten(1).double(), b.flatten(1).double()
    product: Tensor = (first / first.norm(dim=1, keepdim=True)) * (second / second.norm(dim=1, keepdim=True))
    return product.sum(1).clamp(-1, 1)


class _SmoothReLU(TorchFunctionMode):
    """Within this context every ReLU, as module or function, is a softplus."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_):
            return F.softplus(args[0] if args else (kwargs or {})["input"], self.beta)
        return func(*args, **(kwargs or {}))


def _uphill(model: nn.Module, beta: float, x: Tensor, target: Tensor, reference: Tensor) -> tuple[Tensor]:
    """Signs of the direction in which the smoothed model's map loses similarity with `reference`, (B, C, H, W)."""
    # the fast attention kernels have no second derivative
    with frozen_eval(model), torch.enable_grad(), _SmoothReLU(beta), sdpa_kernel(SDPBackend.MATH):
        leaf = x.clone().requires_grad_()
        chosen = model(leaf).gather(1, target.unsqueeze(1)).sum()
        gradient = torch.autograd.grad(chosen, leaf, create_graph=True)[0]
        if not gradient.requires_grad:
            return (torch.zeros_like(x),)
        similarity = F.cosine_similarity(pixel_score(gradient).flatten(1), reference.flatten(1))
        return (-torch.autograd.grad(similarity.sum(), leaf)[0].sign(),)


def _centred_ranks(a: Tensor) -> Tensor:
    """Average rank of each pixel less the mean rank, (B, n) float64."""
    flat = a.detach().flatten(1).double().contiguous()
    ordered = flat.sort(1).values
    twice = torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) - flat.shape[1]
    return twice.double() / 2


def _check(images: Tensor, target: Tensor, **positive: float | None) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    if target.shape != images.shape[:1] or target.is_floating_point():
        got = f"shape {tuple(target.shape)} of {target.dtype}"
        raise ValueError(f"target must be {len(images)} whole numbers, got {got}")
    for name, value in positive.items():
        if value is None or not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")


def _check_maps(a: Tensor, b: Tensor) -> None:
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape (B, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")
    require_finite(a, "a")
    require_finite(b, "b")
