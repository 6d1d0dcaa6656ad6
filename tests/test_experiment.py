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
from dataclasses import asdict, fields, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dying
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdecor.experiment
from sdecor.data import load
from sdecor.experiment import Record, Run, Store, data_of, execute, grid, method_grid
from sdecor.images import permutation
from sdecor.measures.suite import measure, object_masks
from sdecor.objective import METHODS
from sdecor.saliency import ATTRIBUTIONS, attribute, pixel_score
from sdecor.training import evaluate

TINY: dict[str, Any] = {"data": "digits", "evaluate_on": "val", "limit": 96, "epochs": 2, "batch_size": 48}
ONE = Run(method="saliencydecor-absolute", **TINY)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which `ONE` is done; not to be changed."""
    store = Store(tmp_path_factory.mktemp("done"))
    execute(ONE, store)
    return store


def files(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())


def expected_files(*runs: Run) -> list[str]:
    return sorted(
        f"{kind}/digits/{run.key}{suffix}"
        for run in runs
        for kind, suffix in (("results", ".json"), ("weights", ".safetensors"))
    )


def result(record: Record | None) -> tuple[object, ...]:
    """All that must not depend on when, where or how often it was run."""
    assert record is not None
    return record.run, record.metrics, record.curves, record.weights_sha256


def copied(store: Store, tmp_path: Path) -> Store:
    for name in files(store):
        target = tmp_path / "store" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((store.root / name).read_bytes())
    return Store(tmp_path / "store")


# --- descriptions ---------------------------------------------------------------------------------------------------


def test_published_keys_stay_what_they_are() -> None:
    assert Run().key == "5fbba10040483b96"
    assert Run(method="saliencydecor-signed", seed=3).key == "a6b4092b7931c503"
    assert Run(data="mnist", method="decorrelation", lr=2e-3, epochs=6).key == "f160c51ee9fae1d9"
    later = {"permuted_labels": False, "removed": 0, "removed_by": "random"}  # came afterwards; nothing is removed
    assert Run(**later).key == Run().key
    assert {name: getattr(Run(**later), name) for name in later} == {**later, "removed_by": "gradient"}


settings_of_a_run = st.fixed_dictionaries(
    {},
    optional={
        "data": st.text(min_size=1, max_size=20),
        "model": st.sampled_from(["lenet", "package.module:factory"]),
        "method": st.sampled_from(list(METHODS)),
        "seed": st.integers(0, 2**31),
        "evaluate_on": st.sampled_from(["val", "test"]),
        "limit": st.none() | st.integers(1, 10**6),
        "data_options": st.dictionaries(
            st.text(min_size=1, max_size=9), st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
        ).map(lambda d: tuple(d.items())),
        "epochs": st.integers(1, 999),
        "batch_size": st.integers(1, 9999),
        "lr": st.floats(1e-6, 10) | st.integers(1, 10),
        "weight_decay": st.floats(0, 1),
        "shape": st.sampled_from(["cosine", "constant"]),
        "clip": st.none() | st.floats(1e-3, 1e3) | st.integers(1, 9),
        "augment": st.booleans(),
        "lambda_c": st.floats(0, 100) | st.integers(0, 9),
        "lambda_d": st.floats(0, 100) | st.integers(0, 9),
        "fraction": st.floats(0.01, 0.99),
        "fill": st.sampled_from(["uniform", "mean", "constant", "blur"]),
        "fill_value": st.floats(-3, 3) | st.integers(-3, 3),
        "direction": st.sampled_from(["clean_to_masked", "detached", "symmetric"]),
        "penalty": st.sampled_from(["correlation", "zca", "decov"]),
        "group_size": st.none() | st.integers(1, 64),
        "layers": st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
        "permuted_labels": st.booleans(),
        "removed": st.sampled_from([0, 0.0, 0.3, 0.5]),
        "removed_by": st.sampled_from(["gradient", "gradcam", "random"]),
    },
)


@settings(max_examples=50, deadline=None)
@given(settings_of_a_run)
def test_a_description_survives_json(values: dict[str, Any]) -> None:
    run = Run(**values)
    again = Run.from_dict(json.loads(json.dumps(asdict(run))))
    assert again == run
    assert hash(again) == hash(run)
    assert again.key == run.key


@settings(max_examples=50, deadline=None)
@given(settings_of_a_run, settings_of_a_run)
def test_equal_descriptions_have_equal_keys_and_others_have_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = Run(**one), Run(**other)
    assert (first == second) == (first.key == second.key)
    assert Run(**dict(reversed(one.items()))).key == first.key
    assert Run(**asdict(first)).key == first.key


def test_every_setting_that_is_used_changes_the_key() -> None:
    base = Run(method="saliencydecor-absolute", fill="constant")
    others: dict[str, Any] = {
        "data": "mnist", "model": "vit", "method": "saliencydecor-signed", "seed": 1, "evaluate_on": "val", "limit": 9,
        "data_options": (("cue_copies", 2),), "epochs": 9, "batch_size": 9, "lr": 0.1, "weight_decay": 0.1,
        "shape": "constant", "clip": None, "augment": True, "lambda_c": 0.1, "lambda_d": 0.1, "fraction": 0.1,
        "fill": "mean", "fill_value": 1.0, "direction": "detached", "penalty": "zca", "group_size": None,
        "layers": ("conv1",), "permuted_labels": True, "removed": 0.5,
    }  # fmt: skip
    assert {*others, "removed_by"} == {f.name for f in fields(Run)}
    keys = {name: replace(base, **{name: value}).key for name, value in others.items()}
    keys["removed_by"] = replace(base, removed=0.5, removed_by="random").key
    assert len({base.key, *keys.values()}) == 2 + len(others)


def test_settings_of_terms_that_a_method_lacks_are_dropped() -> None:
    consistency = {"lambda_c": 3.0, "fraction": 0.3, "fill": "constant", "fill_value": 1.0, "direction": "detached"}
    decorrelation: dict[str, Any] = {"lambda_d": 3.0, "penalty": "zca", "group_size": 4, "layers": ("conv1",)}
    assert Run(**consistency, **decorrelation) == Run()
    assert Run().lambda_c == Run().lambda_d == 0
    assert Run(method="decorrelation", **consistency) == Run(method="decorrelation")
    assert Run(method="consistency-signed", **decorrelation) == Run(method="consistency-signed")
    both = Run(method="saliencydecor-signed", **consistency, **decorrelation)
    assert {name: getattr(both, name) for name in (*consistency, *decorrelation)} == consistency | decorrelation
    assert Run(method="consistency-signed", fill_value=1.0) == Run(method="consistency-signed")  # fills with noise


def test_the_order_of_options_and_the_type_of_a_number_do_not_matter() -> None:
    assert Run(data_options=(("b", 1), ("a", 2))).key == Run(data_options=(("a", 2), ("b", 1))).key
    assert Run(lr=1, clip=5).key == Run(lr=1.0, clip=5.0).key


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, f"unknown method 'magic'; known: {', '.join(METHODS)}"),
        ({"evaluate_on": "train"}, "unknown evaluate_on 'train'; known: val, test"),
        ({"fraction": 1.0, "method": "consistency-signed"}, "fraction must lie strictly between 0 and 1, got 1.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"removed": 1}, "removed must lie in [0, 1), got 1.0"),
        ({"removed": -0.1}, "removed must lie in [0, 1), got -0.1"),
        ({"removed_by": "magic"}, f"unknown removed_by 'magic'; known: {', '.join(ATTRIBUTIONS)}, random"),
    ],
)
def test_impossible_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Run(**values)
    assert str(error.value) == message


def test_a_description_with_an_unknown_setting() -> None:
    with pytest.raises(ValueError) as error:
        Run.from_dict({"data": "digits", "learning_rate": 1.0})
    assert str(error.value).startswith("unknown setting 'learning_rate'; known: augment, batch_size, ")


def test_a_grid_of_methods_and_seeds() -> None:
    runs = method_grid(range(2), epochs=3)
    assert [(r.seed, r.method) for r in runs] == [(s, m) for s in (0, 1) for m in METHODS]
    assert {r.epochs for r in runs} == {3}
    assert method_grid(iter([5]), iter(["standard"])) == [Run(seed=5)]


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


def test_the_saved_model_is_the_measured_one(done: Store) -> None:
    data = load("digits", split="val")
    model = done.model(ONE, data.channels, data.num_classes, data.image_size)
    record = done.record(ONE)
    assert record is not None and not model.training
    assert evaluate(model, data)["accuracy"] == record.metrics["accuracy"]
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
    run = replace(ONE, evaluate_on="test", epochs=1, limit=48)
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
        (lambda t: json.dumps({"run": []}), "AttributeError: "),
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
        store.model(ONE, 1, 10, 28)
    assert str(error.value) == f"{path} is not the file that its record describes; delete both to train again"
    path.unlink()
    with pytest.raises(FileNotFoundError) as absent:
        store.model(ONE, 1, 10, 28)
    assert str(absent.value) == f"no weights of {ONE.method}, seed 0: {path} or its record is absent"


def test_a_model_that_shares_a_weight_is_saved(tmp_path: Path) -> None:
    run = Run(**{**TINY, "epochs": 1}, model="dying:tied", layers=("first",))
    store = Store(tmp_path)
    record = execute(run, store)
    assert record is not None
    assert evaluate(store.model(run, 1, 10, 28), load("digits", split="val"))["accuracy"] == record.metrics["accuracy"]


def test_a_streamed_folder_can_be_measured(tmp_path: Path) -> None:
    from PIL import Image

    data = load("digits", limit=60, image_size=16)
    for split, images in (("train", data.images[:40]), ("test", data.images[40:])):
        for i, image in enumerate(images[:, 0].numpy()):
            folder = tmp_path / "images" / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    run = Run(data=str(tmp_path / "images"), epochs=1, batch_size=16, method="saliencydecor-absolute")
    whole = execute(run, Store(tmp_path / "whole"))
    streamed = execute(replace(run, data_options=(("memory_limit", 1), ("workers", 0))), Store(tmp_path / "streamed"))
    assert result(streamed)[1:] == result(whole)[1:]
    assert whole is not None and "auroc" not in whole.metrics


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    known = sdecor.experiment.environment(torch.device("cpu"))
    monkeypatch.setenv("PATH", "")
    assert sdecor.experiment.environment(torch.device("cpu")) == {**known, "commit": "unknown"}


# --- spoilt labels and images ---------------------------------------------------------------------------------------


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The data of every training that begins."""
    seen: list[Any] = []
    fit = sdecor.experiment.fit

    def noted(model: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(data)
        return fit(model, data, *args, **kwargs)

    monkeypatch.setattr(sdecor.experiment, "fit", noted)
    return seen


def test_permuted_labels_are_those_of_training(done: Store, tmp_path: Path, trained_on: list[Any]) -> None:
    run, store = replace(ONE, permuted_labels=True), Store(tmp_path)
    record = execute(run, store)
    [seen], train = trained_on, load("digits", limit=96)
    assert torch.equal(seen.images, train.images)
    assert torch.equal(seen.labels, train.labels[permutation(96)]) and not torch.equal(seen.labels, train.labels)
    held_out, plain = data_of(run, store, "val"), load("digits", split="val")
    assert torch.equal(held_out.labels, plain.labels)
    assert record is not None and record.weights_sha256 != result(done.record(ONE))[-1]
    assert record.metrics["accuracy"] == evaluate(store.model(run, 1, 10, 28), plain)["accuracy"]


def test_remove_and_retrain(done: Store, tmp_path: Path, trained_on: list[Any]) -> None:
    run, store = replace(ONE, removed=0.3), Store(tmp_path)
    record = execute(run, store)
    assert files(store) == expected_files(ONE, run)
    assert result(store.record(ONE)) == result(done.record(ONE))  # the run without removal was done on the way
    base = store.model(ONE, 1, 10, 28)
    whole, train = trained_on
    for before, after in ((whole, train), (load("digits", split="val"), data_of(run, store, "val"))):
        score = pixel_score(attribute(base, before.normalized(), progress=False)).flatten(1)
        salient = score >= score.topk(round(0.3 * 784)).values[:, -1:]
        gone = torch.where(salient.view(-1, 1, 28, 28), round(255 * before.mean[0]), before.images)
        assert (gone != after.images).float().mean() < 1e-3  # but for rounding in the score
        assert torch.equal(after.labels, before.labels) and (after.mean, after.std) == (before.mean, before.std)
        assert torch.equal(object_masks(after), object_masks(before))
    assert record is not None
    retrained = store.model(run, 1, 10, 28)
    assert record.metrics["accuracy"] == evaluate(retrained, data_of(run, store, "val"))["accuracy"]
    assert set(record.curves) >= {"gradient_histogram"} and "masked_uniform_most" not in record.curves
    other = replace(run, removed_by="gradcam", epochs=1)
    assert execute(run, store) == record and len(trained_on) == 2
    execute(other, store)
    assert files(store) == expected_files(ONE, run, replace(ONE, epochs=1), other)


def test_removal_at_random_needs_no_other_run(tmp_path: Path, trained_on: list[Any]) -> None:
    run = replace(ONE, removed=0.5, removed_by="random", epochs=1)
    execute(run, Store(tmp_path))
    assert files(Store(tmp_path)) == expected_files(run)
    changed = (trained_on[0].images != load("digits", limit=96).images).float().mean()
    assert 0.45 < changed <= 0.5


def test_without_the_other_run_its_absence_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^no weights of saliencydecor-absolute, seed 0: .*its record is absent"
    ):
        data_of(replace(ONE, removed=0.3), Store(tmp_path), "val")


def test_what_is_measured_in_full() -> None:
    assert Run().thorough
    assert not any(r.thorough for r in (Run(evaluate_on="val"), Run(permuted_labels=True), Run(removed=0.1)))


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

FOUR = [Run(method=method, seed=seed, **TINY) for method in ("standard", "saliencydecor-absolute") for seed in range(2)]


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
    runs = [replace(run, model="dying:counted") for run in FOUR]
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
    bad = Run(**{**TINY, "lr": 1e20, "clip": None, "epochs": 5})
    with pytest.raises(ChildProcessError) as error:
        grid([bad, replace(bad, seed=1)], Store(tmp_path), workers=2, progress=False)
    assert str(error.value) == "2 of 2 workers failed; their output says why"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300))
def test_any_content_of_a_record_is_either_read_or_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results" / "digits" / f"{ONE.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert Store(tmp_path).record(ONE) is None
    assert not path.exists()
