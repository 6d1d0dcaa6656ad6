"""All measures of one trained model on held-out images, as the experiment chapters report them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from sdecor.data import ImageData, ImageStream
from sdecor.masking import replacement
from sdecor.measures.faithfulness import masked_accuracy
from sdecor.measures.localization import pointing_game, relevance_mass
from sdecor.measures.representation import Covariance, effective_rank, mean_abs_correlation
from sdecor.measures.sharpness import entropy, gini, top_mass
from sdecor.models import default_layers
from sdecor.objective import capture
from sdecor.saliency import logits_and_gradient, pixel_score

FRACTIONS = tuple(i / 10 for i in range(10))
FILLS = ("uniform", "constant")
BINS = 101


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


def measure(
    model: nn.Module,
    data: ImageData | ImageStream,
    *,
    layers: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
    batch_size: int = 500,
    seed: int = 0,
    masking: bool = True,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Accuracy, and sharpness, localization, faithfulness and representation of the gradient of the predicted class.

    Args:
        model: Trained classifier; its mode and flags are restored.
        data: Held-out images.
        layers: Layers whose features are described; empty takes `sdecor.models.default_layers`.
        device: Where to compute.
        batch_size: Images at a time; results do not depend on it but for the noise of the uniform fill.
        seed: Of that noise and of the random order.
        masking: Compute the accuracy curves, which take most of the time.

    Returns:
        ``metrics``, means over images (a measure that is undefined on these images is absent), and ``curves``: accuracy
        at each of `FRACTIONS` masked, by fill and order, and the histogram of gradient values.
    """
    names = layers or default_layers(model)
    data = data.to(device)
    model.to(device)
    masks = object_masks(data)
    per_image: dict[str, list[Tensor]] = defaultdict(list)
    curves: dict[str, list[Tensor]] = defaultdict(list)
    statistics = {name: Covariance() for name in names}
    histogram = torch.zeros(BINS, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(seed)
    black = torch.tensor([-m / s for m, s in zip(data.mean, data.std, strict=True)], device=device)
    start = 0
    for x, y in data.batches(batch_size):
        with capture(model, names) as features:
            logits, gradient = logits_and_gradient(model, x)
        for name, z in features.items():
            statistics[name].update(z.detach())
        score = pixel_score(gradient)
        per_image["accuracy"].append((logits.argmax(1) == y).double())
        per_image["gini"].append(gini(score))
        per_image["entropy"].append(entropy(score))
        per_image["top10_mass"].append(top_mass(score, 0.1))
        if masks is not None:
            inside = masks[start : start + len(x)]
            per_image["object_mass"].append(relevance_mass(score, inside))
            per_image["object_peak"].append(pointing_game(score, inside))
            per_image["object_area"].append(inside.double().mean((1, 2)))
        histogram += gradient_histogram(gradient)
        for fill in FILLS if masking else ():
            new = (
                black.view(1, -1, 1, 1).expand_as(x)
                if fill == "constant"
                else replacement(x, fill, generator=generator)
            )
            for order in ("most", "random"):
                right = masked_accuracy(model, x, y, score, FRACTIONS, new, order=order, generator=generator)
                curves[f"masked_{fill}_{order}"].append(right)
        start += len(x)
    metrics = {name: torch.cat(values).double() for name, values in per_image.items()}
    means = {name: float(v.nanmean()) for name, v in metrics.items() if not bool(v.isnan().all())}
    for name, s in statistics.items():
        both = {"correlation": mean_abs_correlation(s), "effective_rank": effective_rank(s)}
        means |= {f"{kind}_{name}": float(v) for kind, v in both.items() if not bool(v.isnan())}
    out = {name: torch.cat(parts, 1).double().mean(1).tolist() for name, parts in curves.items()}
    out["gradient_histogram"] = (histogram / histogram.sum().clamp_min(1)).tolist()
    return means, out
