"""``sdecor plan`` and ``sdecor run``: what they print, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import call, refused

from sdecor import experiment, planned
from sdecor.plan import Plan
from sdecor.store import Store
from sdecor.training import evaluate

TEXT = """
title = "A tiny plan"

[shared]
data = "digits"
limit = 96
epochs = 1
batch_size = 48
curve_images = 20

[choice]
price = 0.5

[arms.standard]
[arms.decorrelation]
try = { decorrelation = [0.3, 1.0] }
[arms.saliencydecor-absolute]
from = "decorrelation"
later = true

[presets.quick]
seeds = 2
[presets.cpu]
epochs = 2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plan and a folder of plans, where the command is given."""
    (tmp_path / "tiny.toml").write_text(TEXT)
    (tmp_path / "book/experiments").mkdir(parents=True)
    (tmp_path / "book/experiments/other.toml").write_text(TEXT.replace("tiny", "other"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are functions of this process, and take no long measures."""

    class Process:
        exitcode = 0

        def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
            self.work = lambda: target(*args, **kwargs)

        def start(self) -> None:
            try:
                self.work()
            except SystemExit as end:
                self.exitcode = int(str(end.code))

        def is_alive(self) -> bool:
            return False

        def join(self) -> None:
            pass

    def measure(model: Any, data: Any, **_: Any) -> Any:
        return {"accuracy": evaluate(model, data.subset(64))["accuracy"]}, {}

    context = SimpleNamespace(Process=Process, Pipe=multiprocessing.Pipe)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(experiment, "measure", measure)
    monkeypatch.setattr(experiment, "exhibit", lambda *_, **__: None)


def test_from_the_plan_to_its_end(here: Path, inline: None) -> None:
    given = ["tiny", "--preset", "quick", "--store", "there"]
    out = call("plan", *given)[0].splitlines()
    assert out[:5] == [
        "A tiny plan (quick), records in there",
        "  standard                         0 of 1 trials, not chosen yet",
        "  decorrelation                    not chosen yet",
        "  saliencydecor-absolute           not chosen yet, later",
        "0 runs done, 1 to do, and at most 8 that depend on these",
    ]
    assert out[5].startswith("Those to do take about ") and out[5].endswith(" seconds one after another on cpu")
    out, err = call("run", *given, "--pack", "out")
    assert out.startswith("9 runs done, 0 to do, after ") and out.endswith(" seconds; records in there\n") and err == ""
    assert {path.name for path in (here / "out").iterdir()} == {"tiny-quick.tar"}
    assert call("plan", *given)[0].splitlines() == [
        "A tiny plan (quick), records in there",
        "  standard                         1 of 1 trials, 2 of 2 final runs",
        "  decorrelation                    2 of 2 trials, 2 of 2 final runs",
        "  saliencydecor-absolute           2 of 2 final runs, later",
        "9 runs done, 0 to do",
    ]
    more = call("plan", *given, "--seeds", 3)[0].splitlines()
    assert more[1] == "  standard                         1 of 1 trials, 2 of 3 final runs"
    assert more[4] == "9 runs done, 3 to do"
    assert call("merge", "out", "--store", "home")[0].splitlines()[-1].startswith("9 records taken, 0 were there; ")
    assert call("plan", "tiny.toml", *given[1:3], "--store", "home")[0].splitlines()[-1] == "9 runs done, 0 to do"


def test_runs_that_broke_down_are_named(here: Path, inline: None) -> None:
    course, store = Plan.read("tiny.toml").at("quick"), Store("there")
    store.fail(course.state(lambda run: None).trials["standard"][0], "loss became nan")
    out = call("plan", "tiny", "--preset", "quick", "--store", "there")[0]
    assert out.splitlines()[1:] == [
        "  standard                         1 of 1 trials, no choice, since trials broke down",
        "  decorrelation                    no choice, since trials broke down",
        "  saliencydecor-absolute           no choice, since trials broke down, later",
        "broke down: trial of arm 'standard', loss became nan",
        "0 runs done, 0 to do",
    ]
    out, _ = call("run", "tiny", "--preset", "quick", "--store", "there")
    assert out.startswith("broke down: trial of arm 'standard', loss became nan\n0 runs done, 0 to do, after ")


def test_the_default_places(here: Path, inline: None) -> None:
    assert call("plan", "other", "--data-root", "data")[0].startswith("A other plan (cpu), records in data/runs\n")


def test_what_is_given_reaches_the_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(planned, "run_plan", lambda course, store, **how: seen.update(how, course=course, store=store))
    given = [
        "--preset",
        "quick",
        "--seeds",
        4,
        "--data",
        "digits",
        "--workers",
        3,
        "--threads",
        2,
        "--device",
        "auto",
        "--compile",
    ]
    call("run", "tiny", *given, "--budget", 60, "--store", "there", "--data-root", "data")
    assert (seen["course"].seeds, seen["course"].preset, seen["store"].root) == (4, "quick", Path("there"))
    assert {run.data.name for runs in seen["course"].possible().values() for run in runs} == {"digits"}
    assert 50 < seen["budget"] <= 60
    rest = {name: seen[name] for name in ("workers", "threads", "device", "compiled", "root")}
    assert rest == {"workers": 3, "threads": 2, "device": "auto", "compiled": True, "root": "data"}
    call("run", "tiny")
    assert (seen["budget"], seen["threads"], seen["workers"], seen["device"]) == (float("inf"), None, 1, "cpu")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_wrong_requests(here: Path, command: str) -> None:
    where = "none.toml and book/experiments/none.toml"
    assert refused(command, "none") == f"no plan 'none': looked for {where}"
    assert refused("--use", "none.py", command, "tiny") == "no file 'none.py' to use"
    assert refused(command, "none.toml") == "no plan 'none.toml': looked for none.toml"
    assert refused(command, "tiny", "--preset", "huge") == "unknown preset 'huge'; known: quick, cpu"
    workers = ["--workers", 2] if command == "run" else []
    assert refused(command, "tiny", "--device", "gpu", *workers).startswith("unknown device 'gpu'; use cpu, cuda ")
    (here / "bad.toml").write_text(TEXT.replace("price", "prize"))
    assert refused(command, "bad").startswith("bad.toml: [choice]: unknown key 'prize'; known: ")
    (here / "bad.toml").write_text(TEXT + "x = \n")
    assert refused(command, "bad") == "bad.toml: Invalid value (at line 25, column 5)"
    assert "0 is not in the range" in call(command, "tiny", "--seeds", 0, code=2)[1]
    assert not (here / "there").exists()


def test_wrong_numbers(here: Path) -> None:
    for option in ("--budget", "--threads", "--workers"):
        assert "is not in the range" in call("run", "tiny", option, 0, code=2)[1]


def test_a_worker_that_fails_ends_with_code_1(here: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(planned, "execute", fail)
    out, err = call("run", "tiny", "--preset", "quick", "--store", "there", code=1)
    assert err == "error: 1 of 1 workers failed: OSError: no space left\n"
    assert out.startswith("0 runs done, 1 to do, and at most 8 that depend on these, after ")


# --- commands as they are -------------------------------------------------------------------------------------------


def command(*given: str) -> subprocess.Popen[str]:
    how: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "process_group": 0}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    return subprocess.Popen([sys.executable, "-m", "sdecor", *given], **how)


@pytest.mark.slow
def test_data_that_are_missing_end_with_one_line(here: Path) -> None:
    (here / "bad.toml").write_text(TEXT.replace('"digits"', '"imagenet10"'))
    run = command("run", "bad", "--preset", "quick", "--store", "there", "--data-root", "none", "--workers", "2")
    out, err = run.communicate()
    assert run.returncode == 2
    assert err.startswith("error: ImageNet, 10 classes not found under none ") and err.count("\n") == 1
    assert out.startswith("0 runs done, 1 to do, and at most 8 ") and out.count("\n") == 1


@pytest.mark.slow
def test_a_budget_is_kept(here: Path) -> None:
    """One that is long enough for some trials; final runs, which take seconds of measures here, may be cut off."""
    started = time.time()
    run = command("run", "tiny", "--preset", "quick", "--store", "there", "--threads", "1", "--budget", "20")
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert time.time() - started < 20 + 25  # the budget's ten, and the start of Python on a busy machine
    done = list(Store("there").records())
    assert out.startswith(f"{len(done)} runs done, ") and " to do" in out
    shown = call("plan", "tiny", "--preset", "quick", "--store", "there")[0].splitlines()
    assert shown[4].startswith(f"{len(done)} runs done, ")


@pytest.mark.slow
def test_an_interrupt_ends_everything_quietly(here: Path) -> None:
    run = command("run", "tiny", "--preset", "quick", "--store", "there", "--workers", "2", "--seeds", "40")
    until = time.time() + 100
    while not list(here.glob("there/results/*/*.json")):
        assert time.time() < until
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 1 and err.strip() == "Aborted!"
    assert " to do, " in out
