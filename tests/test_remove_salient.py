"""Images without their most salient pixels: the data of remove and retrain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdecor.attribution import attribute
from sdecor.config import Objective, Schedule
from sdecor.data import load
from sdecor.images import ImageData, ImageStream
from sdecor.models import build
from sdecor.prepare import remove_salient
from sdecor.saliency import pixel_score
from sdecor.training import fit


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


def test_a_stream_is_refused() -> None:
    stream = ImageStream((), torch.empty(0).long(), ("0",), (0.5,), (0.5,), image_size=8)
    with pytest.raises(ValueError) as error:
        remove_salient(stream, None, "random", 0.5)
    assert str(error.value) == "removed needs images in memory, and these are streamed; raise memory_limit"
