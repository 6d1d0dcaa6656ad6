"""What can be asked of a classifier where the objects of its images are known: boxes from its maps, object, background.

`model` and `data` are on one device; maps are the magnitude of the gradient of the predicted class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdecor.images import ImageData, ImageStream
from sdecor.measures.boxes import box_overlap, box_scores
from sdecor.measures.localization import relevance_mass
from sdecor.measures.sharpness import gini
from sdecor.saliency import logits_and_gradient, pixel_score

#: Saliency (B, H, W) of images (B, C, H, W).
Explain = Callable[[Tensor], Tensor]


def overlaps(explain: Explain, data: ImageData | ImageStream, *, batch_size: int = 500) -> Tensor:
    """Overlap of boxes from maps and boxes of objects, (N, T): see `sdecor.measures.boxes.box_overlap`."""
    parts = data.batches_with_masks(batch_size)
    return torch.cat([box_overlap(explain(x), mask) for x, _, mask in parts if mask is not None])


def box_accuracy(explain: Explain, data: ImageData | ImageStream, train: ImageData | ImageStream) -> dict[str, float]:
    """How often boxes fit, at a threshold that is chosen on the images `train`: `sdecor.measures.boxes.box_scores`."""
    return box_scores(overlaps(explain, data), overlaps(explain, train))


def background_reliance(model: nn.Module, data: ImageData | ImageStream, *, batch_size: int = 500) -> dict[str, float]:
    """What a classifier makes of the object alone and of the background alone, the rest being the mean colour.

    By name, with the prefix ``object_only_`` or ``background_only_``: ``accuracy``, and of the map of such an image
    its ``gini`` and ``relevance_mass``, the share of it that lies where the object is, or was.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for x, y, mask in data.batches_with_masks(batch_size):
        if mask is None:
            raise ValueError("background_reliance needs masks of objects, and these data have none")
        for name, kept in {"object_only": mask, "background_only": ~mask}.items():
            logits, gradient = logits_and_gradient(model, x * kept[:, None])  # 0 is the mean colour
            saliency = pixel_score(gradient)
            found[f"{name}_accuracy"].append(logits.argmax(1) == y)
            found[f"{name}_gini"].append(gini(saliency))
            found[f"{name}_relevance_mass"].append(relevance_mass(saliency, mask))
    return {name: float(torch.cat(parts).double().nanmean()) for name, parts in found.items()}


def object_scores(model: nn.Module, data: ImageData | ImageStream, train: ImageData | ImageStream) -> dict[str, float]:
    """`box_accuracy` of the gradient maps of a classifier, and its `background_reliance`."""

    def explain(x: Tensor) -> Tensor:
        return pixel_score(logits_and_gradient(model, x)[1])

    return {**box_accuracy(explain, data, train), **background_reliance(model, data)}
