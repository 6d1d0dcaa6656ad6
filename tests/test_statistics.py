"""Statistics over seeds: values by hand, SciPy as an oracle, what is undefined, and what is refused."""

from __future__ import annotations

import doctest
import math
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import close

from sdecor.measures import statistics
from sdecor.measures.statistics import (
    below,
    compare,
    effect_size,
    equivalence,
    holm,
    paired_bootstrap,
    paired_difference,
    paired_test,
    summary,
)

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8).map(lambda drawn: tuple(zip(*drawn, strict=True)))


def equal(*differences: float) -> bool:
    return bool(np.ptp(differences) < 1e-9)


# Means and t intervals


def test_summary() -> None:
    assert summary([2.0, 4.0, 9.0]) == (5.0, math.sqrt((9 + 1 + 16) / 2))
    assert summary(torch.tensor([2.0, 4.0, 9.0])).mean == 5
    mean, sd = summary([3])
    assert mean == 3
    assert math.isnan(sd)


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
        (lambda: paired_difference([1, 2], [1, 2], 95), "confidence must be strictly between 0 and 1, got 95"),
    ],
)
def test_bad_statistics(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


# Bootstrap


@given(pairs, st.sampled_from([0.5, 0.9, 0.95]))
@settings(max_examples=20, deadline=None)
def test_bootstrap_against_scipy(drawn: tuple[tuple[float, ...], tuple[float, ...]], confidence: float) -> None:
    a, b = drawn
    differences = np.subtract(a, b)
    found = paired_bootstrap(a, b, confidence, resamples=500, seed=3)
    assert found == paired_bootstrap(torch.tensor(a, dtype=torch.float64), list(b), confidence, resamples=500, seed=3)
    assert found.mean == pytest.approx(differences.mean())
    assert differences.min() - 1e-9 <= found.low <= found.high <= differences.max() + 1e-9
    if not equal(*differences):
        oracle = scipy.stats.bootstrap(
            (differences,),
            np.mean,
            confidence_level=confidence,
            n_resamples=500,
            rng=np.random.default_rng(3),
        ).confidence_interval
        assert found[1:] == pytest.approx(oracle, abs=1e-9)


def test_bootstrap_follows_shift_scale_and_seed() -> None:
    a, b = torch.tensor([1.0, 2.0, 4.0, 8.0, 9.5]), torch.tensor([1.0, 1.5, 2.0, 7.0, 1.0])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = paired_bootstrap(a, b)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert found != paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap(2 * a + 6, 2 * b) == pytest.approx([2 * value + 6 for value in found])
    narrower = paired_bootstrap(a, b, confidence=0.5)
    assert found.low < narrower.low < found.mean < narrower.high < found.high
    # all draws of two pairs lie between the two differences
    assert paired_bootstrap([1.0, 3.0], [0.0, 0.0]) == (2, 1, 3)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_bootstrap_of_equal_differences(shift: float) -> None:
    b = [0.1, 0.2, 0.7]
    found = paired_bootstrap([value + shift for value in b], b)  # of 0.2 they are equal but for rounding
    assert found == pytest.approx((shift, shift, shift))
    assert found.low == found.mean == found.high


def test_bootstrap_of_one_pair() -> None:
    mean, low, high = paired_bootstrap([2.0], [1.0])
    assert mean == 1
    assert math.isnan(low) and math.isnan(high)


def test_bootstrap_of_few_seeds_is_too_narrow_as_documented() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        a = generator.standard_normal(5).tolist()
        _, low, high = paired_bootstrap(a, [0.0] * 5, resamples=500)
        inside += low <= 0 <= high
    assert inside / 400 == pytest.approx(0.85, abs=0.04)


# Effect size


def test_effect_size_by_hand() -> None:
    # differences 0 1 2: mean 1, sd 1; the factor for two degrees of freedom is 1 / gamma(1/2) = 1 / sqrt(pi)
    assert effect_size([1, 2, 3], [1, 1, 1]) == pytest.approx(1 / math.sqrt(math.pi))
    # differences 0 1 2 0 2: sd 1; four degrees of freedom: gamma(2) / (sqrt(2) gamma(3/2)) = sqrt(2 / pi)
    assert effect_size([0, 1, 2, 0, 2], [0.0] * 5) == pytest.approx(math.sqrt(2 / math.pi))


@given(st.integers(3, 30), st.sampled_from([-2.0, 0.3, 1.0]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_effect_size_is_unbiased(n: int, delta: float, seed: int) -> None:
    # t = sqrt(n) d_z of normal differences is non-central t; the factor takes its mean to the true effect
    generator = np.random.default_rng(seed)
    a, b = generator.normal(delta, 1, n), generator.normal(0, 1, n)
    t = scipy.stats.ttest_rel(a, b).statistic
    bias = scipy.stats.nct.mean(n - 1, delta * math.sqrt(n)) / (delta * math.sqrt(n))
    assert effect_size(a, b) == pytest.approx(t / math.sqrt(n) / bias, rel=1e-6)
    assert effect_size(b, a) == pytest.approx(-effect_size(a, b))
    assert effect_size(7 * a + 1, 7 * b + 1) == pytest.approx(effect_size(a, b))


@pytest.mark.parametrize(
    ("a", "b"), [([2.0], [1.0]), ([2.0, 4.0], [1.0, 1.0]), ([2, 3, 4], [1, 2, 3]), ([0.3, 0.4, 0.9], [0.1, 0.2, 0.7])]
)
def test_undefined_effect_size(a: list[float], b: list[float]) -> None:
    assert math.isnan(effect_size(a, b))


# One-sided tests


def tail(t: float) -> float:
    """P(T > t) of Student's t with two degrees of freedom, in closed form."""
    return (1 - t / math.sqrt(t * t + 2)) / 2


@pytest.mark.parametrize(("bound", "t"), [(5.0, 0.0), (6.0, math.sqrt(3)), (20.0, 15 * math.sqrt(3)), (4.0, -(3**0.5))])
def test_below_by_hand(bound: float, t: float) -> None:
    # differences 4 5 6: mean 5, sd 1, so t = (bound - 5) / (1 / sqrt(3))
    assert below([5, 7, 9], [1, 2, 3], bound) == pytest.approx(tail(t), rel=1e-9)
    # t(0.95, 2 degrees of freedom) = 2.919985580355516
    edge = 5 + 2.919985580355516 / math.sqrt(3)
    assert below([4, 5, 6], [0, 0, 0], edge) == pytest.approx(0.05, rel=1e-9)


@given(pairs, st.sampled_from([-30.0, -0.01, 0.0, 1.0, 30.0]))
@settings(max_examples=50, deadline=None)
def test_below_against_scipy(drawn: tuple[tuple[float, ...], tuple[float, ...]], bound: float) -> None:
    a, b = drawn
    p = below(a, b, bound)
    if equal(*np.subtract(a, b)):
        assert math.isnan(p)
        return
    differences = np.subtract(a, b)
    assert p == pytest.approx(scipy.stats.ttest_1samp(differences, bound, alternative="less").pvalue, abs=1e-9)
    assert below(b, a, -bound) == pytest.approx(1 - p, abs=1e-9), "above it"
    assert below(a, b, bound + 1) <= p + 1e-12
    assert equivalence(a, b, 1.5) == max(below(a, b, 1.5), below(b, a, 1.5))
    _, low, high = paired_difference(a, b, 0.9)
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (high < bound)


def test_below_is_wrong_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    wrong = [below(generator.normal(2, 1, 5), [0.0] * 5, 2) < 0.05 for _ in range(2000)]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.015)  # three standard errors


def test_below_without_spread_is_undefined() -> None:
    assert math.isnan(below([2.0], [1.0], 5))
    assert math.isnan(below([0.3, 0.4], [0.1, 0.2], 5))


def test_no_difference_up_to_rounding_is_none() -> None:
    a, b = [0.3, 0.7], [0.1 + 0.2, 0.7]
    assert a[0] != b[0]
    assert paired_difference(a, b) == paired_difference(b, a) == (0, 0, 0)
    assert paired_difference([1e-20, 1e-20], [0, 0]).mean == 1e-20, "small is not the same as rounding"
    # 15 more images of 2945 with either seed, as records have it: to float32
    a, b = ([float(str(np.float32(n / 2945))) for n in right] for right in ((2416, 2532), (2401, 2517)))
    assert a[0] - b[0] != a[1] - b[1]
    assert math.isnan(paired_test(a, b)) and math.isnan(below(a, b, 1.0))
    assert paired_difference(a, b) == pytest.approx([15 / 2945] * 3, rel=1e-4)
    assert paired_test([n / 1e6 for n in (5, 6)], [0, 0]) < 0.2, "one image of a million is more than rounding"


# Equivalence


@given(pairs, st.sampled_from([0.01, 1.0, 30.0]))
@settings(max_examples=50, deadline=None)
def test_equivalence_against_scipy(drawn: tuple[tuple[float, ...], tuple[float, ...]], margin: float) -> None:
    a, b = drawn
    differences = np.subtract(a, b)
    p = equivalence(a, b, margin)
    if equal(*differences):
        assert math.isnan(p)
        return
    above = scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert p == pytest.approx(max(above, below), abs=1e-9)
    assert equivalence(b, a, margin) == pytest.approx(p)
    assert equivalence(a, b, 2 * margin) <= p
    _, low, high = paired_difference(a, b, 0.9)
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (-margin < low and high < margin)


def test_equivalence_without_spread_is_undefined() -> None:
    assert math.isnan(equivalence([2.0], [2.0], 1))
    assert math.isnan(equivalence([2.0, 3.0], [2.0, 3.0], 1))
    # SciPy would be certain of either answer on two seeds that happen to agree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scipy.stats.ttest_1samp([0.0, 0.0], -1, alternative="greater").pvalue == 0


# Holm


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 * 0.01, then 2 * 0.03, then 1 * 0.04 held at 0.06
        ([0.01, 0.013, 0.014, 0.19, 0.35], [0.05, 0.052, 0.052, 0.38, 0.38]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
        ([math.nan, 0.03, math.nan, 0.01], [math.nan, 0.03, math.nan, 0.02]),
        ([math.nan], [math.nan]),
    ],
)
def test_holm_by_hand(p: list[float], adjusted: list[float]) -> None:
    values = torch.tensor(p, dtype=torch.float64)
    assert holm(values).tolist() == pytest.approx(adjusted, nan_ok=True)
    assert holm(p).dtype == torch.float64
    assert values.tolist() == pytest.approx(p, nan_ok=True)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8), st.randoms())
@settings(max_examples=50, deadline=None)
def test_holm_properties(p: list[float], random: object) -> None:
    # the definition: the largest (m - rank) p among the values up to one's own
    found = holm(p).tolist()
    known = sorted(value for value in p if value == value)
    for value, adjusted in zip(p, found, strict=True):
        steps = [(len(known) - rank) * other for rank, other in enumerate(known) if other <= value]
        expected = min(1, max(steps, default=math.nan))
        assert adjusted == pytest.approx(expected if value == value else math.nan, nan_ok=True)
    assert holm(p[::-1]).tolist() == pytest.approx(found[::-1], nan_ok=True)


# Tables


def results(**methods: list[float]) -> pd.DataFrame:
    """One metric, seeds from 0."""
    rows = [(name, seed, "gini", value) for name, values in methods.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["method", "seed", "metric", "value"])


def test_compare_agrees_with_its_parts() -> None:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        [
            (method, seed, metric, generator.normal(i, 0.5))
            for i, method in enumerate(["ours", "plain", "other"])
            for seed in (7, 3, 5, 1)
            for metric in ("gini", "accuracy")
        ],
        columns=["method", "seed", "metric", "value"],
    )
    before = frame.copy()
    table = compare(frame, "plain", margin={"accuracy": 2.0}, confidence=0.9)
    assert list(zip(table["metric"], table["method"], strict=True)) == [
        ("gini", "ours"),
        ("gini", "other"),
        ("accuracy", "ours"),
        ("accuracy", "other"),
    ]
    assert (table["n"] == 4).all()
    values = frame.sort_values("seed").groupby(["metric", "method"])["value"].apply(list)
    for row in table.itertuples():
        a, b = values[row.metric, row.method], values[row.metric, "plain"]
        assert (row.difference, row.low, row.high) == pytest.approx(paired_difference(a, b, 0.9))
        assert (row.bootstrap_low, row.bootstrap_high) == pytest.approx(paired_bootstrap(a, b, 0.9)[1:])
        assert row.effect_size == pytest.approx(effect_size(a, b))
        assert row.p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
        expected = equivalence(a, b, 2.0) if row.metric == "accuracy" else math.nan
        assert row.p_equivalence == pytest.approx(expected, nan_ok=True)
    assert table["p_holm"].tolist() == pytest.approx(holm(table["p"].tolist()).tolist())
    pd.testing.assert_frame_equal(frame, before)
    again = compare(frame.iloc[::-1], "plain", margin=2.0, confidence=0.9)
    both = again.set_index(["metric", "method"]).loc[list(zip(table["metric"], table["method"], strict=True))]
    assert both["p_holm"].tolist() == pytest.approx(table["p_holm"].tolist())
    assert both["p_equivalence"].notna().all()
    assert "p_equivalence" not in compare(frame, "plain")


def test_compare_where_nothing_varies() -> None:
    table = compare(results(plain=[1.0, 2.0], same=[1.0, 2.0], ahead=[2.0, 3.0], noisy=[2.0, 5.0]), "plain", margin=1.0)
    table = table.set_index("method")
    assert table.loc["ahead", ["difference", "low", "high", "bootstrap_low", "bootstrap_high"]].tolist() == [1.0] * 5
    for column in ("effect_size", "p", "p_holm", "p_equivalence"):
        assert table.loc[["same", "ahead"], column].isna().all()
    assert table.loc["noisy", "p_holm"] == table.loc["noisy", "p"]  # the only test of the table


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            results(plain=[1.0], ours=[1.0]).drop(columns=["seed", "value"]),
            "frame has no column seed, value; its columns are method, metric",
        ),
        (results(ours=[1.0], b=[2.0]), "column method must hold 'plain' and another, it holds ours, b"),
        (results(plain=[1.0]), "column method must hold 'plain' and another, it holds plain"),
        (
            pd.concat([results(plain=[1.0, 2.0], ours=[1.0, 2.0]), results(ours=[3.0])]),
            "method 'ours' has more than one value of metric 'gini' for seed 0",
        ),
        (
            results(plain=[1.0, 2.0, 3.0], ours=[1.0]),
            "method 'ours' has no finite value of metric 'gini' for seed 1, 2; each method needs it",
        ),
        (
            results(plain=[1.0], ours=[1.0, 2.0]),
            "method 'plain' has no finite value of metric 'gini' for seed 1; each method needs it",
        ),
        (
            results(plain=[1.0, 2.0], ours=[1.0, math.inf]),
            "method 'ours' has no finite value of metric 'gini' for seed 1; each method needs it",
        ),
    ],
)
def test_bad_frames(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        compare(frame, "plain")
    assert str(caught.value) == message


def test_a_metric_that_a_method_lacks() -> None:
    frame = pd.concat([results(plain=[1.0], ours=[1.0]), results(plain=[1.0]).assign(metric="rank")])
    with pytest.raises(ValueError, match="^method 'ours' has no finite value of metric 'rank' for seed 0"):
        compare(frame, "plain")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap([], []), "a must hold at least one number, one per seed, got shape (0,)"),
        (lambda: paired_bootstrap([1, 2], [1, 2], 95), "confidence must be strictly between 0 and 1, got 95"),
        (lambda: paired_bootstrap([1, 2], [1, 2], resamples=9), "resamples must be at least 100, got 9"),
        (lambda: effect_size([1, 2], [1]), "a has 2 values and b has 1; pairs need one of each per seed"),
        (lambda: equivalence([1, 2], [1, math.nan], 1), "b must be finite, got nan at position 1"),
        (lambda: equivalence([1, 2], [1, 2], 0), "margin must be greater than 0, got 0"),
        (lambda: equivalence([1, 2], [1, 2], math.nan), "margin must be finite and greater than 0, got nan"),
        (lambda: below([1, 2], [1, 3], math.nan), "bound must be finite, got nan"),
        (lambda: below([1, 2], [1, 3], math.inf), "bound must be finite, got inf"),
        (lambda: holm([0.5, 1.5]), "p_values must lie in [0, 1], got 1.5"),
        (lambda: holm(torch.ones(1, 2)), "p_values must have shape (m,), got (1, 2)"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_examples() -> None:
    failed, tried = doctest.testmod(statistics)
    assert failed == 0 < tried
