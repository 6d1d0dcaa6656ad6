"""The images that a run trains on: permuted labels, and pixels removed by what another network found salient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stores import ONE, expected_files, files, result

import sdecor.experiment
from sdecor.attribution import attribute
from sdecor.config import Run
from sdecor.data import load
from sdecor.experiment import execute
from sdecor.images import permutation
from sdecor.prepare import data_of
from sdecor.saliency import pixel_score
from sdecor.store import Store
from sdecor.training import evaluate


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
