"""How much of a map lies on the object, given the object's mask; masks from boxes and from mosaics.

All measures take a non-negative saliency (B, H, W) and a mask of the object's pixels (B, H, W), boolean or 0 and 1, and
give (B,) float64 in [0, 1]; higher is better. They are NaN for an empty mask and for a map of zeros: nothing can be
said about either. They raise ValueError for shapes that differ, a mask that is not binary, and negative, NaN or
infinite saliency. Values are to be read against chance, the score of a constant map: 0.5 for `auroc`, `chance_level`
(the object's share of the image) for all others. A mask that covers the image scores 1 whatever the map, but `auroc`,
undefined without background, is NaN. No result depends on how a sort would order pixels of equal height. They take
`chunk` maps at a time, two at least, None as many as have two million pixels: memory depends on that, the result does
not.

For several objects in one image take the union of their masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, one_hot, pad

from sdecor.measures._checks import binary, by_chunks, non_negative, require_finite, require_images, shares
from sdecor.measures.case import measure
from sdecor.registers import Between
from sdecor.whitening import require_tensors


@measure("mass on object", better="higher", low=0, high=1)
def relevance_mass(saliency: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Share of each map's total that lies on the object.

    Source: Arras, Osman and Samek 2022, doi:10.1016/j.inffus.2021.11.008 (arXiv:2003.07258).
    """
    return _on_object(lambda flat, inside: (shares(flat) * inside).sum(1).clamp(max=1), saliency, mask, chunk)


@measure("rank on object", better="higher", low=0, high=1)
def relevance_rank(saliency: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Share of the K highest pixels that lie on the object, K being the object's pixels.

    Where pixels of equal height compete for the last of the K places, it is the mean over all ways to choose.
    Source: as `relevance_mass`.
    """

    def rank(flat: Tensor, inside: Tensor) -> Tensor:
        size = inside.sum(1, keepdim=True).clamp(min=1)
        ordered = torch.from_numpy(np.sort(flat.cpu().numpy(), axis=1)).to(flat.device)  # several times torch's speed
        lowest = ordered.gather(1, flat.shape[1] - size)  # of the K highest
        above, level = flat > lowest, flat == lowest
        chosen = (size[:, 0] - above.sum(1)).double() / level.sum(1)  # share of the level pixels among the K
        return ((above & inside).sum(1) + chosen * (level & inside).sum(1)) / size[:, 0]

    return _on_object(rank, saliency, mask, chunk)


@measure("peak on object", better="higher", low=0, high=1)
def pointing_game(saliency: Tensor, mask: Tensor, tolerance: float = 0.0, *, chunk: int | None = None) -> Tensor:
    """1 where the map's highest pixel lies on the object, else 0; among equally high pixels the share of them on it.

    A peak still counts within `tolerance` pixels of the object (Euclidean, between centres); chance grows with it.
    Source: Zhang et al. 2018, doi:10.1007/s11263-017-1059-x (arXiv:1608.00507), with `tolerance=15`.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number of pixels, 0 or more, got {tolerance}")
    if tolerance:
        non_negative(saliency), binary(mask, saliency.shape)
        reach = int(min(tolerance, max(mask.shape[1:])))
        step = torch.arange(-reach, reach + 1, device=mask.device)
        disc = (step[:, None].square() + step.square() <= tolerance**2).float()
        mask = conv2d(mask[:, None].float(), disc[None, None], padding=reach)[:, 0] > 0.5

    def peak(flat: Tensor, near: Tensor) -> Tensor:
        peaks = flat == flat.amax(1, keepdim=True)
        return (peaks & near).sum(1).double() / peaks.sum(1)

    return _on_object(peak, saliency, mask, chunk)


@measure("AUROC", better="higher", low=0, high=1)
def auroc(saliency: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Area under the ROC curve: how likely a pixel of the object is higher than one of the background (half if equal).

    Source: Fawcett 2006, doi:10.1016/j.patrec.2005.10.010.
    """

    def area(flat: Tensor, inside: Tensor) -> Tensor:
        hits, taken = _thresholds(flat, inside)
        misses = taken - hits
        return torch.trapezoid(hits, misses) / (hits[:, -1] * misses[:, -1])

    return _on_object(area, saliency, mask, chunk)


@measure("average precision", better="higher", low=0, high=1)
def average_precision(saliency: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Area under the steps of precision over recall, as the threshold sinks.

    Source: Choe et al. 2020, arXiv:2001.07437, whose PxAP pools the pixels of all images; here each image has its own.
    """

    def area(flat: Tensor, inside: Tensor) -> Tensor:
        hits, taken = _thresholds(flat, inside)
        steps = hits.diff(dim=1) * hits[:, 1:] / taken[:, 1:].clamp(min=1)
        return (steps.sum(1) / hits[:, -1]).clamp(max=1)

    return _on_object(area, saliency, mask, chunk)


@measure("best IoU", better="higher", low=0, high=1)
def best_iou(saliency: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Intersection over union of object and the pixels at or above a threshold, the best over all thresholds.

    The mask chooses each map's threshold: an upper bound of what any rule for thresholds reaches.
    Source: Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.
    """

    def best(flat: Tensor, inside: Tensor) -> Tensor:
        hits, taken = _thresholds(flat, inside)
        return (hits / (taken + hits[:, -1:] - hits).clamp(min=1)).amax(1)

    return _on_object(best, saliency, mask, chunk)


def chance_level(mask: Tensor) -> Tensor:
    """Share of the image that the object covers: what a constant map scores in all measures but `auroc`."""
    require_tensors(mask=mask)
    return relevance_mass(torch.ones(mask.shape, device=mask.device), mask)


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks (B, height, width), bool, of the pixels whose centres (column + 0.5, row + 0.5) lie in a box.

    Boxes are x0, y0, x1, y1 in pixels from the image's top left corner, fractions allowed, (B, 4), as in torchvision's
    "xyxy"; what sticks out of the image is cut off. Where x1 and y1 name the last pixel inside (Pascal VOC,
    torchvision's `masks_to_boxes`), add 1 to them. Ends that are not finite or in order raise ValueError.
    """
    require_tensors(boxes=boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (B, 4), got {tuple(boxes.shape)}")
    require_finite(boxes, "boxes")
    if wrong := (boxes[:, 2:] < boxes[:, :2]).any(1).nonzero().flatten().tolist():
        got = f"row {wrong[0]} is {boxes[wrong[0]].tolist()}"
        raise ValueError(f"boxes must be x0, y0, x1, y1 with x0 <= x1, y0 <= y1; {got}")
    x0, y0, x1, y1 = boxes.double()[:, :, None].unbind(1)
    x, y = (torch.arange(n, device=boxes.device) + 0.5 for n in (width, height))
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None, :]


def mosaic(
    images: Tensor, target: Tensor, grid: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images for the grid pointing game: mosaics of images (B, C, H, W) of different classes, one of them the target.

    Given are mosaics (M, C, grid * H, grid * W), the target class of each (M,), and the mask of the target's cell
    (M, grid * H, grid * W), bool. No image is used twice, and M is the largest number possible: B // grid**2 unless few
    classes hold most of the images. Which images meet, their places and the target's are drawn from `generator`, on the
    CPU, torch's global one by default. The classes `target` (B,) must be grid**2 or more, and the `grid` at least 2.

    Explain each mosaic's target class. The game's score is `relevance_mass(attribution.clamp(min=0), mask)`, the share
    of *positive* relevance in the target's cell, and chance is 1 / grid**2. The model must take images of that size.
    Source: Böhle, Fritz and Schiele 2021, arXiv:2104.00032, there with images that the model is surest of.
    """
    require_images(images, target, floating=False)
    Between(2).check("grid", grid)
    cells, (_, channels, height, width) = grid**2, images.shape
    order = torch.randperm(len(images), generator=generator)
    classes, of, left = target.cpu()[order].unique(return_inverse=True, return_counts=True)
    if len(classes) < cells:
        raise ValueError(f"grid={grid} needs images of {cells} classes, target has {len(classes)}")
    order, start = order[of.argsort(stable=True)], left.cumsum(0) - left
    drawn = []
    while (left > 0).sum() >= cells:  # always from the fullest classes, so that no more mosaics could be made
        chosen = (left + torch.rand(len(left), generator=generator, dtype=torch.float64)).topk(cells).indices
        left[chosen] -= 1
        drawn.append(order[start[chosen] + left[chosen]])
    members = torch.stack(drawn)
    members = members.gather(1, torch.rand(members.shape, generator=generator).argsort(1))
    place = torch.randint(cells, (len(members),), generator=generator)
    theirs = members.gather(1, place[:, None])[:, 0]
    tiles = images[members.to(images.device)].view(-1, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    mask = one_hot(place, cells).bool().view(-1, grid, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)
    whole = tiles.reshape(-1, channels, grid * height, grid * width)
    return whole, target[theirs.to(target.device)], mask.to(images.device)


def _on_object(score: Callable[[Tensor, Tensor], Tensor], saliency: Tensor, mask: Tensor, chunk: int | None) -> Tensor:
    """A score of maps and masks (b, H * W), NaN where one of the two is empty."""
    flat, inside = non_negative(saliency), binary(mask, saliency.shape)
    return by_chunks(score, chunk, flat, inside).masked_fill(~(inside.any(1) & flat.any(1).bool()), math.nan)


def _thresholds(flat: Tensor, inside: Tensor) -> Iterator[Tensor]:
    """How many pixels of the object, and how many at all, lie at or above each threshold, highest threshold first.

    Both are (b, H * W + 1) float64, start at 0, and repeat the last count where the next pixel is not below this one.
    """
    ordered, places = flat.sort(dim=1, descending=True)
    last = pad(ordered[:, 1:] != ordered[:, :-1], (0, 1), value=True)
    hits, taken = inside.gather(1, places).cumsum(1), torch.arange(1, flat.shape[1] + 1, device=flat.device)
    return (pad((count * last).cummax(1).values, (1, 0)).double() for count in (hits, taken))
