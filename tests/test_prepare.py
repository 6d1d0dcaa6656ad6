"""The images that a run trains on: permuted labels, and pixels removed by what another network found salient."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import boxed
from PIL import Image
from stores import ONE, expected_files, files, result
from torch import nn

import sdecor.experiment
from sdecor._bits import packed
from sdecor.attribution import attribute
from sdecor.config import Objective, Run, Schedule
from sdecor.data import load
from sdecor.experiment import execute
from sdecor.images import ImageData, ImageStream, permutation
from sdecor.models import build
from sdecor.prepare import data_of, remove_salient
from sdecor.saliency import pixel_score
from sdecor.store import Store
from sdecor.training import evaluate, fit


def accuracy_of(model: Any, data: Any) -> Any:
    return pytest.approx(evaluate(model, data)["accuracy"], rel=1e-6)


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
    run, store = ONE.but(permuted_labels=True), Store(tmp_path)
    record = execute(run, store)
    [seen], train = trained_on, load("digits", limit=96)
    assert torch.equal(seen.images, train.images)
    assert torch.equal(seen.labels, train.labels[permutation(96)]) and not torch.equal(seen.labels, train.labels)
    held_out, plain = data_of(run, store, "val"), load("digits", split="val")
    assert torch.equal(held_out.labels, plain.labels)
    assert record is not None and record.weights_sha256 != result(done.record(ONE))[-1]
    assert record.metrics["accuracy"] == accuracy_of(store.model(run), plain)


def test_remove_and_retrain(done: Store, tmp_path: Path, trained_on: list[Any]) -> None:
    run, store = ONE.but(removed=0.3), Store(tmp_path)
    record = execute(run, store)
    assert files(store) == expected_files(ONE, run)
    assert result(store.record(ONE)) == result(done.record(ONE))  # the run without removal was done on the way
    base = store.model(ONE)
    whole, train = trained_on
    for before, after in ((whole, train), (load("digits", split="val"), data_of(run, store, "val"))):
        score = pixel_score(attribute(base, before.normalized(), progress=False)).flatten(1)
        salient = score >= score.topk(round(0.3 * 784)).values[:, -1:]
        gone = torch.where(salient.view(-1, 1, 28, 28), round(255 * before.mean[0]), before.images)
        assert (gone != after.images).float().mean() < 1e-3  # but for rounding in the score
        assert torch.equal(after.labels, before.labels) and (after.mean, after.std) == (before.mean, before.std)
        assert torch.equal(after.object_masks, before.object_masks)
    assert record is not None
    retrained = store.model(run)
    assert record.metrics["accuracy"] == accuracy_of(retrained, data_of(run, store, "val"))
    assert set(record.curves) >= {"gradient_histogram"} and "masked_uniform_most" not in record.curves
    other = run.but(removed_by="gradcam", epochs=1)
    assert execute(run, store) == record and len(trained_on) == 2
    execute(other, store)
    assert files(store) == expected_files(ONE, run, ONE.but(epochs=1), other)


def test_removal_at_random_needs_no_other_run(tmp_path: Path, trained_on: list[Any]) -> None:
    run = ONE.but(removed=0.5, removed_by="random", epochs=1)
    execute(run, Store(tmp_path))
    assert files(Store(tmp_path)) == expected_files(run)
    changed = (trained_on[0].images != load("digits", limit=96).images).float().mean()
    assert 0.45 < changed <= 0.5


def test_without_the_other_run_its_absence_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^no weights of saliencydecor-absolute, seed 0: .*its record is absent"
    ):
        data_of(ONE.but(removed=0.3), Store(tmp_path), "val")


def test_what_is_measured_in_full() -> None:
    assert Run().thorough
    assert not any(r.thorough for r in (Run.of(evaluate_on="val"), Run.of(permuted_labels=True), Run.of(removed=0.1)))


def test_a_folder_that_changed_is_not_the_one_that_was_described(tmp_path: Path) -> None:
    for i, name in enumerate(("train/a/1.png", "train/b/1.png", "test/a/1.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8), 50 * i).save(path)
    run = Run.of(data=f"folder:{tmp_path}")
    assert len(data_of(run, Store(tmp_path), "test")) == 1
    Image.new("L", (8, 8), 200).save(tmp_path / "train/a/1.png")
    with pytest.raises(ValueError, match=r"has changed: its fingerprint is \w{16}, the run was described for \w{16}"):
        data_of(run, Store(tmp_path), "test")
    assert Run.of(data=f"folder:{tmp_path}").key != run.key


# --- images without their most salient pixels -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = build("lenet", 1, 10, 28)
    fit(model, load("digits"), Objective("standard"), Schedule(epochs=2, batch_size=64), seed=0, progress=False)
    return model


@pytest.fixture(scope="module")
def data() -> ImageData:
    data = load("digits", split="test").subset(30)
    assert isinstance(data, ImageData)
    return data


def test_masks_of_objects(data: ImageData) -> None:
    shapes = load("shapes", samples=4)
    assert isinstance(shapes, ImageData) and shapes.object_masks is shapes.masks
    digits = data.object_masks
    assert digits is not None and torch.equal(digits, data.images[:, 0] > 0)
    assert ImageData.from_tensors(data.images, data.labels).object_masks is None


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_most_salient_pixels_get_the_mean_colour(model: nn.Module, fraction: float) -> None:
    data = load("shapes", samples=20)
    assert isinstance(data, ImageData)
    torch.manual_seed(0)
    net = build("lenet", 3, 8, 32)
    before = data.images.clone()
    result = remove_salient(data, net, "gradient", fraction)
    assert torch.equal(data.images, before) and result.masks is data.masks
    score = pixel_score(attribute(net, data.normalized(), progress=False)).flatten(1)
    count = round(fraction * 1024)
    removed = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(count).indices, True).view(-1, 1, 32, 32)
    colour = torch.tensor([round(255 * m) for m in data.mean], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.equal(result.images, torch.where(removed, colour, before))
    assert (result.labels, result.mean, result.std) == (data.labels, data.mean, data.std)


def test_random_pixels_are_the_control(data: ImageData) -> None:
    white = ImageData(torch.full((20, 1, 9, 9), 255, dtype=torch.uint8), torch.zeros(20).long(), ("0",), (0.2,), (1.0,))
    first = remove_salient(white, None, "random", 0.3)
    changed = first.images[:, 0] != 255
    assert changed.sum((1, 2)).eq(round(0.3 * 81)).all() and first.images[:, 0][changed].eq(51).all()
    assert len(changed.flatten(1).unique(dim=0)) == 20
    assert 2 < changed.float().sum(0).mean() < 10
    assert torch.equal(remove_salient(white, None, "random", 0.3, batch_size=7).images, first.images)
    assert not torch.equal(remove_salient(white, None, "random", 0.3, seed=1).images, first.images)


def test_removal_does_not_depend_on_the_batch(model: nn.Module, data: ImageData) -> None:
    whole, parts = (remove_salient(data, model, "integrated_gradients", 0.2, batch_size=n) for n in (500, 7))
    assert (whole.images != parts.images).float().mean() < 1e-3  # pixels of equal score up to rounding
    assert not torch.equal(whole.images, data.images)


def test_the_object_stays_where_it_was(model: nn.Module, data: ImageData) -> None:
    removed = remove_salient(data, model, "gradient", 0.5).object_masks
    assert removed is not None and torch.equal(removed, data.images[:, 0] > 0)


# --- removal from a stream ------------------------------------------------------------------------------------------

STREAMED: dict[str, Any] = {"memory_limit": 0, "workers": 0}


@pytest.fixture
def both(tmp_path: Path) -> tuple[ImageData, ImageStream]:
    """The same images in memory and as a stream."""
    root = str(boxed(tmp_path / "images"))
    held, stream = load(root), load(root, **STREAMED)
    assert isinstance(held, ImageData) and isinstance(stream, ImageStream) and held.has_masks
    return held, stream


def alike(held: Any, stream: Any, **how: Any) -> None:
    for one, other in zip(held.batches_with_masks(5, **how), stream.batches_with_masks(5, **how), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["random", "gradient", "gradcam"])
@pytest.mark.parametrize("batch_size", [500, 7])
def test_a_stream_loses_the_same_pixels(both: tuple[ImageData, ImageStream], method: str, batch_size: int) -> None:
    torch.manual_seed(0)
    net = None if method == "random" else build("lenet", 3, 3, 28)
    held, stream = (remove_salient(data, net, method, 0.3, batch_size=batch_size, seed=4) for data in both)
    assert isinstance(held, ImageData) and isinstance(stream, ImageStream)
    assert ((held.images != both[0].images).any(1).sum((1, 2)) <= round(0.3 * 784)).all()
    assert not torch.equal(held.images, both[0].images)
    alike(held, stream)
    alike(*both)  # they are as before
    order: Any = {"shuffle": True, "augment": ("flip", "crop")}
    for one, other in zip(
        held.batches(5, generator=torch.Generator().manual_seed(1), **order),
        stream.batches(5, generator=torch.Generator().manual_seed(1), **order),
        strict=True,
    ):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for which in ([7, 2, 2, 23], 5, torch.arange(24) % 3 == 1):
        alike(held.subset(which), stream.subset(which))
    again = [remove_salient(data, None, "random", 0.2) for data in (held, stream)]
    alike(*again)
    assert not torch.equal(again[0].images, held.images)
    digests = [data.digest for data in (both[1], stream, again[1], stream.subset([0, 1]), stream.subset([1, 0]))]
    assert len(set(digests)) == 5
    assert remove_salient(both[1], net, method, 0.3, batch_size=batch_size, seed=4).digest == stream.digest


def test_pixels_are_kept_as_long_as_a_stream_needs_them(
    both: tuple[ImageData, ImageStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    stream = remove_salient(both[1], None, "random", 0.3)
    (file,) = (tmp_path / "kept").iterdir()
    assert file.stat().st_size == 24 * 28 * 28 // 8
    part = stream.subset(3).to("cpu")
    del stream
    assert file.exists() and len(list(part.batches(2))) == 2
    pickle.loads(pickle.dumps(part.removed))  # what goes to other processes owns nothing
    assert file.exists()
    child = multiprocessing.get_context("fork").Process(target=part.removed[0][0].at, args=([0],))
    child.start()
    child.join()
    assert child.exitcode == 0 and file.exists()
    del part, child
    gc.collect()
    assert not file.exists()
    with pytest.raises(ValueError, match="^fraction must lie strictly between 0 and 1, got 1$"):
        remove_salient(both[1], None, "random", 1)
    assert not list((tmp_path / "kept").iterdir())


@given(st.integers(1, 6), st.integers(1, 17), st.integers(1, 4), st.randoms(use_true_random=False))
def test_bits_are_the_masks_that_were_packed(count: int, side: int, part: int, draw: Any) -> None:
    masks = np.random.default_rng(draw.randrange(99)).random((count, side, side)) < 0.5
    bits = packed(side, (masks[i : i + part] for i in range(0, count, part)))
    rows = [draw.randrange(count) for _ in range(4)]
    assert np.array_equal(bits.at(rows), masks[rows]) and bits.at(rows).dtype == bool
    assert bits.at([]).shape == (0, side, side)
    assert os.path.getsize(bits.path) == count * -(-side * side // 8)


@pytest.mark.parametrize("method", ["random", "gradient"])
def test_a_run_on_a_stream_is_that_in_memory(tmp_path: Path, method: str) -> None:
    root = boxed(tmp_path / "images")
    how: dict[str, Any] = {"removed": 0.4, "removed_by": method, "epochs": 2, "batch_size": 8, "evaluate_on": "val"}
    run = Run.of(data=str(root), augment=("flip",), **how)
    held = execute(run, Store(tmp_path / "held"))
    streamed = execute(run.but(data_options=STREAMED), Store(tmp_path / "streamed"))
    assert result(held)[1:] == result(streamed)[1:]


@pytest.mark.slow
def test_other_processes_remove_them_too(both: tuple[ImageData, ImageStream]) -> None:
    held, stream = (remove_salient(data, None, "random", 0.3) for data in both)
    alike(held, replace(stream, workers=2))
    alike(held.subset([5, 1, 9, 1, 3, 3]), replace(stream, workers=1).subset([5, 1, 9, 1, 3, 3]))
