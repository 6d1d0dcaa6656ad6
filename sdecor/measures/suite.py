"""All measures of one trained model on held-out images, as the experiment chapters report them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sdecor.data import ImageData, ImageStream
from sdecor.masking import lowest, masked, replacement
from sdecor.measures.faithfulness import masked_accuracy
from sdecor.measures.localization import chance_level
from sdecor.measures.registry import METRICS, RECOMMENDED, Case, available, evaluate, known
from sdecor.measures.representation import (
    Covariance,
    condition_number,
    effective_rank,
    mean_abs_correlation,
    participation_ratio,
)
from sdecor.models import default_layers
from sdecor.objective import capture
from sdecor.saliency import attribute, logits_and_gradient, pixel_score

FRACTIONS = tuple(i / 10 for i in range(10))
FILLS = ("uniform", "constant")
BINS = 101
MOST = 1000
_FEATURES = {
    "correlation": mean_abs_correlation,
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
    "condition_number": condition_number,
}


def object_masks(data: ImageData | ImageStream) -> Tensor | None:
    """Where the object is: exact masks if `data` has them, the inked pixels (> 0) of a digit, otherwise None.

    Returns:
        Boolean ``(N, H, W)`` or None.
    """
    if isinstance(data, ImageStream):
        return None
    if data.masks is not None:
        return data.masks
    return (data.images > 0).any(1) if data.name in ("mnist", "digits") else None


def gradient_histogram(gradient: Tensor, bins: int = BINS) -> Tensor:
    """Histogram of gradient values, each image's divided by its own largest magnitude.

    Args:
        gradient: ``(B, C, H, W)``.
        bins: Equal bins on [-1, 1].

    Returns:
        Counts ``(bins,)``; images with an all-zero gradient are left out.
    """
    flat = gradient.flatten(1)
    peak = flat.abs().amax(1, keepdim=True)
    scaled = (flat / peak)[peak.squeeze(1) > 0]
    return torch.histc(scaled.float().cpu(), bins=bins, min=-1, max=1)


def remove_salient(
    data: ImageData | ImageStream,
    model: nn.Module | None,
    method: str,
    fraction: float,
    *,
    batch_size: int = 500,
    seed: int = 0,
) -> ImageData:
    """Replace the most salient pixels of every image by the mean colour: the data of remove and retrain (ROAR).

    Args:
        data: Images in memory; not changed. The result keeps its `object_masks`.
        model: Classifier whose predicted class is explained; None removes pixels at random.
        method: Name in `sdecor.saliency.ATTRIBUTIONS`, if there is a model.
        fraction: Share of the pixels, in (0, 1).
        batch_size: Images at a time.
        seed: Of what the method draws, and of the random pixels.

    Raises:
        ValueError: If the images are streamed from files.

    Source:
        Hooker et al. 2019 (arXiv:1806.10758).
    """
    if isinstance(data, ImageStream):
        raise ValueError("removed needs images in memory, and these are streamed; raise memory_limit")
    draws = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device if model is not None else data.device
    colour = torch.tensor(data.mean, device=data.device).mul(255).round().to(torch.uint8).view(1, -1, 1, 1)
    parts = []
    for images, (x, _) in zip(data.images.split(batch_size), data.batches(batch_size), strict=True):
        if model is None:
            score = torch.rand(len(x), *x.shape[2:], generator=draws)
        else:
            score = pixel_score(attribute(model, x.to(device), None, method, seed=seed, progress=False))
        parts.append(masked(images, lowest(-score, fraction).to(data.device), colour.expand_as(images)))
    return replace(data, images=torch.cat(parts), masks=object_masks(data))  # the mean colour is no ink


def measure(
    model: nn.Module,
    data: ImageData | ImageStream,
    *,
    layers: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
    batch_size: int = 500,
    seed: int = 0,
    thorough: bool = True,
    metrics: Iterable[str] = RECOMMENDED,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Accuracy, and what the measures say of the gradient of the predicted class and of the features.

    Args:
        model: Trained classifier; its mode and flags are restored.
        data: Held-out images.
        layers: Layers whose features are described; empty takes `sdecor.models.default_layers`.
        device: Where to compute.
        batch_size: Images at a time; measures do not depend on it, the accuracy curves do by the noise of their fill.
        seed: Of all draws.
        thorough: Compute `metrics` that need the model, and the accuracy curves: nearly all of the time goes there.
        metrics: Names in `sdecor.measures.registry.METRICS`, on at most `MOST` of the images; those that need the map
            alone, or the map and a mask, are always added, on all of them.

    Returns:
        ``metrics``, means over images (a measure that is undefined on these images is absent), and ``curves``: accuracy
        at each of `FRACTIONS` masked, by fill and order, and the histogram of gradient values.

    Raises:
        ValueError: If a metric is unknown, or the model's gradient has NaN or infinity.
    """
    names = layers or default_layers(model)
    data = data.to(device)
    model.to(device)
    of_map = [name for name, metric in METRICS.items() if set(metric.needs) <= {"mask"}]
    rest = [name for name in known(metrics) if thorough and name not in of_map]
    per_image: dict[str, list[Tensor]] = defaultdict(list)
    curves: dict[str, list[Tensor]] = defaultdict(list)
    statistics = {name: Covariance() for name in names}
    histogram = torch.zeros(BINS, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(seed)
    black = torch.tensor([-m / s for m, s in zip(data.mean, data.std, strict=True)], device=device)
    with capture(model, names) as features:
        for case, y, right in _cases(model, data, batch_size, seed):
            for name, z in features.items():
                statistics[name].update(z.detach())
            per_image["accuracy"].append(right)
            for name, values in evaluate(case, [n for n in available(case) if n in of_map]).items():
                per_image[name].append(values)
            if case.mask is not None:
                per_image["object_area"].append(chance_level(case.mask))
            histogram += gradient_histogram(case.attribution)
            for fill in FILLS if thorough else ():
                x = case.images
                assert x is not None
                new = (
                    black.view(1, -1, 1, 1).expand_as(x)
                    if fill == "constant"
                    else replacement(x, fill, generator=generator)
                )
                for order in ("most", "random"):
                    kept = masked_accuracy(model, x, y, case.score, FRACTIONS, new, order=order, generator=generator)
                    curves[f"masked_{fill}_{order}"].append(kept)
    for case, _, _ in _cases(model, data.subset(MOST), batch_size, seed) if rest else ():
        for name, values in evaluate(case, rest).items():
            per_image[name].append(values)
    joined = {name: torch.cat(values).double() for name, values in per_image.items()}
    means = {name: float(v.nanmean()) for name, v in joined.items() if not bool(v.isnan().all())}
    for name, s in statistics.items():
        described = {f"{kind}_{name}": float(function(s)) for kind, function in _FEATURES.items()}
        means |= {key: value for key, value in described.items() if math.isfinite(value)}
    out = {name: torch.cat(parts, 1).double().mean(1).tolist() for name, parts in curves.items()}
    out["gradient_histogram"] = (histogram / histogram.sum().clamp_min(1)).tolist()
    return means, out


def _cases(
    model: nn.Module, data: ImageData | ImageStream, batch_size: int, seed: int
) -> Iterator[tuple[Case, Tensor, Tensor]]:
    """The gradient maps of the predicted class, batch by batch, with the labels and where the prediction is right."""
    masks, start = object_masks(data), 0
    for x, y in data.batches(batch_size):
        logits, gradient = logits_and_gradient(model, x)
        case = Case(
            attribution=gradient,
            mask=None if masks is None else masks[start : start + len(x)],
            model=model,
            images=x,
            target=logits.argmax(1),
            explain=lambda net, images, target: logits_and_gradient(net, images, target)[1],
            batch_size=batch_size,
            seed=seed,
        )
        yield case, y, (logits.argmax(1) == y).double()
        start += len(x)
