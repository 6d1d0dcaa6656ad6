"""The models: shapes, names, default layers, own modules, and what is said when something is wrong."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import nn

import sdecor.models
from sdecor import config
from sdecor.models import build, default_layers, layer
from sdecor.models import model as enter
from sdecor.registers import MODELS, Between

DEFAULT_LAYERS = {
    "lenet": {"conv2": (16, 12, 12), "fc2": (80,)},
    "cnn_bn": {"conv3": (128, 8, 8), "fc1": (128,)},
    "cnn_small": {"conv4": (128, 4, 4), "fc1": (128,)},
    "resnet18": {"layer4.1.conv2": (512, 4, 4), "avgpool": (512, 1, 1)},
    "vgg11_bn": {"features.25": (512, 2, 2), "classifier.0": (256,)},
    "vit": {"heads.pre_logits": (128,)},
}


def run(model: nn.Module, channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, tuple[int, ...]]]:
    """Logits, input gradient, and shapes of the default layers' features."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in default_layers(model, torch.zeros(1, channels, size, size)):
        layer(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:]))
        )
    x = torch.rand(2, channels, size, size, requires_grad=True)
    logits = model.eval()(x)
    return logits, torch.autograd.grad(logits[:, 0].sum(), x)[0], shapes


def test_the_register_holds_those_of_this_file() -> None:
    assert list(MODELS) == list(DEFAULT_LAYERS)
    assert all(entry.label and entry.function.__doc__ for entry in MODELS.values())


@pytest.mark.parametrize("name", DEFAULT_LAYERS)
def test_colour_images_of_32_pixels(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 3, 10, 32)
    assert model.training
    logits, gradient, shapes = run(model, 3, 32)
    assert logits.shape == (2, 10)
    assert shapes == DEFAULT_LAYERS[name]
    assert all(shape[0] % 16 == 0 for shape in shapes.values())
    assert logits.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("lenet", 1, 28), ("lenet", 1, 12), ("cnn_bn", 1, 8), ("vit", 1, 28), ("vit", 3, 64)]
)
def test_other_images(name: str, channels: int, size: int) -> None:
    logits, gradient, _ = run(build(name, channels, 7, size), channels, size)
    assert logits.shape == (2, 7)
    assert gradient.abs().max() > 0


def test_lenet_is_as_documented() -> None:
    model = build("lenet", 1, 10, 28)
    layers = "conv1 pool1 relu1 conv2 pool2 relu2 fc1 relu3 fc2 relu4 fc3"
    assert " ".join(name for name, _ in model.named_children()) == layers
    assert [k.removesuffix(".weight") for k in model.state_dict()][::2] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert sum(p.numel() for p in model.parameters()) == 208 + 3216 + 51328 + 10320 + 810
    x = torch.rand(1, 1, 28, 28)
    features = nn.Sequential(model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2))
    rest = nn.Sequential(nn.Flatten(), model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), model.fc3)
    assert torch.equal(model(x), rest(features(x)))


def test_resnet_has_the_imagenet_stem_only_for_larger_images() -> None:
    small, large = build("resnet18", 3, 10, 64), build("resnet18", 3, 10, 96)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.Identity)
    assert large.conv1.stride == (2, 2)
    assert isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize("size", [32, 96])
def test_the_usual_width_of_resnet_is_torchvisions_bit_for_bit(size: int) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(4)
    official = resnet18(num_classes=10).state_dict()
    torch.manual_seed(4)
    ours = build("resnet18", 3, 10, size).state_dict()
    assert list(ours) == list(official)
    assert all(torch.equal(ours[name], official[name]) for name in official if name != "conv1.weight")
    torch.manual_seed(4)
    again = build("resnet18", 3, 10, size, width=64).state_dict()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_half_the_width_of_resnet_is_a_quarter_of_its_weights() -> None:
    wide, narrow, thin = (build("resnet18", 3, 10, 32, width=width) for width in (64, 32, 1))
    assert list(wide.state_dict()) == list(narrow.state_dict())
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        inside = name not in ("conv1.weight", "fc.weight", "fc.bias") and a.ndim == 4
        assert a.numel() == b.numel() * (4 if inside else 1 if name == "fc.bias" else 2)
    assert run(narrow, 3, 32)[2] == {"layer4.1.conv2": (256, 4, 4), "avgpool": (256, 1, 1)}
    assert run(thin, 3, 32)[0].shape == (2, 10)
    scale = [
        m.weight.detach().std() * (m.out_channels * m.kernel_size[0] ** 2 / 2) ** 0.5
        for m in narrow.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert all(abs(float(s) - 1) < 0.1 for s in scale)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"width": 0}, "width must be at least 1, got 0"),
        ("resnet18", {"width": 1.5}, "width must be of type int, got 1.5 (float)"),
        ("resnet18", {"depth": 3}, "model 'resnet18' has no option 'depth'; it has: width"),
        ("lenet", {"width": 3}, "model 'lenet' has no option 'width'; it has: none"),
    ],
)
def test_bad_options_are_named_by_a_run_as_by_build(name: str, options: dict[str, object], message: str) -> None:
    for attempt in (lambda: build(name, 3, 10, 32, **options), lambda: config.Model(name, tuple(options.items()))):
        with pytest.raises(ValueError) as caught:
            attempt()
        assert str(caught.value) == message


@pytest.fixture
def entered() -> Iterator[None]:
    """What a test enters is taken out again."""
    before = set(MODELS)
    yield
    for name in set(MODELS) - before:
        del MODELS[name]


@pytest.mark.usefixtures("entered")
def test_a_class_of_ones_own_is_entered_with_options() -> None:
    @enter
    class Small(nn.Sequential):
        def __init__(self, channels: int, classes: int, size: int, *, hidden: Annotated[int, Between(1)] = 16) -> None:
            sizes = (channels * size**2, hidden, classes)
            super().__init__(nn.Flatten(), *mlp(*sizes))

    assert default_layers(build("Small", 1, 4, 8), torch.zeros(1, 1, 8, 8)) == ("1",)
    assert layer(build("Small", 1, 4, 8, hidden=5), "1").out_features == 5
    with pytest.raises(ValueError, match="^hidden must be at least 1, got 0$"):
        build("Small", 1, 4, 8, hidden=0)


def test_seed_decides_the_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build("cnn_bn", 3, 10, 32).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    assert not torch.equal(weights(3)[0], weights(4)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("lenett", 1, 10, 28),
            "unknown model 'lenett'; known: lenet, cnn_bn, cnn_small, resnet18, vgg11_bn, vit",
        ),
        (("lenet", 0, 10, 28), "in_channels must be a positive whole number, got 0"),
        (("lenet", 1, 10.0, 28), "num_classes must be a positive whole number, got 10.0"),
        (("lenet", 1, 10, -1), "image_size must be a positive whole number, got -1"),
        (("lenet", 1, 10, 8), "image_size=8 is too small for lenet, which needs at least 12"),
        (("cnn_bn", 1, 10, 4), "image_size=4 is too small for cnn_bn, which needs at least 8"),
        (("resnet18", 1, 10, 4), "image_size=4 is too small for resnet18, which needs at least 8"),
        (("vgg11_bn", 1, 10, 28), "image_size=28 is too small for vgg11_bn, which needs at least 32"),
        (("vit", 3, 10, 31), "image_size=31 cannot be cut into 4 to 16 patches a side for vit; a multiple of 8 works"),
        (("vit", 3, 10, 1), "image_size=1 cannot be cut into 4 to 16 patches a side for vit; a multiple of 8 works"),
        ((":factory", 1, 10, 28), "model ':factory' is not of the form package.module:factory"),
        (("os.path:", 1, 10, 28), "model 'os.path:' is not of the form package.module:factory"),
        (
            ("no_such.place:f", 1, 10, 28),
            "model 'no_such.place:f': no module 'no_such.place'; install it or put it on PYTHONPATH",
        ),
        (("os.path:nothing", 1, 10, 28), "model 'os.path:nothing': module 'os.path' has no 'nothing'"),
    ],
)
def test_bad_arguments(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(*arguments)
    assert str(caught.value) == message


def test_unknown_layer() -> None:
    model = build("lenet", 1, 10, 28)
    assert layer(model, "fc2") is model.fc2
    for name in ("conv9", ""):
        with pytest.raises(ValueError) as caught:
            layer(model, name)
        known = "conv1, pool1, relu1, conv2, pool2, relu2, fc1, relu3, fc2, relu4, fc3"
        assert str(caught.value) == f"unknown layer '{name}'; this model has: {known}"


def test_own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def small(in_channels, num_classes, image_size, hidden=16):\n"
        "    size = in_channels * image_size**2\n"
        "    relu = nn.ReLU(inplace=True)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), relu, nn.Linear(hidden, num_classes))\n"
        "def text(*arguments):\n"
        "    return 'a model'\n"
        "number = 3\n"
    )
    (tmp_path / "own_broken.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = build("own_models:small", 3, 5, 4)
    logits, _, shapes = run(model, 3, 4)
    assert logits.shape == (2, 5)
    assert shapes == {"1": (16,)}
    assert model[2].inplace is False
    assert layer(build("own_models:small", 3, 5, 4, hidden=8), "1").out_features == 8
    with pytest.raises(TypeError, match=r"^model 'own_models:text' must return an nn.Module, it returned str$"):
        build("own_models:text", 3, 5, 4)
    with pytest.raises(TypeError, match=r"^model 'own_models:number' must name a callable, it names a int$"):
        build("own_models:number", 3, 5, 4)
    with pytest.raises(ValueError, match="'own_broken' imports 'a_package_that_is_missing', which is not there$"):
        build("own_broken:small", 3, 5, 4)
    (tmp_path / "own_typo.py").write_text("def small(:\n")
    with pytest.raises(ValueError, match="^model 'own_typo:small': .*own_typo.py, line 1: invalid syntax$"):
        build("own_typo:small", 3, 5, 4)


class Attention(nn.Module):
    """A transformer's parts, in a usual order of definition."""

    def __init__(self, *head: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Sequential(*head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.block(self.patches(x).flatten(2).transpose(1, 2)))[:, 0])


class Disordered(nn.Module):
    """The head is defined first, a linear layer and a convolution are not used, and the side head comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused = nn.Linear(16, 4), nn.Linear(16, 16)
        self.relu2, self.hidden = nn.ReLU(), nn.Linear(8, 16)
        self.relu1, self.conv, self.spare = nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.side = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.relu2(self.hidden(self.relu1(self.conv(x)).mean((2, 3))))
        logits = self.head(features)
        self.beside = self.side(features)
        return logits


def mlp(*widths: int) -> list[nn.Module]:
    return [nn.Linear(a, b) for a, b in pairwise(widths)]


IMAGE = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 6), nn.Flatten(), *mlp(32, 16, 8, 4)), ("1", "4")),
        (nn.Sequential(nn.Flatten(), *mlp(192, 16, 4)), ("1",)),
        (nn.Sequential(nn.Conv2d(3, 16, 8), nn.Flatten(), nn.Linear(16, 4)), ("0",)),
        (nn.Sequential(nn.Conv2d(3, 16, 3), *POOL, nn.Linear(16, 4)), ("0", "1")),
        # a pooling to more than one position does not feed the head as it is
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)), ("0",)),
        # a linear layer before a convolution is a gate inside a block, and so is the pooling before it
        (nn.Sequential(nn.Linear(8, 8), nn.AdaptiveAvgPool2d(3), nn.Conv2d(3, 16, 3), *POOL[1:], *mlp(16, 4)), ("2",)),
        # no linear layer: the last convolution gives the logits
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 10, 1), *POOL), ("0",)),
        (Attention(*mlp(16, 32, 10)), ("head.0",)),
        (Disordered(), ("conv", "hidden")),
    ],
)
def test_default_layers_of_own_modules(model: nn.Module, expected: tuple[str, ...]) -> None:
    modes = [m.training for m in model.modules()]
    assert default_layers(model, IMAGE) == expected == default_layers(torch.compile(model), IMAGE)
    assert [m.training for m in model.modules()] == modes and not any(m._forward_hooks for m in model.modules())


def test_the_nonlinearity_behind_goes_by_what_acts_next() -> None:
    assert default_layers(Disordered(), IMAGE, place="after") == ("relu1", "relu2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet", ("relu2", "relu4")),
        ("cnn_bn", ("relu3", "relu4")),
        ("cnn_small", ("relu4", "relu5")),
        ("resnet18", ("layer4.1", "avgpool")),  # a block ends with its activation; what is averaged is behind it
        ("vgg11_bn", ("features.27", "classifier.1")),
        ("vit", ("heads.act",)),
    ],
)
def test_default_layers_behind_their_nonlinearity(name: str, expected: tuple[str, ...]) -> None:
    assert default_layers(build(name, 3, 10, 32), torch.zeros(1, 3, 32, 32), place="after") == expected


def test_a_place_that_is_unknown_or_not_there() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 16, 8), nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="^no activation follows the layer '0' of Sequential; pass layers=$"):
        default_layers(bare, IMAGE, place="after")
    with pytest.raises(ValueError, match="^unknown place 'behind'; known: before, after$"):
        default_layers(bare, IMAGE, place="behind")


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), Attention(*mlp(16, 10))])
def test_no_default_layers(model: nn.Module) -> None:
    with pytest.raises(ValueError) as caught:
        default_layers(model, IMAGE)
    kind, names = type(model).__name__, ", ".join(name for name, _ in model.named_modules() if name)
    assert str(caught.value) == f"no default layers found in {kind}; pass layers=, some of: {names}"


def test_import_leaves_torchvision_alone() -> None:
    code = "import sys, sdecor.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples() -> None:
    failed, tried = doctest.testmod(sdecor.models)
    assert failed == 0 < tried
