"""The baselines: slopes in closed form, attacked images within their bounds, features white on the way, new layers."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import Compiled, flags, linear
from stores import TINY
from test_objective import Smooth, batch, gradients, hooks, lenet, noise, same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from sdecor.baselines import (
    adversarial,
    attacked,
    gradient_penalty,
    whitened_classification,
    whitened_on_the_way,
    with_whitening,
)
from sdecor.config import Objective, Run
from sdecor.data import load
from sdecor.experiment import execute
from sdecor.images import ImageData
from sdecor.models import build, default_layers, layer
from sdecor.objective import Step, capture, layers_of, losses
from sdecor.registers import METHODS
from sdecor.saliency import logits_and_gradient
from sdecor.store import Store, network
from sdecor.training import fit
from sdecor.whitening import GroupWhitening, covariance, grouped

F64 = torch.float64
SHAPE = {"channels": 3, "num_classes": 4, "image_size": 16}
NORMS = nn.modules.batchnorm._BatchNorm


def data(count: int = 5, classes: int = 3, size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, size, size, dtype=F64), torch.arange(count) % classes


def normed() -> nn.Module:
    """A network with batch norm, in float64 and training mode."""
    torch.manual_seed(1)
    return build("cnn_bn", 2, 3, 8).double()


def made(method: str, name: str = "lenet", options: dict[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return network(Run.of(method=method, model=name, model_options=options or {}), SHAPE)


def directional(model: nn.Module, total: Any, slopes: list[Tensor], h: float = 1e-6) -> None:
    """The slopes are those of `total` in three directions, by central differences."""
    parameters = list(model.parameters())
    for _ in range(3):
        ways, values = [torch.randn_like(p) for p in parameters], []
        for step in (h, -2 * h):
            with torch.no_grad():
                for p, way in zip(parameters, ways, strict=True):
                    p.add_(way, alpha=step)
            values.append(float(total().detach()))
        with torch.no_grad():
            for p, way in zip(parameters, ways, strict=True):
                p.add_(way, alpha=h)
        found = sum(float((g * way).sum()) for g, way in zip(slopes, ways, strict=True))
        assert found == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-8)


# --- the gradient of the log-probability ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Smooth, normed, lambda: normed().eval()])
def test_the_gradient_of_the_log_probability_is_that_of_log_softmax(make: Any) -> None:
    model = make()
    x, y = data(size=4 if isinstance(model, Smooth) else 8)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_softmax(model(leaf), 1)[torch.arange(5), y].sum(), leaf)
    step = Step(model, x, y)
    torch.testing.assert_close(step.log_probability_gradient, expected, rtol=1e-9, atol=1e-12)
    assert (
        step.log_probability_gradient.requires_grad and step.log_probability_gradient is step.log_probability_gradient
    )
    torch.testing.assert_close(step.gradient.detach(), step.saliency)  # the other one is still that of the logit
    assert not torch.allclose(step.saliency, expected)


def test_the_penalty_of_a_linear_model_is_a_closed_form() -> None:
    """Of softmax(W x) the gradient is W' (e_y - p)."""
    model, (x, y) = linear(4), data()
    error = one_hot(y, 3) - model(x).softmax(1)
    expected = (error @ model[1].weight).square().sum(1).mean()
    value = gradient_penalty(Step(model, x, y))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for found, right in zip(gradients(model, value), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, right)


def test_the_penalty_has_the_units_of_nats_a_unit_of_the_images_squared() -> None:
    model, (x, y) = Smooth(), data()

    def penalty(forward: Any, images: Tensor) -> float:
        return float(gradient_penalty(Step(forward, images, y)).detach())

    value = penalty(model, x)
    assert penalty(lambda v: model(v / 3), 3 * x) == pytest.approx(value / 9, rel=1e-9)
    assert penalty(lambda v: model(v) + v.sum((1, 2, 3))[:, None], x) == pytest.approx(
        value, rel=1e-9
    )  # the same shares
    twice = torch.cat([x, x]), torch.cat([y, y])
    assert float(gradient_penalty(Step(model, *twice)).detach()) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("make", [Smooth, normed])
def test_the_gradient_of_the_penalised_total_equals_finite_differences(make: Any) -> None:
    model = make()
    x, y = data(size=4 if isinstance(model, Smooth) else 8)

    def total() -> Tensor:
        return losses(model, x, y, Objective("gradient-penalty", {"gradient_penalty": 2}))["total"]

    directional(model, total, gradients(model, total()))


# --- adversarial training -------------------------------------------------------------------------------------------


def two(count: int = 40) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model of two classes, whose slope has one sign everywhere; images, classes, and that sign."""
    model, (x, y) = linear(8, 2), data(count, 2, 8)
    weight = model[1].weight.detach()
    sign = (weight[y] - weight[1 - y]).sign().view_as(x)
    return model, x, y, sign


def test_attacked_images_stay_within_radius_and_within_the_range_of_their_channel() -> None:
    model, x, y, _ = two()
    x[:, 1] = 0.5 * x[:, 1] + 3  # another range
    for radius in (1e-3, 0.1, 50.0):
        there = attacked(Step(model, x, y, generator=noise()), radius)
        assert float((there - x).abs().max()) <= radius * (1 + 1e-9)
        for channel in range(2):
            low, high = x[:, channel].aminmax()
            assert low <= there[:, channel].min() and there[:, channel].max() <= high
    assert set(there.flatten(2)[:, 0].unique().tolist()) >= {float(x[:, 0].min()), float(x[:, 0].max())}
    x[:, 0] = 0.25
    moved = attacked(Step(model, x, y, generator=noise()), 0.1) != x
    assert not moved[:, 0].any() and moved[:, 1].float().mean() > 0.9


def test_every_value_moves_against_the_slope_and_five_in_eight_by_the_whole_radius() -> None:
    """A step of 1.25 radii from anywhere within ends at the edge, unless it starts in the last 3/8 of the way."""
    model, x, y, sign = two(200)
    radius = 0.1
    inside = (x - radius > x.amin((0, 2, 3), keepdim=True)) & (x + radius < x.amax((0, 2, 3), keepdim=True))
    assert inside.float().mean() > 0.9
    for up in (True, False):
        moved = (attacked(Step(model, x, y, generator=noise()), radius) - x)[inside & ((sign < 0) == up)] / radius
        against = moved if up else -moved
        assert against.min() > 0.25 - 1e-9 and against.max() < 1 + 1e-9
        saturated = (against > 1 - 1e-9).double().mean()
        assert float(saturated) == pytest.approx(5 / 8, abs=0.02)  # of 12 thousand: more than four standard errors
        assert float(against.mean()) == pytest.approx(55 / 64, abs=0.01)


def test_the_loss_of_a_linear_model_rises_on_each_image_by_what_the_slope_says() -> None:
    model, x, y, sign = two(200)
    slope = Step(model, x, y).log_probability_gradient.detach()
    assert torch.equal(slope.sign(), sign)
    for radius in (0.5, 1e-5):
        there = attacked(Step(model, x, y, generator=noise()), radius)
        rise = cross_entropy(model(there), y, reduction="none") - cross_entropy(model(x), y, reduction="none")
        assert rise.min() > 0
    assert float(rise.detach().sum() / radius / slope.abs().sum()) == pytest.approx(55 / 64, abs=0.01)
    term = adversarial(Step(model, x, y, generator=noise(), differentiable=False), radius=radius)
    torch.testing.assert_close(term - cross_entropy(model(x), y), rise.mean(), rtol=1e-6, atol=0)


def test_one_generator_one_attack() -> None:
    model, (x, y) = normed(), data(size=8)
    first, again, other = (attacked(Step(model, x, y, generator=noise(n)), 0.1) for n in (2, 2, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(7)
    free = attacked(Step(model, x, y), 0.1)
    torch.manual_seed(7)
    assert torch.equal(attacked(Step(model, x, y), 0.1), free)


def test_an_attack_leaves_model_images_and_features_as_they_are() -> None:
    model, (x, y) = normed(), data(size=8)
    model.get_parameter("conv1.weight").requires_grad_(False)
    before, names, modes = copy.deepcopy(model), default_layers(model, x), flags(model)
    images = x.clone()
    attacked(Step(model, x, y, generator=noise()), 0.1)
    assert same(list(model.state_dict().values()), list(before.state_dict().values()))
    with capture(model, names) as found:
        step = Step(model, x, y, layers=names, captured=found, generator=noise(), differentiable=False)
        term = adversarial(step)
        before(x)  # one clean pass
        expected = [before.get_submodule("bn1"), model.get_submodule("bn1")]
        assert torch.equal(*(m.running_var for m in expected))
        assert same(list(model.buffers()), list(before.buffers()))
        seen = step.features
    with torch.no_grad(), capture(before, names) as clean:
        before(x)
    assert all(torch.equal(seen[name], clean[name]) for name in names)
    assert flags(model) == modes and hooks(model) == 0 and all(m.track_running_stats for m in norms(model))
    assert torch.equal(x, images) and not x.requires_grad and all(p.grad is None for p in model.parameters())
    assert term.requires_grad


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, NORMS)]


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_is_finite_and_greater_than_0(radius: float) -> None:
    with pytest.raises(ValueError, match=f"^radius must be finite and greater than 0, got {radius}$"):
        Objective("adversarial", radius=radius)


# --- whitened on the way --------------------------------------------------------------------------------------------


@contextmanager
def reaching(model: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """What the layers of these names are given."""
    found: dict[str, Tensor] = {}
    handles = [
        layer(model, name).register_forward_pre_hook(lambda _m, given, name=name: found.__setitem__(name, given[0]))
        for name in names
    ]
    yield found
    for handle in handles:
        handle.remove()


def assert_white(features: Tensor, group: int, tolerance: float) -> None:
    mean, cov = covariance(grouped(features.detach(), group))
    assert mean.abs().max() < tolerance
    torch.testing.assert_close(cov, torch.eye(group, dtype=cov.dtype).expand_as(cov), rtol=0, atol=tolerance)


def loud(model: nn.Module) -> nn.Module:
    """The same network with features so large that the ridge of the whitening does not show."""
    with torch.no_grad():
        for name in ("conv.weight", "hidden.weight"):
            model.get_parameter(name).mul_(30)
    return model


def test_the_next_layers_get_white_features_and_nobody_later() -> None:
    model, (x, _) = loud(Smooth()), data(200)
    with reaching(model, "tanh1", "tanh2") as found:
        with whitened_on_the_way(model, ("conv", "hidden"), 2, x):
            model(x)
        for features in found.values():
            assert_white(features, 2, 1e-3)
        assert found["tanh1"].shape == (200, 4, 2, 2) and found["tanh1"].dtype == F64
        model(x)
        assert covariance(grouped(found["tanh1"], 2))[1].amax() > 5
        assert hooks(model) == 2
    assert hooks(model) == 0


def test_it_is_the_loss_of_the_network_with_whitening_layers() -> None:
    model, (x, y) = normed(), data(40, size=8)
    with capture(model, names := default_layers(model, x)) as found:
        step = Step(model, x, y, layers=names, captured=found, differentiable=False)
        value = whitened_classification(step, group_size=8)
        clean = step.features
    other = normed()
    for name in names:
        whitening = GroupWhitening(128, 8).double()
        setattr(other, name, nn.Sequential(OrderedDict(own=layer(other, name), white=whitening)))
    expected = cross_entropy(other(x), y)
    assert torch.equal(value, expected)
    assert same(gradients(model, value), gradients(other, expected))
    assert all(torch.equal(clean[name], one) for name, one in zip(names, of_plain(x, names), strict=True))


def of_plain(x: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    model = normed()
    with capture(model, names) as found:
        model(x)
    return [found[name] for name in names]


def test_half_precision_stays_half_precision() -> None:
    model, x = lenet().bfloat16(), batch()[0].bfloat16()
    with reaching(model, "relu4") as found, whitened_on_the_way(model, ("fc2",), 16, x):
        assert model(x).dtype == torch.bfloat16
    assert found["relu4"].dtype == torch.bfloat16 and found["relu4"].float().std() > 0.3


def test_its_gradient_reaches_the_layers_below_and_equals_finite_differences() -> None:
    model, (x, y) = loud(Smooth()), data(12)
    objective = Objective("zca-in-training", {"classification": 0}, group_size=2)

    def total() -> Tensor:
        return losses(model, x, y, objective)["total"]

    slopes = gradients(model, total())
    assert all(g.isfinite().all() for g in slopes)
    assert slopes[0].abs().max() > 1e-4  # of the first convolution, below both whitenings
    assert slopes[1].abs().max() < 1e-9  # its bias is taken away with the mean
    directional(model, total, slopes, 1e-7)


def test_fewer_samples_than_channels_give_a_finite_gradient() -> None:
    model, (x, y) = build("cnn_small", 2, 3, 16), (torch.randn(3, 2, 16, 16), torch.arange(3))
    terms = losses(model, x, y, Objective("zca-in-training", group_size=None))
    assert terms["whitened_classification"].isfinite()
    assert all(g.isfinite().all() for g in gradients(model, terms["total"]))


@pytest.mark.parametrize("method", ["zca-in-training", "adversarial"])
@pytest.mark.parametrize("weight", [1, 0])
def test_the_averages_are_those_of_one_clean_pass(method: str, weight: float) -> None:
    """Even if no other term asks for one."""
    model, plain, (x, y) = normed(), normed(), data(6, size=8)
    losses(model, x, y, Objective(method, {"classification": weight}))
    plain(x)
    assert same(list(model.buffers()), list(plain.buffers()))
    assert all(m.track_running_stats for m in norms(model))


def test_hooks_go_whatever_happens_and_errors_name_the_layer() -> None:
    model, (x, y) = lenet(), batch()
    said = "^group_size=12 does not divide the 16 channels of layer 'conv2'; use one of 1, 2, 4, 8, 16$"
    with pytest.raises(ValueError, match=said):
        losses(model, x, y, Objective("zca-in-training", group_size=12))
    with pytest.raises(ValueError, match="^unknown layer 'fc9'"), whitened_on_the_way(model, ("fc2", "fc9"), 16, x):
        pass
    with pytest.raises(RuntimeError, match="inside"), whitened_on_the_way(model, ("fc2",), 16, x):
        raise RuntimeError("inside")
    assert hooks(model) == 0


def test_a_compiled_model_is_whitened_too() -> None:
    model, (x, _) = lenet(), batch()
    with whitened_on_the_way(model, ("conv2",), 16, x):
        expected = model(x)
    with whitened_on_the_way(Compiled(model), ("conv2",), 16, x):
        assert torch.equal(Compiled(model)(x), expected)
    assert not torch.allclose(model(x), expected)


# --- the whitening layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "place", "kinds", "channels"),
    [
        ("resnet18", {"width": 8}, "avgpool", (GroupWhitening, nn.AdaptiveAvgPool2d), 64),
        ("cnn_small", {}, "pool", (GroupWhitening, nn.AdaptiveAvgPool2d), 128),
        ("cnn_bn", {}, "pool3", (GroupWhitening, nn.AdaptiveAvgPool2d), 128),
        ("vgg11_bn", {}, "avgpool", (GroupWhitening, nn.AdaptiveAvgPool2d), 512),
        ("lenet", {}, "conv2", (nn.Conv2d, GroupWhitening), 16),
    ],
)
def test_the_layer_stands_behind_the_last_block(
    name: str, options: dict[str, Any], place: str, kinds: tuple[type, ...], channels: int
) -> None:
    shape = {**SHAPE, "image_size": 32}
    model = network(Run.of(method="whitening-layer", model=name, model_options=options), shape)
    plain = network(Run.of(method="standard", model=name, model_options=options), shape)
    put = layer(model, place)
    assert isinstance(put, nn.Sequential) and tuple(map(type, put)) == kinds
    white = next(m for m in put if isinstance(m, GroupWhitening))
    assert white.running_mean.shape == (channels // 16, 1, 16)
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]  # it has no weights
    assert not any(isinstance(m, GroupWhitening) for m in plain.modules())
    seen: list[Tensor] = []
    white.register_forward_hook(lambda _m, given, out: seen.extend((given[0], out)))
    x = torch.randn(40, 3, 32, 32)
    assert model(x).shape == (40, 4)
    before, after = (covariance(grouped(features.detach().double(), 16))[1] for features in seen)
    ridge = torch.linalg.inv(before + 1e-5 * torch.eye(16))
    torch.testing.assert_close(after, before @ ridge, rtol=0, atol=1e-3)
    assert after.diagonal(dim1=1, dim2=2).mean() > 0.9


def test_whitening_needs_a_convolution_whose_channels_it_divides() -> None:
    with pytest.raises(
        ValueError, match="^whitening needs a convolution to go behind, and VisionTransformer has none$"
    ):
        with_whitening(build("vit", 3, 4, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="^group_size=16 does not divide the 8 channels of layer 'GroupWhitening'"):
        made("whitening-layer", "resnet18", {"width": 1})


def test_a_pooling_before_the_last_convolution_is_none_to_whiten_at() -> None:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(2, 16, 3), nn.Flatten(), nn.Linear(64, 3))
    assert list(map(type, with_whitening(gate, torch.zeros(1, 2, 8, 8))[1])) == [nn.Conv2d, GroupWhitening]
    assert gate(torch.randn(9, 2, 8, 8)).shape == (9, 3)


class Ordered(nn.Module):
    """A network whose parts are defined the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.pool, self.relu = nn.Linear(32, 4), nn.AdaptiveAvgPool2d(1), nn.ReLU()
        self.wide, self.conv = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(2, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.relu(torch.cat([self.wide(x), self.conv(x)], 1))).flatten(1))


def test_whitening_goes_where_the_last_block_ends_whatever_is_defined_when() -> None:
    model = with_whitening(Ordered(), torch.randn(1, 2, 8, 8))
    assert [name for name, m in model.named_modules() if isinstance(m, GroupWhitening)] == ["pool.0"]
    assert model(torch.randn(9, 2, 8, 8)).isfinite().all()  # of the 32 channels that come in, not the 16 of a part


@pytest.mark.parametrize("name", ["lenet", "cnn_small"])
def test_a_network_from_the_store_is_the_trained_one(name: str, tmp_path: Any) -> None:
    run = Run.of(method="whitening-layer", **{**TINY, "epochs": 1, "model": name})
    record = execute(run, Store(tmp_path))
    assert record is not None
    images = load("digits", limit=96)
    torch.manual_seed(run.seed)
    model = network(run, {**SHAPE, "channels": 1, "num_classes": 10, "image_size": images.image_size})
    fit(model, images, run.objective, run.schedule, seed=run.seed)
    again, x = Store(tmp_path).model(run), images.normalized(slice(0, 9))
    assert list(again.state_dict()) == list(model.state_dict())
    assert any("running_covariance" in key for key in again.state_dict())
    assert same(list(again.state_dict().values()), list(model.state_dict().values()))
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("name", ["lenet", "cnn_small"])
def test_an_image_is_explained_alone_in_evaluation_mode_only(name: str) -> None:
    model, x = made("whitening-layer", name).double(), torch.randn(24, 3, 16, 16, dtype=F64)
    for _ in range(3):
        model(x)
    whole, part = logits_and_gradient(model, x)[1], logits_and_gradient(model, x[:3])[1]
    torch.testing.assert_close(part, whole[:3], rtol=1e-9, atol=1e-15)
    y, few = torch.arange(24) % 4, slice(0, 20)
    tied = [Step(model, images, y[: len(images)]).saliency for images in (x, x[few])]  # in training mode it is not
    assert not torch.allclose(tied[1], tied[0][few], rtol=1e-2)


# --- after the nonlinearity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lenet", {}, ("relu2", "relu4")),
        ("cnn_small", {}, ("relu4", "relu5")),
        ("resnet18", {"width": 8}, ("layer4.1", "avgpool")),
    ],
)
def test_features_behind_the_nonlinearity_are_not_negative(
    name: str, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    model, objective = made("decorrelation-after", name, options), Objective("decorrelation-after")
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    names = layers_of(model, objective, x)
    assert names == expected
    with capture(model, (*names, *default_layers(model, x))) as found:
        terms = losses(model, x, y, objective, features=found, layers=names)
        assert all(found[name].min() == 0 or name == "avgpool" for name in names)
        assert all(found[name].min() >= 0 and found[name].max() > 0 for name in names)
        assert found[default_layers(model, x)[0]].min() < 0
    assert terms["decorrelation"] > 0
    assert not torch.equal(terms["decorrelation"], losses(model, x, y, Objective("decorrelation"))["decorrelation"])


# --- all of them ----------------------------------------------------------------------------------------------------


def test_standard_training_of_another_length_is_standard_training() -> None:
    one, other = METHODS["standard-long"], METHODS["standard"]
    assert (one.terms, one.settings, one.network) == (other.terms, other.settings, other.network)
    images, (model, plain) = few(), (made(method, "cnn_small") for method in ("standard-long", "standard"))
    run = Run.of(method="standard-long", epochs=2, batch_size=16)
    curves = fit(model, images, run.objective, run.schedule), fit(plain, images, Objective("standard"), run.schedule)
    assert curves[0].terms == curves[1].terms
    assert same(list(model.parameters()), list(plain.parameters()))


def few() -> ImageData:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (32, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return ImageData.from_tensors(pixels, torch.arange(32) % 4)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("name", "options"), [("resnet18", {"width": 8}), ("cnn_small", {})])
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_method(method: str, name: str, options: dict[str, Any], amp: bool) -> None:
    run = Run.of(method=method, model=name, model_options=options, epochs=1, batch_size=16)
    torch.manual_seed(0)
    model = network(run, SHAPE)
    before = copy.deepcopy(model)
    history = fit(model, few(), run.objective, run.schedule, amp=amp)
    assert list(history.terms) == [*METHODS[method].terms, "total"]
    assert all(math.isfinite(curve[0]) and curve[0] > 0 for curve in history.terms.values())
    assert history.terms["total"][0] == pytest.approx(
        sum(weight * history.terms[term][0] for term, weight in METHODS[method].terms.items()), rel=1e-5
    )
    assert all(v.isfinite().all() for v in model.state_dict().values())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {n for n, _ in model.named_parameters()}
    assert hooks(model) == 0 and all(p.grad is None for p in model.parameters())
