"""Chapter parameters, glued numbers, tables, and figures."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sdecor import plotting, publish
from sdecor.experiment import Record, Run, Store

PRESETS = {"quick": {"epochs": 3, "data": "digits"}, "published": {"epochs": 8, "data": "mnist", "seeds": 5}}
TYPES = {"preset": str, "epochs": int, "data": str, "retrain": bool, "rate": float}
DEFAULTS = {"preset": "published", "epochs": 0, "data": "", "retrain": False, "rate": 0.5}


def namespace(**changed: Any) -> dict[str, Any]:
    """The globals of a notebook after its parameters cell."""
    return {"__annotations__": TYPES, "In": [], "_": 1, "math": types, "publish": publish, **DEFAULTS, **changed}


def test_empty_parameters_take_the_value_of_the_preset() -> None:
    settings = publish.parameters(namespace(), PRESETS)
    assert vars(settings) == {
        "preset": "published", "epochs": 8, "data": "mnist", "seeds": 5, "retrain": False, "rate": 0.5,
    }  # fmt: skip


def test_given_parameters_override_the_preset() -> None:
    settings = publish.parameters(namespace(preset="quick", epochs=1, rate=1), PRESETS)
    assert (settings.epochs, settings.data, settings.rate) == (1, "digits", 1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"sede": 3}, ValueError, "unknown parameter 'sede'; known: preset, epochs, data, retrain, rate"),
        ({"preset": "fast"}, ValueError, "unknown preset 'fast'; known: quick, published"),
        ({"preset": 1}, TypeError, "parameter 'preset' must be of type str, got 1 (int)"),
        ({"epochs": "3"}, TypeError, "parameter 'epochs' must be of type int, got '3' (str)"),
        ({"epochs": True}, TypeError, "parameter 'epochs' must be of type int, got True (bool)"),
        ({"retrain": 1}, TypeError, "parameter 'retrain' must be of type bool, got 1 (int)"),
        ({"epochs": -1}, ValueError, "parameter 'epochs' must be finite and not negative, got -1"),
        ({"rate": float("nan")}, ValueError, "parameter 'rate' must be finite and not negative, got nan"),
        ({"rate": float("inf")}, ValueError, "parameter 'rate' must be finite and not negative, got inf"),
    ],
)
def test_bad_parameters_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        publish.parameters(namespace(**changed), PRESETS)
    assert str(caught.value) == message


def test_glue_writes_what_myst_nb_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(publish, "display", lambda data, **more: shown.append((data, more)))
    publish.glue("accuracy", 0.5)
    scrap = {"name": "accuracy", "mime_prefix": "application/papermill.record/"}
    assert shown == [
        ({"application/papermill.record/text/plain": "0.5"}, {"raw": True, "metadata": {"scrapbook": scrap}})
    ]
    for value, text in ((np.float64(0.5), "0.5"), (np.float32(0.5), "0.5"), (3, "3"), ("rises", "'rises'")):
        publish.glue("accuracy", value)  # as a literal, which the text can format
        assert shown[-1][0] == {"application/papermill.record/text/plain": text}


def record(method: str, seed: int, **metrics: float) -> Record:
    """A record that nobody ran."""
    environment = dict.fromkeys(("device", "threads", "python", "torch", "sdecor", "commit", "date"), "x")
    return Record(Run(method=method, seed=seed), metrics, {}, {**environment, "training_seconds": 60.0}, "")


COLUMNS = {"accuracy": ("accuracy, %", 100.0, 1), "object_mass": ("mass", 1.0, 2)}
ACCURACIES = {"standard": [0.90, 0.92, 0.94], "decorrelation": [0.95, 0.96, 0.91]}
RECORDS = [record(m, seed, accuracy=a) for m, values in ACCURACIES.items() for seed, a in enumerate(values)]


def test_tables_hold_mean_spread_and_the_paired_interval() -> None:
    spread = publish.metric_table(RECORDS, COLUMNS)
    assert spread.loc["standard"].to_dict() == {"accuracy, %": "92.0 ± 2.0", "mass": "–"}
    differences = publish.difference_table(reversed(RECORDS), COLUMNS)
    oracle = stats.ttest_rel(ACCURACIES["decorrelation"], ACCURACIES["standard"]).confidence_interval()
    cell = f"+2.0 [{100 * oracle.low:+.1f}, {100 * oracle.high:+.1f}]"
    assert differences.to_dict("index") == {"decorrelation": {"accuracy, %": cell, "mass": "–"}}


def test_provenance_sums_up_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(publish, "display", shown.append)
    publish.provenance(RECORDS, preset="<quick>")
    text = shown[0].data
    assert "&lt;quick&gt;" in text
    assert "<dd>6: 2 methods, seeds 0, 1, 2</dd>" in text
    assert "<dd>6 minutes, summed over these runs</dd>" in text


def test_missing_record_says_how_to_train_it(tmp_path: Path) -> None:
    run = Run(data="mnist", method="standard", seed=3)
    with pytest.raises(FileNotFoundError) as caught:
        publish.records([run], Store(tmp_path), retrain=False)
    assert str(caught.value) == (
        f"{tmp_path} holds no record of standard on mnist, seed 3 (key {run.key}); pass retrain=True to train it"
    )


def test_store_of_a_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDECOR_DATA", str(tmp_path))
    assert publish.store(str(tmp_path / "mine")).root == tmp_path / "mine"
    assert publish.store(retrain=True).root == tmp_path / "runs"
    assert publish.store().root == Path(publish.__file__).parents[1] / "data"
    assert publish.store(temporary=True).root.is_dir()


@given(st.integers(2, 6), st.integers(2, 6), st.floats(0.1, 0.9))
def test_top_share_keeps_the_largest(height: int, width: int, fraction: float) -> None:
    score = torch.rand(3, height, width)
    kept = plotting.top_share(score, fraction)
    count = round(fraction * height * width)
    assert ((kept > 0).flatten(1).sum(1) == count).all()
    expected = score.flatten(1).sort(descending=True).values[:, :count].sum(1)
    torch.testing.assert_close(kept.flatten(1).sum(1), expected)


def test_bands_draw_mean_and_spread() -> None:
    figure, ax = plotting.plt.subplots()
    plotting.bands(ax, [0, 1], {"standard": [[0.0, 1.0], [2.0, 5.0]], "decorrelation": [[1.0, 1.0]]})
    mean, single = (line.get_ydata().tolist() for line in ax.lines)
    assert (mean, single) == ([1.0, 3.0], [1.0, 1.0])
    low = ax.collections[0].get_paths()[0].vertices[:, 1].min()
    assert low == pytest.approx(min(1 - 2**0.5, 3 - 8**0.5))
    plotting.plt.close(figure)


def test_gallery_has_a_row_a_method_and_two_maps_an_image() -> None:
    figure = plotting.gradient_gallery(torch.rand(3, 8, 8), {"a": torch.rand(3, 8, 8), "b": torch.zeros(3, 8, 8)})
    assert len(figure.axes) == 3 * 6
    assert sum(ax.get_visible() for ax in figure.axes) == 3 + 12
    plotting.plt.close(figure)


def test_every_method_has_its_own_colour_and_label() -> None:
    from sdecor.objective import METHODS

    assert list(plotting.LABELS) == list(METHODS)
    assert len(set(plotting.COLOURS.values())) == len(METHODS)
    assert pd.Series(plotting.LABELS).is_unique


def test_holds_says_by_how_much_and_nan_never_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.holds([1.0, 2.0], 2.0, 1.0)
    assert not publish.holds([1.0, 2.0], 2.0, 0.5)
    assert not publish.holds([1.0, float("nan")], 1.0, 1e9)
    assert capsys.readouterr().out.splitlines() == [
        "holds: largest difference 1.0e+00, tolerance 1e+00",
        "does not hold: largest difference 1.0e+00, tolerance 5e-01",
        "does not hold: largest difference nan, tolerance 1e+09",
    ]
