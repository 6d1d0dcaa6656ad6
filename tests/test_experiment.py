"""Runs and records: one description, one result, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dying
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import ONE, TINY, copied, expected_files, files, result

import sdecor.experiment
from sdecor.config import Run
from sdecor.data import load
from sdecor.evaluation import measure
from sdecor.experiment import devices, execute, grid
from sdecor.store import Record, Store, environment
from sdecor.training import evaluate

# --- records --------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(done: Store) -> None:
    assert files(done) == expected_files(ONE)
    record = done.record(ONE)
    assert record is not None
    content = (done.root / "weights" / "digits" / f"{ONE.key}.safetensors").read_bytes()
    assert record.weights_sha256 == hashlib.sha256(content).hexdigest()
    assert {len(record.curves[f"loss_{name}"]) for name in ("classification", "total")} == {2}
    assert {"device", "threads", "python", "torch", "sdecor", "commit", "date", "training_seconds"} <= set(
        record.environment
    )
    assert json.loads((done.root / "results" / "digits" / f"{ONE.key}.json").read_text())["run"]["method"] == ONE.method
    assert list(done.records()) == [record]
    assert record.shape == {"channels": 1, "num_classes": 10, "image_size": 28}
    assert set(record.curves) & {"loss_consistency", "loss_masked_classification"} == {"loss_consistency"}


def test_a_record_keeps_what_float32_knows(done: Store) -> None:
    record = done.record(ONE)
    assert record is not None
    third = Record(**{**vars(record), "metrics": {"a": 1 / 3, "b": 0.9913, "c": 1e-9}, "curves": {"d": [2 / 3] * 3}})
    text = third.to_json()
    assert '"d": [0.6666667, 0.6666667, 0.6666667]' in text
    again = Record.of_json(text)
    assert again.metrics == {"a": 0.33333334, "b": 0.9913, "c": 1e-9}
    assert again.run == ONE and again.to_json() == text
    beyond = Record(**{**vars(record), "metrics": {"huge": 1e39, "tiny": 1e-50, "none": 0.0}})
    assert Record.of_json(beyond.to_json()).metrics == {"huge": 1e39, "tiny": 1e-50, "none": 0.0}


def test_a_final_run_leaves_an_exhibit(tmp_path: Path) -> None:
    run, store = ONE.but(evaluate_on="test", epochs=1, limit=48), Store(tmp_path)
    execute(run, store)
    shown, test = store.exhibit(run), load("digits", split="test")
    assert [int(test.labels[i]) for i in shown["index"]] == list(range(10))
    assert shown["saliency"].shape == (10, 28, 28) and shown["saliency"].dtype == torch.float16
    assert shown["saliency"].amax((1, 2)).tolist() == [1.0] * 10
    assert (tmp_path / "exhibits" / "digits" / f"{run.key}.safetensors").stat().st_size < 150_000
    with pytest.raises(FileNotFoundError, match=r"no exhibit of saliencydecor-absolute, seed 0: .* is absent"):
        store.exhibit(ONE)


def test_gpus_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices("cuda", 3) == devices("auto", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices("cuda:1", 2) == ["cuda:1"] * 2 and devices("cpu", 2) == ["cpu"] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices("cuda", 2) == ["cuda"] * 2  # whose absence every worker will name


def test_the_saved_model_is_the_measured_one(done: Store) -> None:
    data = load("digits", split="val")
    model = done.model(ONE)
    record = done.record(ONE)
    assert record is not None and not model.training
    assert evaluate(model, data)["accuracy"] == pytest.approx(record.metrics["accuracy"], rel=1e-6)
    metrics, curves = measure(model, data, thorough=False)
    assert metrics == pytest.approx(record.metrics, rel=1e-5)
    assert record.curves["gradient_histogram"] == pytest.approx(curves["gradient_histogram"], abs=1e-4)


def test_a_run_is_done_once(done: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(sdecor.experiment, "fit", again)
    assert execute(ONE, done) == done.record(ONE)
    assert grid([ONE, ONE], done) == [done.record(ONE)] * 2
    assert files(done) == expected_files(ONE)


def test_final_runs_have_accuracy_curves(tmp_path: Path) -> None:
    run = ONE.but(evaluate_on="test", epochs=1, limit=48)
    record = execute(run, Store(tmp_path))
    assert record is not None
    for name in ("uniform_most", "uniform_random", "constant_most", "constant_random"):
        assert record.curves[f"masked_{name}"][0] == pytest.approx(record.metrics["accuracy"])
        assert len(record.curves[f"masked_{name}"]) == 10


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t[: len(t) // 2], "JSONDecodeError: "),
        (lambda t: "", "JSONDecodeError: "),
        (lambda t: "[]", "TypeError: "),
        (lambda t: "{}", "KeyError: 'run'"),
        (lambda t: json.dumps({"run": []}), "TypeError: "),
        (lambda t: json.dumps({**json.loads(t), "metrics": None}), "AttributeError: "),
        (lambda t: json.dumps({**json.loads(t), "more": 1}), "TypeError: "),
        (lambda t: t.replace('"seed": 0', '"seed": 1'), "it describes another run"),
    ],
    ids=["half", "empty", "list", "no run", "run is a list", "no metrics", "more", "another run"],
)
def test_a_damaged_record_is_set_aside_and_the_run_redone(
    done: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str], said: str
) -> None:
    store = copied(done, tmp_path)
    path = store.root / "results" / "digits" / f"{ONE.key}.json"
    damaged = damage(path.read_text())
    path.write_text(damaged)
    assert list(store.records()) == []
    assert files(store) == expected_files(ONE)  # looking moves nothing
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sdecor"):
        record = execute(ONE, store)
    [message] = caplog.messages
    assert message.startswith(f"record {path} is not readable ({said}")
    assert message.endswith(f"); set aside as {ONE.key}.json.corrupt")
    assert result(record) == result(done.record(ONE))
    assert path.with_name(f"{ONE.key}.json.corrupt").read_text() == damaged
    assert files(store) == sorted([*expected_files(ONE), f"results/digits/{ONE.key}.json.corrupt"])


def test_other_weights_than_those_of_the_record(done: Store, tmp_path: Path) -> None:
    store = copied(done, tmp_path)
    path = store.root / "weights" / "digits" / f"{ONE.key}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError) as error:
        store.model(ONE)
    assert str(error.value) == f"{path} is not the file that its record describes; delete both to train again"
    path.unlink()
    with pytest.raises(FileNotFoundError) as absent:
        store.model(ONE)
    assert str(absent.value) == f"no weights of {ONE.method}, seed 0: {path} or its record is absent"


def test_a_model_that_shares_a_weight_is_saved(tmp_path: Path) -> None:
    run = Run.of(**{**TINY, "epochs": 1}, model="dying:tied")
    store = Store(tmp_path)
    record = execute(run, store)
    assert record is not None
    assert evaluate(store.model(run), load("digits", split="val"))["accuracy"] == pytest.approx(
        record.metrics["accuracy"], rel=1e-6
    )


def test_a_streamed_folder_can_be_measured(tmp_path: Path) -> None:
    from PIL import Image

    data = load("digits", limit=60, image_size=16)
    for split, images in (("train", data.images[:40]), ("test", data.images[40:])):
        for i, image in enumerate(images[:, 0].numpy()):
            folder = tmp_path / "images" / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    run = Run.of(data=str(tmp_path / "images"), epochs=1, batch_size=16, method="saliencydecor-absolute")
    whole = execute(run, Store(tmp_path / "whole"))
    streamed = execute(run.but(data_options={"memory_limit": 1, "workers": 0}), Store(tmp_path / "streamed"))
    assert result(streamed)[1:] == result(whole)[1:]
    assert whole is not None and "auroc" not in whole.metrics


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    known = environment(torch.device("cpu"))
    monkeypatch.setenv("PATH", "")
    assert environment(torch.device("cpu")) == {**known, "commit": "unknown"}


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", range(4), ids=["first checkpoint", "second checkpoint", "weights", "record"])
def test_no_space_left(done: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    store, left, sync = Store(tmp_path), [write], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*: No space left on device; nothing was changed") as error:
        execute(ONE, store)
    assert error.value.errno == errno.ENOSPC
    assert not [name for name in files(store) if name.endswith((".partial", ".lock", ".json"))]
    monkeypatch.undo()
    assert result(execute(ONE, store)) == result(done.record(ONE))
    assert files(store) == expected_files(ONE)


def test_no_space_left_on_a_real_disk(done: Store, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("cannot mount a small disk here: that takes root")
    try:
        store = Store(disk / "store")
        for size, left in (("400k", []), ("1m", [f"unfinished/{ONE.key}.pt"])):  # a checkpoint takes about 800 kB
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
            with pytest.raises(OSError, match=r"could not write .*\.pt: No space left on device; nothing was changed"):
                execute(ONE, store)
            assert files(store) == left
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert result(execute(ONE, store)) == result(done.record(ONE))
        assert files(store) == expected_files(ONE)
    finally:
        subprocess.run(["umount", disk], check=True)


# --- kill -9 --------------------------------------------------------------------------------------------------------

FOUR = [
    Run.of(method=method, seed=seed, **TINY) for method in ("standard", "saliencydecor-absolute") for seed in range(2)
]


@pytest.fixture(scope="module")
def begin() -> Callable[..., BaseProcess]:
    """Start a function in a process of its own, forked from one that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sdecor.experiment", "sklearn.datasets"])

    def start(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseProcess:
        process = context.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def undisturbed(begin: Callable[..., BaseProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Results of `FOUR` without any disturbance, and how long a process takes for them."""
    warm = begin(grid, [], Store("."))
    warm.join()
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    started = time.perf_counter()
    process = begin(grid, FOUR, store, threads=1, progress=False)
    process.join()
    assert process.exitcode == 0
    yield [result(store.record(run)) for run in FOUR], time.perf_counter() - started


@pytest.mark.slow
def test_kill_at_ten_random_moments(begin: Any, undisturbed: Any, tmp_path: Path) -> None:
    expected, whole = undisturbed
    store, draw, kills, rounds = Store(tmp_path), random.Random(2), 0, 0
    while kills < 10:
        rounds += 1
        assert rounds < 40
        process = begin(grid, FOUR, store, threads=1, progress=False)
        process.join(timeout=draw.uniform(0.02, 0.35) * whole)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif all(store.record(run) for run in FOUR):  # done before ten kills: begin again
            assert [result(store.record(run)) for run in FOUR] == expected
            assert files(store) == expected_files(*FOUR)
            store = Store(tmp_path / str(rounds))
    process = begin(grid, FOUR, store, threads=1, progress=False)
    process.join()
    assert process.exitcode == 0
    assert [result(store.record(run)) for run in FOUR] == expected
    assert files(store) == expected_files(*FOUR)


@pytest.mark.slow
def test_kill_before_each_operation_on_a_file(begin: Any, done: Store, tmp_path: Path) -> None:
    operation = 0
    while True:
        operation += 1
        store = Store(tmp_path / str(operation))
        process = begin(dying.die_before, operation, [ONE], store)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert result(execute(ONE, store)) == result(done.record(ONE))
        assert files(store) == expected_files(ONE), operation
    assert operation == 1 + 10  # sync and rename 2 checkpoints, weights, record; remove checkpoint and lock


# --- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_on_one_store_do_each_run_once(begin: Any, undisturbed: Any, tmp_path: Path) -> None:
    runs = [run.but(model="dying:counted") for run in FOUR]
    store, builds = Store(tmp_path / "store"), tmp_path / "builds"
    processes = [begin(dying.help_out, runs, store, builds) for _ in range(2)]
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert len(builds.read_text().split()) == len(FOUR)
    assert files(store) == expected_files(*runs)
    for run, expected in zip(runs, undisturbed[0], strict=True):
        assert result(store.record(run))[1:] == expected[1:]


def test_a_run_that_another_process_is_at(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with sdecor.experiment.locked(store.checkpoint(ONE).with_suffix(".lock")) as mine:
        assert mine
        assert execute(ONE, store, wait=False) is None


@pytest.mark.slow
def test_workers(undisturbed: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    records = grid(FOUR, store, workers=2, progress=False)
    assert [result(record) for record in records] == undisturbed[0]
    assert files(store) == expected_files(*FOUR)


def test_the_failure_of_a_worker_is_raised(begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(sdecor.experiment.multiprocessing, "get_context", lambda _: fork)
    bad = Run.of(**{**TINY, "lr": 1e20, "clip": None, "epochs": 5})
    with pytest.raises(ChildProcessError) as error:
        grid([bad, bad.but(seed=1)], Store(tmp_path), workers=2, progress=False)
    assert str(error.value) == "2 of 2 workers failed; their output says why"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300))
def test_any_content_of_a_record_is_either_read_or_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results" / "digits" / f"{ONE.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert Store(tmp_path).record(ONE) is None
    assert not path.exists()
