"""Features are those that a layer gave, whatever comes behind, and whichever way round it has its dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.attribution import attribute
from sdecor.config import Objective, Schedule
from sdecor.evaluation import measure
from sdecor.images import ImageData
from sdecor.models import channels_first, default_layers
from sdecor.objective import Step, capture, losses
from sdecor.saliency import frozen_eval
from sdecor.training import fit


class Net(nn.Module):
    """Two convolutions, the second with its features changed in place behind it, as one of four ways says."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.relu = nn.ReLU(inplace=way == "module")
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv2(self.conv1(x).tanh())
        if self.way == "function":
            z = F.relu(z, inplace=True)
        elif self.way == "method":
            z.relu_()
        else:
            z = self.relu(z)
        return self.head(z.mean((2, 3)))


def net(way: str = "plain") -> Net:
    torch.manual_seed(3)
    return Net(way)


def images(count: int = 12, size: int = 8) -> ImageData:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    return ImageData.from_tensors(pixels, torch.arange(count) % 4)


X, Y = images().normalized(), images().labels


@pytest.mark.parametrize("way", ["module", "function", "method"])
def test_what_works_in_place_behind_a_layer_changes_no_feature(way: str) -> None:
    plain, other = net(), net(way)
    objective = Objective("decorrelation", group_size=8, layers=("conv2",))
    expected, found = (losses(m, X, Y, objective) for m in (plain, other))
    assert torch.equal(found["decorrelation"], expected["decorrelation"])
    slopes = [
        torch.autograd.grad(terms["total"], list(m.parameters())) for terms, m in ((expected, plain), (found, other))
    ]
    torch.testing.assert_close(slopes[1], slopes[0])
    of = "correlation_conv2"
    assert measure(other, images(), layers=("conv2",))[0][of] == measure(plain, images(), layers=("conv2",))[0][of]
    for layer in ({"layer": "conv2"}, {}):
        if layer or way != "module":  # the module itself is the last that gives maps
            torch.testing.assert_close(
                attribute(other, X, Y, "gradcam", **layer), attribute(plain, X, Y, "gradcam", layer="conv2")
            )


class Turned(nn.Module):
    """Channels last from the first layer on; the second adds copies of one channel to nothing."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.last, self.first = Permute(0, 2, 3, 1), Permute(0, 3, 1, 2)
        self.mix, self.norm = nn.Linear(3, channels), nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.norm(self.mix(self.last(x)))).mean((2, 3)))


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def copies() -> Turned:
    """Every channel of the layer `mix` is the same."""
    torch.manual_seed(0)
    model = Turned()
    with torch.no_grad():
        model.mix.weight.copy_(model.mix.weight[:1].expand(32, -1).clone())
    return model


@pytest.mark.parametrize("method", ["decorrelation", "zca-in-training", "saliencydecor-zca"])
def test_copies_of_one_channel_are_correlated_wherever_the_channels_are(method: str) -> None:
    model, objective = copies(), Objective(method, layers=("mix",))
    if method == "decorrelation":
        assert losses(model, X, Y, objective)["decorrelation"].item() == pytest.approx(1, abs=1e-5)
        assert measure(model, images(), layers=("mix",))[0]["correlation_mix"] == pytest.approx(1, abs=1e-5)
        return
    # by hand: as a network with a convolution in its place
    other = nn.Sequential(conv := nn.Conv2d(3, 32, 1), Permute(0, 2, 3, 1), model.norm, model.first, Mean(), model.head)
    with torch.no_grad():
        conv.weight.copy_(model.mix.weight[:, :, None, None])
        conv.bias.copy_(model.mix.bias)
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    values = losses(model, X, Y, objective, generator=draw[0])
    expected = losses(other, X, Y, Objective(method, layers=("0",)), generator=draw[1])
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-5)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_gradcam_lights_the_corner_that_counts_with_channels_last() -> None:
    class Corner(Turned):
        def forward(self, x: Tensor) -> Tensor:
            z = self.mix(self.last(x))
            return torch.stack([z[:, 4:, :4].sum((1, 2, 3)), -z.sum((1, 2, 3))], 1)

    model = Corner()
    with torch.no_grad():
        model.mix.weight.fill_(1)
        model.mix.bias.zero_()
    x = torch.zeros(1, 3, 8, 8)
    x[:, :, 6, 1] = 1
    for option in ({"layer": "mix"}, {"layer": "last"}):
        cam = attribute(model, x, 0, "gradcam", **option)
        assert cam.flatten().argmax() == 6 * 8 + 1, option


@pytest.mark.parametrize(
    ("module", "shape", "image", "moved"),
    [
        (nn.Identity(), (2, 5, 8, 8), (8, 8), False),
        (nn.Identity(), (2, 8, 8, 5), (8, 8), True),
        (nn.Identity(), (2, 4, 6, 24), (8, 12), True),  # an image that is not square
        (nn.Identity(), (2, 24, 4, 6), (8, 12), False),
        (nn.Identity(), (2, 1, 1, 7), (8, 8), True),
        (nn.Identity(), (2, 7, 1, 1), (8, 8), False),
        (nn.Identity(), (2, 6, 6, 6), (8, 8), False),  # both fit: the usual order
        (nn.Linear(3, 6), (2, 6, 6, 6), (8, 8), True),
        (nn.LayerNorm(6), (2, 6, 6, 6), (8, 8), True),
        (nn.Conv2d(3, 6, 1), (2, 6, 6, 6), (8, 8), False),
        (nn.LayerNorm([16, 8, 8]), (2, 16, 8, 8), (8, 8), False),  # it is not over the channels alone
        (nn.GroupNorm(2, 8), (2, 8, 8, 4), (8, 8), False),
        (nn.ConvTranspose2d(3, 8, 1), (2, 8, 8, 4), (8, 8), False),
        (nn.Conv2d(3, 6, (1, 3)), (2, 6, 6, 4), (8, 8), False),  # two sides alike, by chance
        (nn.Identity(), (2, 5, 7, 9), (8, 8), False),
        (nn.Identity(), (2, 9, 5), (8, 8), False),
    ],
)
def test_the_order_of_dimensions(
    module: nn.Module, shape: tuple[int, ...], image: tuple[int, int], moved: bool
) -> None:
    z = torch.randn(shape)
    out = channels_first(z, module, torch.zeros(1, 3, *image))
    assert torch.equal(out, z.movedim(-1, 1) if moved else z)


def test_swin_as_torchvision_has_it() -> None:
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=4).eval()
    x = torch.randn(4, 3, 32, 32)
    with capture(model, ("features.3",)) as found, torch.no_grad():
        model(x)
    z = found["features.3"]
    assert z.shape == (4, 4, 4, 48)
    step = Step(model, x, torch.arange(4), layers=("features.3",), captured=found)
    with capture(model, ("features.3",)) as step.captured:
        assert torch.equal(step.features["features.3"], z.movedim(-1, 1))
    cam = attribute(model, x, 1, "gradcam", layer="features.3")
    with frozen_eval(model), capture(model, ("features.3",)):
        leaf = z.clone().requires_grad_()
        logits = model.head(model.flatten(model.avgpool(model.permute(model.norm(leaf)))))
        (slope,) = torch.autograd.grad(logits[:, 1].sum(), leaf)
    by_hand = (slope.mean((1, 2), keepdim=True) * z).sum(3).relu()
    torch.testing.assert_close(cam, F.interpolate(by_hand[:, None], (32, 32), mode="bilinear")[:, 0])


class Viewing(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = self.conv2(self.conv1(x).tanh())
        return self.head(z.view(len(x), 16, -1).mean(2))


@pytest.mark.parametrize("make", [Net, Viewing])
def test_training_leaves_the_layout_as_it_was_and_asks_for_none(make: type[Net]) -> None:
    torch.manual_seed(0)
    model = make()
    strides = [p.stride() for p in model.parameters()]
    before = model.conv1.weight.clone()
    fit(
        model,
        images(),
        Objective("saliencydecor-absolute", group_size=8, layers=("conv2",)),
        Schedule(epochs=2),
        progress=False,
    )
    assert [p.stride() for p in model.parameters()] == strides and not torch.equal(model.conv1.weight, before)
    assert measure(model, images(), layers=("conv2",))[0]["accuracy"] >= 0
    last = make().to(memory_format=torch.channels_last)
    if make is Net:
        strides = [p.stride() for p in last.parameters()]
        fit(last, images(), Objective("standard"), Schedule(epochs=1), progress=False)
        assert [p.stride() for p in last.parameters()] == strides


def test_the_layout_comes_back_after_an_interruption() -> None:
    model = net()
    strides = [p.stride() for p in model.parameters()]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, images(), Objective("standard"), Schedule(epochs=2), progress=False, after_epoch=stop)
    assert [p.stride() for p in model.parameters()] == strides


def test_buffers_have_their_layout_back_too() -> None:
    class Buffered(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filters", torch.randn(8, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.filters.sum()

    model = Buffered()
    fit(model, images(), Objective("standard"), Schedule(epochs=1), progress=False)
    assert model.filters.view(8, -1).shape == (8, 27)


def test_whatever_looks_contiguous_two_ways_has_its_layout_back() -> None:
    """A 1 x 1 convolution, one by depth, and one of grey images."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(512, 4))
    strides = [p.stride() for p in model.parameters()]
    fit(model, images(), Objective("standard"), Schedule(epochs=1), progress=False)
    assert [p.stride() for p in model.parameters()] == strides
    assert model[1](model[0](X)).view(len(X), -1).shape == (len(X), 512)
    with pytest.raises(ValueError, match="labels must lie in 0..1"):
        fit(other := nn.Sequential(*model[:3], nn.Linear(512, 2)), images(), Objective("standard"), progress=False)
    assert [p.stride() for p in other.parameters()][:4] == strides[:4]


def test_a_layout_that_only_training_cannot_take() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm1d(512), nn.Linear(512, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.head(self.norm(z.view(len(x), -1) if self.training else z.flatten(1)))

    torch.manual_seed(0)
    model = Viewed()
    fit(model, images(), Objective("standard"), Schedule(epochs=3, batch_size=4), progress=False)
    assert int(model.norm.num_batches_tracked) == 9  # the look for the layout has left no trace


def test_another_output_in_training_is_refused_before_any_work() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return (out, out) if self.training else out

    model = Two().eval()
    with pytest.raises(ValueError, match="it returned a tuple"):
        fit(model, images(), Objective("standard"), progress=False)
    assert not model.training


@pytest.mark.parametrize("shape", [(60, 100), (48, 40), (64, 72), (56, 64), (31, 97)])
def test_sides_that_a_stage_rounds_up(shape: tuple[int, int]) -> None:
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 24, [2, 2, 2], [2, 2, 2], [4, 4], num_classes=4).double().eval()
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    for name, channels in (("features.1", 24), ("features.3", 48), ("features.5", 96)):
        with torch.no_grad(), capture(model, (name,)) as found:
            model(x)
        assert found[name].shape[-1] == channels
        module = model.get_submodule(name)
        assert torch.equal(channels_first(found[name], module, x), found[name].movedim(-1, 1)), name
        first = found[name].movedim(-1, 1)
        assert channels_first(first, nn.Identity(), x) is first


def test_parametrized_layers_and_layers_with_parts_are_layers() -> None:
    from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

    class Active(nn.Conv2d):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    def model(conv: nn.Module) -> nn.Sequential:
        behind = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), conv, *behind)

    for of in (orthogonal, spectral_norm, weight_norm):
        for place in (2, 6, 8):
            net = model(nn.Conv2d(8, 16, 3))
            of(net[place])
            assert default_layers(net, X) == ("2", "6"), (of, place)
    assert default_layers(model(Active(8, 16, 3)), X) == ("2", "6")
    z, x = torch.randn(2, 5, 5, 5), torch.randn(2, 3, 10, 10)
    assert torch.equal(channels_first(z, spectral_norm(nn.Linear(5, 5)), x), z.movedim(-1, 1))
