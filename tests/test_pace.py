"""How fast a run will go: that what is slow is named, that numbers follow from those measured, and nothing is left."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pictures import boxed, toy
from stores import files

from sdecor import config
from sdecor import pace as module
from sdecor.__main__ import app
from sdecor.config import Run
from sdecor.images import ImageData
from sdecor.pace import Pace, Peak, described, measured
from sdecor.store import Store

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Slow(ImageData):
    """Images of which a batch takes a twentieth of a second."""

    def _read(self, *how: Any) -> Iterator[Any]:
        for batch in super()._read(*how):
            time.sleep(0.05)
            yield batch


@pytest.mark.slow
def test_the_slower_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = toy(400, size=28)
    run = Run.of(data="digits", batch_size=32, epochs=3, augment=("flip",))
    paces = []
    for data in (plain, Slow(**vars(plain))):
        monkeypatch.setattr(module, "load", lambda *_, data=data, **__: data)
        paces.append(measured(run, seconds=1))
    quick, slow = paces
    assert quick.reading > quick.step > 0 and "the step is the slower of the two: reading alone is" in str(quick)
    assert 0.5 * 32 / 0.05 < slow.reading < 32 / 0.05 < slow.step
    assert slow.together < 32 / 0.05 and slow.together < quick.together
    assert "reading is the slower of the two: the step alone is" in str(slow)
    assert slow.images == 384 and slow.epoch == pytest.approx(384 / slow.together)
    assert slow.gpu == 0 and slow.memory > 1e8


def test_batches_are_small_only_against_those_of_the_run() -> None:
    run = Run.of(data="digits", batch_size=256)
    assert "in place of" not in str(Pace(run, 54, "at hand", 5.0, 1.0, 4.0, 54, 0, 0))  # there are no more images
    assert "in batches of 32 in place of 54" in str(Pace(run, 54, "at hand", 5.0, 1.0, 4.0, 32, 0, 0))


def test_what_is_said() -> None:
    run = Run.of(data="digits", batch_size=256, epochs=90, removed=0.1, model="resnet18")
    pace = Pace(
        run, 1_280_000, "decoded by 4 processes to 224 pixels", 500.0, 1250.0, 400.0, 64, 3_456_000_000, 2 * 10**9
    )
    assert str(pace).splitlines() == [
        "reading          500 images a second, decoded by 4 processes to 224 pixels",
        "step           1,250 images a second, standard with resnet18, on images at hand",
        "together         400 images a second, in batches of 64 in place of 256",
        "memory          3.46 GB at most, of this process and those that decode",
        "GPU             2.00 GB at most, held by torch",
        "reading is the slower of the two: the step alone is 2.5 times as fast",
        "an epoch of 1,280,000 images takes about 53 minutes (0.89 hours), "
        "90 epochs 4800 minutes (80.00 hours), without what is measured afterwards",
        "left out: finding the pixels to remove",
    ]
    plain = replace(pace, run=run.but(removed=0.0), batch=256, memory=0, gpu=0, images=4000)
    lines = str(plain).splitlines()
    assert len(lines) == 5 and lines[2] == "together         400 images a second"
    assert lines[4].startswith("an epoch of 4,000 images takes about 10.0 seconds, 90 epochs 15 minutes (0.25 hours), ")


def test_a_step_that_takes_long_is_measured_on_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "seconds_of_step", lambda *_, **__: 64.0)
    asked: list[int] = []
    training = module._training
    monkeypatch.setattr(module, "_training", lambda *how: (asked.append(how[3]), training(*how))[1])
    pace = measured(Run.of(data="digits", batch_size=64), seconds=1)
    assert asked == [pace.batch] == [4] and pace.step == 1.0


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^it cannot be trained: derivative for aten::"):
        measured(Run.of(data="digits", model="vit", method="gradient-penalty", batch_size=8), seconds=1)
    with pytest.raises(FileNotFoundError, match="^ImageNet, 10 classes not found under "):
        measured(Run.of(data="imagenet10"), root=tmp_path, seconds=1)


def test_a_folder_is_not_read_to_describe_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = boxed(tmp_path)
    monkeypatch.setattr(config, "fingerprint", None)
    for name in (str(root), f"folder:{root}"):
        assert described(data=name, epochs=3).schedule.epochs == 3
    assert described(data="digits").data.fingerprint == "" and described() == Run()
    with pytest.raises(ValueError, match="^unknown data set 'magic'; "):
        described(data="magic")
    with pytest.raises(ValueError, match="^epochs must be at least 1, got 0$"):
        described(epochs=0)


def test_memory_is_that_of_the_most_demanding_moment() -> None:
    with Peak(CPU) as before:
        pass
    with Peak(CPU) as peak:
        held = np.ones(10**8, np.uint8)
        time.sleep(0.5)
        del held
    assert before.memory > 1e7 and 0.9e8 < peak.memory - before.memory < 2e8


def _hold(ready: Any, end: Any) -> None:
    held = np.ones(10**8, np.uint8)
    ready.release()
    end.wait(30)
    assert held.all()


@pytest.mark.slow
def test_memory_is_that_of_other_processes_too() -> None:
    context = multiprocessing.get_context("fork")
    with Peak(CPU) as before:
        pass
    ready, end = context.Semaphore(0), context.Event()
    processes = [context.Process(target=_hold, args=(ready, end)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=30)
    with Peak(CPU) as peak:
        time.sleep(0.1)
    end.set()
    for process in processes:
        process.join()
    assert 1.8e8 < peak.memory - before.memory < 3e8  # and not twice what they share with this one


def test_the_command(tmp_path: Path) -> None:
    root, state = boxed(tmp_path / "images"), torch.get_rng_state()
    given = ["pace", "--data", f"folder:{root}", "--seconds", "1", "--batch-size", "8", "--epochs", "2"]
    given += ["--data-options", "memory_limit=0", "--data-options", "workers=0", "--data-root", str(tmp_path / "root")]
    called = CliRunner().invoke(app, given, prog_name="sdecor")
    assert (called.exit_code, called.stderr) == (0, "")
    lines = called.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["reading", "step", "together", "memory", lines[4].split()[0], "an"]
    assert lines[0].endswith(" images a second, decoded here to 28 pixels")
    assert lines[5].startswith("an epoch of 24 images takes about ") and " 2 epochs " in lines[5]
    assert files(Store(tmp_path / "root")) == [] and torch.equal(torch.get_rng_state(), state)
    for wrong, said in (
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--data", "x"], "unknown data set 'x'"),
    ):
        called = CliRunner().invoke(app, ["pace", *wrong], prog_name="sdecor")
        assert called.exit_code == 2 and called.stderr.startswith(f"error: {said}")
    assert CliRunner().invoke(app, ["pace", "--seconds", "0"]).exit_code == 2


@pytest.mark.slow
def test_a_stream_with_other_processes(tmp_path: Path) -> None:
    root = boxed(tmp_path / "images", train=96)
    run = described(data=str(root), data_options={"memory_limit": 0, "workers": 2}, batch_size=8, method="noise")
    pace = measured(run, seconds=2)
    assert pace.images == 96 and pace.together > 0 and not multiprocessing.active_children()
    assert "decoded by 2 processes to 28 pixels" in str(pace)
