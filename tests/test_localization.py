"""Localization: closed forms worked out by hand, invariances, oracles, and what is undefined or refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import BAD_MAPS, close, maps, quantus_scores, scenes, seeded
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

import sdecor.measures.localization
from sdecor.measures.localization import (
    auroc,
    average_precision,
    best_iou,
    box_masks,
    chance_level,
    mosaic,
    pointing_game,
    relevance_mass,
    relevance_rank,
)

LOCALIZATION: dict[str, Callable[..., Tensor]] = {
    "mass": relevance_mass,
    "pointing": pointing_game,
    "rank": relevance_rank,
    "auroc": auroc,
    "precision": average_precision,
    "iou": best_iou,
}
localization_measure = pytest.mark.parametrize("name", LOCALIZATION)


@st.composite
def scenes_with_ties(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Maps with ties and masks of any size, empty and full ones too."""
    a = draw(maps())
    bits = draw(st.lists(st.booleans(), min_size=a.numel(), max_size=a.numel()))
    return a, torch.tensor(bits).view_as(a)


def test_localization_by_hand() -> None:
    a = torch.tensor([[[3.0, 1.0], [0.0, 4.0]]]).repeat(3, 1, 1)
    mask = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 1]], [[1, 1], [1, 1]]])
    close(relevance_mass(a, mask), torch.tensor([3 / 8, 4 / 8, 1], dtype=torch.float64))
    assert pointing_game(a, mask).tolist() == [0, 1, 1]
    assert chance_level(mask).tolist() == [0.5, 0.25, 1]
    assert relevance_rank(a, mask).tolist() == [0.5, 1, 1]
    close(auroc(a, mask), torch.tensor([1 / 4, 1, math.nan], dtype=torch.float64))  # only 3 > 1 among four pairs
    close(average_precision(a, mask), torch.tensor([(1 / 2 + 2 / 4) / 2, 1, 1], dtype=torch.float64))
    close(best_iou(a, mask), torch.tensor([2 / 4, 1, 1], dtype=torch.float64))
    # three equal peaks, two of them inside
    close(pointing_game(torch.tensor([[[4.0, 4.0], [0.0, 4.0]]]), torch.tensor([[[1, 1], [1, 0]]]))[0], 2 / 3)


def test_ties_by_hand() -> None:
    # heights 5 | 2 2 2 | 0 0, the object has 5, one of the 2s and one of the 0s
    a = torch.tensor([[[5.0, 2.0, 2.0], [2.0, 0.0, 0.0]]])
    mask = torch.tensor([[[1, 1, 0], [0, 1, 0]]])
    close(relevance_rank(a, mask)[0], (1 + 2 * 1 / 3) / 3)  # two of the three 2s are among the three highest
    close(auroc(a, mask)[0], (3 + (2 / 2 + 1) + 1 / 2) / 9)
    close(average_precision(a, mask)[0], (1 / 1 + 2 / 4 + 3 / 6) / 3)
    close(best_iou(a, mask)[0], max(1 / 3, 2 / 5, 3 / 6))


@localization_measure
def test_localization_undefined(name: str) -> None:
    a, mask = torch.ones(4, 2, 2), torch.ones(4, 2, 2, dtype=torch.bool)
    a[0] = 0
    mask[1] = False
    mask[3, 0] = False
    value = LOCALIZATION[name](a, mask)
    assert value.isnan().tolist() == [True, True, name == "auroc", False]
    assert name == "auroc" or value[2] == 1
    assert chance_level(mask).isnan().tolist() == [False, True, False, False]
    assert LOCALIZATION[name](a[:0], mask[:0]).shape == (0,)
    one = LOCALIZATION[name](torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    assert one.isnan() if name == "auroc" else one == 1


@localization_measure
@given(scene=scenes_with_ties(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_localization_invariances(name: str, scene: tuple[Tensor, Tensor], seed: int) -> None:
    measure, (a, mask) = LOCALIZATION[name], scene
    n = a[0].numel()
    before = a.clone(), mask.clone()
    value = measure(a, mask)
    assert value.shape == (len(a),)
    assert value.dtype == torch.float64
    size = mask.sum((1, 2))
    undefined = (size == 0) | (size == n) if name == "auroc" else size == 0
    assert torch.equal(value.isnan(), undefined)
    assert ((value >= 0) & (value <= 1))[~undefined].all()
    close(measure(a * 3, mask.int()), value)
    for dtype in (torch.float64, torch.float16, torch.int64):
        close(measure(a.to(dtype), mask), value)
    if name == "auroc":
        close(measure(torch.ones_like(a), mask)[~undefined], torch.full_like(value, 0.5)[~undefined])
    else:
        close(measure(torch.ones_like(a), mask), chance_level(mask))
    if name in ("mass", "pointing", "auroc"):  # inside and outside complement each other
        both = (size > 0) & (size < n)
        close((value + measure(a, ~mask))[both], torch.ones(int(both.sum()), dtype=torch.float64))
    if name != "mass":  # only the order counts
        close(measure(a.double().sqrt() + 1, mask), value)
    places = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = a.flatten(1)[:, places].view_as(a), mask.flatten(1)[:, places].view_as(mask)
    close(measure(*moved), value)
    close(torch.cat([measure(a[i : i + 1], mask[i : i + 1]) for i in range(len(a))]), value)
    close(measure(a.flip(0), mask.flip(0)), value.flip(0))
    assert torch.equal(a, before[0]) and torch.equal(mask, before[1])


@given(scenes_with_ties())
@settings(max_examples=60, deadline=None)
def test_against_the_definitions(scene: tuple[Tensor, Tensor]) -> None:
    for a, mask in zip(*scene, strict=True):
        if not mask.any():
            continue
        iou = max((mask & (a >= t)).sum() / (mask | (a >= t)).sum() for t in a.unique())
        close(best_iou(a[None], mask[None])[0], iou, 1e-6)
        pairs = a[mask][:, None] - a[~mask]
        assert auroc(a[None], mask[None]).isnan() == (pairs.numel() == 0)
        if pairs.numel():
            close(auroc(a[None], mask[None])[0], ((pairs > 0).double() + (pairs == 0) / 2).mean())


@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_rank_is_the_mean_over_all_orders_of_ties(heights: list[int], inside: list[bool]) -> None:
    heights[0] += 1
    inside[-1] = True
    size = sum(inside)
    orders = np.array(list(itertools.permutations(range(6))))  # which comes first among equal ones
    by_height = np.take_along_axis(orders, np.argsort(-np.array(heights)[orders], axis=1, kind="stable"), 1)
    expected = np.array(inside)[by_height[:, :size]].mean()
    close(relevance_rank(torch.tensor([[heights]]), torch.tensor([[inside]]))[0], expected)


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "gradients"])
def test_curves_against_scikit_learn(kind: str) -> None:
    a, mask = scenes()[kind]
    truth, score = mask.flatten(1).numpy(), a.flatten(1).numpy()
    for ours, theirs in ((auroc, roc_auc_score), (average_precision, average_precision_score)):
        close(ours(a, mask), np.array([theirs(t, s) for t, s in zip(truth, score, strict=True)]), 1e-12)
    assert average_precision_score(np.ones(5), np.arange(5)) == 1  # ours too, see above


def test_order_is_not_lost_to_rounding() -> None:
    a = torch.tensor([[[1e308, 1e-300, 1e-310]]], dtype=torch.float64)  # over the peak the last two are both 0
    mask = torch.tensor([[[1, 1, 0]]])
    for measure in (auroc, average_precision, best_iou, relevance_rank):
        assert measure(a, mask) == 1


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "gradients"])
def test_localization_against_quantus(kind: str) -> None:
    a, mask = scenes()[kind]
    close(relevance_mass(a, mask), quantus_scores("RelevanceMassAccuracy", a, mask), 1e-6)
    close(auroc(a, mask), quantus_scores("AUC", a, mask), 1e-6)
    hit = pointing_game(a, mask)
    assert np.array_equal(hit > 0, quantus_scores("PointingGame", a, mask))  # one peak of many inside is enough there
    if kind in ("random", "gradients"):  # among ties Quantus takes what its sort puts first
        assert ((hit == 0) | (hit == 1)).all()
        close(relevance_rank(a, mask), quantus_scores("RelevanceRankAccuracy", a, mask), 1e-6)
        square = box_masks(torch.tensor([[2, 2, 6, 6]]), 8, 8).expand_as(a)
        close(relevance_rank(a, square), quantus_scores("TopKIntersection", a, square, k=16), 1e-6)


def test_where_quantus_differs() -> None:
    # a map of zeros and a constant one, the object first at the beginning, then at the end, then nowhere
    a = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    mask = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]).bool().repeat(2, 1, 1)
    none, defined = [math.nan] * 3, [0.25, 0.25, math.nan]
    theirs = {
        "PointingGame": ([1, 1, 1], [1, 1, 1]),  # an empty mask counts as hit, and so does a map of zeros
        "RelevanceRankAccuracy": ([1, 0, math.nan], [1, 0, math.nan]),  # depends on where the object lies
        "RelevanceMassAccuracy": (none, defined),
        "AUC": ([0.5, 0.5, math.nan], [0.5, 0.5, math.nan]),
    }
    for metric, values in theirs.items():
        close(quantus_scores(metric, a.flatten(0, 1), mask), np.ravel(values))
    for measure in (pointing_game, relevance_rank, relevance_mass):
        close(measure(a.flatten(0, 1), mask), np.array(none + defined))
    close(auroc(a.flatten(0, 1), mask), np.array([*none, 0.5, 0.5, math.nan]))


@pytest.mark.parametrize(("a", "message"), BAD_MAPS, ids=[message for _, message in BAD_MAPS])
def test_bad_maps(a: Tensor, message: str) -> None:
    for measure in LOCALIZATION.values():
        with pytest.raises(ValueError) as caught:
            measure(a, torch.ones_like(a))
        assert str(caught.value) == message


@localization_measure
def test_bad_masks(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        LOCALIZATION[name](torch.ones(2, 4, 4), torch.ones(2, 4, 5))
    assert str(caught.value) == "mask has shape (2, 4, 5), the maps have (2, 4, 4); both must be (B, H, W)"
    with pytest.raises(ValueError) as caught:
        LOCALIZATION[name](torch.ones(2, 4, 4), torch.full((2, 4, 4), 255, dtype=torch.uint8))
    assert str(caught.value) == "mask must hold only 0 and 1 (or be boolean); threshold it first"


# Masks of boxes


def test_boxes_by_hand() -> None:
    boxes = torch.tensor([[1, 0, 3, 2], [0.5, 0.6, 2.4, 1.6], [-5, -5, 9, 9], [1, 1, 1, 1], [0.51, 0, 1.49, 3]])
    assert box_masks(boxes, 3, 4).int().tolist() == [
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    assert box_masks(torch.zeros(0, 4), 3, 4).shape == (0, 3, 4)


@given(st.lists(st.integers(0, 12), min_size=6, max_size=6))
def test_boxes_that_share_an_edge_share_no_pixel(ends: list[int]) -> None:
    (x0, x1, x2), (y0, y1, y2) = sorted(e / 2 for e in ends[:3]), sorted(e / 2 for e in ends[3:])
    parts = torch.tensor([[x0, y0, x1, y1], [x1, y0, x2, y1], [x0, y1, x1, y2], [x1, y1, x2, y2]])
    whole = box_masks(torch.tensor([[x0, y0, x2, y2]]), 6, 6)[0]
    assert torch.equal(box_masks(parts, 6, 6).sum(0), whole.long())


def test_boxes_against_torchvision() -> None:
    from torchvision.ops import masks_to_boxes

    corners = torch.randint(0, 6, (50, 2), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners, corners + torch.randint(1, 5, (50, 2))], 1)
    masks = box_masks(boxes, 10, 10)
    close(masks_to_boxes(masks), boxes - torch.tensor([0, 0, 1, 1]))  # it names the last pixel inside
    assert torch.equal(masks.sum((1, 2)), (boxes[:, 2:] - boxes[:, :2]).prod(1))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.ones(4), "boxes must have shape (B, 4), got (4,)"),
        (torch.ones(2, 5), "boxes must have shape (B, 4), got (2, 5)"),
        (torch.tensor([[0, 0, math.nan, 1]]), "boxes has NaN in 1 of 1 rows (the first is row 0)"),
        (
            torch.tensor([[0.0, 0, 1, 1], [3, 0, 2, 1]]),
            "boxes must be x0, y0, x1, y1 with x0 <= x1, y0 <= y1; row 1 is [3.0, 0.0, 2.0, 1.0]",
        ),
        (
            torch.tensor([[0, 3, 1, 2]]),
            "boxes must be x0, y0, x1, y1 with x0 <= x1, y0 <= y1; row 0 is [0, 3, 1, 2]",
        ),
    ],
)
def test_bad_boxes(boxes: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        box_masks(boxes, 4, 4)
    assert str(caught.value) == message


# Mosaics


def numbered(counts: list[int], height: int = 2, width: int = 3) -> tuple[Tensor, Tensor]:
    """Images that are everywhere their own number, `counts` of each class, in mixed order."""
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 10 + 7
    target = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(1))]
    return torch.arange(len(target)).view(-1, 1, 1, 1).expand(-1, 2, height, width).float(), target


@given(st.lists(st.integers(1, 9), min_size=4, max_size=11), st.integers(2, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mosaics(counts: list[int], grid: int, seed: int) -> None:
    cells = grid**2
    images, target = numbered(counts)
    if len(counts) < cells:
        with pytest.raises(ValueError) as caught:
            mosaic(images, target, grid)
        assert str(caught.value) == f"grid={grid} needs images of {cells} classes, target has {len(counts)}"
        return
    before = images.clone(), target.clone()
    mosaics, chosen, mask = mosaic(images, target, grid, torch.Generator().manual_seed(seed))
    # the largest m for which the classes can fill m mosaics, each giving at most one image to each
    m = max(m for m in range(1, len(target) + 1) if sum(min(c, m) for c in counts) >= cells * m)
    assert mosaics.shape == (m, 2, grid * 2, grid * 3) and mosaics.dtype == images.dtype
    assert chosen.shape == (m,) and mask.shape == (m, grid * 2, grid * 3) and mask.dtype == torch.bool
    members = mosaics[:, 0, ::2, ::3].flatten(1).long()
    whole = members.view(m, 1, grid, grid).repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert torch.equal(mosaics, whole.expand_as(mosaics).float())
    assert members.unique().numel() == m * cells
    assert all(len(set(row)) == cells for row in target[members].tolist())
    numbers = mosaics[:, 0][mask].view(m, 6)
    assert (numbers == numbers[:, :1]).all()
    assert torch.equal(target[numbers[:, 0].long()], chosen)
    close(relevance_mass(torch.ones_like(mask).float(), mask), torch.full((m,), 1 / cells, dtype=torch.float64))
    again = mosaic(images, target, grid, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(again, (mosaics, chosen, mask), strict=True))
    assert torch.equal(images, before[0]) and torch.equal(target, before[1])


def test_mosaics_are_drawn_evenly() -> None:
    images, target = numbered([400] * 5)
    mosaics, chosen, mask = mosaic(images, target, 2, torch.Generator().manual_seed(0))
    place = mask[:, ::2, ::3].flatten(1).int().argmax(1)
    classes = (target[mosaics[:, 0, ::2, ::3].flatten(1).long()] - 7) // 10
    assert len(mosaics) == 500

    def even(draws: list[object], kinds: int) -> None:
        count = Counter(draws)
        expected = len(draws) / kinds
        assert len(count) == kinds
        assert sum((c - expected) ** 2 / expected for c in count.values()) < kinds + 5 * math.sqrt(2 * kinds)

    even(place.tolist(), 4)
    even(chosen.tolist(), 5)
    even(list(zip(place.tolist(), chosen.tolist(), strict=True)), 20)
    even([frozenset(row) for row in classes.tolist()], 5)
    assert not torch.equal(mosaics, mosaic(images, target, 2, torch.Generator().manual_seed(1))[0])
    images, target = numbered([900, 200, 200, 200])  # the fullest class is drawn first, yet lands anywhere
    members = mosaic(images, target, 2, torch.Generator().manual_seed(0))[0][:, 0, ::2, ::3].flatten(1).long()
    even((target[members] == 7).int().argmax(1).tolist(), 4)


def test_mosaic_takes_torchs_generator_by_default() -> None:
    images, target = numbered([3] * 6)
    torch.manual_seed(5)
    first = mosaic(images, target)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, mosaic(images, target), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.ones(6, 2, 2)}, "images must have shape (B, C, H, W), got (6, 2, 2)"),
        ({"target": torch.arange(5)}, "target must be 6 whole numbers, got shape (5,) of torch.int64"),
        ({"target": torch.ones(6)}, "target must be 6 whole numbers, got shape (6,) of torch.float32"),
        ({"grid": 1}, "grid must be at least 2, got 1"),
        ({"grid": 3}, "grid=3 needs images of 9 classes, target has 6"),
    ],
)
def test_bad_mosaics(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        mosaic(**({"images": torch.ones(6, 1, 2, 2), "target": torch.arange(6)} | changes))
    assert str(caught.value) == message


def test_pointing_game_with_tolerance_by_hand() -> None:
    a = torch.zeros(1, 9, 9)
    a[0, 4, 4] = 1
    for place, distance in (((4, 4), 0), ((4, 6), 2), ((3, 3), math.sqrt(2)), ((1, 0), 5), ((8, 8), math.sqrt(32))):
        mask = torch.zeros(1, 9, 9, dtype=torch.bool)
        mask[0][place] = True
        assert pointing_game(a, mask, distance).item() == 1
        assert pointing_game(a, mask, math.inf).item() == 1
        if distance:
            assert pointing_game(a, mask, distance - 1e-6).item() == 0


@given(scenes_with_ties(), st.sampled_from([0.0, 0.9, 1.0, 1.5, 2.0, 2.3, 4.0, 50.0]))
@settings(max_examples=60, deadline=None)
def test_tolerance_against_scipy(scene: tuple[Tensor, Tensor], tolerance: float) -> None:
    a, mask = scene
    for i, value in enumerate(pointing_game(a, mask, tolerance)):
        if mask[i].any():
            distance = scipy.ndimage.distance_transform_edt(~mask[i].numpy())
            close(value, (distance[a[i].numpy() == a[i].max().item()] <= tolerance + 1e-9).mean())
        else:
            assert value.isnan()


@pytest.mark.parametrize("tolerance", [-1, math.nan])
def test_bad_tolerance(tolerance: float) -> None:
    with pytest.raises(ValueError) as caught:
        pointing_game(torch.ones(1, 2, 2), torch.ones(1, 2, 2), tolerance)
    assert str(caught.value) == f"tolerance must be a number of pixels, 0 or more, got {tolerance}"


@localization_measure
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_chunk_does_not_matter_to_the_last_bit(name: str, count: int, chunk: int, threads: int, ties: bool) -> None:
    a = torch.rand(count, 190, 190, generator=seeded(count))  # sums of so many are made by several threads
    a = (a * 8).floor() if ties else a
    mask = torch.rand(count, 190, 190, generator=seeded(1)) > 0.7
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(LOCALIZATION[name](a, mask, chunk=chunk), LOCALIZATION[name](a, mask))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("chunk", "most"), [(1, 3), (2, 3), (5, 5), (None, 7)])
def test_no_more_maps_at_a_time_than_a_chunk(chunk: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, whole = [], sdecor.measures.localization._thresholds
    monkeypatch.setattr(
        sdecor.measures.localization, "_thresholds", lambda flat, inside: sizes.append(len(flat)) or whole(flat, inside)
    )
    a = torch.rand(29, 500, 600)
    auroc(a, a > 0.5, chunk=chunk)
    assert sum(sizes) == 29
    assert most - 2 <= max(sizes) <= most
    assert auroc(a[:0], a[:0] > 0.5, chunk=chunk).shape == (0,)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_at_least_one_map(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"^chunk must be at least 1, got {chunk}$"):
        auroc(torch.ones(2, 2, 2), torch.ones(2, 2, 2), chunk=chunk)


@localization_measure
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_whole_numbers_and_every_precision_are_maps_and_masks(name: str, kind: torch.dtype) -> None:
    a, mask = torch.tensor([[[1, 0, 1], [0, 1, 0]]]), torch.tensor([[[1, 1, 0], [0, 0, 0]]])
    expected = LOCALIZATION[name](a.float(), mask.bool())
    assert torch.equal(LOCALIZATION[name](a.to(kind), mask), expected)
    assert torch.equal(LOCALIZATION[name](a.float(), mask.to(kind)), expected)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda v: auroc(v, torch.ones(1, 2, 2)), "saliency"),
        (lambda v: pointing_game(torch.ones(1, 2, 2), v, tolerance=2), "mask"),
        (chance_level, "mask"),
        (lambda v: box_masks(v, 4, 4), "boxes"),
        (lambda v: mosaic(v, torch.tensor([0])), "images"),
        (lambda v: mosaic(torch.ones(1, 1, 2, 2), v), "target"),
    ],
)
@pytest.mark.parametrize("value", [[[[1, 0], [0, 1]]], np.ones((1, 2, 2)), None])
def test_what_is_no_tensor(call: Callable[[object], object], name: str, value: object) -> None:
    if name == "target" and value is None:
        pytest.skip("None stands for no target")
    with pytest.raises(ValueError) as error:
        call(value)
    assert str(error.value) == f"{name} must be a tensor, got {type(value).__name__}; pass torch.as_tensor({name})"
