"""Whether an explanation looks at the network at all.

Three checks: it should change when the weights are drawn anew (`parameter_randomization`); it should change when the
network was trained on permuted labels, for which train a second network so and take `spearman` of the maps of both;
and it should beat `controls`, which never look at a network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.measures._checks import binary
from sdecor.measures.robustness import spearman

RANDOMIZATIONS = ("cascading", "independent")


def randomized(model: nn.Module, *, order: str = "cascading", seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a model whose layers are drawn anew, one more or another one each time, from the output downwards.

    A layer is a module with parameters of its own, in the reverse order of definition. It is drawn by the module's
    `reset_parameters` (for attention `_reset_parameters`), which sets normalization to its start and forgets its
    running statistics. Parameters of other modules are drawn from a normal distribution with their mean and standard
    deviation, so that a single number or a constant stays.

    Args:
        model: any module; not changed.
        order: `"cascading"` draws all layers from the last down to this one, `"independent"` this one only.
        seed: of the new parameters, which do not depend on `order`; torch's random state is left alone.

    Yields:
        The layer's name as in `named_modules()` (the class's name for parameters of the model itself), and a copy of
        the model, on the same device and in the same mode.

    Raises:
        ValueError: an unknown order.

    Source: Adebayo et al. 2018, arXiv:1810.03292.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [name for name, _ in randomized(model)]
        ['2', '0']
    """
    if order not in RANDOMIZATIONS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(RANDOMIZATIONS)}")
    fresh, current = copy.deepcopy(model).cpu(), model
    layers = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    # a seed far from those of training: with the same one, a model would be given its own first weights
    draws = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int(draws))
        for name in layers:
            _draw(fresh.get_submodule(name))
    for name in reversed(layers):
        current = copy.deepcopy(current if order == "cascading" else model)
        with torch.no_grad():
            for old, new in zip(*map(_own, (current.get_submodule(name), fresh.get_submodule(name))), strict=True):
                old.copy_(new)
        yield name or type(model).__name__, current


def parameter_randomization(
    model: nn.Module,
    explain_with: Callable[[nn.Module, Tensor, Tensor], Tensor],
    images: Tensor,
    target: Tensor,
    *,
    order: str = "cascading",
    similarity: Callable[[Tensor, Tensor], Tensor] = spearman,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Similarity of the maps of a model and of its copies with random layers; lower is better.

    A method whose maps stay alike does not look at the weights, however good its maps look.

    Args:
        model: any classifier; not changed.
        explain_with: maps (B, H, W) of a model, images and target.
        images: (B, C, H, W), as the model takes them.
        target: class whose output is explained, (B,).
        order: see `randomized`.
        similarity: of two maps (B, H, W), as (B,).
        seed: see `randomized`.

    Returns:
        For each layer, from the last to the first, what `similarity` gives, (B,).

    Raises:
        ValueError: an unknown order, or what `similarity` raises.

    Source: Adebayo et al. 2018, arXiv:1810.03292.
    """
    trained = explain_with(model, images, target)
    copies = randomized(model, order=order, seed=seed)
    return {name: similarity(trained, explain_with(changed, images, target)) for name, changed in copies}


def controls(images: Tensor, mask: Tensor | None = None, *, seed: int = 0) -> dict[str, Tensor]:
    """Maps that do not depend on any model, to be scored beside every explanation.

    Args:
        images: (B, C, H, W).
        mask: the object's pixels, boolean or 0 and 1, (B, H, W).
        seed: of the noise; torch's random state is left alone.

    Returns:
        Non-negative maps (B, H, W) in the dtype of `images`. `constant`: ones. `edges`: Sobel magnitude of the mean
        over channels. `image`: distance of each pixel's colour from the image's mean colour, which needs no zero of
        brightness, so that images may be normalized. `noise`: uniform in [0, 1], the same for all images, so that a
        pointing game on it judges a single random pixel. With a mask `ground truth`: the mask.

    Raises:
        ValueError: images of another shape, or a mask that does not fit or is not binary.

    Source: Achanta et al. 2009, doi:10.1109/CVPR.2009.5206596, for the distance from the mean colour.

    Example:
        >>> list(controls(torch.rand(2, 3, 8, 8)))
        ['constant', 'edges', 'image', 'noise']
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
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
    }
    if mask is not None:
        binary(mask, maps["noise"].shape)
        maps["ground truth"] = mask.to(images)
    return maps


def _draw(layer: nn.Module) -> None:
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if reset is not None:
        reset()
        return
    for parameter in layer.parameters(recurse=False):
        parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())


def _own(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
