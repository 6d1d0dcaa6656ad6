"""From records to a page: the frame and its arms, tables, differences, the forest plot, glued numbers, the box."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from sdecor import report
from sdecor.config import Run
from sdecor.measures.statistics import holm
from sdecor.registers import MEASURES, METHODS, Method
from sdecor.store import Record

ACCURACIES = {
    "standard": [0.90, 0.92, 0.94],
    "decorrelation": [0.95, 0.96, 0.91],
    "saliencydecor-signed": [0.99, 0.98, 0.99],
}
COLUMNS = {"accuracy": ("accuracy, %", 100.0, 1), "relevance_mass": ("mass", 1.0, 2)}


def record(method: str, seed: int, metrics: dict[str, float], curves: Any = None, **flat: Any) -> Record:
    """A record that nobody ran."""
    environment = dict.fromkeys(("device", "threads", "python", "torch", "sdecor", "commit", "date"), "x")
    run = Run.of(**{"data": "mnist", **flat}, method=method, seed=seed)
    return Record(run, metrics, curves or {}, {}, {**environment, "training_seconds": 60.0}, "")


def accurate(**values: list[float]) -> list[Record]:
    return [record(m.replace("_", "-"), seed, {"accuracy": v}) for m, vs in values.items() for seed, v in enumerate(vs)]


RECORDS = [
    record(m, s, {"accuracy": a, "gini": 1 - a}) for m, values in ACCURACIES.items() for s, a in enumerate(values)
]


def test_scores_have_the_interval_of_their_mean() -> None:
    scores = {"noise": {"accuracy": [0.5, 0.7, 0.9, float("nan")]}, "one": {"accuracy": [0.25]}, "none": {}}
    found = report.score_table(scores, COLUMNS)
    low, high = stats.ttest_1samp([50, 70, 90], 0).confidence_interval()
    assert found.to_dict("index") == {
        "noise": {"accuracy, %": f"70.0 [{low:.1f}, {high:.1f}]", "mass": "–"},
        "one": {"accuracy, %": "25.0", "mass": "–"},
        "none": {"accuracy, %": "–", "mass": "–"},
    }
    held = np.array([0.5, 0.7, 0.9])
    held.flags.writeable = False  # as pandas gives them; torch would warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (held, torch.tensor([0.5, 0.7, 0.9])):
            assert report.score_table({"noise": {"accuracy": values}}, COLUMNS).equals(found.loc[["noise"]])


@pytest.fixture
def glued(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is glued: name to the text of the value."""
    found: dict[str, str] = {}

    def display(data: Any, *, raw: bool, metadata: Any) -> None:
        found[metadata["scrapbook"]["name"]] = data["application/papermill.record/text/plain"]

    monkeypatch.setattr("IPython.display.display", display)
    return found


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


# --- the frame ------------------------------------------------------------------------------------------------------


def test_the_frame_is_tidy() -> None:
    frame = report.frame(RECORDS)
    assert len(frame) == 2 * len(RECORDS)
    settings = {name for r in RECORDS for name in r.run.flat()}
    assert set(frame) == settings | {"arm", "key", "seed", "measure", "value"}
    assert [*frame][:1] + [*frame][-4:] == ["arm", "key", "seed", "measure", "value"]
    for r in RECORDS:
        rows = frame[(frame["method"] == r.run.method) & (frame["seed"] == r.run.seed)]
        assert dict(zip(rows["measure"], rows["value"], strict=True)) == r.metrics
        assert set(rows["lr"]) == {r.run.schedule.lr}


def test_a_setting_that_a_run_lacks_is_not_a_number() -> None:
    rows = report.frame(RECORDS).drop_duplicates("method").set_index("method")
    assert rows["weight decorrelation"].isna().to_dict() == {
        "standard": True, "decorrelation": False, "saliencydecor-signed": False,
    }  # fmt: skip
    assert rows["limit"].tolist() == [None] * 3, "nothing is not the same as absent"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model": "m:f", "model_options": {"epochs": 5}}, {"model": "m:f", "model_options": {"epochs": 9}}),
        ({"model": "m:f", "model_options": {"x": True}}, {"model": "m:f", "model_options": {"x": 1}}),
        ({"model": "m:f", "model_options": {"x": None}}, {"model": "m:f"}),
        ({"clip": None}, {}),
    ],
)
def test_runs_with_different_keys_are_never_one_arm(one: dict[str, Any], other: dict[str, Any]) -> None:
    shape = {"channels": 1, "num_classes": 10, "image_size": 28}
    runs = [Run.of(data="digits", seed=0, **one), Run.of(data="digits", seed=1, **other)]
    frame = report.frame([Record(run, {"accuracy": 0.5}, {}, shape, {}, "") for run in runs])
    assert frame["arm"].nunique() == 2
    assert len(report.overview([Record(run, {"accuracy": 0.5}, {}, shape, {}, "") for run in runs])) == 2


def test_extra_measures_and_runs_that_come_twice() -> None:
    frame = report.frame([*RECORDS, RECORDS[0]], {"double": lambda r: 2 * r.metrics["accuracy"]})
    assert len(frame) == 3 * len(RECORDS)
    assert frame.loc[frame["measure"] == "double", "value"].iloc[0] == 1.8


def test_a_frame_of_nothing() -> None:
    with pytest.raises(ValueError, match="records is empty"):
        report.frame([])


def test_arms_have_the_labels_of_their_methods() -> None:
    arms = report.frame(RECORDS)["arm"].unique().tolist()
    assert arms == ["standard", "decorrelation only", "both, signed mask"]


def test_arms_that_share_a_method_are_told_apart_by_what_differs() -> None:
    metrics = {"accuracy": 0.5}
    runs = [record("decorrelation", s, metrics, weights={"decorrelation": w}) for s in (0, 1) for w in (0.3, 1, 3)]
    frame = report.frame([*runs, record("standard", 0, metrics, lr=0.1)])
    assert frame["arm"].unique().tolist() == [
        "decorrelation only, weight decorrelation=0.3",
        "decorrelation only, weight decorrelation=1",
        "decorrelation only, weight decorrelation=3",
        "standard",
    ]
    table = report.table(frame, ["accuracy"])
    assert table["seeds"].tolist() == ["2", "2", "2", "1"] and table.shape == (4, 2)
    assert report.table(frame[frame["seed"] == 0], ["accuracy"]).shape == (4, 1)


def test_no_setting_pools_two_runs() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"limit": 64}, {"lr": 1e-3 + 1e-9}, {"model": "lenet", "epochs": 3}, {"evaluate_on": "val"},
        {"permuted_labels": True}, {"removed": 0.3}, {"removed": 0.3, "removed_by": "random"}, {"clip": None},
        {"augment": ("flip",)}, {"augment": ("crop", "flip")}, {"data": "shapes"},
        {"data": "shapes", "data_options": {"samples": 60}}, {"weights": {"decorrelation": 0}},
        {"weights": {"decorrelation": 0.5}}, {"settings": {"group_size": 8}}, {"settings": {"group_size": None}},
        {"settings": {"layers": ("conv2",)}},
    ]  # fmt: skip
    records = [record("decorrelation", 0, {"accuracy": i}, **change) for i, change in enumerate(changes)]
    frame = report.frame(records)
    assert frame["arm"].nunique() == len(changes)
    assert len(report.overview(records)) == len(changes)
    for a, b in itertools.combinations(records, 2):
        assert report.frame([a, b])["arm"].nunique() == 2, (a.run, b.run)


def test_methods_that_share_a_label_are_told_apart_by_name() -> None:
    METHODS["twin"] = Method({"classification": 1}, label="standard")
    try:
        frame = report.frame([record(m, 0, {"accuracy": 0.5}) for m in ("standard", "twin")])
        assert frame["arm"].tolist() == ["standard (standard)", "standard (twin)"]
    finally:
        del METHODS["twin"]


def test_frames_that_are_put_together_get_new_arms() -> None:
    parts = [report.frame([record("standard", 0, {"accuracy": 0.5}, lr=lr)]) for lr in (0.1, 0.2)]
    both = pd.concat(parts)
    with pytest.raises(ValueError, match="arm 'standard' has two values of 'accuracy' for seed 0; name the arms of"):
        report.table(both, ["accuracy"])
    assert report.arms(both)["arm"].tolist() == ["standard, lr=0.1", "standard, lr=0.2"]


def test_a_setting_may_have_the_name_of_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Run.flat
    monkeypatch.setattr(Run, "flat", lambda run: {**flat(run), "value": run.schedule.lr})
    frame = report.frame([record("standard", 0, {"accuracy": 0.5}, lr=lr) for lr in (0.1, 0.2)])
    assert frame["value"].tolist() == [0.5, 0.5] and frame["value (setting)"].tolist() == [0.1, 0.2]


def test_curves_of_methods() -> None:
    records = [record("standard", s, {}, {"loss": [1.0, s]}) for s in (0, 1)] + [
        record("decorrelation", 0, {}, {"b": [1]})
    ]
    assert report.curves(records, "loss", 100) == {"standard": [[100, 0], [100, 100]]}
    with pytest.raises(ValueError, match="no record has a curve 'c'; there are: loss, b"):
        report.curves(records, "c")
    with pytest.raises(ValueError, match="runs of 'standard' differ in more than the seed"):
        report.curves([*records, record("standard", 2, {}, {"loss": [1.0]}, lr=0.1)], "loss")


# --- tables ---------------------------------------------------------------------------------------------------------


def test_the_table_holds_mean_and_spread() -> None:
    table = report.table(report.frame(reversed(RECORDS)), COLUMNS)
    assert list(table) == ["accuracy, %", "mass"]
    assert table.loc["standard"].to_dict() == {"accuracy, %": "92.0 ± 2.0", "mass": "–"}


def test_headings_come_from_the_register_where_none_are_given() -> None:
    table = report.table(report.frame(RECORDS), ["accuracy", "gini", "correlation_conv2"])
    assert list(table) == ["accuracy, % ↑", MEASURES["gini"].heading, "mean |r|, conv2"]
    assert table.loc["standard"].tolist() == ["92.00 ± 2.00", "0.080 ± 0.020", "–"]


def test_a_single_seed_has_no_spread_and_an_undefined_value_is_said() -> None:
    nan = float("nan")
    frame = report.frame(accurate(standard=[0.5], decorrelation=[0.25, nan, 0.75], noise=[nan, float("inf")]))
    assert report.table(frame, COLUMNS)["accuracy, %"].tolist() == ["50.0", "50.0 ± 35.4 (2 of 3)", "–"]


def test_overview() -> None:
    records = [record("decorrelation", s, {"accuracy": 0.9 + s / 10}, data="digits") for s in (1, 0)]
    records += [record("standard", s, {"accuracy": 0.9}, data="digits") for s in (0, 1)]
    records += [record("decorrelation", 3, {"accuracy": 0.5, "b": 1}, weights={"decorrelation": w}) for w in (3, 0.3)]
    table = report.overview(records)
    assert list(table) == ["data", "model", "method", "weight decorrelation", "seeds", "accuracy", "b"]
    assert table.to_numpy().tolist() == [
        ["digits", "lenet", "decorrelation", 1.0, "0,1", "0.9500 ± 0.0707", "–"],
        ["digits", "lenet", "standard", "–", "0,1", "0.9000 ± 0.0000", "–"],
        ["mnist", "lenet", "decorrelation", 0.3, "3", "0.5000", "1.0000"],
        ["mnist", "lenet", "decorrelation", 3.0, "3", "0.5000", "1.0000"],
    ]


# --- differences ----------------------------------------------------------------------------------------------------


def test_differences_are_those_of_the_paired_t_test_over_the_whole_family() -> None:
    frame = report.frame(RECORDS)
    asked = {**report.pairs(frame), "added": ("saliencydecor-signed", "decorrelation only")}
    found = report.differences(frame, asked, ["accuracy", "gini"])
    assert found[["name", "measure"]].to_numpy().tolist() == [
        [name, m] for m in ("accuracy", "gini") for name in ("decorrelation", "saliencydecor-signed", "added")
    ]
    methods = {entry.title: name for name, entry in METHODS.items()}
    for row in found.itertuples():
        assert methods[row.arm] == row.method
        a, b = (np.array(ACCURACIES[methods[arm]]) for arm in (row.arm, row.reference))
        test = stats.ttest_rel(*((a, b) if row.measure == "accuracy" else (1 - a, 1 - b)))
        low, high = test.confidence_interval()
        assert (row.low, row.high, row.p) == pytest.approx((low, high, test.pvalue))
        assert row.mean == pytest.approx((low + high) / 2) and (row.n, row.seeds) == (3, 3)
    assert found["p_holm"].tolist() == holm(found["p"].tolist()).tolist()
    alone = report.differences(frame, "standard", ["accuracy"])
    assert (alone["p_holm"] <= found["p_holm"][:2]).all(), "a smaller family"


def test_the_order_of_records_does_not_matter_to_pairs() -> None:
    tables = [report.differences(report.frame(rs), "standard", ["accuracy"]) for rs in (RECORDS, RECORDS[::-1])]
    key = ["name", "mean", "p_holm"]
    assert (
        tables[0].sort_values("name")[key].to_numpy().tolist() == tables[1].sort_values("name")[key].to_numpy().tolist()
    )


def test_the_table_of_differences_holds_mean_and_interval() -> None:
    frame = report.frame(RECORDS[:6])
    oracle = stats.ttest_rel(ACCURACIES["decorrelation"], ACCURACIES["standard"]).confidence_interval()
    table = report.difference_table(report.differences(frame, "standard", COLUMNS), COLUMNS)
    cell = f"+2.0 [{100 * oracle.low:+.1f}, {100 * oracle.high:+.1f}]"
    assert table.to_dict("index") == {"decorrelation only": {"accuracy, %": cell, "mass": "–"}}
    pairs = {"a": ("decorrelation", "standard"), "b": ("standard", "decorrelation")}
    both = report.difference_table(report.differences(frame, pairs, COLUMNS), COLUMNS)
    assert both.index.tolist() == ["decorrelation only − standard", "standard − decorrelation only"]


def test_only_seeds_that_both_have_are_paired() -> None:
    nan = float("nan")
    frame = report.frame(accurate(standard=[0.5, 0.5, 0.5], decorrelation=[0.6, nan, 0.8], noise=[0.75], twice=[]))
    found = report.differences(frame, "standard", ["accuracy", "gini"]).set_index(["name", "measure"])
    assert found[["n", "seeds"]].to_numpy().tolist() == [[2, 3], [1, 1], [0, 3], [0, 1]]
    assert found.loc[("decorrelation", "accuracy"), "mean"] == pytest.approx(0.2)
    assert found.loc[("noise", "accuracy"), ["low", "high", "p", "p_holm"]].isna().all()
    assert found.loc[("decorrelation", "gini"), ["mean", "low", "high", "p"]].isna().all()
    table = report.difference_table(found.reset_index(), COLUMNS)
    assert table.loc["noise augmentation"].tolist() == ["1", "+25.0", "–"]
    assert table["seeds"].tolist() == ["3", "1"]
    assert table.loc["decorrelation only", "accuracy, %"].endswith("] (2 of 3)")


def test_arms_are_named_by_a_method_if_it_has_one() -> None:
    metrics = {"accuracy": 0.5}
    frame = report.frame([record("standard", 0, metrics), *(record("noise", 0, metrics, lr=lr) for lr in (0.1, 0.2))])
    assert report.pairs(frame, "noise augmentation, lr=0.1") == {
        "standard": ("standard", "noise augmentation, lr=0.1"),
        "noise-augmentation-lr-0.2": ("noise augmentation, lr=0.2", "noise augmentation, lr=0.1"),
    }
    with pytest.raises(
        ValueError, match="several arms have method 'noise'; known: standard; noise augmentation, lr=0.1"
    ):
        report.pairs(frame, "noise")
    with pytest.raises(ValueError, match="unknown arm 'nothing'; known: standard; noise"):
        report.differences(frame, {"a": ("nothing", "standard")}, ["accuracy"])


# --- the forest plot ------------------------------------------------------------------------------------------------


def drawn(ax: Any) -> tuple[list[Any], list[Any]]:
    """Dots and intervals of a panel."""
    lines = [line for line in ax.lines if line.get_linestyle() != "None"]
    return [line for line in ax.lines if line.get_marker() == "o"], [b for b in lines if b.get_marker() == "None"][1:]


def test_the_forest_shows_what_the_differences_say() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(6)
    shifts = {"standard": 0, "decorrelation": rng.normal(0, 1, 6), "saliencydecor-signed": 5 + rng.normal(0, 0.01, 6)}
    records = [record(m, s, {"gini": (base + v)[s], "accuracy": 0.5}) for m, v in shifts.items() for s in range(6)]
    found = report.differences(report.frame(records), "standard", ["gini", "max_sensitivity"])
    figure = report.forest(found, {"gini": ("G", 10, 2), "max_sensitivity": ("sensitivity", 1, 2)})
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["G ↑", "sensitivity ↓"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["decorrelation only", "both, signed mask"]
    assert left.get_ylim()[0] > left.get_ylim()[1], "the first arm is at the top"
    dots, bars = drawn(left)
    for i, row in enumerate(found[found["measure"] == "gini"].itertuples()):
        assert (dots[i].get_xdata()[0], dots[i].get_ydata()[0]) == (pytest.approx(10 * row.mean), i)
        assert bars[i].get_xdata() == pytest.approx([10 * row.low, 10 * row.high])
    assert [d.get_markeredgecolor() for d in dots] == ["#009e73", "#d55e00"]
    assert [d.get_markerfacecolor() for d in dots] == ["white", "#d55e00"]
    assert left.lines[0].get_xdata() == [0, 0] and left.get_xlabel() == ""
    assert (drawn(right), right.get_xlabel()) == (([], []), "undefined here")


def test_one_arm_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="nothing to compare: the only arm is 'standard'"):
        report.differences(report.frame(accurate(standard=[0.5, 0.6])), "standard", ["accuracy"])


def test_a_forest_of_tables_that_were_put_together() -> None:
    frame = report.frame(RECORDS)
    parts = [report.differences(frame, "standard", [measure]) for measure in ("gini", "accuracy")]
    both, apart = report.forest(pd.concat(parts), ["gini", "accuracy"]), [report.forest(p, p["measure"]) for p in parts]
    for ax, one in zip(both.axes, apart, strict=True):
        assert [d.get_xdata() for d in drawn(ax)[0]] == [d.get_xdata() for d in drawn(one.axes[0])[0]]


def test_the_forest_of_one_seed_has_no_intervals() -> None:
    figure = report.forest(report.differences(report.frame(RECORDS[::3]), "standard", ["gini"]), ["gini"])
    dots, bars = drawn(figure.axes[0])
    assert [d.get_markerfacecolor() for d in dots] == ["white", "white"] and bars == []


def test_the_forest_names_what_is_missing_in_a_panel() -> None:
    frame = report.frame(
        accurate(standard=[0.5, 0.6, 0.7], decorrelation=[0.5, float("nan"), 0.8], noise=[float("nan")])
    )
    ax = report.forest(report.differences(frame, "standard", ["accuracy"]), ["accuracy"]).axes[0]
    assert ax.get_title() == "accuracy, % ↑"
    said = " ".join(ax.get_xlabel().split())
    assert said == "decorrelation only: 2 of 3 seeds noise augmentation: undefined"
    assert len(drawn(ax)[0]) == 1


@pytest.mark.parametrize(
    ("count", "per_row", "shape"), [(1, 2, (1, 1)), (4, 2, (2, 2)), (5, 3, (2, 3)), (8, 2, (4, 2))]
)
def test_panels_wrap_and_can_be_read(count: int, per_row: int, shape: tuple[int, int]) -> None:
    names = [f"m{i}" for i in range(count)]
    rng = np.random.default_rng(0)
    metrics = [{name: rng.random() for name in names} for _ in range(4)]
    frame = report.frame([record(m, s, metrics[s]) for m in list(METHODS)[:6] for s in range(4)])
    figure = report.forest(report.differences(frame, "standard", names), names, per_row=per_row)
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == shape
    assert sum(ax.get_visible() for ax in figure.axes) == count
    figure.draw_without_rendering()
    # on a screen of 360 pixels, which takes the whole width, letters are eight pixels at least
    texts = [*figure.axes[0].get_yticklabels(), *figure.axes[0].get_xticklabels(), figure.axes[0].title]
    smallest = min(text.get_fontsize() for text in texts)
    assert per_row > 2 or smallest / 72 / figure.get_figwidth() * 360 > 7.5
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    for upper, lower in itertools.pairwise(boxes):
        assert upper.y0 > lower.y1, "labels of two rows overlap"


def test_the_forest_of_several_references_names_them() -> None:
    pairs = {"a": ("decorrelation", "standard"), "b": ("saliencydecor-signed", "decorrelation")}
    ax = report.forest(report.differences(report.frame(RECORDS), pairs, ["gini"]), ["gini"]).axes[0]
    labels = [" ".join(t.get_text().split()) for t in ax.get_yticklabels()]
    assert labels == ["decorrelation only − standard", "both, signed mask − decorrelation only"]


def doses(of: dict[float, list[float]], method: str = "decorrelation", **flat: Any) -> list[Record]:
    """Records of a method at several weights, each with so many seeds."""
    given = [(dose, seed, gini) for dose, values in of.items() for seed, gini in enumerate(values)]
    return [record(method, s, {"gini": g}, weights={"decorrelation": d}, **flat) for d, s, g in given]


def test_a_response_is_the_difference_at_every_dose() -> None:
    base = [record("standard", s, {"gini": g}) for s, g in enumerate([0.5, 0.6, 0.9])]
    one = doses({10.0: [0.7, 0.9], 0.1: [0.5, 0.7, 0.7]})  # the doses have other seeds than the reference
    other = doses({0.3: [0.4, float("nan")]}, "decorrelation-zca")
    frame = report.frame(base + one + other)
    panels = {"gini": ("G", 10, 2), "accuracy": ("a", 1, 1)}
    figure = report.response_figure(frame, "weight decorrelation", panels, smallest={"gini": 0.02})
    ax, empty = figure.axes
    lines = {str(line.get_label()): line for line in ax.lines if not str(line.get_label()).startswith("_")}
    found = {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}
    means = [0, pytest.approx(10 * (0 + 0.1 - 0.2) / 3), pytest.approx(10 * (0.2 + 0.3) / 2)]
    assert found["decorrelation only"] == ([0, 0.1, 10.0], means)
    assert found["distance to ZCA"] == ([0, 0.3], [0, pytest.approx(-1.0)])
    assert len({line.get_marker() for line in lines.values()}) == 2, "methods of like colours can be told apart"
    seeds = [line for line in ax.lines if line.get_marker() == "."]
    assert [sum(np.isfinite(line.get_ydata())) for line in seeds] == [3, 2, 1]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "0.1", "0.3", "10"]
    [band] = ax.patches
    assert (band.get_y(), band.get_height(), list(empty.patches)) == (pytest.approx(-0.2), pytest.approx(0.4), [])
    assert (ax.get_title(), empty.get_title(), ax.get_xlabel()) == ("G ↑", "a ↑", "weight decorrelation")


def test_what_has_no_response() -> None:
    with pytest.raises(ValueError, match="no arm has the setting 'radius'; there are: arm, data"):
        report.response_figure(report.frame(RECORDS), "radius", ["gini"])
    mixed = report.frame(
        RECORDS + doses({1.0: [0.5]}, settings={"group_size": 8}) + doses({1.0: [0.5]}, settings={"group_size": 4})
    )
    with pytest.raises(ValueError, match="arms of 'decorrelation' differ in more than 'weight decorrelation'"):
        report.response_figure(mixed, "weight decorrelation", ["gini"])


# --- into the page --------------------------------------------------------------------------------------------------


def test_glue_writes_what_myst_nb_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **more: shown.append((data, more)))
    report.glue("accuracy", 0.5)
    scrap = {"name": "accuracy", "mime_prefix": "application/papermill.record/"}
    assert shown == [
        ({"application/papermill.record/text/plain": "0.5"}, {"raw": True, "metadata": {"scrapbook": scrap}})
    ]
    for value, text in ((np.float64(0.5), "0.5"), (np.float32(0.5), "0.5"), (3, "3"), ("rises", "'rises'")):
        report.glue("accuracy", value)  # as a literal, which the text can format
        assert shown[-1][0] == {"application/papermill.record/text/plain": text}


def test_values_and_differences_are_glued_by_the_names_of_methods(glued: dict[str, str]) -> None:
    frame = report.frame(RECORDS[:6])
    report.glue_values(frame, {"gini": ("Gini", 10, 1)})
    assert set(glued) == {
        f"{m}_{n}_{p}" for m in list(ACCURACIES)[:2] for n in ("accuracy", "gini") for p in ("value", "sd")
    }
    assert float(glued["standard_accuracy_value"]) == pytest.approx(92)
    assert float(glued["standard_gini_sd"]) == pytest.approx(0.2)
    glued.clear()
    pairs = {**report.pairs(frame), "added": ("decorrelation", "standard")}
    report.glue_differences(report.differences(frame, pairs, ["accuracy", "mass"]))
    parts = ("mean", "low", "high", "p")
    assert set(glued) == {f"{name}_accuracy_{part}" for name in ("decorrelation", "added") for part in parts}
    assert float(glued["added_accuracy_mean"]) == pytest.approx(2)
    assert 0 < float(glued["added_accuracy_p"]) <= 1


def test_families_of_tests_are_corrected_apart() -> None:
    values = {"standard": [0.5, 0.6, 0.7], "noise": [0.51, 0.63, 0.72], "decorrelation": [0.6, 0.64, 0.79]}
    frame = report.frame(accurate(**values))
    one = report.differences(frame, "standard", ["accuracy"])
    apart = report.differences(frame, "standard", ["accuracy"], family="arm")
    assert apart["p_holm"].tolist() == apart["p"].tolist() == one["p"].tolist()
    assert (
        one["p_holm"].tolist() == pytest.approx([max(2 * min(one["p"]), one["p"].max())] * 2, rel=1)
        and (one["p_holm"] >= one["p"]).all()
    )


def test_nothing_that_is_not_a_number_is_glued(glued: dict[str, str]) -> None:
    frame = report.frame(accurate(standard=[0.5], noise=[0.75], decorrelation=[float("nan")]))
    report.glue_values(frame)
    report.glue_differences(report.differences(frame, "standard", ["accuracy"]))
    assert glued == {"standard_accuracy_value": "50.0", "noise_accuracy_value": "75.0", "noise_accuracy_mean": "25.0"}


def test_provenance_sums_up_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    report.provenance(RECORDS, preset="<quick>", note="a & b")
    text = shown[0].data
    for said in (
        "<dd>&lt;quick&gt;</dd>", "<dd>mnist</dd>", "<dd>9: 3 methods, seeds 0, 1, 2</dd>", "<dd>8</dd>",
        "<dd>x, x thread(s) a run</dd>", "<dd>9 minutes, summed over these runs</dd>", "<dd>a &amp; b</dd>",
    ):  # fmt: skip
        assert said in text
    report.provenance(RECORDS[:1], preset="quick")
    assert "<dd>1: 1 method, seeds 0</dd>" in shown[1].data and "<dd>60 seconds, summed" in shown[1].data
    assert "Note" not in shown[1].data
