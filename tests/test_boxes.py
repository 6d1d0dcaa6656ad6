"""Boxes from maps: by hand, against scikit-image and torchvision, and what a threshold chosen elsewhere is worth."""

from __future__ import annotations

import math

import pytest
import skimage.measure
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from sdecor.measures.boxes import THRESHOLDS, blurred, box_fits, box_overlap, map_boxes, mask_boxes
from sdecor.measures.localization import box_masks


def test_a_box_surrounds_the_largest_part() -> None:
    saliency = torch.zeros(1, 6, 8)
    saliency[0, 1:3, 1:4] = 0.6
    saliency[0, 4, 5] = 1.0
    saliency[0, 3, 4] = 0.6  # touches both at corners
    found = map_boxes(saliency, [0.5, 0.7, 1.0], blur=0)
    assert found.dtype == torch.int64 and found.tolist() == [[[1, 1, 6, 5], [5, 4, 6, 5], [5, 4, 6, 5]]]
    saliency[0, 3, 4] = 0
    assert map_boxes(saliency, [0.5], blur=0).tolist() == [[[1, 1, 4, 3]]]


def test_maps_are_blurred() -> None:
    specks = torch.zeros(1, 32, 32)
    specks[0, 8:24:2, 8:24:2] = 1
    assert map_boxes(specks, [0.4], blur=0).tolist() == [[[8, 8, 9, 9]]]  # the first of equal specks
    [[[x0, y0, x1, y1]]] = map_boxes(specks, [0.4]).tolist()
    assert (x0, y0) == (y0, x0) and abs(x0 - 8) <= 1 and abs(x1 - 23) <= 1 and (x1, y1) == (y1, x1)
    assert torch.equal(map_boxes(specks, [0.4]), map_boxes(specks, [0.4], blur=2))


@given(seed=st.integers(0, 10_000), height=st.integers(1, 12), width=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_boxes_against_scikit_image(seed: int, height: int, width: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    saliency = torch.rand(1, height, width, generator=draws, dtype=torch.float64)
    [[box]] = map_boxes(saliency, [0.6], blur=0).tolist()
    marked = (saliency[0] >= 0.6 * saliency.max()).numpy()
    regions = skimage.measure.regionprops(skimage.measure.label(marked, connectivity=2))
    largest = max(regions, key=lambda region: region.area)
    y0, x0, y1, x1 = largest.bbox
    assert box == [x0, y0, x1, y1]
    found = sorted(map(tuple, mask_boxes(torch.from_numpy(marked)[None])[0].tolist()))
    assert found == sorted((r.bbox[1], r.bbox[0], r.bbox[3], r.bbox[2]) for r in regions)


def test_the_overlap_is_that_of_torchvision() -> None:
    from torchvision.ops import box_iou

    saliency = torch.rand(40, 16, 16, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2, 3, 11, 9]]).repeat(40, 1)
    found = box_overlap(saliency, box_masks(boxes, 16, 16))
    wanted = box_iou(map_boxes(saliency).flatten(0, 1).double(), boxes[:1].double()).view(40, len(THRESHOLDS))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted)


def test_the_best_of_several_objects_counts_and_nothing_is_nan() -> None:
    mask = torch.zeros(3, 8, 8, dtype=torch.bool)
    mask[:2, :2, :2] = mask[:2, 4:, 4:] = True
    saliency = torch.zeros(3, 8, 8)
    saliency[0, 4:, 4:] = saliency[2] = 1
    found = box_overlap(saliency, mask, [0.5])
    assert found[1:].isnan().all()  # a map of zeros, and an empty mask
    assert found[0, 0] > 0.5  # blur by half a pixel
    assert mask_boxes(mask)[2].shape == (0, 4)
    assert box_overlap(torch.ones(1, 8, 8), torch.ones(1, 8, 8), [0.5]).tolist() == [[1.0]]


def test_the_threshold_is_chosen_on_training_images() -> None:
    train = torch.tensor([[0.6, 0.4, 0.6], [0.7, 0.6, 0.2], [math.nan] * 3], dtype=torch.float64)
    test = torch.tensor([[0.1, 0.5, 0.9], [0.5, 0.2, 0.6], [math.nan] * 3, [0.0, 0.0, 0.7]], dtype=torch.float64)
    found, threshold = box_fits(test, train, [0.2, 0.4, 0.6])
    assert threshold == 0.2
    for name, wanted in {
        "box_accuracy": [0, 1, math.nan, 0],
        "max_box_accuracy": [1, 1, math.nan, 1],
        "box_overlap": [0.1, 0.5, math.nan, 0],
    }.items():
        assert found[name].tolist() == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_maps_of_every_kind_have_the_boxes_of_double_precision(kind: torch.dtype) -> None:
    maps = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 5).to(kind)
    assert torch.equal(map_boxes(maps, [0.2, 0.8]), map_boxes(maps.double(), [0.2, 0.8]))


def test_blurred_maps_are_those_that_are_cut_off() -> None:
    maps = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = blurred(maps)
    assert smooth.dtype == torch.float64 and torch.equal(map_boxes(smooth, [0.7], blur=0), map_boxes(maps, [0.7]))
    torch.testing.assert_close(
        smooth[1], torch.from_numpy(gaussian_filter(maps[1].double().numpy(), 1, mode="nearest"))
    )
    assert torch.equal(blurred(maps, 0), maps.double()) and blurred(maps[:0]).shape == (0, 16, 16)


def test_without_training_overlaps_there_is_no_threshold() -> None:
    known, nothing = torch.rand(4, 19, dtype=torch.float64), torch.full((2, 19), math.nan)
    for train in (nothing, nothing[:0]):
        fits, threshold = box_fits(known, train)
        assert math.isnan(threshold) and fits["box_accuracy"].isnan().all() and fits["box_overlap"].isnan().all()
        assert not fits["max_box_accuracy"].isnan().any()


def test_objects_that_touch_at_a_corner_have_one_box() -> None:
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, :3, :3] = mask[0, 3:, 3:] = True
    assert mask_boxes(mask)[0].tolist() == [[0, 0, 6, 6]]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^thresholds must be finite and greater than 0, got 0\.0$"):
        map_boxes(torch.ones(1, 2, 2), [0.0])
    for blur in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="^blur must be finite and at least 0, got"):
            map_boxes(torch.ones(1, 2, 2), blur=blur)
    with pytest.raises(ValueError, match=r"^train must have shape \(N, 19\), as there are thresholds, got \(4, 3\)$"):
        box_fits(torch.rand(2, 19), torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"^thresholds must be from 0 to 1, got 1\.5$"):
        map_boxes(torch.ones(1, 2, 2), [1.5])
    with pytest.raises(ValueError, match="^saliency must be non-negative"):
        map_boxes(-torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"^mask has shape \(1, 2, 3\)"):
        box_overlap(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="^mask must hold only 0 and 1"):
        mask_boxes(torch.full((1, 2, 2), 0.5))
    before = torch.rand(2, 4, 4)
    kept = before.clone()
    map_boxes(before)
    assert torch.equal(before, kept) and map_boxes(torch.zeros(0, 3, 3)).shape == (0, 19, 4)
    assert box_overlap(torch.zeros(1, 3, 3), torch.ones(1, 3, 3)).isnan().all()
