"""The measures: closed forms worked out by hand, invariances, oracles, and what is undefined or refused."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdecor.measures import (
    Covariance,
    chance_level,
    effective_rank,
    entropy,
    faithfulness,
    gini,
    localization,
    masked_accuracy,
    mean_abs_correlation,
    paired_difference,
    pointing_game,
    relevance_mass,
    representation,
    sharpness,
    statistics,
    summary,
    top_mass,
)

SHARPNESS: dict[str, Callable[[Tensor], Tensor]] = {"gini": gini, "entropy": entropy, "top_mass": top_mass}
sharpness_measure = pytest.mark.parametrize("measure", SHARPNESS.values(), ids=SHARPNESS.keys())
LOCALIZATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mass": relevance_mass, "pointing": pointing_game}
localization_measure = pytest.mark.parametrize("measure", LOCALIZATION.values(), ids=LOCALIZATION.keys())


def close(a: Tensor | float, b: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


def one_hot(side: int, *places: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(places), side * side).view(-1, side, side).float()


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    """Non-negative maps (B, H, W), none of them zero, many with ties and zeros."""
    shape = draw(st.tuples(*[st.integers(1, 3), st.integers(2, 5), st.integers(2, 5)]))
    values = draw(st.lists(st.integers(0, 20), min_size=math.prod(shape), max_size=math.prod(shape)))
    result = torch.tensor(values, dtype=torch.float32).view(shape)
    result[:, 0, 0] += 1
    return result


# Sharpness


def test_sharpness_of_one_pixel_and_of_a_constant() -> None:
    n = 64
    close(gini(one_hot(8, 5, 63)), torch.full((2,), 1 - 1 / n, dtype=torch.float64))
    close(entropy(one_hot(8, 5)), torch.zeros(1, dtype=torch.float64))
    close(top_mass(one_hot(8, 5)), torch.ones(1, dtype=torch.float64))
    constant = torch.full((2, 8, 8), 0.3)
    close(gini(constant), torch.zeros(2, dtype=torch.float64))
    close(entropy(constant), torch.ones(2, dtype=torch.float64))
    close(top_mass(constant, 0.25), torch.full((2,), 0.25, dtype=torch.float64))


def test_sharpness_by_hand() -> None:
    # sorted 0 1 2 5, total 8: gini = 1 - 2 (0 * 3.5 + 1 * 2.5 + 2 * 1.5 + 5 * 0.5) / (4 * 8) = 1 - 16 / 32
    a = torch.tensor([[[2.0, 0.0], [5.0, 1.0]]])
    close(gini(a)[0], 0.5)
    close(entropy(a)[0], -(2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8) + 1 / 8 * math.log(1 / 8)) / math.log(4))
    close(top_mass(a, 0.25)[0], 5 / 8)
    close(top_mass(a, 0.5)[0], 7 / 8)
    close(top_mass(a, 0.4)[0], 7 / 8)  # 1.6 pixels are rounded to two
    close(top_mass(a, 0.01)[0], 5 / 8)  # at least one pixel
    # m equal pixels among n: gini = 1 - m / n, entropy = log m / log n
    half = torch.zeros(1, 4, 4)
    half[0, :2] = 7
    close(gini(half)[0], 0.5)
    close(entropy(half)[0], math.log(8) / math.log(16))


@given(maps())
@settings(max_examples=50, deadline=None)
def test_gini_is_half_the_relative_mean_difference(a: Tensor) -> None:
    flat = a.flatten(1).double()
    n = flat.shape[1]
    pairs = (flat[:, :, None] - flat[:, None]).abs().sum((1, 2))
    close(gini(a), pairs / (2 * n * flat.sum(1)))


@given(maps())
@settings(max_examples=30, deadline=None)
def test_entropy_against_scipy(a: Tensor) -> None:
    n = a[0].numel()
    close(entropy(a), scipy.stats.entropy(a.flatten(1).double().numpy(), axis=1) / np.log(n))


@sharpness_measure
@given(a=maps(), scale=st.sampled_from([1e-30, 0.37, 2.0, 1e30]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_sharpness_invariances(measure: Callable[[Tensor], Tensor], a: Tensor, scale: float, seed: int) -> None:
    before = a.clone()
    value = measure(a)
    assert value.shape == (len(a),)
    assert value.dtype == torch.float64
    assert ((value >= 0) & (value <= 1)).all()
    close(measure(a * scale), value, 1e-6)  # a * scale is rounded to float32
    shuffled = a.flatten(1)[:, torch.randperm(a[0].numel(), generator=torch.Generator().manual_seed(seed))]
    close(measure(shuffled.view_as(a)), value)
    close(torch.cat([measure(a[i : i + 1]) for i in range(len(a))]), value)
    assert torch.equal(a, before)


@sharpness_measure
def test_sharpness_survives_the_largest_numbers(measure: Callable[[Tensor], Tensor]) -> None:
    a = torch.rand(2, 4, 4, dtype=torch.float64)
    close(measure(a * 1e308), measure(a))
    half = torch.full((1, 64, 64), 6e4, dtype=torch.float16)
    close(measure(half), measure(torch.ones(1, 64, 64)))


@sharpness_measure
def test_sharpness_of_zero_is_nan(measure: Callable[[Tensor], Tensor]) -> None:
    a = torch.ones(3, 4, 4)
    a[1] = 0
    assert measure(a).isnan().tolist() == [False, True, False]
    assert measure(torch.zeros(0, 4, 4)).shape == (0,)


def test_one_pixel_has_no_normalized_entropy() -> None:
    assert entropy(torch.ones(2, 1, 1)).isnan().all()
    assert gini(torch.ones(2, 1, 1)).tolist() == [0, 0]


def spoiled(value: float) -> Tensor:
    a = torch.ones(4, 2, 2)
    a[2:, 0, 1] = value
    return a


BAD_MAPS = [
    (torch.ones(2, 2), "attribution must have shape (B, H, W), got (2, 2)"),
    (torch.ones(2, 3, 4, 4), "attribution must have shape (B, H, W), got (2, 3, 4, 4)"),
    (torch.ones(2, 0, 4), "attribution has no pixels: its shape is (2, 0, 4)"),
    (spoiled(math.nan), "attribution has NaN in 2 of 4 rows (the first is row 2)"),
    (spoiled(math.inf), "attribution has infinity in 2 of 4 rows (the first is row 2)"),
    (spoiled(-0.5), "attribution must be non-negative, its smallest value is -0.5; pass its absolute value"),
]


@pytest.mark.parametrize(("a", "message"), BAD_MAPS, ids=[message for _, message in BAD_MAPS])
def test_bad_attributions(a: Tensor, message: str) -> None:
    for measure in (*SHARPNESS.values(), *[lambda a, m=m: m(a, torch.ones_like(a)) for m in LOCALIZATION.values()]):
        with pytest.raises(ValueError) as caught:
            measure(a)
        assert str(caught.value) == message


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 10, math.nan])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError) as caught:
        top_mass(torch.ones(1, 2, 2), fraction)
    assert str(caught.value) == f"fraction must lie between 0 and 1, both excluded, got {fraction}"


# Localization


def test_localization_by_hand() -> None:
    a = torch.tensor([[[3.0, 1.0], [0.0, 4.0]]]).repeat(3, 1, 1)
    mask = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 1]], [[1, 1], [1, 1]]])
    close(relevance_mass(a, mask), torch.tensor([3 / 8, 4 / 8, 1], dtype=torch.float64))
    assert pointing_game(a, mask).tolist() == [0, 1, 1]
    assert chance_level(mask).tolist() == [0.5, 0.25, 1]
    # three equal peaks, two of them inside
    close(pointing_game(torch.tensor([[[4.0, 4.0], [0.0, 4.0]]]), torch.tensor([[[1, 1], [1, 0]]]))[0], 2 / 3)


@localization_measure
def test_localization_undefined(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, mask = torch.ones(3, 2, 2), torch.ones(3, 2, 2, dtype=torch.bool)
    a[0] = 0
    mask[1] = False
    assert measure(a, mask).isnan().tolist() == [True, True, False]
    assert chance_level(mask).isnan().tolist() == [False, True, False]


@localization_measure
@given(a=maps(), bits=st.integers(0, 2**25 - 1), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_localization_invariances(measure: Callable[[Tensor, Tensor], Tensor], a: Tensor, bits: int, seed: int) -> None:
    n = a[0].numel()
    mask = torch.tensor([bits >> i & 1 for i in range(n)]).view(a.shape[1:]).expand_as(a)
    before = a.clone()
    value = measure(a, mask)
    assert value.shape == (len(a),)
    close(measure(a * 3, mask.bool()), value)
    close(measure(torch.ones_like(a), mask), chance_level(mask))
    # inside and outside complement each other
    if 0 < mask[0].sum() < n:
        close(value + measure(a, 1 - mask), torch.ones(len(a), dtype=torch.float64))
    places = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    close(measure(a.flatten(1)[:, places].view_as(a), mask.flatten(1)[:, places].view_as(a)), value)
    close(torch.cat([measure(a[i : i + 1], mask[i : i + 1]) for i in range(len(a))]), value)
    assert torch.equal(a, before)


@localization_measure
def test_bad_masks(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError) as caught:
        measure(torch.ones(2, 4, 4), torch.ones(2, 4, 5))
    assert str(caught.value) == "mask has shape (2, 4, 5), attribution has (2, 4, 4); both must be (B, H, W)"
    with pytest.raises(ValueError) as caught:
        measure(torch.ones(2, 4, 4), torch.full((2, 4, 4), 255, dtype=torch.uint8))
    assert str(caught.value) == "mask must hold only 0 and 1 (or be boolean); threshold it first"


# Faithfulness


class Brightest(nn.Module):
    """The class is the brightest pixel; notes every batch and its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        assert not torch.is_grad_enabled()
        logits: Tensor = self.drop(x.mean(1).flatten(1)) * self.weight
        return logits


@pytest.fixture
def scene() -> tuple[Brightest, Tensor, Tensor, Tensor]:
    """Images whose class is their brightest pixel, and the score that ranks pixels by brightness."""
    images = torch.rand(7, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    return Brightest(), images, images.mean(1).flatten(1).argmax(1), images.mean(1)


def test_masking_by_hand() -> None:
    model = Brightest()
    images = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]], [[[1.0, 2.0], [3.0, 9.0]]]])
    labels = torch.tensor([0, 3])
    score = torch.tensor([[[1.0, 9.0], [5.0, 7.0]], [[-1.0, -2.0], [-4.0, 8.0]]])
    most = masked_accuracy(model, images, labels, score, [0, 0.25, 0.5, 0.75, 1], torch.tensor(-1.0))
    assert most.tolist() == [[1, 1], [1, 0], [1, 0], [1, 0], [1, 0]]  # all replaced: argmax takes the first pixel
    assert [batch[0, 0].flatten().tolist() for batch in model.seen[:4]] == [
        [4, 3, 2, 1],
        [4, -1, 2, 1],
        [4, -1, 2, -1],
        [4, -1, -1, -1],
    ]
    model.seen.clear()
    least = masked_accuracy(model, images, labels, score, [0.5], torch.tensor(-1.0), order="least")
    assert least.tolist() == [[0, 1]]
    assert [image[0].flatten().tolist() for image in model.seen[0]] == [[-1, 3, -1, 1], [1, -1, -1, 9]]


def test_masking_puts_the_replacement_there(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    fill = torch.randn(images.shape)
    inputs = [t.clone() for t in (images, labels, score, fill)]
    masked_accuracy(model, images, labels, score, [1 / 3], fill)
    replaced = model.seen[0] != images
    assert torch.equal(model.seen[0], torch.where(replaced, fill, images))
    assert (replaced.sum((2, 3)) == 3).all()
    assert (replaced[:, 0] == replaced[:, 1]).all()
    highest = score.flatten(1).topk(3).indices
    assert replaced[:, 0].flatten(1).gather(1, highest).all()
    assert all(torch.equal(a, b) for a, b in zip(inputs, (images, labels, score, fill), strict=True))


@pytest.mark.parametrize("order", ["most", "least", "random"])
def test_masking_does_not_depend_on_the_chunk(order: str, scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    results = []
    for batch_size in (1, 3, 7, 100):
        for s in (score, torch.ones_like(score)):
            generator = torch.Generator().manual_seed(5)
            out = masked_accuracy(
                model,
                images,
                labels,
                s,
                [0.2, 0.6],
                images * -1,
                order=order,
                batch_size=batch_size,
                generator=generator,
            )
            assert out.shape == (2, 7)
            results.append(out)
    assert all(torch.equal(results[0], r) for r in results[::2])
    assert all(torch.equal(results[1], r) for r in results[1::2])


def test_equal_scores_come_in_random_order() -> None:
    count = 4000
    rank = faithfulness._ranks(torch.zeros(count, 10), "most", torch.Generator().manual_seed(0))
    assert (rank.sort(1).values == torch.arange(10)).all()
    share = (rank < 5).double().mean(0)  # each place comes first half of the time, within five standard errors
    assert ((share - 0.5).abs() < 5 * 0.5 / count**0.5).all()
    assert torch.equal(rank, faithfulness._ranks(torch.rand(count, 10), "random", torch.Generator().manual_seed(0)))


def test_masking_restores_the_model(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    model.train()
    model.drop.eval()
    out = masked_accuracy(model, images, labels, score, [0.0], images)
    assert out.eq(1).all()
    assert (model.training, model.drop.training, model.weight.requires_grad) == (True, False, True)
    with pytest.raises(ValueError, match="labels must lie"):
        masked_accuracy(model, images, labels + 5, score, [0.0], images)
    assert (model.training, model.drop.training) == (True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.ones(2, 3, 3)}, "images must have shape (B, C, H, W), got (2, 3, 3)"),
        ({"labels": torch.tensor([0, 0, 0])}, "labels must be 7 whole numbers, got shape (3,) of torch.int64"),
        ({"labels": torch.zeros(7)}, "labels must be 7 whole numbers, got shape (7,) of torch.float32"),
        ({"labels": torch.full((7,), 9)}, "labels must lie in 0..8, got 9..9"),
        ({"labels": torch.full((7,), -1)}, "labels must lie in 0..8, got -1..-1"),
        ({"score": torch.ones(7, 2, 3, 3)}, "score has shape (7, 2, 3, 3), these images need (7, 3, 3)"),
        ({"score": torch.full((7, 3, 3), math.nan)}, "score has NaN in 7 of 7 rows (the first is row 0)"),
        ({"fractions": [0.5, 1.5]}, "fractions must lie in [0, 1], got 1.5"),
        (
            {"replacement": torch.ones(3, 3, 3)},
            "replacement has shape (3, 3, 3), images (7, 2, 3, 3); it must broadcast to that",
        ),
        ({"order": "best"}, "unknown order 'best'; known: most, least, random"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_masking(changes: dict[str, object], message: str, scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    arguments = {"images": images, "labels": labels, "score": score, "fractions": [0.5], "replacement": images}
    with pytest.raises(ValueError) as caught:
        masked_accuracy(model, **(arguments | changes))
    assert str(caught.value) == message


# Representation


def test_correlation_by_hand() -> None:
    # orthogonal columns, their sum, and a constant: correlations 0, 1 / sqrt(2), 1 / sqrt(2)
    a, b = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    close(mean_abs_correlation(torch.stack([a, 3 * b + 7, a + b, 0.1 * torch.ones(4)], 1)), math.sqrt(2) / 3)
    close(mean_abs_correlation(torch.stack([a, -5 * a], 1)), 1.0)
    close(mean_abs_correlation(torch.stack([a, b], 1)), 0.0)


def test_effective_rank_by_hand() -> None:
    # centred columns of lengths 3 and 1 are the singular values: shares 3/4 and 1/4
    a, b = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    shares = [3 / 4, 1 / 4]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    close(effective_rank(torch.stack([3 * a + 4, b - 1], 1)), expected)
    close(effective_rank(torch.stack([a, b, 0 * a], 1)), 2.0)
    close(effective_rank(torch.stack([a, 2 * a, -a], 1)), 1.0, 1e-9)


def test_undefined_representation() -> None:
    constant = torch.full((10, 3), 0.1)
    assert mean_abs_correlation(constant).isnan()
    assert effective_rank(constant).isnan()
    constant[0, 0] = 1
    assert mean_abs_correlation(constant).isnan()
    assert effective_rank(constant) == 1
    assert mean_abs_correlation(torch.rand(1, 4)).isnan()


@given(st.integers(2, 40), st.integers(2, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_representation_against_numpy(samples: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, channels, generator=generator) @ torch.randn(channels, channels, generator=generator) + 50
    data = z.double().numpy()
    correlation = np.abs(np.corrcoef(data.T))
    close(mean_abs_correlation(z), (correlation.sum() - channels) / (channels * (channels - 1)), 1e-9)
    singular = np.linalg.svd(data - data.mean(0), compute_uv=False)
    # fewer samples than channels: SVD leaves rounding where the rank ends, as does the root of an eigenvalue
    close(effective_rank(z), math.exp(scipy.stats.entropy(singular)), 1e-6)
    assert 1 <= effective_rank(z) <= min(channels, samples - 1) * (1 + 1e-9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.0, 1e4]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_covariance_does_not_depend_on_batches(sizes: list[int], offset: float, seed: int) -> None:
    z = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    z[:, 2] = 0.1  # not a binary fraction: its mean is rounded
    covariance = Covariance()
    for batch in z.split(sizes):
        covariance.update(batch)
    assert covariance.samples == len(z)
    close(covariance.matrix, np.cov(z.T, ddof=0), 1e-9)
    assert (covariance.matrix[2] == 0).all()
    close(effective_rank(covariance), effective_rank(z), 1e-6)
    close(mean_abs_correlation(covariance), mean_abs_correlation(z), 1e-6)


def test_positions_are_samples() -> None:
    z = torch.randn(5, 4, 3, 2)
    before = z.clone()
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    close(mean_abs_correlation(z), mean_abs_correlation(rows))
    close(effective_rank(z), effective_rank(rows))
    assert torch.equal(z, before)


def test_representation_invariances() -> None:
    z = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    close(mean_abs_correlation(z * torch.tensor([1e-6, -2, 3, 4e5, 5, 6]) + 3), mean_abs_correlation(z), 1e-9)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    close(effective_rank(4 * z @ rotation - 9), effective_rank(z), 1e-9)
    order = torch.randperm(50)
    close(effective_rank(z[order]), effective_rank(z), 1e-9)


def test_gaussian_correlation_is_as_documented() -> None:
    z = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    close(mean_abs_correlation(z), math.sqrt(2 / (math.pi * 1000)), 0.03)


def test_subsamples_of_positions() -> None:
    z = torch.randn(20, 3, 8, 8)
    some = Covariance(max_samples=100)
    some.update(z)
    some.update(z[:1])
    assert some.samples == 100 + 64
    again = Covariance(max_samples=100)
    again.update(z)
    again.update(z[:1])
    assert torch.equal(some.matrix, again.matrix)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.ones(4, 3, 2), "features must have shape (N, C) or (N, C, H, W), got (4, 3, 2)"),
        (torch.ones(0, 3), "features have no samples or no channels: their shape is (0, 3)"),
        (torch.full((4, 3), math.nan), "features have NaN or infinite values"),
    ],
)
def test_bad_features(z: Tensor, message: str) -> None:
    for measure in (mean_abs_correlation, effective_rank, Covariance().update):
        with pytest.raises(ValueError) as caught:
            measure(z)
        assert str(caught.value) == message


def test_bad_covariance() -> None:
    covariance = Covariance()
    with pytest.raises(ValueError, match=r"^no features were added; call update\(features\) first$"):
        effective_rank(covariance)
    covariance.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^features have 4 channels, the batches before had 3$"):
        covariance.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"^max_samples must be at least 1, got 0$"):
        Covariance(max_samples=0)


# Statistics


def test_summary() -> None:
    assert summary([2.0, 4.0, 9.0]) == (5.0, math.sqrt((9 + 1 + 16) / 2))
    assert summary(torch.tensor([2.0, 4.0, 9.0])).mean == 5
    mean, sd = summary([3])
    assert mean == 3
    assert math.isnan(sd)


numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(max_examples=50, deadline=None)
def test_paired_difference_against_scipy(pairs: list[tuple[float, float]], confidence: float) -> None:
    a, b = zip(*pairs, strict=True)
    mean, low, high = paired_difference(a, b, confidence)
    assert low <= mean <= high
    if np.ptp(np.subtract(a, b)) > 1e-9:
        oracle = scipy.stats.ttest_rel(a, b).confidence_interval(confidence)
        close(torch.tensor([low, high]), torch.tensor([oracle.low, oracle.high]), 1e-5)
    else:
        close(low, mean, 1e-6)
    close(torch.tensor(paired_difference(b, a, confidence)), torch.tensor([-mean, -high, -low]), 1e-6)


def test_paired_difference_by_hand() -> None:
    # differences 0 1 2: mean 1, sd 1, t(0.975, 2 degrees of freedom) = 4.302652729911275
    half = 4.302652729911275 / math.sqrt(3)
    close(torch.tensor(paired_difference([1, 2, 3], [1, 1, 1])), torch.tensor([1, 1 - half, 1 + half]), 1e-6)
    assert paired_difference([2.0, 3.0], [1.0, 2.0]) == (1, 1, 1)
    mean, low, high = paired_difference([2.0], [1.0])
    assert mean == 1
    assert math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summary([]), "values must hold at least one number, one per seed, got shape (0,)"),
        (lambda: summary([[1.0]]), "values must hold at least one number, one per seed, got shape (1, 1)"),
        (lambda: summary([1.0, math.nan]), "values must be finite, got nan at position 1"),
        (lambda: paired_difference([1.0], [math.inf]), "b must be finite, got inf at position 0"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "a has 2 values and b has 3; pairs need one of each per seed"),
        (lambda: paired_difference([1, 2], [1, 2], 95), "confidence must lie between 0 and 1, both excluded, got 95"),
    ],
)
def test_bad_statistics(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("module", [sharpness, localization, representation, statistics], ids=lambda m: m.__name__)
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 < tried
