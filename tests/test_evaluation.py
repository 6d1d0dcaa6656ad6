"""Tables of attributions by measures, kept as they grow, and records measured anew."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor
from typer.testing import CliRunner

import sdecor.evaluation
from sdecor.__main__ import app
from sdecor.data import load
from sdecor.evaluation import CONTROLS, SAMPLES, measure_again, tabulate
from sdecor.experiment import Run, Store, data_of, execute
from sdecor.measures import controls
from sdecor.measures.registry import METRICS, Case, available, table
from sdecor.measures.suite import measure
from sdecor.saliency import ATTRIBUTIONS, attribute, logits_and_gradient

RUN = Run(data="shapes", limit=96, epochs=1, batch_size=32, data_options=(("samples", 60),))
TWO = ("gradient", "gradcam")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a run and a table of it; not to be changed."""
    store = Store(tmp_path_factory.mktemp("done"))
    execute(RUN, store)
    tabulate(RUN, store, TWO, images=8)
    return store


@pytest.fixture
def store(done: Store, tmp_path: Path) -> Store:
    shutil.copytree(done.root, tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is measured from here on, by the measures that take no time."""
    names: list[str] = []

    def noted(cases: dict[str, Case]) -> pd.DataFrame:
        names.extend(cases)
        cheap = ("sharpness", "localization")
        return table(cases, [n for c in cases.values() for n in available(c) if METRICS[n].family in cheap])

    monkeypatch.setattr(sdecor.evaluation.registry, "table", noted)
    return names


def path_of(store: Store) -> Path:
    return store.root / "tables" / "shapes" / f"{RUN.key}.csv"


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_has_every_attribution_and_control_by_every_measure(done: Store) -> None:
    result = tabulate(RUN, done, TWO, images=8)
    assert list(result["attribution"].unique()) == [*CONTROLS, *TWO]
    for name, part in result.groupby("attribution"):
        without = {n for n, m in METRICS.items() if "explain" in m.needs} if name == "ground truth" else set()
        assert list(part["metric"]) == [n for n in METRICS if n not in without]
    assert (result["images"] == 8).all()
    values = result.set_index(["attribution", "metric"])
    assert (values.loc["ground truth"]["value"][["relevance_mass", "auroc", "pointing_game"]] == 1).all()
    assert values.loc["constant", "auroc"]["value"] == 0.5
    assert values.loc["edges", "randomization"]["value"] == values.loc["noise", "randomization"]["value"] == 1
    assert values.loc["constant", "randomization"]["undefined"] == 8  # a constant map has no ranks to compare


def test_its_values_are_those_of_the_registry(done: Store) -> None:
    data = load("shapes", split="test", samples=60).subset(8)
    x, model = data.normalized(), done.model(RUN, 3, 8, 32)
    target = logits_and_gradient(model, x)[0].argmax(1)

    def gradcam(model: Any, images: Tensor, target: Tensor) -> Tensor:
        return attribute(model, images, target, "gradcam", progress=False)

    known: dict[str, Any] = {"mask": data.masks, "model": model, "images": x, "target": target, "samples": SAMPLES}
    case = Case(attribution=gradcam(model, x, target), explain=gradcam, **known)
    expected = table(
        {"gradcam": case, "ground truth": Case(attribution=controls(x, data.masks)["ground truth"], **known)}
    )
    result = tabulate(RUN, done, TWO, images=8)
    for name, part in expected.groupby("attribution"):
        mine = result[result["attribution"] == name].set_index("metric")
        assert mine["value"].to_dict() == pytest.approx(
            part.set_index("metric")["value"].to_dict(), rel=1e-4, abs=1e-6, nan_ok=True
        )
        assert mine["undefined"].to_dict() == part.set_index("metric")["undefined"].to_dict()


def test_a_second_call_computes_nothing(store: Store, seen: list[str]) -> None:
    shutil.rmtree(store.root / "weights")
    before = path_of(store).read_bytes()
    first = tabulate(RUN, store, TWO, images=8)
    assert seen == [] and path_of(store).read_bytes() == before
    some = tabulate(RUN, store, ["gradcam"], images=8)
    pd.testing.assert_frame_equal(some, first[first["attribution"] != "gradient"].reset_index(drop=True))
    assert [p.name for p in path_of(store).parent.iterdir()] == [f"{RUN.key}.csv"]


def test_a_killed_call_goes_on_where_it_was(store: Store, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    path_of(store).unlink()
    whole = tabulate(RUN, store, TWO, images=8)
    content = path_of(store).read_bytes()
    path_of(store).unlink()
    seen.clear()
    write, left = sdecor.evaluation.replace_atomically, 3

    def deadly(path: Path, content: Callable[..., Any]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        write(path, content)

    monkeypatch.setattr(sdecor.evaluation, "replace_atomically", deadly)
    with pytest.raises(Killed):
        tabulate(RUN, store, TWO, images=8)
    assert seen == list(CONTROLS[:4])  # the fourth was lost
    seen.clear()
    left = 99
    result = tabulate(RUN, store, TWO, images=8)
    assert seen == [*CONTROLS[3:], *TWO]
    pd.testing.assert_frame_equal(result, whole)
    assert path_of(store).read_bytes() == content


def test_another_number_of_images_starts_over(store: Store, seen: list[str]) -> None:
    result = tabulate(RUN, store, ["gradient"], images=4)
    assert seen == [*CONTROLS, "gradient"] and (result["images"] == 4).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "No columns to parse from file"),
        (b"\xff\xfe\x00 no text", "'utf-8' codec can't decode byte 0xff"),
        (b"a,b\n1,2\n", "its columns are a, b"),
        (b"attribution,metric,value,undefined,images\ngradient,gini,0.5\n", "Cannot convert non-finite values"),
        (b"attribution,metric,value,undefined,images\ngradient,gini,much,0,8\n", "could not convert string to float"),
        (b"attribution,metric,value,undefined,images\n1,2,3,4,5\n1,2,3,4,5,6,7,8\n", "Error tokenizing data"),
    ],
    ids=["empty", "bytes", "columns", "cut", "words", "ragged"],
)
def test_an_unreadable_table_is_set_aside(
    store: Store, seen: list[str], caplog: pytest.LogCaptureFixture, content: bytes, said: str
) -> None:
    path = path_of(store)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "sdecor"):
        tabulate(RUN, store, [], images=2)
    [message] = caplog.messages
    assert message.startswith(f"table {path} is not readable (") and said in message
    assert message.endswith(f"); set aside as {path.name}.corrupt")
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == content
    assert seen == list(CONTROLS)


def test_images_without_masks(tmp_path: Path, seen: list[str]) -> None:
    from PIL import Image

    digits = load("digits", limit=40)
    for i, image in enumerate(digits.images[:, 0].numpy()):
        folder = tmp_path / "images" / ("test" if i % 4 == 0 else "train") / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    run, store = replace(RUN, data=str(tmp_path / "images"), data_options=()), Store(tmp_path / "store")
    execute(run, store)
    result = tabulate(run, store, ["gradient"], images=4)
    assert seen == [*CONTROLS[1:], "gradient"]
    assert not {n for n, m in METRICS.items() if m.family == "localization"} & set(result["metric"])
    seen.clear()
    pd.testing.assert_frame_equal(tabulate(run, store, ["gradient"], images=4), result)
    assert seen == []
    streamed = replace(run, data_options=(("memory_limit", 1), ("workers", 0)))
    with pytest.raises(ValueError) as error:
        tabulate(streamed, store, images=4)
    assert str(error.value) == "a table needs images in memory, and these are streamed; raise memory_limit"


def test_what_tabulate_refuses(done: Store) -> None:
    with pytest.raises(ValueError) as error:
        tabulate(RUN, done, ["gradient", "magic"], images=8)
    assert str(error.value) == f"unknown attribution 'magic'; known: {', '.join(ATTRIBUTIONS)}"
    with pytest.raises(ValueError) as error:
        tabulate(RUN, done, [], images=99)
    assert str(error.value) == "images must be at most 60, the held-out ones of shapes, got 99"
    with pytest.raises(FileNotFoundError) as absent:
        tabulate(replace(RUN, seed=9), done, [], images=8)
    assert str(absent.value).startswith("no weights of standard, seed 9: ")


# --- records measured again -----------------------------------------------------------------------------------------


@pytest.fixture
def old(store: Store) -> Iterator[Any]:
    """The record of `RUN` as an earlier version might have left it."""
    record = store.record(RUN)
    assert record is not None
    curves = {**{n: c for n, c in record.curves.items() if n.startswith("loss_")}, "gone": [1.0]}
    changed = replace(record, metrics={"object_mass": 0.5}, curves=curves)
    store.write(changed)
    yield record
    assert not list((store.root / "unfinished").iterdir())


def test_a_record_is_measured_again(store: Store, old: Any) -> None:
    new = measure_again(RUN, store)
    assert new == store.record(RUN)
    assert new.metrics == pytest.approx(old.metrics, rel=1e-5)  # the trained model had another layout in memory
    assert set(new.curves) == set(old.curves) and new.curves["loss_total"] == old.curves["loss_total"]
    assert (new.run, new.weights_sha256) == (old.run, old.weights_sha256)
    measured = new.environment.pop("measured")
    assert new.environment == old.environment
    assert {"device", "torch", "commit", "date"} <= set(measured)


def test_a_run_that_saw_other_images_is_measured_on_them(tmp_path: Path) -> None:
    run, store = replace(RUN, removed=0.5, removed_by="random"), Store(tmp_path)
    record = execute(run, store)
    assert record is not None
    again = measure_again(run, store).metrics
    assert again == pytest.approx(record.metrics, rel=1e-5)
    model = store.model(run, 3, 8, 32)
    assert measure(model, data_of(run, store, "test"), thorough=False)[0] == again
    assert measure(model, load("shapes", split="test", samples=60), thorough=False)[0]["gini"] != pytest.approx(
        again["gini"], rel=1e-3
    )


def test_without_weights_nothing_is_measured(store: Store) -> None:
    shutil.rmtree(store.root / "weights")
    before = store.record(RUN)
    with pytest.raises(FileNotFoundError, match=r"^no weights of standard, seed 0: "):
        measure_again(RUN, store)
    assert store.record(RUN) == before


def test_the_command(store: Store, old: Any) -> None:
    other = replace(RUN, seed=1)
    store.write(replace(old, run=other))
    called = CliRunner().invoke(app, ["measure", "--store", str(store.root), "--data", "shapes"], prog_name="sdecor")
    assert (called.exit_code, called.stderr) == (0, "")
    assert called.stdout == (
        f"standard on shapes, seed 0: {RUN.key}\n1 runs measured, 1 without weights left as they were\n"
    )
    record = store.record(RUN)
    assert record is not None and record.metrics == pytest.approx(old.metrics, rel=1e-5)
    assert "measured" in record.environment and "gone" not in record.curves
    assert store.record(other) == replace(old, run=other)


def test_the_command_without_weights(tmp_path: Path) -> None:
    called = CliRunner().invoke(app, ["measure", "--store", str(tmp_path), "--data", "mnist"], prog_name="sdecor")
    assert (called.exit_code, called.stdout) == (2, "")
    assert called.stderr == f"error: no weights of mnist in {tmp_path}; name another folder with --store\n"
