"""Whether an explanation looks at the network at all.

Three checks: it should change when the weights are drawn anew (`parameter_randomization`); it should change when the
network was trained on permuted labels, for which train a second network so and take `spearman` of the maps of both;
and it should beat `controls`, which never look at a network. `explain_with` is a function of a model, images
(B, C, H, W) and target (B,) that gives maps (B, H, W). Models and torch's random state are left as they were. Unknown
names, and shapes and masks that do not fit, raise ValueError.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.measures._checks import binary, require_images
from sdecor.measures.case import Explanation, measure
from sdecor.measures.robustness import spearman
from sdecor.registers import Between, OneOf

RANDOMIZATIONS = ("cascading", "independent")


def randomized(model: nn.Module, *, order: str = "cascading", seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a model whose layers are drawn anew, one more or another one each time, from the output downwards.

    A layer is a module with parameters of its own, in the reverse order of definition. It is drawn by the module's
    `reset_parameters` (for attention `_reset_parameters`), which sets normalization to its start and forgets its
    running statistics; else from a normal distribution with the mean and standard deviation of each parameter, so that
    a single number or a constant stays.

    The order `"cascading"` draws all layers from the last down to this one, `"independent"` this one only. The new
    parameters depend on `seed`, not on `order`. With each copy comes the layer's name as in `named_modules()`, or the
    class's name for parameters of the model itself.
    Source: Adebayo et al. 2018, arXiv:1810.03292.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [name for name, _ in randomized(model)]
        ['2', '0']
    """
    OneOf(RANDOMIZATIONS).check("order", order)
    fresh, current = _copy(model).cpu(), model
    layers = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    # a seed far from those of training: with the same one, a model would be given its own first weights
    draws = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int(draws))
        for name in layers:
            layer = fresh.get_submodule(name)
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if reset:
                reset()
                continue
            for p in layer.parameters(recurse=False):
                p.normal_(p.mean().item(), p.std(correction=0).item())
    for name in reversed(layers):
        current = _copy(current if order == "cascading" else model)
        with torch.no_grad():
            for old, new in zip(*(_own(net.get_submodule(name)) for net in (current, fresh)), strict=True):
                old.copy_(new)
        yield name or type(model).__name__, current


def parameter_randomization(
    model: nn.Module,
    explain_with: Explanation,
    images: Tensor,
    target: Tensor,
    order: str = "cascading",
    seed: int = 0,
    similarity: Callable[[Tensor, Tensor], Tensor] = spearman,
) -> dict[str, Tensor]:
    """Similarity of the maps of a model and of each of its `randomized` copies, (B,) by the name of the layer.

    A method whose maps stay alike does not look at the weights, however good its maps look: lower is better.
    Source: Adebayo et al. 2018, arXiv:1810.03292.
    """
    trained = explain_with(model, images, target)
    copies = randomized(model, order=order, seed=seed)
    return {name: similarity(trained, explain_with(changed, images, target)) for name, changed in copies}


@measure("like a random network's", better="lower", low=-1, high=1)
def randomization(
    saliency: Tensor, model: nn.Module, images: Tensor, target: Tensor, explain_with: Explanation, seed: int = 0
) -> Tensor:
    """`spearman` of the model's maps, `saliency`, and of a copy with all layers drawn anew; lower is better."""
    random = model
    for _, changed in randomized(model, seed=seed):
        random = changed
    return spearman(saliency, explain_with(random, images, target))


def controls(images: Tensor, mask: Tensor | None = None, *, seed: int = 0) -> dict[str, Tensor]:
    """Maps (B, H, W), not negative, that do not depend on any model, to be scored beside every explanation.

    Of images (B, C, H, W), in their dtype. `constant`: ones. `edges`: Sobel magnitude of the mean over channels.
    `image`: distance of each pixel's colour from the image's mean colour (Achanta et al. 2009,
    doi:10.1109/CVPR.2009.5206596), so that images may be normalized. `noise`: uniform in [0, 1], the same for all
    images. `centre spot` and `centre box`: see the functions. With a mask (B, H, W), boolean or 0 and 1,
    `ground truth`: the mask.
    """
    require_images(images)
    images = images.detach()
    brightness = images.mean(1, keepdim=True)
    across = images.new_tensor([[1, 2, 1], [0, 0, 0], [-1, -2, -1]]) / 4
    sobel = F.conv2d(F.pad(brightness, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T]).unsqueeze(1))
    noise = torch.rand(images.shape[2:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = {
        "constant": torch.ones_like(brightness[:, 0]),
        "edges": sobel.norm(dim=1),
        "image": (images - images.mean((2, 3), keepdim=True)).norm(dim=1),
        "noise": noise.to(images).repeat(len(images), 1, 1),
        "centre spot": centre_spot(images),
        "centre box": centre_box(images),
    }
    if mask is not None:
        binary(mask, maps["noise"].shape)
        maps["ground truth"] = mask.to(images)
    return maps


def centre_spot(images: Tensor, *, width: float = 0.25) -> Tensor:
    """A Gaussian spot at the centre, (B, H, W): photographers put the object there. Its sigma is `width` of the height.

    A control that knows neither the model nor the image.
    """
    require_images(images)
    Between(0, ends=False).check("width", width)
    height, across = images.shape[2:]
    rows, columns = (torch.arange(n, dtype=images.dtype, device=images.device) - (n - 1) / 2 for n in (height, across))
    spot = torch.exp(-(rows[:, None].square() + columns.square()) / (2 * (width * height) ** 2))
    return spot.expand(len(images), -1, -1)


def centre_box(images: Tensor, *, share: float = 0.5) -> Tensor:
    """1 in a box at the centre that covers a `share` of the image, and 0 around it, (B, H, W).

    Its margins are rounded to pixels. A control that knows neither the model nor the image.
    """
    require_images(images)
    Between(0, 1).check("share", share)
    height, across = images.shape[2:]
    top, left = (round(n * (1 - share**0.5) / 2) for n in (height, across))
    box = images.new_zeros(height, across)
    box[top : height - top, left : across - left] = 1
    return box.expand(len(images), -1, -1)


def _copy(model: nn.Module) -> nn.Module:
    with torch.inference_mode(False):  # else its parameters could never ask for a gradient
        return copy.deepcopy(model)


def _own(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
