"""Measures of features: closed forms by hand, oracles, invariances, and what is undefined or refused."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import close
from torch import Tensor

from sdecor.measures import representation
from sdecor.measures.representation import (
    Covariance,
    cka,
    condition_number,
    effective_rank,
    mean_abs_correlation,
    participation_ratio,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 1 of Kornblith et al. from the centred kernel matrices of samples."""
    centre = np.eye(len(a)) - 1 / len(a)
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


# Orthogonal columns of equal length
A, B, C = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]])


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


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.ones(4, 3, 2), "features must have shape (N, C) or (N, C, H, W), got (4, 3, 2)"),
        (torch.ones(0, 3), "features have no samples or no channels: their shape is (0, 3)"),
        (torch.full((4, 3), math.nan), "features have NaN or infinite values"),
    ],
)
def test_bad_features(z: Tensor, message: str) -> None:
    measures = mean_abs_correlation, effective_rank, participation_ratio, condition_number, Covariance().update
    for measure in measures:
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


def test_spread_by_hand() -> None:
    # standard deviations 3, 2, 1: variances 9, 4, 1, whose sum is 14 and whose squares have the sum 98
    z = torch.stack([3 * A + 4, 2 * B - 1, C], 1)
    close(condition_number(z), 9.0, 1e-9)
    close(participation_ratio(z), 14**2 / 98)
    # turned by 45 degrees: the same spread
    turned = torch.stack([(3 * A + C), (3 * A - C)], 1)
    close(condition_number(turned), 9.0, 1e-9)
    close(participation_ratio(turned), (9 + 1) ** 2 / (81 + 1))
    white = torch.stack([A, B, C], 1)
    close(condition_number(white), 1.0)
    close(participation_ratio(white), 3.0)
    copies = torch.stack([A, 2 * A, -A], 1)
    assert condition_number(copies).isinf()
    close(participation_ratio(copies), 1.0)
    constant = torch.stack([A, B, 0.1 * torch.ones(4)], 1)
    assert condition_number(constant).isinf()
    close(participation_ratio(constant), 2.0)


def test_cka_by_hand() -> None:
    a, b, c = A[:, None], B[:, None], C[:, None]
    close(cka(a, a), 1.0)
    close(cka(a, b), 0.0)
    # one of the two directions is shared: |cov(a, ab)|^2 = 1 over |cov(a)| |cov(ab)| = 1 * sqrt(2)
    close(cka(a, torch.cat([a, b], 1)), 1 / math.sqrt(2))
    # (2 A, B) and (A, C): 2^2 over sqrt(4^2 + 1) sqrt(2)
    close(cka(torch.cat([2 * a, b], 1), torch.cat([a, c], 1)), 4 / math.sqrt(17 * 2))


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_against_numpy(samples: int, first: int, second: int, seed: int) -> None:
    z = normal(samples, first + second, seed=seed) @ normal(first + second, first + second, seed=seed + 1) + 50
    a, b = z.split([first, second], 1)
    before = z.clone()
    close(cka(a, b), hsic_cka(a.numpy(), b.numpy()), 1e-9)
    close(cka(b, a), cka(a, b))
    assert 0 <= cka(a, b) <= 1
    variances = np.linalg.svd(a.numpy() - a.numpy().mean(0), compute_uv=False) ** 2
    close(participation_ratio(a), variances.sum() ** 2 / (variances**2).sum(), 1e-9)
    assert 1 - 1e-9 <= participation_ratio(a) <= min(first, samples - 1) * (1 + 1e-9)
    if samples > first:
        oracle = np.linalg.cond(np.cov(a.numpy().T).reshape(first, first))
        assert condition_number(a) >= 1
        if oracle < 1e9:
            close(condition_number(a), oracle, 1e-6)
    else:
        assert condition_number(a).isinf()
    assert torch.equal(z, before)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_batches_positions_and_order_do_not_matter(sizes: list[int], seed: int) -> None:
    maps = normal(sum(sizes), 5, 2, 3, seed=seed) + 1e3
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    joint = Covariance()
    for batch in maps.split(sizes):
        joint.update(batch)
    for z in (joint, rows, rows[order]):
        close(participation_ratio(z), participation_ratio(maps), 1e-9)
        close(condition_number(z), condition_number(maps), 1e-6)
    close(cka(rows[:, :2], rows[:, 2:]), cka(maps[:, :2], maps[:, 2:]), 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_invariances(seed: int) -> None:
    a, b = normal(60, 6, seed=seed), normal(60, 4, seed=seed + 10)
    b[:, :3] += a[:, :3]
    rotation = torch.linalg.qr(normal(6, 6, seed=seed + 20)).Q
    moved = -4e3 * a @ rotation + 9
    close(cka(moved, b), cka(a, b), 1e-9)
    close(cka(moved, a), 1.0, 1e-9)
    close(participation_ratio(moved), participation_ratio(a), 1e-9)
    close(condition_number(moved), condition_number(a), 1e-9)
    # not to a general invertible map, which none of them should be
    stretched = a * torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert cka(stretched, a) < 0.9
    assert participation_ratio(stretched) < participation_ratio(a) - 1
    assert condition_number(stretched) > 5 * condition_number(a)


def test_white_samples_score_as_documented() -> None:
    n, a, b = 2000, 100, 50
    z = normal(n, a + b)
    close(participation_ratio(z[:, :a]), n * a / (n + a), 0.01)
    root = math.sqrt(a / n)
    close(condition_number(z[:, :a]), ((1 + root) / (1 - root)) ** 2, 0.05)
    close(cka(z[:, :a], z[:, a:]), math.sqrt(a * b / ((n + a) * (n + b))), 0.005)
    few = z[:10]
    close(cka(few[:, :a], few[:, a:]), math.sqrt(a * b / ((10 + a) * (10 + b))), 0.03)
    assert condition_number(z[:a, :a]).isinf()
    assert condition_number(z[: a + 1, :a]).isfinite()


@given(st.integers(2, 60), st.data(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_too_few_samples_are_singular(channels: int, data: st.DataObject, seed: int) -> None:
    samples = data.draw(st.integers(2, channels))
    z = (normal(samples, channels, seed=seed) + 100).float()
    covariance = Covariance()
    for batch in z.split(3):
        covariance.update(batch)
    assert condition_number(z).isinf()
    assert condition_number(covariance).isinf()


def test_undefined() -> None:
    constant = torch.full((10, 3), 0.1)
    assert condition_number(constant).isnan()
    assert participation_ratio(constant).isnan()
    assert condition_number(torch.rand(1, 4)).isnan()
    varied = normal(10, 2).float()
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        assert cka(*pair).isnan()
    close(cka(torch.cat([varied, constant], 1), varied), 1.0)  # a constant feature does not count


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), "a has shape (4, 3) and b (5, 3); only their channels may differ"),
        (
            torch.ones(2, 3, 4, 1),
            torch.ones(2, 3, 2, 2),
            "a has shape (2, 3, 4, 1) and b (2, 3, 2, 2); only their channels may differ",
        ),
        (torch.ones(4, 3), torch.ones(4), "features must have shape (N, C) or (N, C, H, W), got (4,)"),
        (torch.ones(4, 3), torch.ones(4, 0), "features have no samples or no channels: their shape is (4, 0)"),
    ],
)
def test_bad_pairs(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        cka(a, b)
    assert str(caught.value) == message


def test_condition_number_and_effective_rank_agree_on_what_is_zero() -> None:
    z = normal(500, 4)
    z = torch.cat([z, z.sum(1, keepdim=True)], 1)
    assert condition_number(z).isinf()
    assert effective_rank(z) <= 4


def test_examples() -> None:
    failed, tried = doctest.testmod(representation)
    assert failed == 0 < tried


@pytest.mark.parametrize("channels", [0, 3, -1])
def test_a_set_without_features(channels: int) -> None:
    joint = Covariance()
    with pytest.raises(ValueError, match=r"^no features were added; call update\(features\) first$"):
        cka(joint, 1)
    joint.update(normal(5, 3))
    with pytest.raises(
        ValueError, match=rf"^{channels} of 3 features are of the first set; each set needs at least one"
    ):
        cka(joint, channels)


def test_cka_of_a_whole_data_set() -> None:
    maps, joint = normal(12, 5, 2, 3), Covariance()
    for batch in maps.split(5):
        joint.update(batch)
    close(cka(joint, 2), cka(maps[:, :2], maps[:, 2:]), 1e-9)
    with pytest.raises(ValueError, match="^cka takes two tensors, or a Covariance and a number, got Tensor, int$"):
        cka(maps, 2)


@pytest.mark.parametrize("value", [[[1.0, 2.0], [3.0, 4.0]], np.ones((4, 2)), None])
def test_what_is_no_tensor(value: object) -> None:
    for function in (mean_abs_correlation, effective_rank, participation_ratio, condition_number, Covariance().update):
        with pytest.raises(ValueError) as error:
            function(value)
        words = f"features must be a tensor, got {type(value).__name__}; pass torch.as_tensor(features)"
        assert str(error.value) == words


def test_whole_numbers_and_every_precision_are_features() -> None:
    z = torch.randint(-9, 9, (40, 6), generator=torch.Generator().manual_seed(0))
    for kind in (torch.int64, torch.float16, torch.bfloat16, torch.float64):
        for function in (mean_abs_correlation, effective_rank, participation_ratio, condition_number):
            assert torch.equal(function(z.to(kind)), function(z.float()))
        assert torch.equal(cka(z.to(kind), z[:, :2].float()), cka(z.float(), z[:, :2].float()))
