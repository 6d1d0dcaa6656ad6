"""What the experiment chapters report of one model, and the data of remove and retrain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from maps import close
from torch import Tensor, nn

from sdecor.data import ImageData, load
from sdecor.images import ImageStream
from sdecor.measures import chance_level, effective_rank
from sdecor.measures.registry import METRICS, RECOMMENDED, Case, evaluate
from sdecor.measures.suite import BINS, FRACTIONS, MOST, gradient_histogram, measure, object_masks, remove_salient
from sdecor.models import build
from sdecor.objective import Objective, capture
from sdecor.saliency import attribute, logits_and_gradient, pixel_score
from sdecor.training import Schedule, fit
from sdecor.training import evaluate as accuracy_of

OF_MAP = [name for name, metric in METRICS.items() if set(metric.needs) <= {"mask"}]
ALL_BUT_SLOW = [name for name in METRICS if name != "infidelity"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = build("lenet", 1, 10, 28)
    fit(model, load("digits"), Objective.of("standard"), Schedule(epochs=2, batch_size=64), seed=0, progress=False)
    return model


@pytest.fixture(scope="module")
def data() -> ImageData:
    data = load("digits", split="test").subset(30)
    assert isinstance(data, ImageData)
    return data


def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return attribute(model, images, target, progress=False)


# --- measure --------------------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_registry(model: nn.Module, data: ImageData) -> None:
    metrics, curves = measure(model, data, metrics=METRICS, seed=3)
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
    assert set(thorough) & set(METRICS) == {*OF_MAP, *RECOMMENDED}
    assert set(brief) & set(METRICS) == set(OF_MAP)
    assert list(curves) == ["gradient_histogram"]
    assert brief == {name: thorough[name] for name in brief}


def test_only_so_many_images_for_what_runs_the_model(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits", split="test").subset(12)
    monkeypatch.setattr("sdecor.measures.suite.MOST", 5)
    few, whole = (measure(model, d, metrics=["deletion"])[0] for d in (data.subset(5), data))
    assert few["deletion"] == pytest.approx(whole["deletion"]) and few["gini"] != pytest.approx(whole["gini"])
    assert MOST == 1000


def test_without_masks_there_is_no_localization(model: nn.Module, data: ImageData) -> None:
    plain = ImageData.from_tensors(data.images, data.labels, classes=data.classes)
    metrics, _ = measure(model, plain, thorough=False)
    assert {n for n in OF_MAP if n in metrics} == {n for n in OF_MAP if METRICS[n].family == "sharpness"}
    assert "object_area" not in metrics


def test_what_is_undefined_on_all_images_is_absent(data: ImageData) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(784, 10)

        def forward(self, x: Tensor) -> Any:
            return 0 * self.fc(x.flatten(1))

    metrics, curves = measure(Constant(), data, layers=("fc",), metrics=["area_between", "randomization"])
    assert set(metrics) & set(METRICS) == {"area_between"}
    assert metrics["area_between"] == 0
    assert sum(curves["gradient_histogram"]) == 0


def test_unknown_metrics_and_broken_models(model: nn.Module, data: ImageData) -> None:
    for thorough in (True, False):
        with pytest.raises(ValueError) as error:
            measure(model, data, metrics=["magic"], thorough=thorough)
        assert str(error.value) == f"unknown metric 'magic'; known: {', '.join(METRICS)}"
    broken = build("lenet", 1, 10, 28)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(ValueError) as error:
        measure(broken, data)
    assert str(error.value) == "attribution has NaN in 30 of 30 rows (the first is row 0)"


def test_modes_flags_and_random_state_stay(model: nn.Module, data: ImageData) -> None:
    model.train()
    state = torch.get_rng_state()
    first = measure(model, data, metrics=["area_between"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    torch.rand(3)
    assert measure(model, data, metrics=["area_between"]) == first
    model.eval()


def test_masks_of_objects(data: ImageData) -> None:
    shapes = load("shapes", samples=4)
    assert isinstance(shapes, ImageData) and object_masks(shapes) is shapes.masks
    digits = object_masks(data)
    assert digits is not None and torch.equal(digits, data.images[:, 0] > 0)
    assert object_masks(ImageData.from_tensors(data.images, data.labels)) is None


# --- remove and retrain ---------------------------------------------------------------------------------------------


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
    removed = object_masks(remove_salient(data, model, "gradient", 0.5))
    assert removed is not None and torch.equal(removed, data.images[:, 0] > 0)


def test_a_stream_is_refused() -> None:
    stream = ImageStream((), torch.empty(0).long(), ("0",), (0.5,), (0.5,), image_size=8)
    with pytest.raises(ValueError) as error:
        remove_salient(stream, None, "random", 0.5)
    assert str(error.value) == "removed needs images in memory, and these are streamed; raise memory_limit"
