"""What is seen of a plan before its runs: that they can be trained, that claims can be told, and what they cost."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from plans import SHAPE, TINY, course, write
from stores import files

from sdecor import experiment, rehearsal
from sdecor.config import Run
from sdecor.rehearsal import Prices, check
from sdecor.store import Store


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"arms": {"standard": {}, "decorrelation": {"settings": {"layers": ["fc9"]}}}},
            "arm 'decorrelation': unknown layer 'fc9'; this model has: conv1, pool1, ",
        ),
        (
            {"arms": {"standard": {}, "decorrelation": {"try": {"group_size": [8, 5]}}}},
            "arm 'decorrelation': group_size=5 does not divide the 16 channels of layer 'conv2'; ",
        ),
        (
            {"shared": {**TINY["shared"], "model": "vit"}, "arms": {"standard": {}, "whitening-layer": {}}},
            "arm 'whitening-layer': whitening needs a convolution to go behind, and VisionTransformer has none",
        ),
        (
            {"shared": {**TINY["shared"], "model": "vit"}, "arms": {"standard": {}, "gradient-penalty": {}}},
            "arm 'gradient-penalty': it cannot be trained: derivative for aten::",
        ),
        ({"shared": {**TINY["shared"], "data": "imagenet10"}}, "ImageNet, 10 classes not found under "),
    ],
    ids=["layer", "group size", "no convolution", "no derivative", "no data"],
)  # fmt: skip
def test_what_only_networks_and_data_show(tmp_path: Path, tables: dict[str, Any], message: str) -> None:
    one = course(**{"doses": {}, **tables})
    threads = torch.get_num_threads()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check(one, Store(tmp_path), tmp_path)
    assert str(error.value).startswith(message)
    assert torch.get_num_threads() == threads
    assert files(Store(tmp_path)) == []


def test_what_final_runs_are_measured_on_is_looked_for_before_the_trials(tmp_path: Path) -> None:
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "val/a/1", "val/b/1"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), int(name[-1]) * 60).save(path)
    shared = {**TINY["shared"], "data": f"folder:{tmp_path / 'pets'}"}
    one = course(doses={}, shared={name: value for name, value in shared.items() if name != "data_options"})
    with pytest.raises(FileNotFoundError, match="no test split"):
        check(one, Store(tmp_path / "store"))


def test_a_check_ends_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tried = iter(range(100)), []
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(rehearsal, "_check_step", lambda run, shape: tried.append(run.method))
    check(course(doses={}), Store(tmp_path), until=1)
    assert tried == ["standard", "decorrelation"]
    check(course(doses={}), Store(tmp_path))
    assert tried[2:] == ["standard", "decorrelation", "noise"]


def test_claims_are_about_features_that_there_are(tmp_path: Path) -> None:
    claim = {"name": "a", "text": "b", "arm": "decorrelation", "against": "standard", "direction": "lower"}
    arms = {"standard": {}, "decorrelation": {"settings": {"layers": ["conv1", "fc1"]}}}
    for measure, known in (("correlation_fc1", True), ("correlation_fc3", False), ("effective_rank_", False)):
        one = course(arms=arms, doses={}, claims=[{**claim, "measure": measure, "smallest": 0.1}])
        if known:
            with pytest.raises(ValueError, match="^arm 'standard': unknown measure"):  # its own are the default ones
                check(one, Store(tmp_path))
        else:
            with pytest.raises(ValueError, match=f"unknown measure of claim 'a' '{measure}'; known: correlation_"):
                check(one, Store(tmp_path))
    check(course(), Store(tmp_path))


def test_claims_are_about_what_records_will_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = {"name": "a", "text": "b", "arm": "noise", "against": "standard", "direction": "lower", "smallest": 0.1}
    shapes = {"data": "shapes", "data_options": {"samples": 80}, "model": "cnn_small", "batch_size": 40}

    def checked(measure: str, **shared: Any) -> None:
        arms, claims = {"standard": {}, "noise": {}}, [{**claim, "measure": measure}]
        check(course(arms=arms, doses={}, claims=claims, shared=shared), Store(tmp_path))

    for measure in ("grid_pointing_game", "auroc"):
        checked(measure, **shapes)
    with pytest.raises(ValueError, match="game needs networks with an average over positions and 4 classes or more, "):
        checked("grid_pointing_game", **TINY["shared"])
    monkeypatch.setattr(rehearsal, "_shape", lambda *_: {**SHAPE, "images": 80, "masks": False})
    with pytest.raises(ValueError, match="claim 'a': auroc needs masks of objects, and 'digits' has none"):
        checked("auroc", **TINY["shared"])


# --- prices ---------------------------------------------------------------------------------------------------------


def test_prices_are_those_of_runs_of_the_same_size_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = Store(tmp_path), Run.of(data="digits", method="noise", epochs=4, evaluate_on="val")
    here: dict[str, Any] = {"device": "CPU (any)", "amp": False, "training_seconds": 8.0, "session_seconds": 11.0}
    prices = Prices(store, "cpu")
    monkeypatch.setattr(rehearsal, "_shape", None)  # so that nothing is tried
    others = [{"amp": True}, {"device": "NVIDIA H200"}, {"training_seconds": None}]
    for seed, other in enumerate(others):
        write(store, run.but(seed=seed), **{n: value for n, value in {**here, **other}.items() if value is not None})
    for size in ({"batch_size": 9}, {"limit": 9}, {"model": "vit"}):
        write(store, run.but(**size), **here)
    (tmp_path / "results/digits/0123.json").write_text("{")
    prices.update()
    with pytest.raises(TypeError):
        prices.seconds(run)
    write(store, run.but(seed=3), **{**here, "session_seconds": 1.0})  # in two sessions
    prices.update()
    assert prices.seconds(run) == pytest.approx(4 * 2.0 + 2.0)  # of the rest nothing is known
    for seed, trained in enumerate((8.0, 8.0, 800.0), start=4):  # a median cares little for one that stood still
        write(store, run.but(seed=seed), **{**here, "training_seconds": trained, "session_seconds": trained + 3})
    write(store, run.but(seed=7, epochs=2), **{**here, "training_seconds": 2.0, "session_seconds": 3.0})
    prices.update()
    assert prices.seconds(run) == pytest.approx(4 * 2.0 + 3.0)
    assert prices.seconds(run.but(epochs=10, lr=0.1, seed=9)) == pytest.approx(10 * 2.0 + 3.0)
    assert prices.seconds(run.but(evaluate_on="test")) == pytest.approx(4 * 2.0 + 6 * 2.0)
    write(store, run.but(evaluate_on="test"), **{**here, "session_seconds": 58.0})
    prices.update()
    assert prices.seconds(run.but(evaluate_on="test")) == pytest.approx(4 * 2.0 + 50.0)
    tuned = run.but(evaluate_on="test", tuning_epochs=5)
    assert prices.seconds(tuned) == pytest.approx(4 * 2.0 + (6 + 5) * 2.0)  # what one took without says nothing of it
    write(store, tuned, **{**here, "session_seconds": 99.0})
    prices.update()
    assert prices.seconds(tuned) == pytest.approx(4 * 2.0 + 91.0)
    store.checkpoint(run).parent.mkdir()
    monkeypatch.setattr(rehearsal, "epochs_done", lambda path: {store.checkpoint(run): 3}[path])
    store.checkpoint(run).touch()
    assert prices.seconds(run) == pytest.approx(1 * 2.0 + 3.0)  # the rest of it
    store.checkpoint(run).unlink()
    amp = Prices(store, "cpu", amp=True)
    amp.update()
    assert amp.seconds(run) == pytest.approx(4 * 2.0 + 3.0)


def test_without_records_a_few_steps_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images first; if all of a batch would be quick, two whole steps, so often that once is enough."""
    run = Run.of(data="digits", limit=100, batch_size=32, epochs=7, evaluate_on="val", lr=1e30)
    tried: list[Any] = []
    an_image = 0.01

    def fit(model: Any, data: Any, objective: Any, schedule: Any, **how: Any) -> Any:
        tried.append((len(data), schedule.batch_size, schedule.epochs, schedule.lr, how["device"], how["amp"]))
        return SimpleNamespace(seconds=[9 * an_image * len(data), an_image * len(data)])

    monkeypatch.setattr(rehearsal, "fit", fit)
    prices = Prices(Store(tmp_path), "cpu", amp=True)
    expected = (7 + 1) * 3 * 32 * an_image
    assert prices.seconds(run) == prices.seconds(run.but(seed=3, lr=0.1)) == pytest.approx(expected)
    assert tried == [(16, 16, 2, 1e-9, "cpu", True), (64, 32, 3, 1e-9, "cpu", True)]
    an_image = 0.1  # a whole batch would take its time, so that of the few is scaled
    assert prices.seconds(run.but(batch_size=512)) == pytest.approx((7 + 1) * 100 * an_image)
    assert [images for images, *_ in tried[2:]] == [16]

    def broken(*_: Any, **__: Any) -> None:
        raise FloatingPointError("loss became inf")

    monkeypatch.setattr(rehearsal, "fit", broken)
    assert prices.seconds(run.but(method="noise")) == 0.0  # so it is begun, and breaks down by itself


@pytest.mark.slow
def test_an_estimate_is_near_what_a_run_takes(tmp_path: Path) -> None:
    run = Run.of(data="digits", epochs=12, batch_size=64, evaluate_on="val", method="saliencydecor-absolute")
    threads, store = torch.get_num_threads(), Store(tmp_path)
    ratios = []
    for _ in range(3):  # as the machine has other work too
        expected = Prices(store, "cpu").seconds(run)
        started = time.perf_counter()
        experiment.execute(run, store, progress=False)
        ratios.append(expected / (time.perf_counter() - started))
        known = Prices(store, "cpu")
        known.update()
        assert 1 / 3 < known.seconds(run) / expected < 3 or len(ratios) < 3
        if 1 / 3 < ratios[-1] < 3:
            break
        (store.path("results", run, ".json")).unlink()
    assert 1 / 3 < ratios[-1] < 3, ratios
    assert torch.get_num_threads() == threads
