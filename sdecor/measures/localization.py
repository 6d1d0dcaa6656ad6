"""How much of an attribution lies on the object, given the object's mask; masks from boxes and from mosaics.

All measures are NaN for an empty mask and for a map of zeros: nothing can be said about either. Values are to be read
against chance, the score of a constant map: 0.5 for `auroc`, `chance_level` (the object's share of the image) for all
others. A mask that covers the image scores 1 whatever the map, but `auroc`, undefined without background, is NaN.
No result depends on how a sort would order pixels of equal height.

For several objects in one image take the union of their masks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, one_hot, pad

from sdecor.measures._checks import binary, non_negative, require_finite, shares


def relevance_mass(attribution: Tensor, mask: Tensor) -> Tensor:
    """Share of each map's total that lies on the object; higher is better.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in [0, 1]; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Arras, Osman and Samek 2022, doi:10.1016/j.inffus.2021.11.008 (arXiv:2003.07258).

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
        >>> relevance_mass(attribution, torch.tensor([[[1, 0], [1, 0]]])).item()
        0.75
    """
    share = shares(attribution)
    inside = binary(mask, attribution.shape)
    return _defined((share * inside).sum(1).clamp(max=1), share, inside)


def pointing_game(attribution: Tensor, mask: Tensor, tolerance: float = 0.0) -> Tensor:
    """1 where the map's highest pixel lies on the object, else 0; among equally high pixels the share of them on it.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).
        tolerance: how far from the object a peak still counts, in pixels (Euclidean, between centres of pixels). Chance
            grows with it: it is the score of a constant map.

    Returns:
        (B,) float64 in [0, 1], higher is better; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, negative, NaN or infinite attribution, or a negative
            tolerance.

    Source: Zhang et al. 2018, doi:10.1007/s11263-017-1059-x (arXiv:1608.00507), with `tolerance=15`.

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [0.0, 3.0]]])
        >>> pointing_game(attribution, torch.tensor([[[1, 0], [1, 0]]])).item()
        0.5
    """
    flat, inside = non_negative(attribution), binary(mask, attribution.shape)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number of pixels, 0 or more, got {tolerance}")
    peaks = flat == flat.amax(1, keepdim=True)
    near = _dilated(inside.view(mask.shape), tolerance).flatten(1) if tolerance else inside
    return _defined((peaks & near).sum(1).double() / peaks.sum(1), flat, inside)


def relevance_rank(attribution: Tensor, mask: Tensor) -> Tensor:
    """Share of the K highest pixels that lie on the object, K being the object's pixels; higher is better.

    Where pixels of equal height compete for the last of the K places, it is the mean over all ways to choose.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in [0, 1]; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Arras, Osman and Samek 2022, doi:10.1016/j.inffus.2021.11.008 (arXiv:2003.07258).

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
        >>> relevance_rank(attribution, torch.tensor([[[1, 1], [0, 0]]])).item()
        0.75
    """
    flat, inside = non_negative(attribution), binary(mask, attribution.shape)
    size = inside.sum(1, keepdim=True).clamp(min=1)
    # on a CPU NumPy sorts several times as fast
    ordered = torch.from_numpy(np.sort(flat.numpy(), axis=1)) if flat.device.type == "cpu" else flat.sort(1).values
    lowest = ordered.gather(1, flat.shape[1] - size)  # of the K highest
    above, level = flat > lowest, flat == lowest
    chosen = (size[:, 0] - above.sum(1)).double() / level.sum(1)  # share of the level pixels among the K
    return _defined(((above & inside).sum(1) + chosen * (level & inside).sum(1)) / size[:, 0], flat, inside)


def auroc(attribution: Tensor, mask: Tensor) -> Tensor:
    """How likely a pixel of the object is higher than one of the background (half if equal); higher is better.

    This is the area under the ROC curve. Only the order of the pixels counts. Chance is 0.5 whatever the object's size.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in [0, 1]; NaN for an empty mask, a mask that covers the image, or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Fawcett 2006, doi:10.1016/j.patrec.2005.10.010.

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
        >>> auroc(attribution, torch.tensor([[[1, 1], [0, 0]]])).item()
        0.875
    """
    hits, taken, flat, inside = _thresholds(attribution, mask)
    misses = taken - hits
    return _defined(torch.trapezoid(hits, misses) / (hits[:, -1] * misses[:, -1]), flat, inside)


def average_precision(attribution: Tensor, mask: Tensor) -> Tensor:
    """Area under the steps of precision over recall, as the threshold sinks; higher is better.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in (0, 1]; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Choe et al. 2020, arXiv:2001.07437, whose PxAP pools the pixels of all images; here each image has its own.

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
        >>> average_precision(attribution, torch.tensor([[[1, 0], [1, 0]]])).item()  # 1 / 2 + 2 / 3 / 2
        0.8333333333333333
    """
    hits, taken, flat, inside = _thresholds(attribution, mask)
    steps = hits.diff(dim=1) * hits[:, 1:] / taken[:, 1:].clamp(min=1)
    return _defined((steps.sum(1) / hits[:, -1]).clamp(max=1), flat, inside)


def best_iou(attribution: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union of object and the pixels at or above a threshold, the best over all; higher is better.

    The mask chooses each map's threshold, so this is an upper bound of what any rule for thresholds reaches. The lowest
    threshold takes every pixel: no map scores below the object's share of the image.

    Args:
        attribution: non-negative, (B, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in (0, 1]; NaN for an empty mask or a map of zeros.

    Raises:
        ValueError: shapes that differ, a mask that is not binary, or negative, NaN or infinite attribution.

    Source: Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.

    Example:
        >>> attribution = torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
        >>> best_iou(attribution, torch.tensor([[[1, 1], [0, 0]]])).item() == 2 / 3
        True
    """
    hits, taken, flat, inside = _thresholds(attribution, mask)
    return _defined((hits / (taken + hits[:, -1:] - hits).clamp(min=1)).amax(1), flat, inside)


def chance_level(mask: Tensor) -> Tensor:
    """Share of the image that the object covers: what a constant map scores in all measures but `auroc`.

    Args:
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).

    Returns:
        (B,) float64 in (0, 1]; NaN for an empty mask.

    Raises:
        ValueError: a mask of another shape or not binary.
    """
    return relevance_mass(torch.ones(mask.shape, device=mask.device), mask)


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of the pixels whose centres lie in a box; in row r, column c the centre is x = c + 0.5, y = r + 0.5.

    Args:
        boxes: x0, y0, x1, y1 in pixels from the image's top left corner, fractions allowed, (B, 4), as in torchvision's
            "xyxy"; what sticks out of the image is cut off. Where x1 and y1 name the last pixel inside (Pascal VOC,
            torchvision's `masks_to_boxes`), add 1 to them.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        (B, height, width) bool; all False for a box that holds no centre.

    Raises:
        ValueError: another shape, NaN or infinite ends, or x1 < x0 or y1 < y0.

    Example:
        >>> box_masks(torch.tensor([[1, 0, 3, 1]]), height=2, width=3).int().tolist()
        [[[0, 1, 1], [0, 0, 0]]]
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (B, 4), got {tuple(boxes.shape)}")
    require_finite(boxes, "boxes")
    wrong = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"boxes must be x0, y0, x1, y1 with x0 <= x1, y0 <= y1; row {first} is {boxes[first].tolist()}"
        )
    x0, y0, x1, y1 = boxes.double()[:, :, None].unbind(1)
    x, y = (torch.arange(n, device=boxes.device) + 0.5 for n in (width, height))
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None, :]


def mosaic(
    images: Tensor, target: Tensor, grid: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images for the grid pointing game: mosaics of images of different classes, one of them the target.

    Explain each mosaic's target class. The game's score is `relevance_mass(attribution.clamp(min=0), mask)`, the share
    of *positive* relevance in the target's cell, and chance is 1 / grid**2. The model must take images of that size.

    Args:
        images: (N, C, H, W).
        target: their classes, whole numbers, (N,).
        grid: images per side of a mosaic, at least 2.
        generator: of the draws, on the CPU; torch's global one by default.

    Returns:
        mosaics (M, C, grid * H, grid * W), the target class of each (M,), and the mask of the target's cell
        (M, grid * H, grid * W), bool. No image is used twice, and M is the largest number possible: N // grid**2 unless
        few classes hold most of the images. Which images meet, their places and the target's are random.

    Raises:
        ValueError: shapes that do not fit, grid < 2, or fewer than grid**2 classes.

    Source: Böhle, Fritz and Schiele 2021, arXiv:2104.00032, there with images that the model is surest of.

    Example:
        >>> mosaics, target, mask = mosaic(torch.rand(9, 3, 8, 8), torch.arange(9))
        >>> mosaics.shape, target.shape, mask.sum((1, 2)).tolist()
        (torch.Size([2, 3, 16, 16]), torch.Size([2]), [64, 64])
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if target.shape != images.shape[:1] or target.is_floating_point():
        raise ValueError(
            f"target must be {len(images)} whole numbers, got shape {tuple(target.shape)} of {target.dtype}"
        )
    if grid < 2:
        raise ValueError(f"grid must be at least 2, got {grid}")
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
    rows = torch.arange(len(members))
    tiles = images[members.to(images.device)].view(-1, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    mask = one_hot(place, cells).bool().view(-1, grid, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)
    return (
        tiles.reshape(-1, channels, grid * height, grid * width),
        target[members[rows, place].to(target.device)],
        mask.to(images.device),
    )


def _thresholds(attribution: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many pixels of the object, and how many at all, lie at or above each threshold, highest threshold first.

    Both are (B, H * W + 1) float64, start at 0, and repeat the last count where the next pixel is not below this one.
    The flat attribution and mask come with them.
    """
    flat, inside = non_negative(attribution), binary(mask, attribution.shape)
    ordered, places = flat.sort(dim=1, descending=True)
    last = pad(ordered[:, 1:] != ordered[:, :-1], (0, 1), value=True)
    hits = inside.gather(1, places).cumsum(1) * last
    taken = torch.arange(1, flat.shape[1] + 1, device=flat.device) * last
    return pad(hits.cummax(1).values, (1, 0)).double(), pad(taken.cummax(1).values, (1, 0)).double(), flat, inside


def _dilated(mask: Tensor, radius: float) -> Tensor:
    """The pixels (B, H, W) within `radius` of a pixel of `mask`."""
    reach = int(min(radius, max(mask.shape[1:])))
    step = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (step[:, None].square() + step.square() <= radius**2).float()
    return conv2d(mask[:, None].float(), disc[None, None], padding=reach)[:, 0] > 0.5


def _defined(value: Tensor, flat: Tensor, inside: Tensor) -> Tensor:
    return value.masked_fill(~(inside.any(1) & flat.any(1)), math.nan)
