"""What is said of one model, tables of attributions by measures, kept as they grow, and records measured anew."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from maps import close
from pictures import boxed
from torch import Tensor, nn

import sdecor.evaluation
from sdecor.__main__ import app
from sdecor.attribution import attribute
from sdecor.config import Objective, Run, Schedule
from sdecor.data import load
from sdecor.evaluation import (
    BINS,
    BYTES,
    CONTROLS,
    FRACTIONS,
    MOST,
    SAMPLES,
    exhibit,
    gradient_histogram,
    grid_pointing_game,
    measure,
    measure_again,
    tabulate,
)
from sdecor.experiment import execute
from sdecor.images import ImageData
from sdecor.measures import MEASURES, RECOMMENDED, Case, available, evaluate, needs, table
from sdecor.measures.localization import chance_level
from sdecor.measures.representation import effective_rank
from sdecor.measures.sanity import controls
from sdecor.models import build
from sdecor.objective import capture
from sdecor.prepare import data_of
from sdecor.registers import ATTRIBUTIONS
from sdecor.saliency import logits_and_gradient, pixel_score
from sdecor.store import Store
from sdecor.training import evaluate as accuracy_of
from sdecor.training import fit

OF_MAP = [name for name in MEASURES if set(needs(name)) <= {"mask"}]
ALL_BUT_SLOW = [name for name in MEASURES if name != "infidelity"]
RUN = Run.of(data="shapes", limit=96, epochs=1, batch_size=32, data_options={"samples": 60})
TWO = ("gradient", "gradcam")


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


def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return attribute(model, images, target, progress=False)


# --- one model --------------------------------------------------------------------------------------------------------


def test_means_are_those_of_the_cases(model: nn.Module, data: ImageData) -> None:
    metrics, curves = measure(model, data, metrics=MEASURES, seed=3)
    logits, gradient = logits_and_gradient(model, data.normalized())
    masks = (data.images > 0).any(1)
    case = Case(
        attribution=gradient,
        mask=masks,
        model=model,
        images=data.normalized(),
        target=logits.argmax(1),
        explain=explain,
        seed=3,
    )
    for name, values in evaluate(case).items():
        close(metrics.pop(name), values.nanmean(), 1e-4)
    assert metrics.pop("accuracy") == accuracy_of(model, data)["accuracy"]
    close(metrics.pop("object_area"), chance_level(masks).mean())
    with capture(model, ("conv2",)) as features:
        logits_and_gradient(model, data.normalized())
    close(metrics.pop("effective_rank_conv2"), effective_rank(features["conv2"].detach()), 1e-5)
    kinds = {name.rsplit("_", 1)[0] for name in metrics}
    assert kinds <= {"correlation", "effective_rank", "participation_ratio", "condition_number"}
    assert curves["gradient_histogram"] == pytest.approx((gradient_histogram(gradient) / 30 / 784).tolist(), abs=1e-6)
    assert len(curves["gradient_histogram"]) == BINS
    names = [f"masked_{fill}_{order}" for fill in ("uniform", "constant") for order in ("most", "random")]
    assert list(curves) == [*names, "gradient_histogram"]
    assert all(len(curves[name]) == len(FRACTIONS) for name in names)


def test_the_size_of_a_batch_does_not_matter(model: nn.Module, data: ImageData) -> None:
    (whole, curves), (parts, other) = (measure(model, data, metrics=ALL_BUT_SLOW, batch_size=n) for n in (500, 7))
    assert parts == pytest.approx(whole, rel=1e-3)
    assert set(whole) >= {"accuracy", *ALL_BUT_SLOW}
    assert other["gradient_histogram"] == pytest.approx(curves["gradient_histogram"], abs=1e-4)
    for name, curve in curves.items():
        assert other[name][0] == pytest.approx(curve[0], abs=1e-4)


def test_what_is_measured_unless_asked_otherwise(model: nn.Module, data: ImageData) -> None:
    thorough, _ = measure(model, data)
    brief, curves = measure(model, data, thorough=False)
    assert set(thorough) & set(MEASURES) == {*OF_MAP, *RECOMMENDED}
    assert set(brief) & set(MEASURES) == set(OF_MAP)
    assert list(curves) == ["gradient_histogram"]
    assert brief == {name: thorough[name] for name in brief}


def test_only_so_many_images_for_what_runs_the_model(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits", split="test").subset(12)
    monkeypatch.setattr("sdecor.evaluation.MOST", 5)
    few, whole = (measure(model, d, metrics=["deletion"])[0] for d in (data.subset(5), data))
    assert few["deletion"] == pytest.approx(whole["deletion"]) and few["gini"] != pytest.approx(whole["gini"])
    assert MOST == 1000


def test_without_masks_there_is_no_localization(model: nn.Module, data: ImageData) -> None:
    plain = ImageData.from_tensors(data.images, data.labels, classes=data.classes)
    metrics, _ = measure(model, plain, thorough=False)
    assert {n for n in OF_MAP if n in metrics} == {n for n in OF_MAP if MEASURES[n].family == "sharpness"}
    assert "object_area" not in metrics


def test_what_is_undefined_on_all_images_is_absent(data: ImageData) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(784, 10)

        def forward(self, x: Tensor) -> Any:
            return 0 * self.fc(x.flatten(1))

    metrics, curves = measure(Constant(), data, layers=("fc",), metrics=["area_between", "randomization"])
    assert set(metrics) & set(MEASURES) == {"area_between"}
    assert metrics["area_between"] == 0
    assert sum(curves["gradient_histogram"]) == 0


def test_unknown_metrics_and_broken_models(model: nn.Module, data: ImageData) -> None:
    for thorough in (True, False):
        with pytest.raises(ValueError) as error:
            measure(model, data, metrics=["magic"], thorough=thorough)
        assert str(error.value) == f"unknown measure 'magic'; known: {', '.join(MEASURES)}"
    broken = build("lenet", 1, 10, 28)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(ValueError) as error:
        measure(broken, data)
    wanted = "model must return logits (B, K) that are finite, it returned NaN or infinity for 30 of 30 images"
    assert str(error.value) == wanted


def test_modes_flags_and_random_state_stay(model: nn.Module, data: ImageData) -> None:
    model.train()
    state = torch.get_rng_state()
    first = measure(model, data, metrics=["area_between"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    torch.rand(3)
    assert measure(model, data, metrics=["area_between"]) == first
    model.eval()


# --- exhibits -------------------------------------------------------------------------------------------------------


def test_an_exhibit_shows_the_first_image_of_each_class(model: nn.Module, data: ImageData) -> None:
    shown = exhibit(model, data)
    first = {int(y): i for i, y in reversed(list(enumerate(data.labels.tolist())))}
    assert shown["index"].tolist() == [first[y] for y in sorted(first)]
    logits, gradient = logits_and_gradient(model, data.normalized(shown["index"]))
    score = pixel_score(gradient)
    close(shown["saliency"], score / score.amax((1, 2), keepdim=True), 1e-3)
    assert shown["saliency"].dtype == torch.float16 and shown["saliency"].amax((1, 2)).eq(1).all()
    assert torch.equal(shown["predicted"], logits.argmax(1)) and shown["index"].dtype == torch.int64
    assert exhibit(model, data, images=3)["index"].tolist() == shown["index"][:3].tolist()


def test_an_exhibit_is_small() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return 0 * x.flatten(1)[:, :10]

    pictures = torch.randint(256, (10, 1, 150, 150), dtype=torch.uint8)
    shown = exhibit(Constant(), ImageData.from_tensors(pictures, torch.arange(10).flip(0)))
    assert shown["index"].tolist() == [9, 8, 7]  # of 45 kB each
    assert shown["saliency"].nbytes <= BYTES and shown["saliency"].eq(0).all()  # a map of zeros stays one
    huge = ImageData.from_tensors(torch.zeros(1, 1, 300, 300), torch.zeros(1))
    assert len(exhibit(Constant(), huge)["index"]) == 1


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a run and a table of it; not to be changed."""
    store = Store(tmp_path_factory.mktemp("done"))
    execute(RUN, store)
    tabulate(RUN, store, TWO, images=8)
    return store


@pytest.fixture
def store(done: Store, tmp_path: Path) -> Store:
    shutil.copytree(done.root, tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is measured from here on, by the measures that take no time."""
    names: list[str] = []

    def noted(cases: dict[str, Case]) -> pd.DataFrame:
        names.extend(cases)
        cheap = ("sharpness", "localization")
        return table(cases, [n for c in cases.values() for n in available(c) if MEASURES[n].family in cheap])

    monkeypatch.setattr(sdecor.evaluation, "table", noted)
    return names


def path_of(store: Store) -> Path:
    return store.root / "tables" / "shapes" / f"{RUN.key}.csv"


def test_a_table_has_every_attribution_and_control_by_every_measure(done: Store) -> None:
    result = tabulate(RUN, done, TWO, images=8)
    assert list(result["attribution"].unique()) == [*CONTROLS, *TWO]
    for name, part in result.groupby("attribution"):
        without = {n for n in MEASURES if "explain" in needs(n)} if name == "ground truth" else set()
        assert list(part["metric"]) == [n for n in MEASURES if n not in without]
    assert (result["images"] == 8).all()
    values = result.set_index(["attribution", "metric"])
    assert (values.loc["ground truth"]["value"][["relevance_mass", "auroc", "pointing_game"]] == 1).all()
    assert values.loc["constant", "auroc"]["value"] == 0.5
    assert values.loc["edges", "randomization"]["value"] == values.loc["noise", "randomization"]["value"] == 1
    assert values.loc["constant", "randomization"]["undefined"] == 8  # a constant map has no ranks to compare


def test_its_values_are_those_of_the_measures(done: Store) -> None:
    data = load("shapes", split="test", samples=60).subset(8)
    x, model = data.normalized(), done.model(RUN)
    target = logits_and_gradient(model, x)[0].argmax(1)

    def gradcam(model: Any, images: Tensor, target: Tensor) -> Tensor:
        return attribute(model, images, target, "gradcam", progress=False)

    known: dict[str, Any] = {"mask": data.masks, "model": model, "images": x, "target": target, "samples": SAMPLES}
    case = Case(attribution=gradcam(model, x, target), explain=gradcam, **known)
    expected = table(
        {"gradcam": case, "ground truth": Case(attribution=controls(x, data.masks)["ground truth"], **known)}
    )
    result = tabulate(RUN, done, TWO, images=8)
    for name, part in expected.groupby("attribution"):
        mine = result[result["attribution"] == name].set_index("metric")
        assert mine["value"].to_dict() == pytest.approx(
            part.set_index("metric")["value"].to_dict(), rel=1e-4, abs=1e-6, nan_ok=True
        )
        assert mine["undefined"].to_dict() == part.set_index("metric")["undefined"].to_dict()


def test_a_second_call_computes_nothing(store: Store, seen: list[str]) -> None:
    shutil.rmtree(store.root / "weights")
    before = path_of(store).read_bytes()
    first = tabulate(RUN, store, TWO, images=8)
    assert seen == [] and path_of(store).read_bytes() == before
    some = tabulate(RUN, store, ["gradcam"], images=8)
    pd.testing.assert_frame_equal(some, first[first["attribution"] != "gradient"].reset_index(drop=True))
    assert [p.name for p in path_of(store).parent.iterdir()] == [f"{RUN.key}.csv"]


def test_the_published_tables_are_read_and_not_made_anew(root: Path, seen: list[str], tmp_path: Path) -> None:
    for kind in ("results", "tables"):
        shutil.copytree(root / "data" / kind, tmp_path / kind)
    store = Store(tmp_path)
    paths = sorted((store.root / "tables").rglob("*.csv"))
    for path in paths:
        images = int(pd.read_csv(path, comment="#")["images"].iloc[0])
        found = tabulate(next(r.run for r in store.records() if r.run.key == path.stem), store, images=images)
        assert set(found["attribution"]) == {*CONTROLS, *ATTRIBUTIONS}
    assert seen == [] and paths


def test_a_killed_call_goes_on_where_it_was(store: Store, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    path_of(store).unlink()
    whole = tabulate(RUN, store, TWO, images=8)
    content = path_of(store).read_bytes()
    path_of(store).unlink()
    seen.clear()
    write, left = sdecor.evaluation.replace_atomically, 3

    def deadly(path: Path, content: Callable[..., Any]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        write(path, content)

    monkeypatch.setattr(sdecor.evaluation, "replace_atomically", deadly)
    with pytest.raises(Killed):
        tabulate(RUN, store, TWO, images=8)
    assert seen == list(CONTROLS[:4])  # the fourth was lost
    seen.clear()
    left = 99
    result = tabulate(RUN, store, TWO, images=8)
    assert seen == [*CONTROLS[3:], *TWO]
    pd.testing.assert_frame_equal(result, whole)
    assert path_of(store).read_bytes() == content


def test_another_number_of_images_starts_over(store: Store, seen: list[str]) -> None:
    result = tabulate(RUN, store, ["gradient"], images=4)
    assert seen == [*CONTROLS, "gradient"] and (result["images"] == 4).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "No columns to parse from file"),
        (b"\xff\xfe\x00 no text", "'utf-8' codec can't decode byte 0xff"),
        (b"a,b\n1,2\n", "its columns are a, b"),
        (b"attribution,metric,value,undefined,images\ngradient,gini,0.5\n", "Cannot convert non-finite values"),
        (b"attribution,metric,value,undefined,images\ngradient,gini,much,0,8\n", "could not convert string to float"),
        (b"attribution,metric,value,undefined,images\n1,2,3,4,5\n1,2,3,4,5,6,7,8\n", "Error tokenizing data"),
    ],
    ids=["empty", "bytes", "columns", "cut", "words", "ragged"],
)
def test_an_unreadable_table_is_set_aside(
    store: Store, seen: list[str], caplog: pytest.LogCaptureFixture, content: bytes, said: str
) -> None:
    path = path_of(store)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "sdecor"):
        tabulate(RUN, store, [], images=2)
    [message] = caplog.messages
    assert message.startswith(f"table {path} is not readable (") and said in message
    assert message.endswith(f"); set aside as {path.name}.corrupt")
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == content
    assert seen == list(CONTROLS)


def test_images_without_masks(tmp_path: Path, seen: list[str]) -> None:
    from PIL import Image

    digits = load("digits", limit=40)
    for i, image in enumerate(digits.images[:, 0].numpy()):
        folder = tmp_path / "images" / ("test" if i % 4 == 0 else "train") / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    run, store = RUN.but(data=str(tmp_path / "images"), data_options=()), Store(tmp_path / "store")
    execute(run, store)
    result = tabulate(run, store, ["gradient"], images=4)
    assert seen == [*CONTROLS[1:], "gradient"]
    assert not {n for n, m in MEASURES.items() if m.family == "localization"} & set(result["metric"])
    seen.clear()
    pd.testing.assert_frame_equal(tabulate(run, store, ["gradient"], images=4), result)
    assert seen == []


@pytest.mark.slow
def test_a_stream_has_the_table_and_the_exhibit_of_memory(tmp_path: Path, seen: list[str]) -> None:
    run, store = Run.of(data=str(boxed(tmp_path / "images")), epochs=1, batch_size=8), Store(tmp_path)
    held, streamed = run, run.but(data_options={"memory_limit": 0, "workers": 0})
    for one in (held, streamed):
        execute(one, store)
    first, second = (tabulate(one, store, ["gradient", "gradcam"], images=6) for one in (held, streamed))
    pd.testing.assert_frame_equal(first, second)
    assert {n for n, m in MEASURES.items() if m.family == "localization"} & set(second["metric"])
    assert "ground truth" in set(second["attribution"])
    for name, part in store.exhibit(held).items():
        assert torch.equal(part, store.exhibit(streamed)[name]) and len(part) == 3


def test_what_tabulate_refuses(done: Store) -> None:
    with pytest.raises(ValueError) as error:
        tabulate(RUN, done, ["gradient", "magic"], images=8)
    assert str(error.value) == f"unknown attribution 'magic'; known: {', '.join(ATTRIBUTIONS)}"
    with pytest.raises(ValueError) as error:
        tabulate(RUN, done, [], images=99)
    assert str(error.value) == "images must be at most 60, the held-out ones of shapes, got 99"
    with pytest.raises(FileNotFoundError) as absent:
        tabulate(RUN.but(seed=9), done, [], images=8)
    assert str(absent.value).startswith("no weights of standard, seed 9: ")


# --- records measured again -----------------------------------------------------------------------------------------


@pytest.fixture
def old(store: Store) -> Iterator[Any]:
    """The record of `RUN` as an earlier version might have left it."""
    record = store.record(RUN)
    assert record is not None
    curves = {**{n: c for n, c in record.curves.items() if n.startswith("loss_")}, "gone": [1.0]}
    changed = replace(record, metrics={"object_mass": 0.5}, curves=curves)
    store.write(changed)
    yield record
    assert not list((store.root / "unfinished").iterdir())


def test_a_record_is_measured_again(store: Store, old: Any) -> None:
    new = measure_again(RUN, store)
    assert new == store.record(RUN)
    assert new.metrics == pytest.approx(old.metrics, rel=1e-5)  # the trained model had another layout in memory
    assert set(new.curves) == set(old.curves) and new.curves["loss_total"] == old.curves["loss_total"]
    assert (new.run, new.weights_sha256) == (old.run, old.weights_sha256)
    measured = new.environment.pop("measured")
    assert new.environment == old.environment
    assert {"device", "torch", "commit", "date"} <= set(measured)


def test_a_run_that_saw_other_images_is_measured_on_them(tmp_path: Path) -> None:
    run, store = RUN.but(removed=0.5, removed_by="random"), Store(tmp_path)
    record = execute(run, store)
    assert record is not None
    again = measure_again(run, store).metrics
    assert again == pytest.approx(record.metrics, rel=1e-5)
    model = store.model(run)
    assert measure(model, data_of(run, store, "test"), thorough=False)[0] == pytest.approx(again, rel=1e-6)
    assert measure(model, load("shapes", split="test", samples=60), thorough=False)[0]["gini"] != pytest.approx(
        again["gini"], rel=1e-3
    )


def test_without_weights_nothing_is_measured(store: Store) -> None:
    shutil.rmtree(store.root / "weights")
    before = store.record(RUN)
    with pytest.raises(FileNotFoundError, match=r"^no weights of standard, seed 0: "):
        measure_again(RUN, store)
    assert store.record(RUN) == before


def test_the_command(store: Store, old: Any) -> None:
    other = RUN.but(seed=1)
    store.write(replace(old, run=other))
    called = CliRunner().invoke(app, ["measure", "--store", str(store.root), "--data", "shapes"], prog_name="sdecor")
    assert (called.exit_code, called.stderr) == (0, "")
    assert called.stdout == (
        f"standard on shapes, seed 0: {RUN.key}\n1 runs measured, 1 without weights left as they were\n"
    )
    record = store.record(RUN)
    assert record is not None and record.metrics == pytest.approx(old.metrics, rel=1e-5)
    assert "measured" in record.environment and "gone" not in record.curves
    assert store.record(other) == replace(old, run=other)


def test_the_command_without_weights(tmp_path: Path) -> None:
    called = CliRunner().invoke(app, ["measure", "--store", str(tmp_path), "--data", "mnist"], prog_name="sdecor")
    assert (called.exit_code, called.stdout) == (2, "")
    assert called.stderr == f"error: no weights of mnist in {tmp_path}; name another folder with --store\n"


def test_curves_may_be_drawn_of_fewer_images(model, data) -> None:
    whole, few = (measure(model, data, metrics=(), curve_images=n)[1] for n in (None, 20))
    subset = measure(model, data.subset(20), metrics=())[1]
    assert few.keys() == whole.keys()
    assert few["gradient_histogram"] == whole["gradient_histogram"]
    for name in few.keys() - {"gradient_histogram"}:
        assert few[name] == subset[name]
        assert few[name] != whole[name]


class Even(nn.Module):
    """Every class is a multiple of the mean: the gradient is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.weight = nn.Parameter(torch.arange(1.0, 11.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x).flatten(1)[:, :1] * self.weight


class Matching(nn.Module):
    """Looks for class k where the image has grey value k / 10: the gradient lies on the picture of that class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        level = torch.arange(10).view(1, -1, 1, 1) / 10
        near = ((x[:, :1] - level).detach().abs() < 0.01).float()
        return self.pool(near * x[:, :1]).flatten(1)


def flat(count: int) -> ImageData:
    """Images of one grey value each, a tenth of their label, and with mean 0 and spread 1, so that x is that value."""
    labels = torch.arange(count) % 10
    images = (labels * 25.5).round().to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    return replace(ImageData.from_tensors(images, labels), mean=(0.0,), std=(1.0,))


def test_grid_pointing_game_of_known_maps() -> None:
    data = flat(80)
    close(grid_pointing_game(Matching(), data), torch.ones(20, dtype=torch.float64))
    close(grid_pointing_game(Even(), data, batch_size=7), torch.full((20,), 0.25, dtype=torch.float64))


def test_grid_pointing_game_is_played_where_networks_and_classes_allow_it() -> None:
    data = flat(40)
    metrics, _ = measure(Matching(), data, layers=("pool",), metrics=())
    assert metrics["grid_pointing_game"] == 1
    assert "grid_pointing_game" not in measure(Matching(), data, layers=("pool",), metrics=(), thorough=False)[0]
    three = replace(data.subset(torch.arange(40)[data.labels < 3]), classes=("a", "b", "c"))
    assert "grid_pointing_game" not in measure(Matching(), three, layers=("pool",), metrics=())[0]
