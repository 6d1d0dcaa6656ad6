"""The command line: what each command does, and the one line that it says when something is wrong."""

from __future__ import annotations

import csv
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import torch
from typer.testing import CliRunner

import sdecor
from sdecor import _chapters
from sdecor.__main__ import _settings, app
from sdecor._options import typed
from sdecor.data import load
from sdecor.experiment import Record, Run, Store
from sdecor.objective import METHODS

DIGITS = ["--data", "digits", "--evaluate-on", "val", "--limit", "64", "--epochs", "1", "--batch-size", "32"]
QUIET = ["--quiet", *DIGITS]


def call(*arguments: object, code: int = 0) -> tuple[str, str]:
    """What the command writes to standard output and to standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="sdecor")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def refused(*arguments: object, code: int = 2) -> str:
    """The one line of an error."""
    out, err = call(*arguments, code=code)
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err.removeprefix("error: ").removesuffix("\n")


# --- help -----------------------------------------------------------------------------------------------------------


def test_help() -> None:
    out, _ = call("--help")
    assert [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()] == [
        "train",
        "grid",
        "measure",
        "show",
        "chapter",
        "data",
    ]
    for command in ("train", "grid", "measure", "show", "chapter", "data", "data list", "data fetch", "data check"):
        assert f"Usage: sdecor {command} " in call(*command.split(), "--help")[0]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, sdecor.__main__; print([m for m in ('torch', 'numpy', 'pandas', 'papermill') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdecor", "train", "--epochs", "many"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'epochs' must be of type int, got 'many'\n"


def test_every_setting_of_a_run_has_its_option_default_and_help() -> None:
    values, helps = _settings()
    assert {name: default for name, (_, default) in values.items()} == {f.name: f.default for f in fields(Run)}
    assert {name: kind for name, (kind, _) in values.items()} == inspect.get_annotations(Run)
    assert set(values) <= set(helps)
    for command, absent in (("train", set()), ("grid", {"method", "seed"})):
        out, _ = call(command, "--help")
        words = out.split()
        assert {n for n in values if f"--{n.replace('_', '-')}" not in words} == absent


def test_texts_become_values() -> None:
    assert typed("x", "int", "3") == 3
    assert typed("x", "float", "1e-3") == 1e-3
    assert typed("x", "int | None", "none") is None
    assert typed("x", "float | None", "2") == 2.0
    assert typed("x", "bool", "True") is True
    assert typed("x", "bool", "false") is False
    assert typed("x", "str", "1") == "1"
    assert typed("x", "tuple[str, ...]", "conv2,fc2") == ("conv2", "fc2")
    assert typed("x", "tuple[str, ...]", "") == ()
    assert typed("x", "tuple[tuple[str, Any], ...]", "a=1,b=0.5,c=word") == (("a", 1), ("b", 0.5), ("c", "word"))
    for kind, text in (("int", "1.5"), ("float", "x"), ("bool", "yes"), ("list", "1"), ("int", "none")):
        with pytest.raises(ValueError) as error:
            typed("x", kind, text)
        assert str(error.value) == f"'x' must be of type {kind}, got '{text}'"


# --- train and grid -------------------------------------------------------------------------------------------------


def test_train_once(tmp_path: Path) -> None:
    given = [*QUIET, "--method", "saliencydecor-signed", "--seed", 5, "--lambda-c", "0.5", "--layers", "conv1,fc1"]
    given += ["--group-size", "8", "--clip", "none", "--augment", "--store", tmp_path]
    out, err = call("train", *given)
    [record] = Store(tmp_path).records()
    assert record.run == Run(
        data="digits",
        evaluate_on="val",
        limit=64,
        epochs=1,
        batch_size=32,
        method="saliencydecor-signed",
        seed=5,
        lambda_c=0.5,
        layers=("conv1", "fc1"),
        group_size=8,
        clip=None,
        augment=True,
    )
    head, *rows = out.splitlines()
    assert head == f"saliencydecor-signed on digits, seed 5: {record.run.key} in {tmp_path}"
    assert [row.split() for row in rows] == [[name, f"{value:.4f}"] for name, value in record.metrics.items()]
    assert err == ""
    before = (tmp_path / "results" / "digits" / f"{record.run.key}.json").stat().st_mtime_ns
    assert call("train", *given)[0] == out
    assert (tmp_path / "results" / "digits" / f"{record.run.key}.json").stat().st_mtime_ns == before


def test_options_of_a_data_set(tmp_path: Path) -> None:
    call(
        *["train", "--quiet", "--store", tmp_path, "--data", "shapes", "--epochs", 1, "--limit", 32],
        *["--evaluate-on", "val", "--data-options", "cue_strength=0.9,samples=40"],
    )
    [record] = Store(tmp_path).records()
    assert record.run.data_options == (("cue_strength", 0.9), ("samples", 40))


def test_the_default_store_lies_below_the_data_root(tmp_path: Path) -> None:
    call("train", *QUIET, "--data-root", tmp_path)
    assert len(list(Store(tmp_path / "runs").records())) == 1
    assert "standard" in call("show", "--data-root", tmp_path)[0]


def test_grid_goes_on_where_it_was(tmp_path: Path) -> None:
    given = [*QUIET, "--store", tmp_path, "--methods", "standard,decorrelation"]
    out, _ = call("grid", *given, "--seeds", "0")
    assert out == f"2 runs in {tmp_path}: 0 done, 2 left\n2 runs in {tmp_path}: 2 done, 0 left\n"
    out, _ = call("grid", *given, "--seeds", "0-1")
    assert out == f"4 runs in {tmp_path}: 2 done, 2 left\n4 runs in {tmp_path}: 4 done, 0 left\n"
    assert {(r.run.method, r.run.seed) for r in Store(tmp_path).records()} == {
        (method, seed) for method in ("standard", "decorrelation") for seed in (0, 1)
    }


def test_all_methods_and_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sdecor.experiment

    seen: dict[str, object] = {}
    monkeypatch.setattr(sdecor.experiment, "grid", lambda runs, store, **how: seen.update(how, runs=runs, store=store))
    given = ["--seeds", "0-1,7", "--workers", 3, "--threads", 2, "--device", "auto", "--amp", "--compile", "--lr", 1]
    out, _ = call("grid", *given, "--store", tmp_path, "--data-root", tmp_path / "data")
    assert seen.pop("runs") == [Run(method=m, seed=s, lr=1.0) for s in (0, 1, 7) for m in METHODS]
    assert seen.pop("store").root == tmp_path
    assert seen == {
        "workers": 3,
        "threads": 2,
        "device": "auto",
        "amp": True,
        "compiled": True,
        "progress": False,
        "root": str(tmp_path / "data"),
    }


def test_a_loss_that_is_not_finite_ends_with_code_1(tmp_path: Path) -> None:
    given = [*QUIET, "--store", tmp_path, "--lr", "1e20", "--clip", "none"]
    message = refused("train", *given, "--epochs", 5, code=1)
    assert message.startswith("loss term '") and message.endswith("; lower lr or the weight of that term")
    out, err = call("grid", *given, "--epochs", 5, "--methods", "standard", "--seeds", "0,1", code=1)
    assert out == f"2 runs in {tmp_path}: 0 done, 2 left\n" * 2
    assert err == f"error: {message}\n"


def test_workers_that_fail_end_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdecor.experiment

    def fail(*_: object, **__: object) -> None:
        raise ChildProcessError("2 of 2 workers failed; their output says why")

    monkeypatch.setattr(sdecor.experiment, "grid", fail)
    assert (
        refused("grid", "--store", tmp_path, "--workers", 2, code=1) == "2 of 2 workers failed; their output says why"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--epochs", "two"], "'epochs' must be of type int, got 'two'"),
        (["--clip", "some"], "'clip' must be of type float | None, got 'some'"),
        (
            ["--data-options", "cue_strength"],
            "'data_options' must be of type tuple[tuple[str, Any], ...], got 'cue_strength'",
        ),
        (["--method", "magic"], f"unknown method 'magic'; known: {', '.join(METHODS)}"),
        (
            ["--model", "magic"],
            "unknown model 'magic'; known: lenet, cnn_bn, resnet18, vgg11_bn, vit, or package.module:factory",
        ),
        (
            ["--data", "magic"],
            "unknown data set 'magic'; known: mnist, cifar10, caltech101, digits, shapes, "
            "or an image folder (folder:PATH)",
        ),
        (
            ["--method", "decorrelation", "--layers", "fc9"],
            "unknown layer 'fc9'; this model has: "
            "conv1, pool1, relu1, conv2, pool2, relu2, fc1, relu3, fc2, relu4, fc3",
        ),
        (
            ["--method", "decorrelation", "--group-size", "12"],
            "group_size=12 does not divide the 16 channels of layer 'conv2'; use one of 1, 2, 4, 8, 16",
        ),
        (["--method", "consistency-signed", "--fraction", "1"], "fraction must lie strictly between 0 and 1, got 1.0"),
        (["--data-options", "copies=2"], "data set 'digits' has no option 'copies'; it has none"),
        (["--device", "gpu"], "unknown device 'gpu'; use cpu, cuda (or cuda:0, cuda:1, ...) or auto"),
    ],
)
def test_train_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert refused("train", *QUIET, "--store", tmp_path, *arguments) == message
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(tmp_path: Path) -> None:
    assert refused("train", *QUIET, "--store", tmp_path, "--device", "cuda") == (
        f"device='cuda' was asked for, but torch {torch.__version__} finds no CUDA GPU; use device='cpu'"
    )


@pytest.mark.parametrize("seeds", ["x", "", "0-", "1.5", "0 1", "-1"])
def test_seeds_that_are_none(tmp_path: Path, seeds: str) -> None:
    assert (
        refused("grid", "--store", tmp_path, f"--seeds={seeds}") == f"seeds must look like 0-4 or 0,1,2, got '{seeds}'"
    )


# --- show -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Store:
    """A store with made-up records."""
    runs = [
        (Run(data="digits", method=m, seed=s), 0.9 + s / 100) for m in ("standard", "decorrelation") for s in (0, 1)
    ]
    runs += [(Run(data="mnist", method="decorrelation", seed=3, lambda_d=lambda_d), 0.5) for lambda_d in (0.3, 3.0)]
    for run, accuracy in runs:
        metrics = {"accuracy": accuracy, **({"object_mass": 0.25} if run.data == "mnist" else {})}
        record = Record(run, metrics, {}, {"device": "CPU"}, "")
        path = tmp_path / "results" / run.data / f"{run.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**vars(record), "run": vars(run)}))
    return Store(tmp_path)


def test_show_all(shelf: Store) -> None:
    out, _ = call("show", "--store", shelf.root)
    assert [line.split() for line in out.splitlines()] == [
        ["data", "model", "method", "lambda_d", "seeds", "accuracy", "object_mass"],
        ["digits", "lenet", "decorrelation", "1.0", "0,1", "0.9050", "±", "0.0071", "–"],
        ["digits", "lenet", "standard", "0.0", "0,1", "0.9050", "±", "0.0071", "–"],
        ["mnist", "lenet", "decorrelation", "0.3", "3", "0.5000", "0.2500"],
        ["mnist", "lenet", "decorrelation", "3.0", "3", "0.5000", "0.2500"],
    ]


def test_show_one_data_set(shelf: Store) -> None:
    out, _ = call("show", "--store", shelf.root, "--data", "digits")
    assert [line.split()[:4] for line in out.splitlines()] == [
        ["data", "model", "method", "lambda_d"],
        ["digits", "lenet", "decorrelation", "1.0"],
        ["digits", "lenet", "standard", "0.0"],
    ]


def test_show_one_run(shelf: Store) -> None:
    run = Run(data="digits", seed=1)
    path = shelf.root / "results" / "digits" / f"{run.key}.json"
    assert call("show", "--store", shelf.root, "--run", run.key[:9])[0] == path.read_text()
    assert (
        refused("show", "--store", shelf.root, "--run", "xyz")
        == f"0 records in {shelf.root} have a key that begins with 'xyz'"
    )


def test_show_nothing(tmp_path: Path) -> None:
    assert refused("show", "--store", tmp_path) == f"no records in {tmp_path}; name another folder with --store"
    assert refused("show", "--store", tmp_path, "--data", "mnist") == (
        f"no records of mnist in {tmp_path}; name another folder with --store"
    )


def test_show_leaves_unreadable_records_out(shelf: Store, caplog: pytest.LogCaptureFixture) -> None:
    path = shelf.root / "results" / "digits" / "0123456789abcdef.json"
    path.write_text("{")
    assert len(call("show", "--store", shelf.root)[0].splitlines()) == 5
    assert caplog.messages == [
        f"record {path} is not readable (JSONDecodeError: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); left out"
    ]


# --- data -----------------------------------------------------------------------------------------------------------


def test_data_list(tmp_path: Path) -> None:
    out, _ = call("data", "list", "--data-root", tmp_path)
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines() if not line.startswith(" ")}
    assert lines == {
        "mnist": "absent",
        "cifar10": "absent",
        "caltech101": "absent",
        "digits": "present",
        "shapes": "present",
    }


def test_data_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("data", "fetch", "digits") == (
        "nothing to fetch for 'digits'; data sets to fetch: mnist, cifar10, caltech101"
    )
    monkeypatch.setattr("sdecor.sources.fetch", lambda name, root: f"{root}/{name}")
    assert call("data", "fetch", "mnist", "--data-root", tmp_path)[0] == f"mnist is in {tmp_path}/mnist\n"


def test_data_check(tmp_path: Path) -> None:
    assert call("data", "check", "digits")[0] == "digits is as registered\n"
    assert refused("data", "check", "magic") == (
        "unknown data set 'magic'; known: mnist, cifar10, caltech101, digits, shapes"
    )
    assert refused("data", "check", "mnist", "--data-root", tmp_path, code=1) == f"MNIST is not under {tmp_path}"


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
    monkeypatch.setattr(_chapters, "BOOK", folder)
    yield folder
    assert sorted(p.name for p in (folder / "part").iterdir()) in (["one.md"], ["one.ipynb", "one.md"])


def outputs(path: Path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [o.get("text", "") or o["data"]["text/plain"] for c in notebook.cells for o in c.get("outputs", ())]


def test_a_chapter_with_parameters(book: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "quick.ipynb"
    out, _ = call(
        "chapter", "-p", "preset", "quick", "part/one", "-p", "epochs", 4, "-p", "retrain", "true", "--out", target
    )
    assert out == f"part/one: {target}\n"
    assert outputs(target) == ["one\nquick 4 0.5 True\n", "0.25"]


@pytest.mark.slow
def test_stale_chapters_are_published_without_traces(book: Path) -> None:
    notebook, source = book / "part" / "one.ipynb", book / "part" / "one.md"
    assert call("chapter", "--stale")[0] == f"part/one: {notebook}\n"
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
    assert call("chapter", "--stale")[0] == "every notebook agrees with its source\n"
    source.write_text(CHAPTER.replace("rate: float = 0.5", "rate: float = 0.25"))
    assert _chapters.is_stale("part/one")
    source.write_text(CHAPTER.replace("[hide-input]", "[hide-cell]"))
    assert _chapters.is_stale("part/one")
    source.write_text(CHAPTER.replace("# A chapter", "# Another"))
    assert _chapters.is_stale("part/one")
    source.write_text(CHAPTER)
    call("chapter", "part/one", "--publish")
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
    call("chapter", "part/one", "--publish")
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
    call("chapter", "part/two", "--publish")
    one.write_text(CHAPTER.replace("# A chapter", "# A chapter of its own"))
    call("chapter", "part/one", "--publish")
    assert [(r["chapter"], r["commit"]) for r in rows(book)] == [("part/one", f"{commit}+"), ("part/two", f"{commit}+")]
    for path in (book / "part").glob("two.*"):
        path.unlink()
    call("chapter", "part/one", "--publish")
    assert [r["chapter"] for r in rows(book)] == ["part/one"]


def test_only_publishing_notes_anything(book: Path, tmp_path: Path) -> None:
    call("chapter", "part/one", "--out", tmp_path / "out.ipynb")
    (book / "part" / "one.md").write_text(CHAPTER.replace("epochs: int = 2", "epochs: int = 0"))
    refused("chapter", "part/one", "--publish", code=1)
    assert not (tmp_path / "data").exists()


def test_a_failing_chapter_is_not_published(book: Path) -> None:
    source = book / "part" / "one.md"
    source.write_text(CHAPTER.replace("epochs: int = 2", "epochs: int = 0"))
    message = refused("chapter", "--stale", code=1)
    assert message.startswith("ZeroDivisionError in cell 2 of part/one: division by zero (see ")
    assert not (book / "part" / "one.ipynb").exists()


def test_what_a_chapter_itself_refuses(book: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.ipynb"
    assert refused("chapter", "part/one", "-p", "preset", "quik", "--out", target) == (
        f"ValueError in cell 3 of part/one: unknown preset 'quik'; known: published, quick (see {target})"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["part/two"], "unknown chapter 'part/two'; known: part/one"),
        (["intro"], "unknown chapter 'intro'; known: part/one"),
        ([], "give one chapter; known: part/one"),
        (["part/one", "intro"], "give one chapter; known: part/one"),
        (["part/one", "--stale"], "give no chapter; known: part/one"),
        (["part/one", "-p", "presset", "quick"], "unknown parameter 'presset'; known: preset, epochs, rate, retrain"),
        (["part/one", "-p", "epochs", "two"], "'epochs' must be of type int, got 'two'"),
        (["part/one", "-p", "epochs", "2.0"], "'epochs' must be of type int, got '2.0'"),
        (["part/one", "-p", "retrain", "1"], "'retrain' must be of type bool, got '1'"),
        (["part/one", "-p", "epochs"], "unexpected '-p'; a parameter is given as -p NAME VALUE"),
        (["part/one", "--preset", "quick"], "unexpected '--preset'; a parameter is given as -p NAME VALUE"),
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
    assert refused("chapter", *arguments) == message


def test_out_spares_the_book(book: Path, tmp_path: Path) -> None:
    for out in (book / "part" / "one.ipynb", tmp_path / "out.md"):
        assert refused("chapter", "part/one", "--out", out) == f"out must be a file .ipynb outside of {book}, got {out}"


def test_a_chapter_by_the_path_of_either_file(book: Path) -> None:
    for name in ("part/one", "book/part/one.ipynb", "./book/part/one.md"):
        assert _chapters._path(name) == book / "part" / "one.ipynb"


def test_the_chapters_of_this_book_agree_with_their_notebooks() -> None:
    assert "experiments/mnist" in _chapters.known()
    assert [name for name in _chapters.known() if _chapters.is_stale(name)] == []


def test_every_chapter_of_this_book_has_its_run_time() -> None:
    with _chapters.table().open(newline="") as f:
        table = csv.DictReader(f)
        assert tuple(row["chapter"] for row in table if all(row.values())) == _chapters.known()
        assert tuple(table.fieldnames or ()) == _chapters.COLUMNS


def test_digits_are_what_the_tests_above_take_them_for() -> None:
    assert len(load("digits", split="val")) == 297
