"""The command line: what each command does, and the one line that it says when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sdecor.__main__ import app
from sdecor.config import Run, flat_fields, method_grid
from sdecor.registers import METHODS, REGISTERS
from sdecor.store import Record, Store

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
    commands = [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()]
    assert commands == ["bundle", "data", "grid", "list", "measure", "merge", "pace", "plan", "run", "show", "train"]
    for command in (*commands, "data list", "data fetch", "data check"):
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
    assert done.stderr == "error: epochs must be of type int, got 'many' (str)\n"


FOUND_OUT = {"fingerprint", "code"}


def test_every_setting_of_a_run_has_its_option_default_and_help() -> None:
    for command, absent in (("train", FOUND_OUT), ("pace", FOUND_OUT), ("grid", {"method", "seed", *FOUND_OUT})):
        out = " ".join(call(command, "--help")[0].split())
        assert {n for n in flat_fields() if f"--{n.replace('_', '-')} " not in out} == absent
        for name, field in flat_fields().items():
            assert name in absent or field.metadata["help"].split()[0] in out


# --- registers ------------------------------------------------------------------------------------------------------


def test_list_everything_that_has_a_name() -> None:
    rows = [line.split(None, 1) for line in call("list")[0].splitlines()]
    assert {kind: names.split(", ") for kind, names in rows} == {kind: list(r) for kind, r in REGISTERS.items()}
    for kind, register in REGISTERS.items():
        lines = call("list", kind)[0].splitlines()
        assert [line.split()[0] for line in lines] == list(register)
        assert all(len(line.split()) > 1 for line in lines)  # each says what it is
        for name, entry in register.items():
            out = call("list", kind, name)[0]
            assert out.startswith(f"{name}: {entry.title}\n") and entry.source in out
            assert all(f"  {option}=" in out for option in entry.options)
    assert refused("list", "magic") == f"unknown kind 'magic'; known: {', '.join(REGISTERS)}"
    assert refused("list", "fills", "magic") == "unknown fill 'magic'; known: uniform, mean, constant, blur"


# --- train and grid -------------------------------------------------------------------------------------------------


def test_train_once(tmp_path: Path) -> None:
    given = [*QUIET, "--method", "saliencydecor-signed", "--seed", 5, "--weights", "consistency=0.5"]
    given += ["--settings", "layers=conv1,fc1", "--settings", "group_size=8"]
    given += ["--clip", "none", "--augment", "crop,flip", "--store", tmp_path]
    out, err = call("train", *given)
    [record] = Store(tmp_path).records()
    assert record.run == Run.of(
        data="digits",
        evaluate_on="val",
        limit=64,
        epochs=1,
        batch_size=32,
        method="saliencydecor-signed",
        seed=5,
        weights={"consistency": 0.5},
        settings={"layers": ("conv1", "fc1"), "group_size": 8},
        clip=None,
        augment=("crop", "flip"),
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
        *["--evaluate-on", "val", "--data-options", "cue_strength=0.9", "--data-options", "samples=40"],
    )
    [record] = Store(tmp_path).records()
    assert record.run.data.options == (("cue_strength", 0.9), ("samples", 40))


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
    assert seen.pop("runs") == method_grid((0, 1, 7), lr=1.0)
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
        (["--epochs", "two"], "epochs must be of type int, got 'two' (str)"),
        (["--clip", "some"], "clip must be of type float, got 'some' (str)"),
        (["--data-options", "cue_strength"], "data_options must look like NAME=VALUE, got 'cue_strength'"),
        (["--settings", "fraction=0.3"], "method 'standard' has no setting 'fraction'; it has: none"),
        (["--method", "magic"], f"unknown method 'magic'; known: {', '.join(METHODS)}"),
        (
            ["--model", "magic"],
            "unknown model 'magic'; known: lenet, cnn_bn, cnn_small, resnet18, vgg11_bn, vit, "
            "or package.module:factory",
        ),
        (
            ["--data", "magic"],
            "unknown data set 'magic'; known: mnist, cifar10, cifar10-jpeg, caltech101, imagenet10, digits, shapes, "
            "or an image folder (folder:PATH)",
        ),
        (
            ["--method", "decorrelation", "--settings", "layers=fc9"],
            "unknown layer 'fc9'; this model has: "
            "conv1, pool1, relu1, conv2, pool2, relu2, fc1, relu3, fc2, relu4, fc3",
        ),
        (
            ["--method", "decorrelation", "--settings", "group_size=12"],
            "group_size=12 does not divide the 16 channels of layer 'conv2'; use one of 1, 2, 4, 8, 16",
        ),
        (
            ["--method", "consistency-signed", "--settings", "fraction=1"],
            "fraction must be strictly between 0 and 1, got 1.0",
        ),
        (["--data-options", "copies=2"], "data set 'digits' has no option 'copies'; it has: image_size"),
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


def test_seeds_go_upwards(tmp_path: Path) -> None:
    said = "seeds must go upwards, such as 0-4, got '1,4-0'"
    assert refused("grid", "--store", tmp_path, "--seeds=1,4-0") == said
    said = "there must be 10,000 seeds at most, got '0-999999999999'"
    assert refused("grid", "--store", tmp_path, "--seeds=0-999999999999") == said


def test_seeds_of_every_size_and_seeds_that_come_twice(tmp_path: Path) -> None:
    call("train", "--store", tmp_path, "--method", "standard", "--seed", 20240101123456, *QUIET)
    call("grid", "--store", tmp_path, "--methods", "standard", "--seeds", "0,0", "--quiet", *DIGITS)
    assert sorted(record.run.seed for record in Store(tmp_path).records()) == [0, 20240101123456]


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    for path in ("folder:~nobody_of_that_name/x", "~nobody_of_that_name/x"):
        said = refused("train", "--store", tmp_path, "--data", path)
        assert said.startswith("~nobody_of_that_name/x: ") or said.startswith("unknown data set"), said


def test_what_show_is_asked_for_is_no_pattern(tmp_path: Path) -> None:
    call("train", "--store", tmp_path, "--method", "standard", *QUIET)
    assert (
        refused("show", "--store", tmp_path, "--run", "*") == f"0 records in {tmp_path} have a key that begins with '*'"
    )


def test_whoever_has_seen_enough_ends_it_without_a_word() -> None:
    command = [sys.executable, "-m", "sdecor", "list", "measures"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_a_folder_is_found_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/a/3", "test/b/3"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), int(name[-1]) * 60).save(path)
    monkeypatch.chdir(tmp_path)
    call("train", "--store", "st", "--data", "folder:pets", "--epochs", "1", "--batch-size", "2", "--quiet")
    for written in ("folder:pets", "pets", "folder:./pets/", tmp_path / "pets"):
        assert "folder:pets" in call("show", "--store", "st", "--data", written)[0]
    assert refused("show", "--store", "st", "--data", "folder:cats").startswith("no records of folder:cats in st; ")


@pytest.mark.parametrize("seeds", ["x", "", "0-", "1.5", "0 1", "-1"])
def test_seeds_that_are_none(tmp_path: Path, seeds: str) -> None:
    assert (
        refused("grid", "--store", tmp_path, f"--seeds={seeds}") == f"seeds must look like 0-4 or 0,1,2, got '{seeds}'"
    )


# --- show -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Store:
    """A store with made-up records."""
    runs = [(m, s, 0.9 + s / 100) for m in ("standard", "decorrelation") for s in (0, 1)]
    made = [(Run.of(data="digits", method=m, seed=s), accuracy) for m, s, accuracy in runs]
    weights = [{"decorrelation": w} for w in (0.3, 3.0)]
    made += [(Run.of(data="mnist", method="decorrelation", seed=3, weights=w), 0.5) for w in weights]
    for run, accuracy in made:
        metrics = {"accuracy": accuracy, **({"object_mass": 0.25} if run.data.name == "mnist" else {})}
        shape = {"channels": 1, "num_classes": 10, "image_size": 28}
        Store(tmp_path).write(Record(run, metrics, {}, shape, {"device": "CPU"}, ""))
    return Store(tmp_path)


def test_show_all(shelf: Store) -> None:
    out, _ = call("show", "--store", shelf.root)
    assert [line.split() for line in out.splitlines()] == [
        ["data", "model", "method", "weight", "decorrelation", "seeds", "accuracy", "object_mass"],
        ["digits", "lenet", "decorrelation", "1.0", "0,1", "0.9050", "±", "0.0071", "–"],
        ["digits", "lenet", "standard", "–", "0,1", "0.9050", "±", "0.0071", "–"],
        ["mnist", "lenet", "decorrelation", "0.3", "3", "0.5000", "0.2500"],
        ["mnist", "lenet", "decorrelation", "3.0", "3", "0.5000", "0.2500"],
    ]


def test_show_one_data_set(shelf: Store) -> None:
    out, _ = call("show", "--store", shelf.root, "--data", "digits")
    assert [line.split()[:4] for line in out.splitlines()] == [
        ["data", "model", "method", "seeds"],
        ["digits", "lenet", "decorrelation", "0,1"],
        ["digits", "lenet", "standard", "0,1"],
    ]


def test_show_one_run(shelf: Store) -> None:
    run = Run.of(data="digits", seed=1)
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
        "cifar10-jpeg": "absent",
        "caltech101": "absent",
        "imagenet10": "absent",
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
        "unknown data set 'magic'; known: mnist, cifar10, cifar10-jpeg, caltech101, imagenet10, digits, shapes, folder"
    )
    assert refused("data", "check", "mnist", "--data-root", tmp_path, code=1) == f"MNIST is not under {tmp_path}"
