"""What the book needs around its chapters: parameters, records, and the command that executes them."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import nbformat
import pytest
import safetensors.torch
import torch
from PIL import Image

import sdecor
from sdecor import report
from sdecor.config import Run
from sdecor.images import ImageData
from sdecor.models import build
from sdecor.plan import Course, Plan
from sdecor.planned import Results
from sdecor.store import Record, Store
from sdecor_book import chapter, execute
from sdecor_book.__main__ import main

# --- in a notebook --------------------------------------------------------------------------------------------------

PRESETS = {"quick": {"epochs": 3, "data": "digits"}, "published": {"epochs": 8, "data": "mnist", "seeds": 5}}
TYPES = {"preset": str, "epochs": int, "data": str, "retrain": bool, "rate": float}
DEFAULTS = {"preset": "published", "epochs": 0, "data": "", "retrain": False, "rate": 0.5}


def namespace(**changed: Any) -> dict[str, Any]:
    """The globals of a notebook after its parameters cell."""
    return {"__annotations__": TYPES, "In": [], "_": 1, "math": types, "chapter": chapter, **DEFAULTS, **changed}


def test_empty_parameters_take_the_value_of_the_preset() -> None:
    settings = chapter.parameters(namespace(), PRESETS)
    assert vars(settings) == {
        "preset": "published", "epochs": 8, "data": "mnist", "seeds": 5, "retrain": False, "rate": 0.5,
        "given": {"rate": 0.5},
    }  # fmt: skip


def test_given_parameters_override_the_preset() -> None:
    settings = chapter.parameters(namespace(preset="quick", epochs=1, rate=1), PRESETS)
    assert (settings.epochs, settings.data, settings.rate) == (1, "digits", 1)
    assert settings.given == {"epochs": 1, "rate": 1}  # digits are the preset's own
    assert chapter.parameters(namespace(preset="quick", data="digits", rate=0.0), PRESETS).given == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sede": 3}, "unknown parameter 'sede'; known: preset, epochs, data, retrain, rate"),
        ({"preset": "fast"}, "unknown preset 'fast'; known: quick, published"),
        ({"preset": 1}, "parameter 'preset' must be of type str, got 1 (int)"),
        ({"epochs": "3"}, "parameter 'epochs' must be of type int, got '3' (str)"),
        ({"epochs": True}, "parameter 'epochs' must be of type int, got True (bool)"),
        ({"retrain": 1}, "parameter 'retrain' must be of type bool, got 1 (int)"),
        ({"epochs": -1}, "parameter 'epochs' must be at least 0, got -1"),
        ({"rate": float("nan")}, "parameter 'rate' must be finite and at least 0, got nan"),
        ({"rate": float("inf")}, "parameter 'rate' must be finite and at least 0, got inf"),
    ],
)
def test_bad_parameters_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        chapter.parameters(namespace(**changed), PRESETS)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 1}, "parameter 'epochs' must be from 2 to 9, got 1"),
        ({"epochs": 10, "retrain": True}, "parameter 'epochs' must be from 2 to 9, got 10"),
        ({"rate": 1.0}, "parameter 'rate' must be finite and at least 2, got 1.0"),
        ({"epochs": 2}, "parameter 'epochs' is 8 in what was published; 2 needs retrain=True"),
    ],
)
def test_what_a_chapter_cannot_use_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        limits = {"epochs": (2, 9), "rate": (2, None)}
        chapter.parameters(namespace(**{"rate": 0.0, **changed}), PRESETS, limits=limits, fixed=("epochs",))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "changed", [{}, {"epochs": 8}, {"epochs": 2, "retrain": True}, {"preset": "quick", "epochs": 2}]
)
def test_what_it_can_use_is_taken(changed: dict[str, Any]) -> None:
    settings = chapter.parameters(namespace(**changed), PRESETS, limits={"epochs": (2, 9)}, fixed=("epochs",))
    assert settings.epochs == changed.get("epochs", 8)


def said_by(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> str:
    """What a chapter's check of its parameters puts on the page, in Markdown."""
    shown: list[str] = []
    monkeypatch.setattr(chapter, "display", lambda text: shown.append(text.data))
    chapter.parameters(namespace(**{"rate": 0.0, **changed}), PRESETS)
    return "".join(shown)


@pytest.mark.parametrize("changed", [{}, {"epochs": 8}, {"retrain": True}])
def test_of_the_published_run_nothing_is_said(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    assert said_by(monkeypatch, **changed) == ""


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ({"preset": "quick"}, "`preset='quick'`"),
        ({"preset": "quick", "retrain": True, "epochs": 1}, "`preset='quick'`, `epochs=1`"),
        ({"data": "shapes", "epochs": 8}, "`data='shapes'`"),
    ],
)
def test_another_run_is_said_to_be_another(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], settings: str
) -> None:
    assert said_by(monkeypatch, **changed).startswith(
        f"> **This is not the published run**, but one with {settings}. Tables, figures and the numbers"
    )


def test_a_flag_without_effect_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    chapter.parameters(namespace(preset="quick", retrain=True), PRESETS)
    said = "without effect here: retrain=True (this preset trains what is missing anyway)"
    assert said in capsys.readouterr().out.splitlines()


def test_missing_record_says_how_to_train_it(tmp_path: Path) -> None:
    run = Run.of(data="mnist", method="standard", seed=3)
    with pytest.raises(FileNotFoundError) as caught:
        chapter.records([run], Store(tmp_path), retrain=False)
    assert str(caught.value) == (
        f"{tmp_path} holds no record of standard on mnist, seed 3 (key {run.key}); pass retrain=True to train it, or "
        "where a chapter has no such parameter leave store empty"
    )


def test_records_that_are_there_are_read_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf, runs = Store(tmp_path), [Run.of(data="mnist", seed=seed) for seed in (1, 0)]
    shape = {"channels": 1, "num_classes": 10, "image_size": 28}
    for run in runs:
        shelf.write(Record(run, {"accuracy": run.seed / 2}, {}, shape, {}, ""))
    given = {"workers": 8, "device": "cuda", "data": "mnist"}
    for retrain in (False, True):
        asked = {"retrain": True, **given} if retrain else given
        assert [r.run.seed for r in chapter.records(iter(runs), shelf, retrain=retrain, given=asked)] == [1, 0]
    assert capsys.readouterr().out.splitlines() == [
        f"without effect here: {names} (no network is trained here, all are read from records)"
        for names in ("workers=8, device='cuda'", "retrain=True, workers=8, device='cuda'")
    ]


def test_missing_records_are_trained_with_no_more_workers_than_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(chapter, "grid", lambda runs, shelf, **how: seen.update(how, runs=runs) or [])
    runs = [Run.of(data="mnist", seed=seed) for seed in range(2)]
    chapter.records(runs, Store(tmp_path), retrain=True, workers=8, root="data")
    assert seen == {"runs": runs, "workers": 2, "threads": 1, "progress": False, "root": "data"}


TINY_PLAN = {
    "shared": {"data": "digits", "epochs": 1},
    "choice": {"seed": 1000, "price": 0.1},
    "arms": {"standard": {}, "decorrelation": {"try": {"decorrelation": [1.0, 3.0]}}},
    "presets": {"quick": {"seeds": 1, "tries": 1}, "cpu": {"seeds": 2}, "gpu": {"seeds": 2, "epochs": 3}},
}


def planned(shelf: Store, **given: Any) -> Results:
    values = {"preset": "published", "retrain": False, "data": "", "model": "", "seeds": 0, "epochs": 0, "workers": 0}
    values |= {"limit": 0, "device": "", "data_root": ""}
    settings = SimpleNamespace(**{**values, **given}, given={n: v for n, v in given.items() if n != "preset"})
    return chapter.planned(Plan.of("tiny", TINY_PLAN), settings, shelf)


def write(shelf: Store, runs: Iterable[Run]) -> None:
    shape = {"channels": 1, "num_classes": 10, "image_size": 28}
    for run in runs:
        shelf.write(Record(run, {"accuracy": 0.5}, {}, shape, {}, ""))


def everything(preset: str) -> list[Run]:
    course = Plan.of("tiny", TINY_PLAN).at(preset)
    state = course.state(lambda run: 0.5)
    return [run for runs in state.trials.values() for run in runs] + [run for _, run in course.final(state)]


def test_published_is_the_preset_with_most_records(tmp_path: Path) -> None:
    shelf = Store(tmp_path)
    with pytest.raises(FileNotFoundError, match="no records of this plan at 'cpu'; pass retrain=True"):
        planned(shelf)
    write(shelf, everything("cpu")[:-1])
    found = planned(shelf)
    assert (found.course.preset, len(found.all()), found.missing) == ("cpu", 3, {"decorrelation": 1})
    assert chapter.progress(found, Store(chapter.ROOT / "data")) == (
        "Preset `cpu`: 3 networks of 2 arms. Not run yet: some seeds of: decorrelation only. "
        "This goes on: `sdecor run tiny --preset cpu --store data`."
    )
    assert chapter.progress(found, shelf).endswith(f"`sdecor run tiny --preset cpu --store {tmp_path}`.")
    shelf.fail(everything("cpu")[-1], "loss became nan")
    found = planned(shelf)
    assert (found.missing, found.broken) == ({}, {"decorrelation": 1})
    assert chapter.progress(found, shelf) == (
        "Preset `cpu`: 3 networks of 2 arms. Training broke down: 1 of decorrelation only. Nothing is missing."
    )
    write(shelf, everything("gpu"))
    found = planned(shelf)
    assert (found.course.preset, len(found.all()), found.missing) == ("gpu", 4, {})
    assert chapter.progress(found, shelf) == "Preset `gpu`: 4 networks of 2 arms, all that the plan asks for."
    assert planned(shelf, preset="cpu").course.preset == "cpu"
    names = [f.course.preset for f in chapter.published(Plan.of("tiny", TINY_PLAN), shelf)]
    assert names == ["gpu", "cpu"]


def test_a_planned_chapter_trains_where_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def train(course: Course, shelf: Store, **how: Any) -> None:
        seen.append((course.preset, course.seeds, course.shared["epochs"], how))
        state = course.state(lambda run: 0.5)
        write(shelf, [run for runs in state.trials.values() for run in runs] + [r for _, r in course.final(state)])

    monkeypatch.setattr(chapter, "run_plan", train)
    found = planned(Store(tmp_path / "quick"), preset="quick", workers=3, epochs=7)
    assert len(found.all()) == 2
    planned(Store(tmp_path / "cpu"), preset="cpu", retrain=True, seeds=4, data_root="there")
    assert seen == [
        ("quick", 1, 7, {"workers": 3, "threads": 1, "device": "cpu", "root": None}),
        ("cpu", 4, 1, {"workers": 1, "threads": 1, "device": "cpu", "root": "there"}),
    ]
    assert capsys.readouterr().out == "without effect here: data_root='there' (digits does not lie there)\n"
    planned(Store(tmp_path / "cpu"), preset="cpu", retrain=True, seeds=4, workers=900, device="cuda")
    assert len(seen) == 2
    said = "retrain=True, workers=900, device='cuda' (no network is trained here, all are read from records)"
    assert capsys.readouterr().out == f"without effect here: {said}\n"
    planned(Store(tmp_path / "many"), preset="quick", workers=900)
    assert seen[2][3]["workers"] == 4  # no more than there are runs at most


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"train": 3},
            "image folder {} has no test split; put images in {}/test/CLASS, or use the split 'val' "
            "(of a run: evaluate_on='val')",
        ),
        ({"train": 3, "test": 1}, "the test images of folder:{} are of 1 class, and this chapter needs 2"),
    ],
)
def test_test_images_are_looked_at_before_anything_is_trained(
    classes: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, count in classes.items():
        for name in range(count):
            (folder := tmp_path / "own" / split / str(name)).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (80 * name, 40 * i, 0)).save(folder / f"{i}.png")
    monkeypatch.setattr(chapter, "run_plan", lambda *_, **__: pytest.fail("it is trained"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        planned(Store(tmp_path / "store"), preset="quick", data=f"folder:{tmp_path / 'own'}")
    assert str(caught.value) == message.format(*[tmp_path / "own"] * 2)


def test_a_chapter_may_be_run_on_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Course] = []
    monkeypatch.setattr(chapter, "run_plan", lambda course, *_, **__: seen.append(course))
    with pytest.raises(FileNotFoundError, match="no records"):
        planned(Store(tmp_path), preset="quick", limit=40)
    assert {run.data.limit for runs in seen[0].possible().values() for run in runs} == {40}


def test_pictures_shown_are_there() -> None:
    for count in range(1, 12):
        rows = chapter.shown(torch.arange(count), [3, 5, 7, 8])
        assert rows == ([3, 5, 7, 8] if count > 8 else [*range(min(count, 4))])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0], "1.50 ± 0.71"),
        ([1.0, float("nan"), 2.0], "1.50 ± 0.71"),
        ([2.0], "2.00"),
        ([-1e-9, 1e-9, -1e-9], "0.00 ± 0.00"),
        ([float("nan")], "–"),
        ([], "–"),
    ],
)
def test_mean_and_spread_in_a_table(values: list[float], text: str) -> None:
    assert chapter.spread(values) == text
    assert chapter.spread(torch.tensor(values, dtype=torch.float64)) == text


def test_a_chapter_asks_for_a_data_root_only_if_its_data_may_lie_there() -> None:
    """And no parameter of a chapter is one that its cells never look at."""
    for name in execute.known():
        cells = [c for c in jupytext.read(chapter.BOOK / f"{name}.md").cells if c.cell_type == "code"]
        (declared,) = [c.source for c in cells if "parameters" in c.metadata.get("tags", ())]
        names = re.findall(r"^(\w+): \w+ = ", declared, re.MULTILINE)
        assert ("data_root" in names) == ("data" in names), name
        used = "\n".join(c.source for c in cells if c.source != declared)
        through = ["preset"] + ["data", "limit", "model", "seeds", "epochs", "workers", "device"] * ("planned(" in used)
        assert [n for n in names if n not in through and not re.search(rf"\b{n}\b", used)] == [], name


def test_presets_of_a_plan_are_those_of_its_chapter() -> None:
    plan = chapter.plan("mnist")
    assert list(chapter.presets(plan)) == ["published", *plan.presets]


def finished(shelf: Store) -> Record:
    """The record of a run that was never trained, with its weights and an exhibit."""
    run = Run.of(data="mnist")
    weights = safetensors.torch.save(build(run.model.name, 1, 10, 28).state_dict())
    shape = {"channels": 1, "num_classes": 10, "image_size": 28}
    record = Record(run, {}, {}, shape, {}, hashlib.sha256(weights).hexdigest())
    shelf.write(record, weights, {"saliency": torch.zeros(1, 2, 2)})
    return record


def test_what_is_kept_of_a_network_needs_no_weights(tmp_path: Path) -> None:
    shelf, seen = Store(tmp_path), []
    run = (record := finished(shelf)).run

    def make(model: torch.nn.Module) -> dict[str, Any]:
        seen.append(model.training)
        return {"third": 1 / 3, "two": torch.tensor(2), "map": torch.full((2, 2), 0.1)}

    first = chapter.kept("one", run, shelf, make)
    chapter.kept("other", run, shelf, lambda model: {"sum": 5})
    shelf.path("weights", run, ".safetensors").unlink()
    again = chapter.kept("one", run, shelf, make)
    assert seen == [False]
    assert (again["third"], again["two"]) == (first["third"], first["two"]) == (0.333333333, 2.0)
    assert torch.equal(again["map"], torch.full((2, 2), 0.1).half().float())
    assert shelf.exhibit(run).keys() == {"saliency", "one.map"}
    with pytest.raises(FileNotFoundError, match="^no 'third' of standard, seed 0: .* or train anew with retrain=True$"):
        chapter.kept("third", run, shelf, make)
    shelf.write(dataclasses.replace(record, weights_sha256="of another network"))
    with pytest.raises(FileNotFoundError, match="^no 'one' of standard, seed 0: "):
        chapter.kept("one", run, shelf, make)
    shelf.path("tables", run, ".json").write_text("{")
    with pytest.raises(ValueError, match=r"\.json is not readable \(.*\); delete it to make it again$"):
        chapter.kept("one", run, shelf, make)


def test_a_grid_is_told_from_what_maps_show(tmp_path: Path) -> None:
    """Of a linear network the map is its weights: here the same in every picture, and larger where both are odd."""
    shelf = Store(tmp_path)
    kinds = torch.ones(1, 8, 8)
    kinds[:, 1::2, 1::2] = 4
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(1.0, 11)[:, None] * kinds.flatten())
    data = ImageData.from_tensors(torch.rand(6, 1, 8, 8), torch.arange(6))
    maps = chapter.every_map(data)(net)
    assert torch.allclose(maps / maps[:, :1, :1], kinds.expand(6, 8, 8))
    record = finished(shelf)
    found = {name: of(record) for name, of in chapter.of_grid(shelf, lambda _: maps).items()}
    assert found == pytest.approx({"pixels": 3 / 4 - 3 / 7, "within": 0, "seen": 4 / 7}, abs=1e-6)
    assert found.keys() == chapter.GRID.keys()


def test_glue_is_that_of_the_report() -> None:
    assert chapter.glue is report.glue


def test_store_of_a_chapter(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDECOR_DATA", str(tmp_path))
    assert chapter.store(str(tmp_path / "mine")).root == tmp_path / "mine"
    assert chapter.store(retrain=True).root == tmp_path / "runs"
    assert chapter.store().root == root / "data"
    assert chapter.store(temporary=True).root.is_dir()


def test_holds_says_by_how_much_and_nan_never_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert chapter.holds([1.0, 2.0], 2.0, 1.0)
    assert not chapter.holds([1.0, 2.0], 2.0, 0.5)
    assert not chapter.holds([1.0, float("nan")], 1.0, 1e9)
    assert capsys.readouterr().out.splitlines() == [
        "holds: largest difference 1.0e+00, tolerance 1e+00",
        "does not hold: largest difference 1.0e+00, tolerance 5e-01",
        "does not hold: largest difference nan, tolerance 1e+09",
    ]


# --- chapters -------------------------------------------------------------------------------------------------------

CHAPTER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell} ipython3
:tags: [parameters]

preset: str = "published"  # or "quick"
epochs: int = 2  # passes
rate: float = 0.5
retrain: bool = False
```

```{code-cell} ipython3
:tags: [hide-input]

import sys

print("one")
print(preset, epochs, rate, retrain)
if preset not in ("published", "quick"):
    raise ValueError(f"unknown preset '{preset}'; known: published, quick")
1 / epochs
```
"""


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A book of one chapter and a page of prose."""
    folder = tmp_path / "book"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "one.md").write_text(CHAPTER)
    (folder / "intro.md").write_text("# No code\n")
    monkeypatch.setattr(execute, "BOOK", folder)
    yield folder
    assert sorted(p.name for p in (folder / "part").iterdir()) in (["one.md"], ["one.ipynb", "one.md"])


def call(*arguments: object, code: int = 0) -> str:
    """What ``python -m sdecor_book`` writes to standard output, or with a code that is not 0, to standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        got = main([str(a) for a in arguments])
    assert got == code, err.getvalue()
    return err.getvalue() if code else out.getvalue()


def refused(*arguments: object, code: int = 2) -> str:
    """The one line of an error."""
    line = call(*arguments, code=code)
    assert line.count("\n") == 1 and line.startswith("error: "), line
    return line.removeprefix("error: ").removesuffix("\n")


def outputs(path: Path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [o.get("text", "") or o["data"]["text/plain"] for c in notebook.cells for o in c.get("outputs", ())]


def test_a_chapter_with_parameters(book: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "quick.ipynb"
    out = call("-p", "preset", "quick", "part/one", "-p", "epochs", 4, "-p", "retrain", "true", "--out", target)
    assert out == f"part/one: {target}\n"
    assert outputs(target) == ["one\nquick 4 0.5 True\n", "0.25"]


def test_kernels_side_by_side_cannot_take_the_port_of_another(book: Path, tmp_path: Path) -> None:
    asked = "from ipykernel.kernelapp import IPKernelApp; print(IPKernelApp.instance().transport)"
    (book / "part" / "one.md").write_text(CHAPTER.replace('print("one")', asked))
    call("part/one", "--out", target := tmp_path / "out.ipynb")
    assert outputs(target)[0] == "ipc\npublished 2 0.5 False\n"


@pytest.mark.slow
def test_stale_chapters_are_published_without_traces(book: Path) -> None:
    notebook, source = book / "part" / "one.ipynb", book / "part" / "one.md"
    assert call("--stale") == f"part/one: {notebook}\n"
    assert outputs(notebook) == ["one\npublished 2 0.5 False\n", "0.5"]
    first = notebook.read_text()
    found = nbformat.read(notebook, as_version=4)
    nbformat.validate(found)
    assert [dict(c.metadata) for c in found.cells] == [{}, {"tags": ["parameters"]}, {"tags": ["hide-input"]}]
    assert [c.id for c in found.cells] == ["cell-0", "cell-1", "cell-2"]
    assert [c.get("execution_count") for c in found.cells] == [None, 1, 2]
    assert dict(found.metadata) == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    for word in ("papermill", 'execution"', "202", "duration", str(book)):
        assert word not in first
    assert call("--stale") == "every notebook agrees with its source\n"
    source.write_text(CHAPTER.replace("rate: float = 0.5", "rate: float = 0.25"))
    assert execute.is_stale("part/one")
    source.write_text(CHAPTER.replace("[hide-input]", "[hide-cell]"))
    assert execute.is_stale("part/one")
    source.write_text(CHAPTER.replace("# A chapter", "# Another"))
    assert execute.is_stale("part/one")
    source.write_text(CHAPTER)
    call("part/one", "--publish")
    assert notebook.read_text() == first


def rows(book: Path) -> list[dict[str, str]]:
    """The run-time table of a book."""
    assert sorted(p.name for p in (book.parent / "data").iterdir()) == ["chapters.csv"]
    with (book.parent / "data" / "chapters.csv").open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_publishing_notes_time_place_and_versions(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.check_output(["git", "-C", str(book.parent), *who, *words], text=True).strip()

    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a hook of git's sets them
        monkeypatch.delenv(name, raising=False)
    git("init", "--quiet")
    git("add", "book")
    git("commit", "--quiet", "-m", "A book")
    commit = git("rev-parse", "--short=12", "HEAD")
    call("part/one", "--publish")
    (row,) = rows(book)
    assert 1 <= int(row.pop("seconds")) <= 600
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row.pop("date"))
    assert int(row.pop("threads")) >= 1
    assert row == {
        "chapter": "part/one",
        "device": f"CPU ({platform.machine()})",
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdecor": sdecor.__version__,
        "commit": commit,
    }
    # A plus says that the source is not that of the commit. Rows are in order, and of chapters that are there.
    one = book / "part" / "one.md"
    (book / "part" / "two.md").write_text(CHAPTER)
    call("part/two", "--publish")
    one.write_text(CHAPTER.replace("# A chapter", "# A chapter of its own"))
    call("part/one", "--publish")
    assert [(r["chapter"], r["commit"]) for r in rows(book)] == [("part/one", f"{commit}+"), ("part/two", f"{commit}+")]
    for path in (book / "part").glob("two.*"):
        path.unlink()
    call("part/one", "--publish")
    assert [r["chapter"] for r in rows(book)] == ["part/one"]


def test_only_publishing_notes_anything(book: Path, tmp_path: Path) -> None:
    call("part/one", "--out", tmp_path / "out.ipynb")
    (book / "part" / "one.md").write_text(CHAPTER.replace("epochs: int = 2", "epochs: int = 0"))
    refused("part/one", "--publish", code=1)
    assert not (tmp_path / "data").exists()


def test_a_failing_chapter_is_not_published(book: Path) -> None:
    source = book / "part" / "one.md"
    source.write_text(CHAPTER.replace("epochs: int = 2", "epochs: int = 0"))
    message = refused("--stale", code=1)
    assert message.startswith("ZeroDivisionError in cell 2 of part/one: division by zero (see ")
    assert not (book / "part" / "one.ipynb").exists()


def test_what_a_chapter_itself_refuses(book: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.ipynb"
    assert refused("part/one", "-p", "preset", "quik", "--out", target) == (
        f"ValueError in cell 3 of part/one: unknown preset 'quik'; known: published, quick (see {target})"
    )


def test_without_arguments_all_chapters_are_listed(book: Path) -> None:
    (book / "part" / "another.md").write_text(CHAPTER)
    assert call() == "part/another\npart/one\n"
    assert refused("-p", "epochs", "1") == "give one chapter; known: part/another, part/one"
    (book / "part" / "another.md").unlink()


def test_as_a_module_from_anywhere(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdecor_book"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert tuple(done.stdout.split()) == execute.known()
    assert chapter.ROOT == root and (root / "book" / "experiments" / "mnist.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["part/two"], "unknown chapter 'part/two'; known: part/one"),
        (["intro"], "unknown chapter 'intro'; known: part/one"),
        (["part/one", "intro"], "give one chapter; known: part/one"),
        (["part/one", "--stale"], "give no chapter; known: part/one"),
        (["part/one", "-p", "presset", "quick"], "unknown parameter 'presset'; known: preset, epochs, rate, retrain"),
        (["part/one", "-p", "epochs", "two"], "epochs must be of type int, got 'two' (str)"),
        (["part/one", "-p", "epochs", "2.0"], "epochs must be of type int, got 2.0 (float)"),
        (["part/one", "-p", "retrain", "1"], "retrain must be of type bool, got 1 (int)"),
        (["part/one", "-p", "epochs"], "argument -p: expected 2 arguments; a parameter is given as -p NAME VALUE"),
        (
            ["part/one", "--preset", "quick"],
            "unrecognized arguments: --preset quick; a parameter is given as -p NAME VALUE",
        ),
        (
            ["part/one", "--publish", "-p", "epochs", "1"],
            "a published chapter has default parameters and its own place: leave -p and --out away",
        ),
        (
            ["--stale", "--out", "x.ipynb"],
            "a published chapter has default parameters and its own place: leave -p and --out away",
        ),
    ],
)
def test_chapter_refuses(book: Path, arguments: list[str], message: str) -> None:
    assert refused(*arguments) == message


def test_out_spares_the_book(book: Path, tmp_path: Path) -> None:
    for out in (book / "part" / "one.ipynb", tmp_path / "out.md"):
        assert refused("part/one", "--out", out) == f"out must be a file .ipynb outside of {book}, got {out}"


def test_a_chapter_by_the_path_of_either_file(book: Path) -> None:
    for name in ("part/one", "book/part/one.ipynb", "./book/part/one.md"):
        assert execute.notebook_of(name) == book / "part" / "one.ipynb"


def test_the_chapters_of_this_book_agree_with_their_notebooks() -> None:
    assert "experiments/mnist" in execute.known()
    assert [name for name in execute.known() if execute.is_stale(name)] == []


def test_every_chapter_of_this_book_has_its_run_time() -> None:
    with execute.table().open(newline="") as f:
        table = csv.DictReader(f)
        assert tuple(row["chapter"] for row in table if all(row.values())) == execute.known()
        assert tuple(table.fieldnames or ()) == execute.COLUMNS


def test_a_published_figure_is_lighter_and_looks_the_same() -> None:
    from xml.etree import ElementTree

    from matplotlib import pyplot as plt

    figure, (ax, shown) = plt.subplots(1, 2)
    ax.plot(torch.rand(300), torch.rand(300), label="a name with spaces")
    ax.legend()
    shown.imshow(torch.rand(64, 64))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    heavy, light = buffer.getvalue(), execute.light(buffer.getvalue())
    assert len(light) < 0.95 * len(heavy)
    assert execute.light(light) == light
    pairs = list(zip(*(ElementTree.fromstring(svg).iter() for svg in (heavy, light)), strict=True))
    assert len(pairs) > 50
    for a, b in pairs:
        assert (a.tag, a.attrib.keys(), (a.text or "").split()) == (b.tag, b.attrib.keys(), (b.text or "").split())
        for name, value in a.attrib.items():
            if name.endswith("href") and value.startswith("data:"):
                shown = [Image.open(io.BytesIO(base64.b64decode(v.partition(",")[2]))) for v in (value, b.attrib[name])]
                assert [s.mode for s in shown] == ["RGBA", "P"] and len(b.attrib[name]) < 0.8 * len(value)
                assert shown[0].tobytes() == shown[1].convert("RGBA").tobytes()
            elif name != "d":
                assert b.attrib[name] == value
            if name != "d":
                continue
            old, new = value.split(), b.attrib[name].split()
            assert [w for w in new if w.isalpha()] == [w for w in old if w.isalpha()]
            numbers = [[float(w) for w in words if not w.isalpha()] for words in (old, new)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.00501)
