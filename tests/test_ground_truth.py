"""What knowing the object lets one ask: a network that looks at one half, by construction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sdecor.data import load
from sdecor.evaluation import measure
from sdecor.ground_truth import background_reliance, control_scores, localization_scores, object_scores, overlaps
from sdecor.images import ImageData
from sdecor.measures.boxes import THRESHOLDS
from sdecor.measures.sanity import controls
from sdecor.models import build


class Half(nn.Module):
    """Two classes by the brightness of the left or of the right half."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.part = slice(0, 4) if left else slice(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        bright = x[..., self.part].square().mean((1, 2, 3)) * x[..., self.part].mean((1, 2, 3)).sign()
        return torch.stack([-bright, bright], 1)


def halves(count: int = 40) -> ImageData:
    """Bright and dark images of class 1 and 0; the object is the left half."""
    labels = torch.arange(count) % 2
    images = torch.full((count, 1, 8, 8), 60, dtype=torch.uint8)
    images[labels == 1] = 200
    masks = torch.zeros(count, 8, 8, dtype=torch.bool)
    masks[:, :, :4] = True
    return ImageData.from_tensors(images, labels, masks=masks)


def test_reliance_on_object_or_background() -> None:
    on, off = (background_reliance(Half(left), halves()) for left in (True, False))
    assert on["object_only_accuracy"] == off["background_only_accuracy"] == 1
    assert on["background_only_accuracy"] == off["object_only_accuracy"] == 0.5  # all are of one class
    assert on["object_only_relevance_mass"] == 1 and off["background_only_relevance_mass"] == 0
    assert set(on) == {
        f"{n}_only_{m}" for n in ("object", "background") for m in ("accuracy", "gini", "relevance_mass")
    }
    assert background_reliance(Half(True), halves(), batch_size=7) == pytest.approx(on, nan_ok=True)
    with pytest.raises(ValueError, match="^the images of custom have no masks of objects$"):
        background_reliance(Half(True), ImageData.from_tensors(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])))


def test_boxes_of_a_network_and_of_controls() -> None:
    data = halves()
    found = object_scores(Half(True), data, data.subset(10))
    assert found["box_accuracy"] == found["max_box_accuracy"] == 1 and found["box_overlap"] > 0.75
    assert object_scores(Half(False), data, data.subset(10))["max_box_accuracy"] == 0
    constant = localization_scores(lambda x: controls(x)["constant"], data, data.subset(10))
    assert {name: values.mean() for name, values in constant.items()} == {
        **{name: 0.5 for name in ("relevance_mass", "pointing_game", "auroc", "box_overlap")},
        "box_accuracy": 1,  # half the image: just at the limit
        "max_box_accuracy": 1,
    }
    assert all(values.shape == (40,) for values in constant.values())
    known = control_scores(data, data.subset(10))
    assert known.keys() == controls(torch.rand(1, 1, 8, 8)).keys()
    assert {name: values.tolist() for name, values in known["constant"].items()} == {
        name: values.tolist() for name, values in constant.items()
    }
    spot = localization_scores(lambda x: controls(x)["centre spot"], data, data.subset(10))
    assert known["centre spot"]["relevance_mass"].tolist() == spot["relevance_mass"].tolist()
    assert overlaps(lambda x: controls(x)["noise"], data, batch_size=9).shape == (40, len(THRESHOLDS))


def test_images_whose_object_is_not_known_are_left_out() -> None:
    data = halves()
    few = torch.zeros_like(data.masks)
    few[:6] = data.masks[:6]
    some = replace(data, masks=few)
    assert len(some.with_objects) == 6
    for left in (True, False):
        found = background_reliance(Half(left), some)
        assert found == pytest.approx(background_reliance(Half(left), data.subset(range(6))), nan_ok=True)
    none = background_reliance(Half(True), replace(data, masks=torch.zeros_like(few)))
    assert all(math.isnan(value) for value in none.values())


def test_without_a_training_image_with_an_object_no_threshold_is_chosen(caplog: pytest.LogCaptureFixture) -> None:
    data = halves()
    bare = replace(data, masks=None)
    for train in (bare, data.subset([]), replace(data, masks=torch.zeros_like(data.masks))):
        found = object_scores(Half(True), data, train)
        assert all(math.isnan(found[name]) for name in ("box_accuracy", "box_overlap", "box_threshold"))
        assert found["max_box_accuracy"] == 1
    assert "no training image of custom has a known object to choose a threshold on: no box_accuracy" in caplog.text
    metrics, _ = measure(build("cnn_small", 1, 2, 8), data, train=bare)
    assert "box_accuracy" not in metrics and "max_box_accuracy" in metrics


def test_a_run_is_measured_with_them() -> None:
    data, train = load("shapes", split="test", limit=30), load("shapes", limit=20)
    model = build("lenet", 3, 8, 32)
    with_them, _ = measure(model, data, metrics=(), train=train)
    without, _ = measure(model, data, metrics=())
    extra = set(with_them) - set(without)
    assert extra == set(object_scores(model, data, train)) and len(extra) == 10
    assert {name: with_them[name] for name in without} == without
    assert set(measure(model, data, thorough=False, train=train)[0]) & extra == set()
