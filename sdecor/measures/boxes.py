"""Boxes from maps, as weakly supervised localization draws them, and how well they fit the boxes of the objects.

Maps are non-negative saliency (B, H, W). Boxes are x0, y0, x1, y1 in pixels from the top left corner, the last two
exclusive, as `sdecor.measures.localization.box_masks` takes them. What is impossible is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from sdecor.measures._checks import binary, non_negative
from sdecor.registers import Between

#: Shares of a map's maximum that are tried as its threshold.
THRESHOLDS = tuple(i / 20 for i in range(1, 20))
OVERLAP = 0.5
_BESIDE = np.ones((3, 3), int)  # pixels that touch at a corner belong together


def map_boxes(saliency: Tensor, thresholds: Sequence[float] = THRESHOLDS, *, blur: float | None = None) -> Tensor:
    """Box around the largest connected part of each map at or above each threshold, (B, T, 4) int64.

    A threshold is a share, in (0, 1], of the map's maximum; of parts of one size, the first in reading order counts.
    Maps are blurred before, by a Gaussian with a standard deviation of `blur` pixels, by default H / 16: a gradient map
    is specks, and its largest part without this is one of them (ours). The box of a map of zeros has no pixels.
    Source: Zhou et al. 2016, arXiv:1512.04150, for class activation maps, at a threshold of 0.2.
    """
    for threshold in thresholds:
        Between(0, ends=False).check("thresholds", threshold)
        Between(0, 1).check("thresholds", threshold)
    out = np.zeros((len(saliency), len(thresholds), 4), np.int64)
    for i, smooth in enumerate(blurred(saliency, blur).numpy()):
        if (peak := smooth.max()) > 0:
            out[i] = [_largest(smooth >= threshold * peak) for threshold in thresholds]
    return torch.from_numpy(out)


def blurred(saliency: Tensor, blur: float | None = None) -> Tensor:
    """The maps as `map_boxes` cuts them off, (B, H, W) float64 on the CPU."""
    maps = non_negative(saliency).double().view(saliency.shape).cpu()
    sigma = maps.shape[1] / 16 if blur is None else blur
    Between(0).check("blur", sigma)
    smooth = [torch.from_numpy(ndimage.gaussian_filter(one.numpy(), sigma, mode="nearest")) for one in maps]
    return torch.stack(smooth) if sigma and smooth else maps


def _largest(marked: np.ndarray) -> tuple[int, int, int, int]:
    parts, _ = ndimage.label(marked, _BESIDE)
    rows, columns = ndimage.find_objects(parts)[int(np.bincount(parts.ravel())[1:].argmax())]
    return columns.start, rows.start, columns.stop, rows.stop


def mask_boxes(mask: Tensor) -> list[Tensor]:
    """Boxes (n, 4) int64 around the connected parts of each mask (B, H, W); none where it is empty.

    Objects that overlap or touch, at a corner too, are one part: they have one box in common.
    """
    parts = [
        ndimage.find_objects(ndimage.label(one, _BESIDE)[0])
        for one in binary(mask, mask.shape).view(mask.shape).cpu().numpy()
    ]
    edges = [[(x.start, y.start, x.stop, y.stop) for y, x in found] for found in parts]
    return [torch.tensor(boxes, dtype=torch.int64).view(-1, 4) for boxes in edges]


def box_overlap(saliency: Tensor, mask: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Intersection over union of each map's box and the box of the object, the best of those of `mask_boxes`, (B, T).

    It is float64 in [0, 1], for each of the `thresholds` of `map_boxes`, and NaN for an empty mask or a map of zeros.
    """
    binary(mask, saliency.shape)
    drawn, known = map_boxes(saliency, thresholds), mask_boxes(mask)
    out = torch.full(drawn.shape[:2], math.nan, dtype=torch.float64)
    for i, boxes in enumerate(known):
        if len(boxes) and drawn[i, 0, 2] > 0:
            out[i] = _overlap(drawn[i][:, None], boxes[None]).amax(1)
    return out


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1).double()
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def box_fits(test: Tensor, train: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> tuple[dict[str, Tensor], float]:
    """Which boxes fit, of overlaps (N, T) that `box_overlap` gives on test and on training images, and the threshold.

    The threshold is the best one on the training images: where most of them overlap by at least 0.5. By name, (N,)
    float64, NaN where there is no overlap: ``box_accuracy``, 1 where a test image does so at that threshold, else 0;
    ``box_overlap`` at it; and ``max_box_accuracy``, at the threshold that is best on the test images themselves, and so
    a little too high. Without any overlap on training images, the threshold and what depends on it are NaN.
    Source: Choe et al. 2020, arXiv:2001.07437.
    """
    for name, of in (("test", test), ("train", train)):
        if of.ndim != 2 or of.shape[1] != len(thresholds):
            raise ValueError(
                f"{name} must have shape (N, {len(thresholds)}), as there are thresholds, got {tuple(of.shape)}"
            )
    hits, there = ((of >= OVERLAP).double().masked_fill(of.isnan(), math.nan) for of in (test, train))
    best, highest = (int(of.nanmean(0).nan_to_num(-1).argmax()) for of in (there, hits))
    fits = {"box_accuracy": hits[:, best], "max_box_accuracy": hits[:, highest], "box_overlap": test[:, best]}
    if there.isnan().all():
        none = torch.full_like(hits[:, 0], math.nan)
        return {**fits, "box_accuracy": none, "box_overlap": none}, math.nan
    return fits, float(thresholds[best])
