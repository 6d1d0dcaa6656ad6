"""Verdicts on claims: every cell of the decision table by hand, the correction, what is undefined, and properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sdecor import report
from sdecor.measures.statistics import holm
from sdecor.plan import Claim

YES, NO, OPEN = "holds", "does not hold", "cannot tell"
NAN = math.nan


def tidy(measure: str = "gini", **arms: Sequence[float]) -> pd.DataFrame:
    """A frame of these values, seeds from 0; every arm has the name of its method, and a key."""
    rows = [(a, a, f"key-{a}", seed, measure, v) for a, values in arms.items() for seed, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["arm", "method", "key", "seed", "measure", "value"])


def base_of(n: int) -> list[float]:
    return [2.0 ** (seed % 8) for seed in range(n)]


def moved(differences: Sequence[float], **others: Sequence[float]) -> pd.DataFrame:
    """Arm `noise` with these differences to `standard`, whose values differ as well."""
    base = base_of(len(differences))
    return tidy(standard=base, noise=[b + d for b, d in zip(base, differences, strict=True)], **others)


def claim(direction: str = "higher", smallest: float = 1.0, **other: Any) -> Claim:
    given = {"name": "c", "text": "It is so.", "measure": "gini", "arm": "noise", "against": "standard", **other}
    return Claim(**given, direction=direction, smallest=smallest)


def word(differences: Sequence[float], direction: str, smallest: float) -> str:
    return str(report.verdict(moved(differences), [claim(direction, smallest)])["verdict"].item())


def tail(t: float) -> float:
    """P(T > t) of Student's t with two degrees of freedom, in closed form."""
    return (1 - t / math.sqrt(t * t + 2)) / 2


# --- the decision table ---------------------------------------------------------------------------------------------

CERTAIN = 2 * tail(5 * math.sqrt(3))  # of the differences 4 5 6: mean 5, standard error 1 / sqrt(3); 0.013


@pytest.mark.parametrize(
    ("direction", "differences", "smallest", "p", "small", "expected"),
    [
        # an effect of 5, and it matters
        ("higher", [4, 5, 6], 1, CERTAIN, 1 - tail(4 * 3**0.5), YES),
        ("higher", [4, 5, 6], 5, CERTAIN, 0.5, YES),
        ("lower", [-4, -5, -6], 1, CERTAIN, 1 - tail(4 * 3**0.5), YES),
        # there is one, but it may be smaller than matters
        ("higher", [4, 5, 6], 6, CERTAIN, tail(3**0.5), OPEN),
        ("lower", [-4, -5, -6], 6, CERTAIN, tail(3**0.5), OPEN),
        # there is one, and it is smaller than matters
        ("higher", [4, 5, 6], 20, CERTAIN, tail(15 * 3**0.5), NO),
        ("lower", [-4, -5, -6], 20, CERTAIN, tail(15 * 3**0.5), NO),
        # it is the other way round
        ("lower", [4, 5, 6], 1, CERTAIN, tail(6 * 3**0.5), NO),
        ("higher", [-4, -5, -6], 1, CERTAIN, tail(6 * 3**0.5), NO),
        # none to be seen: it may matter nevertheless, or cannot
        ("higher", [-1, 0, 1], 1, 1, tail(3**0.5), OPEN),
        ("higher", [-1, 0, 1], 20, 1, tail(20 * 3**0.5), NO),
        ("lower", [-1, 0, 1], 20, 1, tail(20 * 3**0.5), NO),
        # one that would matter, but is not certain
        ("higher", [-1, 5, 11], 1, 2 * tail(5 / (6 / 3**0.5)), 1 - tail(4 / (6 / 3**0.5)), OPEN),
        # equal: within what matters, beyond, at its edge, perhaps within
        ("equal", [-1, 0, 1], 20, 1, tail(20 * 3**0.5), YES),
        ("equal", [4, 5, 6], 20, CERTAIN, tail(15 * 3**0.5), YES),
        ("equal", [4, 5, 6], 1, CERTAIN, 1 - tail(4 * 3**0.5), NO),
        ("equal", [-4, -5, -6], 1, CERTAIN, 1 - tail(4 * 3**0.5), NO),
        ("equal", [4, 5, 6], 5, CERTAIN, 0.5, OPEN),
        ("equal", [4, 5, 6], 6, CERTAIN, tail(3**0.5), OPEN),
        ("equal", [-1, 0, 1], 1, 1, tail(3**0.5), OPEN),
        ("equal", [-1, 5, 11], 1, 2 * tail(5 / (6 / 3**0.5)), 1 - tail(4 / (6 / 3**0.5)), OPEN),
    ],
)
def test_the_decision_table_by_hand(
    direction: str, differences: list[float], smallest: float, p: float, small: float, expected: str
) -> None:
    row = report.verdict(moved(differences), [claim(direction, smallest)]).iloc[0]
    assert (row["p"], row["p_equivalent"]) == pytest.approx((p, small), rel=1e-6)
    assert row["p_holm"] == row["p"]
    assert row["verdict"] == expected


def test_the_row_of_a_claim() -> None:
    found = report.verdict(moved([4, 5, 6]), [claim("higher", 2.5)])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) / sqrt(3)
    assert found.drop(columns=["mean", "low", "high", "p", "p_holm", "p_equivalent"]).to_dict("records") == [
        {
            **{"name": "c", "text": "It is so.", "measure": "gini", "direction": "higher", "arm": "noise"},
            **{"reference": "standard", "method": "noise", "n": 3, "seeds": 3, "smallest": 2.5, "verdict": YES},
            "planned": 0,
        }
    ]
    assert found[["mean", "low", "high"]].to_numpy().tolist() == [pytest.approx([5, 5 - half, 5 + half])]


def test_certain_but_smaller_than_matters_is_open_until_there_are_seeds() -> None:
    # "not shown to be too small" alone would let the same effect hold with few seeds, and not with more
    assert word([4, 5, 6], "higher", 6) == OPEN
    assert word([4, 5, 6] * 9, "higher", 6) == NO


# --- the correction -------------------------------------------------------------------------------------------------


def test_all_claims_of_a_plan_are_one_family() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 6)
    frame = tidy(standard=base, noise=base + rng.normal(1, 1, 6), decorrelation=base + rng.normal(0.2, 0.3, 6))
    claims = [
        claim("higher", 0.5, name="a"),
        claim("lower", 0.5, name="b", arm="decorrelation"),
        claim("equal", 0.7, name="c", arm="decorrelation", against="noise"),
    ]
    found = report.verdict(frame, claims)
    values = {arm: rows["value"].to_numpy() for arm, rows in frame.groupby("arm")}
    a, b, c = (values[one.arm] - values[one.against] for one in claims)
    two_sided = [stats.ttest_1samp(d, 0).pvalue for d in (a, b, c)]
    small = [
        stats.ttest_1samp(a, 0.5, alternative="less").pvalue,
        stats.ttest_1samp(b, -0.5, alternative="greater").pvalue,
        max(
            stats.ttest_1samp(c, -0.7, alternative="greater").pvalue,
            stats.ttest_1samp(c, 0.7, alternative="less").pvalue,
        ),
    ]
    assert found["p"].tolist() == pytest.approx(two_sided)
    assert found["p_holm"].tolist() == pytest.approx(holm(two_sided).tolist())
    assert found["p_equivalent"].tolist() == pytest.approx(holm(small).tolist())
    alone = [report.verdict(frame, [one]).iloc[0] for one in claims]
    assert [row["p_equivalent"] for row in alone] == pytest.approx(small)


def test_a_claim_that_would_hold_alone_may_not_among_others() -> None:
    claims = [claim(name=name) for name in "abcd"]
    frame = moved([4, 5, 6])
    assert report.verdict(frame, claims[:3])["verdict"].tolist() == [YES] * 3  # 3 * 0.013
    assert report.verdict(frame, claims)["verdict"].tolist() == [OPEN] * 4  # 4 * 0.013 is more than 0.05
    assert report.verdict(frame, claims)["p_holm"].tolist() == pytest.approx([4 * CERTAIN] * 4)


def test_the_other_way_round_is_enough_to_refute() -> None:
    frame = moved([4, 5, 6], decorrelation=np.add(base_of(3), [50, 50.01, 49.99]).tolist())
    sure = [claim(name=str(i), arm="decorrelation") for i in range(9)]
    found = report.verdict(frame, [claim("lower", 0.001), *sure])
    assert found["p_holm"][0] == pytest.approx(CERTAIN), "the largest of its column"
    assert found["p_equivalent"][0] == pytest.approx(10 * tail(5.001 * 3**0.5)), "the smallest of its column"
    assert found["p_equivalent"][0] > 0.05
    assert found["verdict"].tolist() == [NO] + [YES] * 9


def test_an_undefined_claim_still_counts() -> None:
    lost = [claim(name=name, measure="accuracy") for name in "xyz"]
    found = report.verdict(moved([4, 5, 6]), [claim(), *lost])
    assert found["p_holm"].tolist() == pytest.approx([4 * CERTAIN, NAN, NAN, NAN], nan_ok=True)
    assert found["verdict"].tolist() == [OPEN] * 4


# --- what is undefined ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["higher", "lower", "equal"])
@pytest.mark.parametrize(("differences", "n"), [([NAN, NAN], 0), ([5.0], 1), ([5.0, NAN], 1), ([math.inf, 0.0], 1)])
def test_fewer_than_two_pairs_tell_nothing(direction: str, differences: list[float], n: int) -> None:
    row = report.verdict(moved(differences), [claim(direction)]).iloc[0]
    assert (row["n"], row["seeds"], row["verdict"]) == (n, len(differences), OPEN)
    assert row[["low", "high", "p", "p_holm", "p_equivalent"]].isna().all()
    assert math.isnan(row["mean"]) == (n == 0)


def test_a_pair_of_zero_difference_is_no_proof_but_two_are() -> None:
    assert [word([0.0], d, 1) for d in ("higher", "lower", "equal")] == [OPEN] * 3
    assert [word([0.0] * 2, d, 1) for d in ("higher", "lower", "equal")] == [NO, NO, YES]
    row = report.verdict(moved([0.0] * 2), [claim("equal", 1e-9)]).iloc[0]
    assert row[["mean", "low", "high", "p", "p_holm", "p_equivalent"]].tolist() == [0, 0, 0, 1, 1, 0]


def test_no_change_up_to_rounding() -> None:
    frame = tidy(standard=[0.3, 0.7, 0.1], noise=[0.1 + 0.2, 0.7, 0.1])
    assert report.verdict(frame, [claim("equal", 0.01)])["verdict"].item() == YES


@pytest.mark.parametrize("direction", ["higher", "lower", "equal"])
@pytest.mark.parametrize("smallest", [1.0, 9.0])
def test_differences_that_are_all_the_same_leave_no_spread_to_judge_by(direction: str, smallest: float) -> None:
    row = report.verdict(moved([5.0] * 4), [claim(direction, smallest)]).iloc[0]
    assert row[["mean", "low", "high"]].tolist() == [5] * 3
    assert row[["p", "p_holm", "p_equivalent"]].isna().all()
    assert row["verdict"] == OPEN


def test_a_measure_that_nobody_took() -> None:
    row = report.verdict(moved([4, 5, 6]), [claim(measure="accuracy")]).iloc[0]
    assert (row["n"], row["seeds"], row["verdict"]) == (0, 3, OPEN)


def test_only_seeds_of_both_count() -> None:
    frame = moved([4, 5, 6, NAN], decorrelation=[0.0])
    row = report.verdict(frame, [claim()]).iloc[0]
    assert (row["n"], row["seeds"], row["mean"], row["verdict"]) == (3, 4, 5, YES)


def test_no_claims() -> None:
    found = report.verdict(moved([4, 5, 6]), [])
    assert found.empty and found.columns.tolist() == report.verdict(moved([4, 5, 6]), [claim()]).columns.tolist()
    assert report.verdict_table(found).empty
    with pytest.raises(ValueError, match="verdicts is empty"):
        report.verdict_figure({"small": found})


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_arms_of_a_plan_are_mapped_to_those_of_the_frame() -> None:
    frame = moved([4, 5, 6])
    frame["arm"] = "arm of " + frame["method"]
    asked = [claim(arm="strong", against="plain")]
    methods = report.verdict(frame, asked, {"strong": "noise", "plain": "standard"})
    for name in ("key-", "arm of "):
        found = report.verdict(frame, asked, {"strong": f"{name}noise", "plain": f"{name}standard", "more": "nothing"})
        pd.testing.assert_frame_equal(found, methods)
    assert methods[["arm", "reference", "verdict"]].to_numpy().tolist() == [["arm of noise", "arm of standard", YES]]
    with pytest.raises(ValueError, match="unknown arm 'strong'; known: arm of standard; arm of noise"):
        report.verdict(frame, asked)
    with pytest.raises(ValueError, match="unknown arm 'nothing'"):
        report.verdict(frame, asked, {"strong": "nothing", "plain": "standard"})


def test_an_arm_without_runs_yet() -> None:
    found = report.verdict(moved([4, 5, 6]), [claim(arm="later")], {"standard": "standard"})
    row = found.iloc[0]
    assert (row["arm"], row["reference"], row["n"], row["verdict"]) == ("later", "standard", 0, OPEN)
    assert report.verdict_table(found).loc["c", ["effect", "p", "p, too small"]].tolist() == ["–"] * 3
    ax = report.forest(found, ["gini"]).axes[0]
    assert ax.get_xlabel() == "undefined here"
    plt.close("all")


def test_arms_that_came_out_as_the_same_runs() -> None:
    arms = {"strongest": "key-noise", "most accurate": "key-noise"}
    asked = [claim(d, name=d, arm="strongest", against="most accurate") for d in ("higher", "equal")]
    found = report.verdict(moved([4, 5, 6]), asked, arms)
    assert found[["n", "mean"]].to_numpy().tolist() == [[3, 0], [3, 0]]
    assert found["verdict"].tolist() == [NO, YES]


def test_claims_that_share_a_name() -> None:
    with pytest.raises(ValueError, match="several claims have the name 'c'"):
        report.verdict(moved([4, 5, 6]), [claim(), claim("lower")])


def test_the_picture_of_the_verdicts() -> None:
    three = [claim(d, 2.0, name=d, text=f"It is {d}.") for d in ("higher", "lower", "equal")]
    sizes = {"small": moved([4.75, 5, 5.25]), "one seed": moved([-3])}
    later = claim(name="later", text="It comes later.", arm="later")
    known, planned = {m: m for m in ("noise", "standard")}, {"noise": 3, "standard": 3, "later": 3}
    tables = {n: report.verdict(f, [*three, later], known, planned) for n, f in sizes.items()}
    ax = report.verdict_figure(tables).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [*(c.text for c in three), later.text]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first claim is at the top"
    assert [t.get_text() for t in ax.texts] == [YES, NO, NO, "not run", *[OPEN] * 3, "not run"]
    places = [t.get_position()[1] for t in ax.texts]
    assert all(p < row < q and q - p < 0.5 for row, (p, q) in enumerate(zip(places[:4], places[4:], strict=True)))
    for marker, mean in (("o", 5), ("s", -3)):
        dots = [line for line in ax.lines if line.get_marker() == marker and len(line.get_xdata())]
        drawn = [d for d in dots if not math.isnan(d.get_xdata()[0])]
        assert [d.get_xdata()[0] for d in drawn] == [mean / 2, -mean / 2, mean / 2]
        assert {d.get_markerfacecolor() == "white" for d in drawn} == {mean == -3}, "some seeds are missing"
    bars = [line for line in ax.lines if line.get_marker() == "None"][1:]
    half = stats.t.ppf(0.975, 2) * 0.25 / math.sqrt(3) / 2
    assert len(bars) == 3, "one seed has no interval"
    assert [sorted(b.get_xdata()) for b in bars] == [pytest.approx([m - half, m + half]) for m in (2.5, -2.5, 2.5)]
    assert [t.get_text() for t in ax.figure.legends[0].get_texts()] == ["small", "one seed"]
    assert not report.verdict_figure({"small": tables["small"]}).legends
    plt.close("all")


# --- properties -----------------------------------------------------------------------------------------------------

DIRECTIONS = st.sampled_from(["higher", "lower", "equal"])
OTHER = {"higher": "lower", "lower": "higher", "equal": "equal"}
SMALLEST = st.sampled_from([0.125, 0.5, 1.0, 4.0, 32.0])


@st.composite
def drawn(draw: st.DrawFn) -> list[float]:
    """Differences in eighths, which are exact, around a mean: between certain and not, small and large."""
    middle, spread = draw(st.sampled_from([0, 1, 4, -4, 20])), draw(st.sampled_from([0, 1, 8, 40]))
    return [middle + d / 8 for d in draw(st.lists(st.integers(-spread, spread), min_size=2, max_size=7))]


@given(drawn(), DIRECTIONS, SMALLEST)
@settings(max_examples=15, deadline=None)
def test_swapping_the_arms_turns_the_direction(differences: list[float], direction: str, smallest: float) -> None:
    one = claim(direction, smallest)
    other = claim(OTHER[direction], smallest, arm="standard", against="noise")
    a, b = (report.verdict(moved(differences), [c]).iloc[0] for c in (one, other))
    assert a["verdict"] == b["verdict"]
    assert a["mean"] == -b["mean"]
    assert a[["p", "p_equivalent"]].tolist() == pytest.approx(b[["p", "p_equivalent"]].tolist(), nan_ok=True)


@given(drawn(), DIRECTIONS, SMALLEST, st.sampled_from([2.0**-10, 2.0, 2.0**20]))
@settings(max_examples=15, deadline=None)
def test_the_unit_does_not_matter(differences: list[float], direction: str, smallest: float, unit: float) -> None:
    frame = moved(differences)
    a = report.verdict(frame, [claim(direction, smallest)]).iloc[0]
    b = report.verdict(frame.assign(value=unit * frame["value"]), [claim(direction, unit * smallest)]).iloc[0]
    assert a["verdict"] == b["verdict"]
    for columns, factor in ((["mean", "low", "high"], unit), (["p", "p_holm", "p_equivalent"], 1)):
        assert (factor * a[columns]).tolist() == pytest.approx(b[columns].tolist(), nan_ok=True)


@given(
    st.floats(-3, 3), st.floats(0.05, 5), st.integers(2, 8), st.integers(1, 20), DIRECTIONS, st.sampled_from([0.5, 2])
)
@settings(max_examples=15, deadline=None)
def test_more_seeds_of_the_same_mean_and_spread_take_nothing_back(
    mean: float, sd: float, few: int, more: int, direction: str, smallest: float
) -> None:
    def at(n: int) -> str:
        shape = stats.norm.ppf((np.arange(n) + 0.5) / n)
        return word((mean + sd * (shape - shape.mean()) / shape.std(ddof=1)).tolist(), direction, smallest)

    before, after = at(few), at(few + more)
    assert (before, after) in {(OPEN, OPEN), (OPEN, YES), (OPEN, NO), (YES, YES), (NO, NO)}


@given(drawn(), SMALLEST)
@settings(max_examples=15, deadline=None)
def test_verdicts_of_one_difference_agree(differences: list[float], smallest: float) -> None:
    higher, lower, equal = (word(differences, d, smallest) for d in ("higher", "lower", "equal"))
    assert (higher, lower) != (YES, YES)
    if equal == YES:
        assert (higher, lower) == (NO, NO)
    if YES in (higher, lower):
        assert equal != YES and NO in (higher, lower)
    if equal == NO:
        assert {higher, lower} == {YES, NO}


@given(st.lists(st.tuples(DIRECTIONS, SMALLEST), min_size=2, max_size=6), drawn(), drawn())
@settings(max_examples=12, deadline=None)
def test_more_claims_only_leave_more_open(asked: list[tuple[str, float]], one: list[float], other: list[float]) -> None:
    n = min(len(one), len(other))
    frame = moved(one[:n], decorrelation=np.add(base_of(n), other[:n]).tolist())
    arms = itertools.cycle(["noise", "decorrelation"])
    claims = [claim(d, s, name=str(i), arm=arm) for i, ((d, s), arm) in enumerate(zip(asked, arms, strict=False))]
    alone = [report.verdict(frame, [c])["verdict"].item() for c in claims]
    together = report.verdict(frame, claims)["verdict"].tolist()
    assert all(b in (a, OPEN) for a, b in zip(alone, together, strict=True))
    assert report.verdict(frame, claims[::-1])["verdict"].tolist()[::-1] == together


# --- on the page ----------------------------------------------------------------------------------------------------


def test_the_table_of_verdicts() -> None:
    frame = pd.concat([moved([4, 5, 6, NAN]), moved([0.04, 0.05, 0.06]).assign(measure="accuracy")])
    claims = [
        claim("equal", 20, name="same"),
        claim("lower", 0.007, name="costs", measure="accuracy"),
        claim("higher", 0.5, name="lost", measure="correlation_conv1"),
    ]
    verdicts = report.verdict(frame, claims, planned={"standard": 5, "noise": 4})
    assert report.verdict_table(verdicts, {"gini": ("Gini", 10, 1)}).to_dict("index") == {
        "same": {
            **{"measure": "Gini", "effect": "+50.0 [+25.2, +74.8] (3 of 4)", "smallest effect": "±200"},
            **{"seeds": "3 of 4", "p": "0.039", "p, too small": "0.002", "verdict": YES},
        },
        "costs": {
            **{"measure": "accuracy, % ↑", "effect": "+5.00 [+2.52, +7.48] (3 of 4)", "smallest effect": "-0.7"},
            **{"seeds": "3 of 4", "p": "0.039", "p, too small": "0.010", "verdict": NO},
        },
        "lost": {
            **{"measure": "mean |r|, conv1", "effect": "–", "smallest effect": "+0.5"},
            **{"seeds": "0 of 4", "p": "–", "p, too small": "–", "verdict": OPEN},
        },
    }
    assert report.verdict_table(verdicts).loc["same", "measure"] == "Gini ↑"
    assert report.verdict_table(report.verdict(moved([4, 5, 6] * 9), [claim()])).loc["c", "p"] == "< 0.001"
    whole = report.verdict(frame, claims[:1], planned={"standard": 3, "noise": 9})
    assert report.verdict_table(whole).loc["same", "seeds"] == "3"


def test_verdicts_are_differences_too(monkeypatch: pytest.MonkeyPatch) -> None:
    glued: dict[str, Any] = {}
    monkeypatch.setattr("sdecor.report.page.glue", glued.__setitem__)
    verdicts = report.verdict(moved([4, 5, 6]), [claim(), claim("lower", name="other", measure="accuracy")])
    report.glue_differences(verdicts)
    assert set(glued) == {"c_gini_mean", "c_gini_low", "c_gini_high", "c_gini_p"}
    assert report.difference_table(verdicts, {"gini": ("g", 1, 1)}).to_dict() == {"g": {"noise": "+5.0 [+2.5, +7.5]"}}
    found = report.differences(moved([4, 5, 6]), "standard", ["gini"])
    assert set(found) <= set(verdicts)
    same = [c for c in found if c not in ("name", "p_holm")]
    assert verdicts.loc[0, same].tolist() == found.loc[0, same].tolist()
    assert verdicts["p_holm"][0] == pytest.approx(2 * found["p_holm"][0])
