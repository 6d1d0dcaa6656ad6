"""How much an explanation changes when the image hardly does, and how far two maps agree.

An explanation, `maps_of`, is a function of images (B, C, H, W), as the model takes them, and target (B,), the class
whose output is explained. It returns maps (B, ...), for example
`lambda x, t: pixel_score(attribute(model, x, t, "gradient"))`, and is to explain each image by itself. Measures give
(B,) float64. Noise is drawn from `seed` and the same for every image, `radius` and `epsilon` are in units of the
images, and results do not depend on `batch_size`, the rows per call, up to rounding. All raise ValueError for shapes
that do not fit, numbers that are not positive, and maps with NaN or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sdecor.measures._checks import by_chunks, require_finite, require_images
from sdecor.measures.case import measure, quantity
from sdecor.saliency import frozen_eval, input_gradient, logits_and_gradient, logits_of, pixel_score
from sdecor.whitening import require_tensors

Explain = Callable[[Tensor, Tensor], Tensor]


@measure("max-sensitivity", better="lower", low=0, high=math.inf)
def max_sensitivity(
    maps_of: Explain,
    images: Tensor,
    target: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Largest change of the explanation under small noise, relative to the explanation; lower is better.

    The max over `samples` of ``|maps_of(x + noise) - maps_of(x)| / |maps_of(x)|``, Euclidean, of noise uniform in
    [-radius, radius] per value; NaN where the explanation of the image is zero.
    Source: Yeh et al. 2019, arXiv:1901.09392.
    """
    before, change, _ = _changes(maps_of, images, target, radius, samples, batch_size, seed)
    return change.amax(1) / torch.where(before > 0, before, torch.nan)


@measure("local Lipschitz", better="lower", low=0, high=math.inf)
def local_lipschitz(
    maps_of: Explain,
    images: Tensor,
    target: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Largest change of the explanation under the noise of `max_sensitivity`, per change of the image; lower is better.

    The max over `samples` of ``|maps_of(x + noise) - maps_of(x)| / |noise|``: it scales with the explanation. NaN where
    the noise is too small to change the image's floating point numbers.
    Source: Alvarez-Melis and Jaakkola 2018, arXiv:1806.08049.
    """
    _, change, distance = _changes(maps_of, images, target, radius, samples, batch_size, seed)
    return (change / distance).amax(1)


def attack(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Images (B, C, H, W) within `epsilon` of the given ones, classified alike but with another gradient map.

    Projected signed steps of epsilon / 2 raise 1 - cosine similarity of `pixel_score(input gradient of the target)`,
    from a small random start, since at the image itself it has no slope. ReLU has no second derivative: while a step is
    computed, every call of it (`nn.ReLU`, `F.relu`, `torch.relu`) gives a softplus. The model as it is judges the step:
    one that changes the predicted class is not taken, and that image's next is half as long. The largest shift on the
    way is kept. A model whose input gradient does not depend on the input even so raises ValueError.
    Source: Ghorbani et al. 2019, arXiv:1710.10547; the softplus is that of Dombrowski et al. 2019, arXiv:1906.07983.
    """
    require_images(images, target, epsilon=epsilon, steps=steps, batch_size=batch_size)

    def judged(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [logits_and_gradient(model, *part) for part in _chunks(batch_size, x, target)]
        logits, gradient = map(torch.cat, zip(*parts, strict=True))
        return logits.argmax(1), pixel_score(gradient)

    images = images.detach()
    label, reference = judged(images)
    current = best = images
    candidate = images + epsilon / 100 * _noise(images, 1, seed)
    step = torch.full((len(images), 1, 1, 1), epsilon / 2, dtype=images.dtype, device=images.device)
    largest = torch.zeros_like(step, dtype=torch.float64)
    for i in range(steps + 1):
        if i > 0:
            parts = _chunks(batch_size, current, target, reference)
            direction = torch.cat([_uphill(model, *part) for part in parts])
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


@quantity()
def adversarial(model: nn.Module, images: Tensor, target: Tensor, radius: float, batch_size: int, seed: int) -> Tensor:
    """Images from `attack` within `radius`, (B, C, H, W)."""
    return attack(model, images, target, epsilon=radius, batch_size=batch_size, seed=seed)


@measure("shift under attack", better="lower", low=0, high=1)
def explanation_shift(maps_of: Explain, images: Tensor, adversarial: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity of the explanations of each image and of its changed copy, as from `attack`.

    In [0, 1] for non-negative maps, else in [0, 2]; NaN where one of the two is zero; lower is better.
    Source: Dombrowski et al. 2019, arXiv:1906.07983, use other distances of the same pair of maps.
    """
    require_images(images, target)
    require_tensors(adversarial=adversarial)
    if images.shape != adversarial.shape:
        raise ValueError(f"adversarial has shape {tuple(adversarial.shape)}, images have {tuple(images.shape)}")
    return 1 - _cosine(*(_explained(maps_of, x, target) for x in (images, adversarial)))


def spearman(a: Tensor, b: Tensor, *, chunk: int | None = None) -> Tensor:
    """Spearman's rank correlation of two maps (B, H, W) of any sign, in [-1, 1]; NaN where one is constant.

    Ties have their average rank. It takes `chunk` maps at a time, None as many as have two million pixels, which bounds
    the memory. Source: Spearman 1904, doi:10.2307/1412159.
    """
    from scipy.stats import rankdata

    def correlation(*rows: Tensor) -> Tensor:
        ranks = (torch.from_numpy(rankdata(r.double().numpy(), axis=1) - (r.shape[1] + 1) / 2) for r in rows)
        return _cosine(*ranks)

    _check_maps(a, b)
    return by_chunks(correlation, chunk, *(m.detach().flatten(1).cpu() for m in (a, b))).to(a.device)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two non-negative maps (B, H, W), each divided by its maximum; NaN where one is zero.

    That of scikit-image, in [-1, 1], with a window of 7 by 7 pixels. Source: Wang et al. 2004,
    doi:10.1109/TIP.2003.819861.
    """
    from skimage.metrics import structural_similarity

    _check_maps(a, b)
    if min(a.shape[1:]) < 7:
        raise ValueError(f"a and b must have at least 7 by 7 pixels, got {tuple(a.shape[1:])}")
    if (a < 0).any() or (b < 0).any():
        raise ValueError("a and b must be non-negative; pass their absolute values")
    measure: Callable[..., float] = partial(structural_similarity, win_size=7, data_range=1.0)
    pairs = (((m.double() / m.max()).cpu().numpy() for m in pair) for pair in zip(a.detach(), b.detach(), strict=True))
    return torch.tensor([measure(*pair) for pair in pairs], dtype=torch.float64, device=a.device)


def _changes(
    maps_of: Explain, images: Tensor, target: Tensor, radius: float, samples: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of each explanation (B,), and of its change and of the image's under each sample of noise (B, samples)."""
    # captum's sensitivity_max takes all images into every call, and does not give the distance
    require_images(images, target, radius=radius, samples=samples, batch_size=batch_size)
    images, noise = images.detach(), radius * _noise(images, samples, seed)
    before = torch.cat([_explained(maps_of, *part) for part in _chunks(batch_size, images, target)])

    def change(row: Tensor) -> tuple[Tensor, Tensor]:
        image = row // samples
        moved = images[image] + noise[row % samples]
        after = _explained(maps_of, moved, target[image])
        return (after - before[image]).norm(dim=1), (moved - images[image]).flatten(1).double().norm(dim=1)

    rows = torch.arange(len(images) * samples, device=images.device)
    changes, distances = map(torch.cat, zip(*map(change, rows.split(batch_size)), strict=True))
    return before.norm(dim=1), changes.view(-1, samples), distances.view(-1, samples)


def _noise(images: Tensor, samples: int, seed: int) -> Tensor:
    """Uniform in [-1, 1], (samples, C, H, W), the same on every device."""
    draws = torch.rand(samples, *images.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * draws - 1).to(images)


def _chunks(batch_size: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part.split(batch_size) for part in rows), strict=True)


def _explained(maps_of: Explain, images: Tensor, target: Tensor) -> Tensor:
    """The explanation as float64 rows (B, n)."""
    result = maps_of(images, target)
    if not isinstance(result, Tensor):
        raise ValueError(f"maps_of must give a tensor, it gave {type(result).__name__}")
    if len(result) != len(images):
        raise ValueError(f"maps_of gave shape {tuple(result.shape)} for {len(images)} images; it must be (B, ...)")
    require_finite(result, "the result of maps_of")
    return result.detach().flatten(1).double()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the rows, (B,) float64; NaN for a row of zeros."""

    def cosine(*rows: Tensor) -> Tensor:
        first, second = (row / row.norm(dim=1, keepdim=True) for row in rows)
        product: Tensor = first * second
        return product.sum(1).clamp(-1, 1)

    return by_chunks(cosine, None, a.flatten(1), b.flatten(1))


class _SmoothReLU(TorchFunctionMode):
    """Within this context every ReLU, as module or function, is a softplus."""

    beta = 5.0  # larger is closer to ReLU, smaller sees further

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in (F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_):
            x: Tensor = args[0] if args else named["input"]
            if func in (torch.relu_, Tensor.relu_) or named.get("inplace", args[1:] == (True,)):
                return x.copy_(F.softplus(x.clone(), self.beta))
            return F.softplus(x, self.beta)
        return func(*args, **named)


def _uphill(model: nn.Module, x: Tensor, target: Tensor, reference: Tensor) -> Tensor:
    """Signs of the direction in which the smoothed model's map loses similarity with `reference`, (B, C, H, W)."""
    # the fast attention kernels have no second derivative
    off = torch.inference_mode(False)
    with off, torch.enable_grad(), frozen_eval(model), _SmoothReLU(), sdpa_kernel(SDPBackend.MATH):
        leaf, target, reference = x.clone().requires_grad_(), target.clone(), reference.clone()
        gradient = input_gradient(logits_of(model, leaf), leaf, target, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(x)
        similarity = F.cosine_similarity(pixel_score(gradient).flatten(1), reference.flatten(1))
        return -torch.autograd.grad(similarity.sum(), leaf)[0].sign()


def _check_maps(a: Tensor, b: Tensor) -> None:
    require_tensors(a=a, b=b)
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape (B, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")
    require_finite(a, "a")
    require_finite(b, "b")
