"""What can be asked of a classifier where the objects of its images are known: boxes from its maps, object, background.

Where they are not known it is a ValueError. `model` and `data` are on one device; the maps of a classifier are the
magnitude of the gradient of the predicted class.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sdecor.images import ImageData, ImageStream
from sdecor.measures.boxes import THRESHOLDS, box_fits, box_overlap
from sdecor.measures.localization import auroc, pointing_game, relevance_mass
from sdecor.measures.sanity import controls
from sdecor.measures.sharpness import gini
from sdecor.saliency import logits_and_gradient, pixel_score

log = logging.getLogger("sdecor")
#: Saliency (B, H, W) of images (B, C, H, W).
Explain = Callable[[Tensor], Tensor]


def _known(data: ImageData | ImageStream, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for x, y, mask in data.batches_with_masks(batch_size):
        if mask is None:
            raise ValueError(f"the images of {data.name} have no masks of objects")
        yield x, y, mask


def overlaps(explain: Explain, data: ImageData | ImageStream, *, batch_size: int | None = None) -> Tensor:
    """Overlap of boxes from maps and boxes of objects, (N, T): see `sdecor.measures.boxes.box_overlap`."""
    found = [box_overlap(explain(x), mask) for x, _, mask in _known(data, batch_size or data.pass_size)]
    return torch.cat([torch.empty(0, len(THRESHOLDS), dtype=torch.float64), *found])


def localization_scores(
    explain: Explain, data: ImageData | ImageStream, train: ImageData | ImageStream, *, batch_size: int | None = None
) -> dict[str, Tensor]:
    """How well maps lie on the objects, an image at a time (N,): energy, peak and order on the object, and boxes.

    Boxes are those of `sdecor.measures.boxes.box_fits`, at a threshold that is chosen on the images `train`. NaN stands
    where an image's object is not known and, of what depends on the threshold, where that is so of all of `train`.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for x, _, mask in _known(data, batch_size or data.pass_size):
        saliency = explain(x)
        for measure in (relevance_mass, pointing_game, auroc, box_overlap):
            found[measure.__name__].append(measure(saliency, mask))
    scores = {name: torch.cat(parts) for name, parts in found.items()}
    fits, _ = box_fits(scores["box_overlap"], overlaps(explain, train, batch_size=batch_size))
    return {**scores, **fits}


def control_scores(
    data: ImageData | ImageStream, train: ImageData | ImageStream, *, batch_size: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """The `localization_scores` of maps that know no network: `sdecor.measures.sanity.controls`, by name."""

    def of(name: str) -> dict[str, Tensor]:
        return localization_scores(lambda x: controls(x)[name], data, train, batch_size=batch_size)

    return {name: of(name) for name in controls(next(data.subset(1).batches(1))[0])}


def background_reliance(
    model: nn.Module, data: ImageData | ImageStream, *, batch_size: int | None = None
) -> dict[str, float]:
    """What a classifier makes of the object alone and of the background alone, the rest being the mean colour.

    By name, with the prefix ``object_only_`` or ``background_only_``: ``accuracy``, and of the map of such an image
    its ``gini`` and ``relevance_mass``, the share of it that lies where the object is, or was. Images whose object is
    not known are left out. An object that fills its image leaves a blank background, and what is said of that counts.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for x, y, mask in _known(data, batch_size or data.pass_size):
        for name, kept in {"object_only": mask, "background_only": ~mask}.items():
            logits, gradient = logits_and_gradient(model, x * kept[:, None])  # 0 is the mean colour
            saliency = pixel_score(gradient)
            scores = {"accuracy": logits.argmax(1) == y, "gini": gini(saliency)}
            scores["relevance_mass"] = relevance_mass(saliency, mask)
            for measure, values in scores.items():
                found[f"{name}_{measure}"].append(values.double().masked_fill(~mask.flatten(1).any(1), math.nan))
    return {name: float(torch.cat(parts).nanmean()) for name, parts in found.items()}


def object_scores(model: nn.Module, data: ImageData | ImageStream, train: ImageData | ImageStream) -> dict[str, float]:
    """How often boxes from the gradient maps of a classifier fit, and its `background_reliance`; means over images.

    Without a training image whose object is known, the threshold of the boxes and what depends on it are NaN.
    """

    def explain(x: Tensor) -> Tensor:
        return pixel_score(logits_and_gradient(model, x)[1])

    learned = train.with_objects
    fits, threshold = box_fits(overlaps(explain, data), overlaps(explain, learned))
    if not len(learned):
        log.warning("no training image of %s has a known object to choose a threshold on: no box_accuracy", data.name)
    boxes = {name: float(values.nanmean()) for name, values in fits.items()}
    return {**boxes, "box_threshold": threshold, **background_reliance(model, data)}
