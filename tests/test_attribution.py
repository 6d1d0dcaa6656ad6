"""Attribution: bad input and options, superpixels, methods of ones own; what every method keeps: test_contracts."""

from __future__ import annotations

import doctest
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CHEAP, F64, images, linear, network
from torch import Tensor, nn

import sdecor.attribution
from sdecor.attribution import ATTRIBUTIONS, attribute, attribution, superpixels
from sdecor.saliency import logits_and_gradient


def test_docstrings() -> None:
    assert doctest.testmod(sdecor.attribution).failed == 0


def test_every_method_names_its_source_and_says_whole_sentences() -> None:
    for entry in ATTRIBUTIONS.values():
        assert entry.source.startswith(("arXiv:", "doi:"))
        assert entry.title[0].isupper()
        assert entry.about.endswith(".")


@pytest.mark.parametrize("method", ["gradient", "absolute", "input_x_gradient", "gradcam"])
def test_one_forward_pass_is_enough_for_what_needs_one_gradient(method: str) -> None:
    model, rows = network(), []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    attribute(model, images(3), method=method)
    assert rows == [3]


@pytest.mark.parametrize("method", ["smoothgrad", "rise", "kernel_shap", "shapley_sampling"])
def test_another_seed_draws_otherwise(method: str) -> None:
    model, x = network(), images(2)
    options = CHEAP[method] | ({"segments": 12, "samples": 60} if method == "kernel_shap" else {})
    first, other = (attribute(model, x, method=method, seed=s, **options) for s in (0, 1))
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 6, 6)},
            "x must be floating images (B, C, H, W), not empty; got torch.float32 of shape (2, 6, 6)",
        ),
        (
            {"x": torch.zeros(2, 2, 6, 6, dtype=torch.uint8)},
            "x must be floating images (B, C, H, W), not empty; got torch.uint8 of shape (2, 2, 6, 6)",
        ),
        (
            {"x": torch.zeros(0, 2, 6, 6)},
            "x must be floating images (B, C, H, W), not empty; got torch.float32 of shape (0, 2, 6, 6)",
        ),
        ({"x": torch.full((2, 2, 6, 6), math.nan)}, "x has NaN or infinity"),
        ({"target": torch.tensor([0, 3])}, "target must lie in 0 to 2, got 3"),
        ({"target": torch.tensor([-1, 0])}, "target must lie in 0 to 2, got -1"),
        (
            {"target": torch.tensor([0])},
            "target must be class indices, integers of shape (2,); got torch.int64 of shape (1,)",
        ),
        (
            {"target": torch.zeros(2)},
            "target must be class indices, integers of shape (2,); got torch.float32 of shape (2,)",
        ),
        (
            {"model": nn.Identity()},
            "model must return logits (B, K), it returned torch.float32 of shape (2, 2, 6, 6) for 2 images",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"model": linear().float(), "x": torch.randn(2, 2, 6, 6), "target": None} | change
    for method in ("gradient", "integrated_gradients", "guided_ig"):
        with pytest.raises(ValueError) as error:
            attribute(**call, method=method)
        slow = method == "integrated_gradients"  # one image at a time
        assert str(error.value) == (
            message.replace("shape (2, 2", "shape (1, 2").replace("2 images", "1 images")
            if slow and "model" in change
            else message
        )
    with pytest.raises(ValueError) as error:
        logits_and_gradient(**call)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "magic"}, f"unknown attribution 'magic'; known: {', '.join(ATTRIBUTIONS)}"),
        ({"method": "gradient", "steps": 3}, "attribution 'gradient' has no option 'steps'; it has: none"),
        (
            {"method": "guided_ig", "samples": 3},
            "attribution 'guided_ig' has no option 'samples'; it has: steps, fraction, max_dist, baseline",
        ),
        ({"method": "gradient", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"method": "smoothgrad", "samples": 1}, "samples must be at least 2, got 1"),
        ({"method": "rise", "samples": 1}, "samples must be at least 2, got 1"),
        ({"method": "shapley_sampling", "samples": 1}, "samples must be at least 2, got 1"),
        ({"method": "smoothgrad", "samples": 2.5}, "samples must be of type int, got 2.5 (float)"),
        ({"method": "kernel_shap", "samples": True}, "samples must be of type int, got True (bool)"),
        ({"method": "smoothgrad", "noise": -0.1}, "noise must be finite and at least 0, got -0.1"),
        ({"method": "smoothgrad", "noise": math.nan}, "noise must be finite and at least 0, got nan"),
        ({"method": "integrated_gradients", "steps": 0}, "steps must be at least 1, got 0"),
        ({"method": "guided_ig", "fraction": 2}, "fraction must be from 0 to 1, got 2.0"),
        ({"method": "guided_ig", "max_dist": -1}, "max_dist must be from 0 to 1, got -1.0"),
        ({"method": "rise", "keep": 0}, "keep must be from 0.001 to 1, got 0.0"),
        ({"method": "rise", "grid": 0}, "grid must be at least 1, got 0"),
        ({"method": "gradcam", "layer": 3}, "layer must be of type str, got 3 (int)"),
        ({"method": "occlusion", "window": 0}, "window must be at least 1, got 0"),
        ({"method": "occlusion", "stride": 1.5}, "stride must be of type int, got 1.5 (float)"),
        ({"method": "occlusion", "window": 7}, "need 1 <= stride <= window <= 6, got window=7 and stride=3"),
        ({"method": "occlusion", "stride": 2}, "need 1 <= stride <= window <= 6, got window=1 and stride=2"),
        (
            {"method": "rise", "baseline": torch.zeros(4)},
            "baseline of shape (4,) cannot be broadcast to x, (2, 2, 6, 6)",
        ),
        ({"method": "rise", "baseline": math.inf}, "baseline has NaN or infinity"),
        ({"method": "rise", "baseline": None}, "baseline must be of type float or Tensor, got None (NoneType)"),
        ({"method": "deeplift", "baseline": True}, "baseline must be of type float or Tensor, got True (bool)"),
        ({"method": "occlusion", "baseline": {}}, "baseline must be a number or a tensor, got dict"),
        ({"method": "guided_ig", "baseline": ["grey"]}, "baseline must be a number or a tensor, got list"),
        ({"method": "rise", "baseline": "grey"}, "baseline must be of type float or Tensor, got 'grey' (str)"),
        ({"method": "kernel_shap", "segments": None}, "segments must be of type int or Tensor, got None (NoneType)"),
        ({"method": "kernel_shap", "segments": [[0], [0, 1]]}, "segments must be a number or a tensor, got list"),
        ({"method": "feature_ablation", "segments": 1}, "segments must be at least 2, got 1"),
        ({"method": "feature_ablation", "segments": 2.5}, "segments must be of type int or Tensor, got 2.5 (float)"),
        (
            {"method": "feature_ablation", "segments": [1, 2]},
            "segments must be integer labels of shape (2, 6, 6); got torch.int64 of shape (2,)",
        ),
        (
            {"method": "kernel_shap", "segments": torch.zeros(2, 6, 5, dtype=torch.int64)},
            "segments must be integer labels of shape (2, 6, 6); got torch.int64 of shape (2, 6, 5)",
        ),
        (
            {"method": "feature_ablation", "segments": torch.zeros(2, 6, 6, dtype=torch.int64)},
            "segments must have at least two regions in each image",
        ),
    ],
)
def test_bad_options(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        attribute(linear().float(), torch.randn(2, 2, 6, 6), **call)
    assert str(error.value) == message


@given(st.integers(1, 4), st.integers(6, 20), st.integers(6, 20), st.integers(2, 40))
@settings(max_examples=15, deadline=None)
def test_superpixels_are_labels_without_gaps(channels: int, height: int, width: int, segments: int) -> None:
    x = torch.randn(2, channels, height, width)
    labels = superpixels(x, segments)
    assert labels.shape == (2, height, width)
    assert labels.dtype == torch.int64
    for one in labels:
        assert torch.equal(one.unique(), torch.arange(int(one.max()) + 1))
    assert torch.equal(superpixels(x.flip(0) * 3 - 1, segments), labels.flip(0))  # units do not matter


def test_superpixels_follow_the_object() -> None:
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    disc = ((row - 15) ** 2 + (column - 17) ** 2 < 81).float()
    for channels in (1, 3):
        labels = superpixels(disc.expand(1, channels, 32, 32))[0]
        assert 30 < int(labels.max()) < 80
        share = torch.stack([disc[labels == k].mean() for k in range(int(labels.max()) + 1)])
        mixed = torch.minimum(share, 1 - share)[labels]
        squares = F.interpolate(F.avg_pool2d(disc[None, None], 4), (32, 32))[0, 0]
        assert mixed.mean() < 0.6 * torch.minimum(squares, 1 - squares).mean()


def test_a_compiled_model_and_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = network(), images(2)
    plain = attribute(model, x, method="deeplift")
    compiled = nn.Module()  # as torch.compile makes it, with hooks that the modules inside do not see
    compiled._orig_mod = model
    assert torch.equal(attribute(compiled, x, method="deeplift"), plain)
    attribute(model, x, method="guided_ig", steps=1)
    assert capsys.readouterr().err == ""  # not a terminal
    attribute(model, x, method="guided_ig", steps=1, progress=True)
    assert "Guided integrated gradients:" in capsys.readouterr().err


@pytest.mark.parametrize("slow", [False, True])
def test_a_method_of_ones_own(slow: bool) -> None:
    sizes = []

    @attribution("mine", slow=slow, predicts=False)
    def mine(model: nn.Module, x: Tensor, y: Tensor, rows: int, *, power: float = 1.0, mask: Any = None) -> Tensor:
        sizes.append(len(x))
        return (x * y[:, None, None, None] * (1 if mask is None else mask)) ** power

    try:
        model, x = network(), images(3)
        y = model.eval()(x).argmax(1)
        expected = x * y[:, None, None, None]
        assert torch.equal(attribute(model, x, method="mine"), expected)
        assert sizes == ([1, 1, 1] if slow else [3])
        mask = torch.rand(3, 1, 16, 16)  # a tensor has a row for each image
        torch.testing.assert_close(
            attribute(model, x, method="mine", power=2, mask=mask, batch_size=2), (expected * mask) ** 2
        )
        with pytest.raises(ValueError, match="attribution 'mine' has no option 'samples'; it has: power, mask"):
            attribute(model, x, method="mine", samples=3)
    finally:
        del ATTRIBUTIONS["mine"]


@pytest.mark.parametrize(
    ("per_channel", "message"),
    [
        (True, "(B, C, H, W), or say per_channel=False; it gave (2, 16) for images (2, 3, 16, 16)"),
        (False, "(B, H, W); it gave (2, 16) for images (2, 3, 16, 16)"),
    ],
)
def test_a_method_whose_result_has_another_shape(per_channel: bool, message: str) -> None:
    attribution("flat", per_channel=per_channel)(lambda model, x, y, rows: x[:, 0, 0])
    try:
        with pytest.raises(ValueError) as error:
            attribute(network(), images(2), method="flat")
        assert str(error.value) == f"attribution 'flat' must give {message}"
    finally:
        del ATTRIBUTIONS["flat"]


@pytest.mark.parametrize("given", [0.1, np.float64(0.1), np.full((2, 6, 6), 0.1), torch.tensor(0.1, dtype=F64), [0.1]])
def test_a_baseline_arrives_as_precise_as_the_images_are(given: Any) -> None:
    model, x, seen = linear(), images(2, 2, 6), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    attribute(model, x, method="shapley_sampling", segments=(x[:, 0] > 0).long(), samples=2, baseline=given)
    assert (seen[1][0] == 0.1).all()  # to the last bit, of float64


def test_a_baseline_of_whole_numbers() -> None:
    model, x = linear(), images(2, 2, 6)
    whole, fraction = (attribute(model, x, method="deeplift", baseline=b) for b in (torch.tensor(1), 1.0))
    assert torch.equal(whole, fraction)


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def waves(x: Tensor) -> nn.Module:
    """A network in which no two pixels act independently."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 40), Wave(), nn.Linear(40, 3)).to(x)
    with torch.no_grad():
        model[1].weight.mul_(6)
    return model


STRIPES = (torch.arange(100) // 4).view(1, 10, 10)


@pytest.mark.parametrize(
    ("method", "few", "many", "said"),
    [
        ("smoothgrad", {"samples": 20}, {"samples": 4000, "noise": 0.05}, "noise is expected"),
        ("rise", {"samples": 20}, {"samples": 40000, "grid": 2}, "noise is expected"),
        ("shapley_sampling", {"samples": 2}, {"samples": 400}, "noise is expected"),
        ("kernel_shap", {"samples": 100}, {"samples": 8000}, "noise is expected"),
        ("integrated_gradients", {"steps": 1}, {"steps": 300}, "the sum is more than a tenth off the change"),
    ],
)
def test_a_rough_map_is_called_so_once(
    method: str, few: dict[str, Any], many: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = images(4, 1, 10, torch.float32)
    if "shap" in method:
        few, many = ({"segments": STRIPES.expand(4, -1, -1), **options} for options in (few, many))
    with caplog.at_level(logging.WARNING, "sdecor"):
        attribute(waves(x), x, method=method, **many)
        assert caplog.messages == []
        attribute(waves(x), x, method=method, **few)
    (message,) = caplog.messages
    assert message.startswith(f"{method}: {said}")
    assert " of 4 images, at most " in message
    assert message.endswith(f"more {'steps' if 'steps' in few else 'samples'} lower it")


@pytest.mark.parametrize("method", ["smoothgrad", "rise", "shapley_sampling", "kernel_shap"])
def test_the_noise_that_is_expected_is_that_between_seeds(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, shares = images(1, 1, 10, torch.float32), []
    options = {"samples": 150, **({"segments": STRIPES} if "shap" in method else {})}
    module = sdecor.attribution.gradients if method == "smoothgrad" else sdecor.attribution.perturbation
    monkeypatch.setattr(module, "noisy", lambda error, result: shares.append(float(error.norm() / result.norm())))
    maps = torch.cat([attribute(waves(x), x, method=method, seed=s, **options) for s in range(60)]).flatten(1)
    if method == "rise":
        maps = maps - maps.mean(1, keepdim=True)
    found = maps.std(0).norm() / maps.norm(dim=1).mean()
    assert float(found) == pytest.approx(sum(shares) / 60, rel=0.2)
