"""Sharpness: closed forms worked out by hand, invariances, oracles, and what is undefined or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import BAD_MAPS, close, maps, one_hot, quantus_scores, scenes, seeded
from torch import Tensor

from sdecor.measures.sharpness import effective_support, entropy, gini, sublattice_gini, top_mass, total_variation

SHARPNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "gini": gini,
    "entropy": entropy,
    "effective_support": effective_support,
    "total_variation": total_variation,
    "top_mass": top_mass,
}
sharpness_measure = pytest.mark.parametrize("measure", SHARPNESS.values(), ids=SHARPNESS.keys())


def test_sharpness_of_one_pixel_and_of_a_constant() -> None:
    n = 64
    close(gini(one_hot(8, 5, 63)), torch.full((2,), 1 - 1 / n, dtype=torch.float64))
    close(entropy(one_hot(8, 5)), torch.zeros(1, dtype=torch.float64))
    close(effective_support(one_hot(8, 5)), torch.full((1,), 1 / n, dtype=torch.float64))
    # neighbours of a pixel: two in a corner, three at a border, four elsewhere
    close(total_variation(one_hot(8, 0, 7, 5, 8, 9, 63)), torch.tensor([2, 2, 3, 3, 4, 2], dtype=torch.float64) / 4)
    close(top_mass(one_hot(8, 5)), torch.ones(1, dtype=torch.float64))
    constant = torch.full((2, 8, 8), 0.3)
    close(gini(constant), torch.zeros(2, dtype=torch.float64))
    close(entropy(constant), torch.ones(2, dtype=torch.float64))
    close(effective_support(constant), torch.ones(2, dtype=torch.float64))
    close(total_variation(constant), torch.zeros(2, dtype=torch.float64))
    close(top_mass(constant, 0.25), torch.full((2,), 0.25, dtype=torch.float64))


def test_sharpness_by_hand() -> None:
    # sorted 0 1 2 5, total 8: gini = 1 - 2 (0 * 3.5 + 1 * 2.5 + 2 * 1.5 + 5 * 0.5) / (4 * 8) = 1 - 16 / 32
    a = torch.tensor([[[2.0, 0.0], [5.0, 1.0]]])
    close(gini(a)[0], 0.5)
    close(entropy(a)[0], -(2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8) + 1 / 8 * math.log(1 / 8)) / math.log(4))
    close(effective_support(a)[0], 64 / (4 * (4 + 25 + 1)))
    close(total_variation(a)[0], (2 + 4 + 3 + 1) / 8 / 4)  # right of 2 and 5, below 2 and 0
    close(top_mass(a, 0.25)[0], 5 / 8)
    close(top_mass(a, 0.5)[0], 7 / 8)
    close(top_mass(a, 0.4)[0], 7 / 8)  # 1.6 pixels are rounded to two
    close(top_mass(a, 0.01)[0], 5 / 8)  # at least one pixel
    # m equal pixels among n: gini = 1 - m / n, entropy = log m / log n, effective support = m / n
    half = torch.zeros(1, 4, 4)
    half[0, :2] = 7
    close(gini(half)[0], 0.5)
    close(entropy(half)[0], math.log(8) / math.log(16))
    close(effective_support(half)[0], 0.5)
    close(total_variation(half)[0], 4 / 8 / 4)  # four pairs across the edge
    stripes = torch.zeros(1, 4, 4)
    stripes[0, ::2] = 7
    close(total_variation(stripes)[0], 12 / 8 / 4)  # the same pixels elsewhere: three edges


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


@given(maps())
@settings(max_examples=30, deadline=None)
def test_effective_support_and_total_variation_against_numpy(a: Tensor) -> None:
    share = a.double().numpy() / a.double().sum((1, 2), keepdim=True).numpy()
    n = a[0].numel()
    # Hill's numbers fall with their order: 0 counts the pixels that are not zero, 1 is exp(entropy), 2 is ours
    support = effective_support(a)
    close(support, 1 / (n * np.square(share).sum((1, 2))))
    assert (support <= n ** (entropy(a) - 1) * (1 + 1e-12)).all()
    assert (support >= 1 / (n * torch.tensor(share.max((1, 2)))) * (1 - 1e-12)).all()
    # a map with a border of its own values has no differences across it
    edges = [np.abs(np.diff(np.pad(share, ((0, 0), (1, 1), (1, 1)), mode="edge"), axis=axis)) for axis in (1, 2)]
    inner = edges[0][:, :, 1:-1].sum((1, 2)) + edges[1][:, 1:-1].sum((1, 2))
    close(total_variation(a), inner / 4)


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "gradients"])
def test_sharpness_against_quantus(kind: str) -> None:
    a, _ = scenes()[kind]
    # Quantus adds 1e-7 to each pixel and a small number inside the logarithm, and leaves the entropy in nats
    scaled = a / a.amax((1, 2), keepdim=True)
    close(gini(a), quantus_scores("Sparseness", scaled), 1e-5)
    close(entropy(a) * math.log(64), quantus_scores("Complexity", a), 1e-6)


def test_where_quantus_differs() -> None:
    # one pixel of 1e-9 is as flat as can be there: the 1e-7 that it adds to each outweighs it
    a = one_hot(8, 5, 5, 5) * torch.tensor([1, 1e-9, 0])[:, None, None]
    close(gini(a), torch.tensor([63 / 64, 63 / 64, math.nan], dtype=torch.float64))
    close(entropy(a), torch.tensor([0, 0, math.nan], dtype=torch.float64))
    sharp, small, zero = quantus_scores("Sparseness", a)
    assert (round(sharp, 4), round(small, 4), round(zero, 4)) == (0.9844, 0.0002, 0)
    assert np.isnan(quantus_scores("Complexity", a)).tolist() == [False, False, True]


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
    if measure is total_variation:
        moved = a.flip(1).mT
    else:
        places = torch.randperm(a[0].numel(), generator=torch.Generator().manual_seed(seed))
        moved = a.flatten(1)[:, places].view_as(a)
    close(measure(moved), value)
    close(torch.cat([measure(a[i : i + 1]) for i in range(len(a))]), value)
    close(measure(a.flip(0)), value.flip(0))
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
    assert effective_support(torch.ones(2, 1, 1)).tolist() == [1, 1]
    assert total_variation(torch.ones(2, 1, 1)).tolist() == [0, 0]


@pytest.mark.parametrize(("a", "message"), BAD_MAPS, ids=[message for _, message in BAD_MAPS])
def test_bad_maps(a: Tensor, message: str) -> None:
    for measure in SHARPNESS.values():
        with pytest.raises(ValueError) as caught:
            measure(a)
        assert str(caught.value) == message


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 10, math.nan])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError) as caught:
        top_mass(torch.ones(1, 2, 2), fraction)
    assert str(caught.value) == f"fraction must be strictly between 0 and 1, got {fraction}"


@sharpness_measure
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_chunk_does_not_matter_to_the_last_bit(
    measure: Callable[..., Tensor], count: int, chunk: int, threads: int
) -> None:
    a = torch.rand(count, 190, 190, generator=seeded(count))  # sums of so many are made by several threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(measure(a, chunk=chunk), measure(a))
    finally:
        torch.set_num_threads(before)


@sharpness_measure
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_whole_numbers_and_every_precision(measure: Callable[..., Tensor], kind: torch.dtype) -> None:
    a = torch.tensor([[[1, 0, 1], [0, 1, 0]]])
    assert torch.equal(measure(a.to(kind)), measure(a.float()))


@sharpness_measure
@pytest.mark.parametrize("value", [[[[1, 0], [0, 1]]], np.ones((1, 2, 2)), None])
def test_what_is_no_tensor(measure: Callable[..., Tensor], value: object) -> None:
    with pytest.raises(ValueError) as error:
        measure(value)
    words = f"saliency must be a tensor, got {type(value).__name__}; pass torch.as_tensor(saliency)"
    assert str(error.value) == words


@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_pattern_of_its_period_does_not_enter_the_sublattice_gini(period: int) -> None:
    picture = torch.rand(4, 5, 7, generator=seeded(0), dtype=torch.float64)
    pattern = torch.rand(period, period, generator=seeded(1), dtype=torch.float64) + 0.01
    seen = torch.kron(picture, pattern)  # every pixel of the picture becomes a block, of the same look everywhere
    close(sublattice_gini(seen, period=period), gini(picture))
    assert period == 1 or (gini(seen) > gini(picture) + 0.05).all()
    longer = torch.kron(picture, torch.ones(2 * period, 2 * period))  # what has another period stays
    close(sublattice_gini(longer, period=period), gini(picture))
    close(sublattice_gini(seen * 7, period=period, chunk=2), sublattice_gini(seen, period=period))


def test_sublattices_without_pixels_or_without_any_value() -> None:
    one = one_hot(4, 4, 1, 1)[:1]
    assert sublattice_gini(one).isnan().all()  # three of the four hold nothing
    for period in (0, 5):
        with pytest.raises(ValueError) as caught:
            sublattice_gini(one, period=period)
        assert str(caught.value) == f"period must be from 1 to 4, got {period}"
