"""Image classifiers, and the names of the layers whose features the method looks at.

A model is a callable that `model` enters: from the channels of the images, the number of logits K and the side of the
images in pixels to an ordinary `nn.Module` from images (B, C, H, W) to logits (B, K). The method changes none of them,
and no weights are fetched. Seed torch before `build` for a reproducible initialization.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sdecor._code import check_loaded, foreign, home
from sdecor.registers import MODELS, Between, OneOf, WrongType
from sdecor.saliency import checked_images, checked_model, frozen_eval, logits_of

model = MODELS.register
PLACES = ("before", "after")
_SMALLEST = {"lenet": 12, "cnn_bn": 8, "resnet18": 8, "vgg11_bn": 32}  # sides of images, in pixels


@model("lenet", label="LeNet", source="LeCun et al. 1998, doi:10.1109/5.726791")
class LeNet(nn.Module):
    """LeNet-5 with its widths rounded to multiples of eight, so that groups of 16 divide the features."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        side = (image_size // 2 - 4) // 2
        self.conv1, self.pool1, self.relu1 = nn.Conv2d(in_channels, 8, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()
        self.conv2, self.pool2, self.relu2 = nn.Conv2d(8, 16, 5), nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.relu3 = nn.Linear(16 * side * side, 128), nn.ReLU()
        self.fc2, self.relu4 = nn.Linear(128, 80), nn.ReLU()
        self.fc3 = nn.Linear(80, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        x = self.relu1(self.pool1(self.conv1(x)))  # the same as pooling last, on a quarter of the numbers
        x = self.relu2(self.pool2(self.conv2(x)))
        x = self.relu4(self.fc2(self.relu3(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits


@model(label="CNN with batch norm")
def cnn_bn(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Three convolutions and two linear layers, each but the last with a ReLU."""
    parts: dict[str, nn.Module] = {}
    for i, (before, width) in enumerate(pairwise((in_channels, 32, 64, 128)), start=1):
        parts[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=1, bias=False)
        parts[f"bn{i}"] = nn.BatchNorm2d(width)
        parts[f"relu{i}"] = nn.ReLU()
        parts[f"pool{i}"] = nn.MaxPool2d(2) if i < 3 else nn.AdaptiveAvgPool2d(1)
    parts |= {"flatten": nn.Flatten(), "fc1": nn.Linear(128, 128), "relu4": nn.ReLU()}
    return nn.Sequential(OrderedDict(parts, fc2=nn.Linear(128, num_classes)))


@model(label="small CNN with batch norm")
def cnn_small(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Four convolutions, the first three of stride 2, and two linear layers: a photograph's network for two cores."""
    parts: dict[str, nn.Module] = {}
    for i, (before, width) in enumerate(pairwise((in_channels, 32, 64, 128, 128)), start=1):
        parts[f"conv{i}"] = nn.Conv2d(before, width, 3, stride=2 if i < 4 else 1, padding=1, bias=False)
        parts[f"bn{i}"] = nn.BatchNorm2d(width)
        parts[f"relu{i}"] = nn.ReLU()
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc1": nn.Linear(128, 128), "relu5": nn.ReLU()}
    return nn.Sequential(OrderedDict(parts, fc2=nn.Linear(128, num_classes)))


@model(label="ResNet-18", source="He et al. 2016, arXiv:1512.03385")
def resnet18(
    in_channels: int, num_classes: int, image_size: int, *, width: Annotated[int, Between(1)] = 64
) -> nn.Module:
    """The one of torchvision, with `width` channels in the first stage; half of them are a quarter of the work.

    Up to 64 px the first convolution is 3 x 3 and no pooling follows: the ImageNet stem would leave a 32 px image with
    one position in the last block.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    class Scaled(ResNet):  # type: ignore[misc]
        def _make_layer(self, block: Any, planes: int, *args: Any, **how: Any) -> Any:
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *args, **how)

    net: nn.Module = Scaled(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    if width != 64:
        net.bn1, net.fc = nn.BatchNorm2d(width), nn.Linear(8 * width, num_classes)
    net.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    if image_size <= 64:
        net.conv1, net.maxpool = nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(net.get_parameter("conv1.weight"), mode="fan_out", nonlinearity="relu")
    return net


@model(label="VGG-11 with batch norm", source="Simonyan and Zisserman 2015, arXiv:1409.1556")
def vgg11_bn(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """The convolutions of torchvision, and a head of two linear layers after an average over all positions."""
    from torchvision.models.vgg import cfgs, make_layers  # vgg11_bn() would first make a head of 120 million weights

    features: nn.Sequential = make_layers(cfgs["A"], batch_norm=True)
    features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    for name, parameter in features.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    head = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, num_classes))
    parts = {"features": features, "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": head}
    return nn.Sequential(OrderedDict(parts))


@model(label="vision transformer", source="Dosovitskiy et al. 2021, arXiv:2010.11929")
def vit(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """The one of torchvision, with six layers of three heads, on 8 x 8 patches or as nearly as the image allows."""
    from torchvision.models import VisionTransformer

    divisors = [p for p in range(2, image_size + 1) if image_size % p == 0]
    patch = min(divisors, key=lambda p: abs(p - image_size / 8), default=1)
    if not 4 <= image_size // patch <= 16:
        raise ValueError(f"{image_size=} cannot be cut into 4 to 16 patches a side for vit; a multiple of 8 works")
    sizes = {"num_layers": 6, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768, "representation_size": 128}
    net: nn.Module = VisionTransformer(image_size, patch, **sizes, num_classes=num_classes)
    net.conv_proj = nn.Conv2d(in_channels, 192, patch, stride=patch)
    nn.init.trunc_normal_(net.get_parameter("conv_proj.weight"), std=(in_channels * patch * patch) ** -0.5)
    # torchvision starts the head at zero, where every input gradient, hence every saliency map, is zero
    nn.init.trunc_normal_(net.get_parameter("heads.head.weight"), std=0.02)
    return net


def build(name: str, in_channels: int, num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """A fresh classifier, by its name in `MODELS`, or ``package.module:factory`` for a callable of one's own.

    It is in train mode, on the CPU, and does nothing in place, since hooks and input gradients need the values that
    would be overwritten. ``sdecor list models NAME`` shows the `options`. What is unknown or impossible is a
    ValueError, and so is a network of one's own that does not give so many logits for one image; a factory that is not
    callable or returns something else than an `nn.Module` is a TypeError too.

    >>> import torch
    >>> net = build("lenet", in_channels=1, num_classes=10, image_size=28)
    >>> net(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    for argument, value in (("in_channels", in_channels), ("num_classes", num_classes), ("image_size", image_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be a positive whole number, got {value!r}")
    make, checked = (_factory(name), options) if ":" in name else (MODELS[name].function, MODELS[name].checked(options))
    if image_size < (smallest := _SMALLEST.get(name, 1)):
        raise ValueError(f"{image_size=} is too small for {name}, which needs at least {smallest}")
    if foreign(make):
        check_loaded(home(make))
    _check_parameters(name, make, checked)
    net = make(in_channels, num_classes, image_size, **checked)
    if not isinstance(net, nn.Module):
        raise WrongType(f"model {name!r} must return an nn.Module, it returned {type(net).__name__}")
    if foreign(make):
        _check_logits(name, net, torch.zeros(2, in_channels, image_size, image_size), num_classes)
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return net


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` was given, whose layers have the names that a user knows."""
    own: nn.Module = getattr(checked_model(model), "_orig_mod", model)
    return own


def _check_parameters(name: str, make: Callable[..., Any], options: dict[str, Any]) -> None:
    try:
        takes = inspect.signature(make)
    except ValueError:  # of something built in
        return
    try:
        takes.bind(1, 2, 3, **options)
    except TypeError as error:
        wanted = ", ".join(["in_channels", "num_classes", "image_size", *options])
        raise ValueError(f"model {name!r} must take ({wanted}), it takes {takes}: {error}") from None


def _check_logits(name: str, net: nn.Module, x: Tensor, classes: int) -> None:
    """One pass of two images, which shows whether a network of one's own fits, and fills its lazy layers."""
    try:
        with torch.no_grad(), frozen_eval(net):
            found = logits_of(net, x, finite=False).shape[1]
    except (RuntimeError, ValueError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model {name!r} does not do for images of shape {tuple(x.shape[1:])}: {problem}") from error
    if found != classes:
        raise ValueError(f"model {name!r} gives {found} logits for {classes} classes; it must use its num_classes")


def layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name in `named_modules()`; a ValueError that lists those that there are, if there is none.

    >>> layer(build("lenet", 1, 10, 28), "fc3").out_features
    10
    """
    modules: dict[str, nn.Module] = dict(uncompiled(model).named_modules())
    if not name or name not in modules:
        raise ValueError(f"unknown layer {name!r}; this model has: {', '.join(n for n in modules if n)}")
    return modules[name]


def default_layers(model: nn.Module, images: Tensor, *, place: str = "before") -> tuple[str, ...]:
    """Name the layers to decorrelate: the last convolution and the penultimate linear layer, in this order.

    Both are taken before normalization and nonlinearity, or with the `place` ``after`` behind these. The rule goes by
    the order in which modules act on `images` (B, C, H, W), of which one is enough, in evaluation mode, and works on
    any `nn.Module`; one that is defined and not used does not count. To find neither is a ValueError.

    - The head is the `nn.Linear` whose output the logits are, else the last one, else the last `nn.Conv2d`.
    - The convolution is the last `nn.Conv2d` before it; a patch embedding (kernel as large as the stride, larger than
      one) is none.
    - The linear layer is the `nn.Linear` before the head, if no convolution, attention or layer norm lies between
      them; otherwise the last 2-D pooling to one position after that convolution (`avgpool` of a residual network).
    - Gates and side heads that are used late may be taken for one of these: pass the layers by name then.
    - Behind the nonlinearity is the next activation beside the layer, if it acts once, else the block that the layer is
      in; a pooling stays.

    >>> import torch
    >>> default_layers(build("lenet", 1, 10, 28), torch.zeros(1, 1, 28, 28))
    ('conv2', 'fc2')
    """
    OneOf(PLACES).check("place", place)
    model = uncompiled(model)
    calls, body, conv = _body(model, images)
    linear = _last(body, nn.Linear)
    if linear < _last(body, nn.Conv2d | nn.MultiheadAttention | nn.LayerNorm):
        linear = _pool(body, conv)
    found = [i for i in (conv, linear) if i >= 0]
    if not found:
        known = ", ".join(name for name, _ in model.named_modules() if name)
        raise ValueError(f"no default layers found in {type(model).__name__}; pass layers=, some of: {known}")
    return tuple(calls[i][0] if place == "before" else _activated(model, calls, i) for i in found)


def averaged(model: nn.Module, images: Tensor) -> str:
    """Name of the pooling to one position that `default_layers` would find, empty if there is none."""
    calls, body, conv = _body(model, images)
    return calls[pool][0] if (pool := _pool(body, conv)) >= 0 else ""


def _body(model: nn.Module, images: Tensor) -> tuple[list[tuple[str, nn.Module]], list[nn.Module], int]:
    """Names and modules, call by call; the modules before the head; the place of the last convolution among them."""
    checked_images(images)
    calls, outputs, logits = _calls(model, images[:1])
    kinds = [module for _, module in calls]
    giving = [i for i, out in enumerate(outputs) if out is not None and torch.equal(out, logits)]
    head = _last(kinds, nn.Linear) if not giving else max(giving)
    body = kinds[: max(head if head >= 0 else _last(kinds, nn.Conv2d), 0)]
    return calls, body, _last(body, nn.Conv2d, lambda m: not 1 < m.kernel_size[0] == m.stride[0])


def _pool(body: Sequence[nn.Module], conv: int) -> int:
    pool = _last(body, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d, lambda m: m.output_size in (1, (1, 1)))
    return pool if pool > conv else -1


def _calls(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, nn.Module]], list[Tensor | None], Tensor]:
    """Names and modules without parts of their own (attention counts whole), call by call; what linear ones gave."""
    calls: list[tuple[str, nn.Module]] = []
    outputs: list[Tensor | None] = []

    def note(module: nn.Module, _i: Any, output: Any, name: str = "") -> None:
        calls.append((name, module))
        outputs.append(output.clone() if isinstance(module, nn.Linear) else None)

    kinds = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)  # with parts, if they are parametrized, say
    whole = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) or not [*m.children()]]
    handles = [m.register_forward_hook(partial(note, name=name)) for name, m in whole]
    try:
        with torch.no_grad(), frozen_eval(model):
            logits = logits_of(model, x, finite=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs, logits


def _activated(model: nn.Module, calls: Sequence[tuple[str, nn.Module]], place: int) -> str:
    """Name of the module that gives the features of a layer after their nonlinearity."""
    name, module = calls[place]
    if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return name
    block, times = name.rpartition(".")[0], Counter(other for other, _ in calls)
    for other, behind in calls[place + 1 :]:
        activation = type(behind).__module__ == nn.ReLU.__module__ and not isinstance(behind, nn.MultiheadAttention)
        if activation and other.rpartition(".")[0] == block and times[other] == 1:
            return other
    if not block:
        raise ValueError(f"no activation follows the layer '{name}' of {type(model).__name__}; pass layers=")
    return block


def _last(modules: Sequence[nn.Module], kind: Any, wanted: Callable[[Any], bool] = lambda module: True) -> int:
    return max((i for i, module in enumerate(modules) if isinstance(module, kind) and wanted(module)), default=-1)


_FIRST: tuple[type[nn.Module], ...] = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d, nn.PixelShuffle),
)


def channels_first(z: Tensor, module: nn.Module, images: Tensor) -> Tensor:
    """Features that a module gives for `images` (B, C, H, W), as (B, C, h, w) where it puts the channels last.

    A linear layer, and a layer norm over one dimension, act on the last; a convolution has its channels in the second,
    and so has what goes with convolutions. What other modules do is read from the shape: the one of (h, w) that has the
    proportions of the images, or if neither has, that has them up to a rounding of both sides. Where both have, the
    channels count as first; where a convolution strides unevenly, name the convolution itself. Features with another
    number of dimensions come back as they are.
    """
    if z.ndim != 4 or isinstance(module, _FIRST):
        return z
    kind = type_before_parametrizations(module)
    over_channels = kind is nn.LayerNorm and len(getattr(module, "normalized_shape", ())) == 1
    for fits in (_proportional, _nearly_proportional):
        first, last = (fits(z.shape[i : i + 2], images.shape[2:]) for i in (2, 1))
        if first or last:
            break
    return z.movedim(-1, 1) if kind is nn.Linear or over_channels or (last and not first) else z


def _proportional(sides: Sequence[int], of: Sequence[int]) -> bool:
    return sides[0] * of[1] == sides[1] * of[0]


def _nearly_proportional(sides: Sequence[int], of: Sequence[int]) -> bool:
    """Whether there is a factor that gives both sides, up to one."""
    pairs = [*zip(sides, of, strict=True)]
    return max(whole / (side + 1) for side, whole in pairs) < min(whole / max(side - 1, 1e-9) for side, whole in pairs)


def _factory(name: str) -> Callable[..., Any]:
    """The callable that ``package.module:factory`` names; a ValueError, or WrongType, if there is none."""
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"model {name!r} is not of the form package.module:factory")
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        if (module_name + ".").startswith(f"{error.name}."):
            problem = f"no module {module_name!r}; install it or put it on PYTHONPATH"
            raise ValueError(f"model {name!r}: {problem}") from None
        raise ValueError(f"model {name!r}: {module_name!r} imports {error.name!r}, which is not there") from error
    except SyntaxError as error:
        raise ValueError(f"model {name!r}: {error.filename}, line {error.lineno}: {error.msg}") from error
    if found is None:
        raise ValueError(f"model {name!r}: module {module_name!r} has no {attribute!r}")
    if isinstance(found, nn.Module):
        raise WrongType(f"model {name!r} must name what makes a network, it names a {type(found).__name__} itself")
    if not callable(found):
        raise WrongType(f"model {name!r} must name a callable, it names a {type(found).__name__}")
    return found  # type: ignore[no-any-return]
