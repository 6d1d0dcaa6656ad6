"""Baselines and controls that take terms of their own: what else could sharpen a map, or whiten features.

They are trained like every other method, see `sdecor.objective`; what each of them is for, the book says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from sdecor.masking import cells
from sdecor.models import averaged, channels_first, default_layers, layer
from sdecor.objective import Step, capture, classification, consistency, decorrelation, frozen_statistics, term
from sdecor.processes import drawn, least
from sdecor.registers import METHODS, Between, Method
from sdecor.saliency import frozen_eval, input_gradient, logits_of, quick_slope
from sdecor.whitening import GroupWhitening, full_precision, whiten

_PAPER, _OVERSHOOT = "arXiv:2604.25315", 1.25


@term(label="squared input gradient", source="arXiv:1712.09936")
def gradient_penalty(step: Step) -> Tensor:
    """Squared L2 norm of the gradient of the true class's log-probability by the image, averaged over the batch.

    It is in nats² per squared unit of the images (Varga, Csiszárik and Zombori 2017).
    """
    return step.log_probability_gradient.square().sum((1, 2, 3)).mean()


@term(label="cross-entropy on attacked images (nats)", source="arXiv:2001.03994", gradient=False)
def adversarial(step: Step, *, radius: Annotated[float, Between(0, ends=False)] = 0.03) -> Tensor:
    """Cross-entropy on images moved by one signed gradient step from a random start, within `radius` of each value.

    The radius is in units of the images that the network sees: a grey value of 255 is 1 / (255 std) of it. The step is
    1.25 radii long (Wong, Rice and Kolter 2020), and no value leaves the range of its channel in the batch. The method
    of this name adds it to the cross-entropy of the images themselves, with equal weights, where that source trains on
    the attacked ones alone. Batch norm averages over the images themselves.
    """
    _ = step.logits  # the clean pass comes first: it alone is averaged by batch norm
    with frozen_statistics(step.model):
        logits = step.model(attacked(step, radius))
    return cross_entropy(full_precision(logits), step.target)


def attacked(step: Step, radius: float) -> Tensor:
    """The images ``(B, C, H, W)`` that `adversarial` trains on; the network's mode is left as it is."""
    x = step.images
    low, high = least(x.amin((0, 2, 3), keepdim=True)), -least(-x.amax((0, 2, 3), keepdim=True))
    device = x.device if step.generator is None else step.generator.device
    noise = drawn(torch.rand, x.shape, generator=step.generator, device=device, dtype=x.dtype).to(x.device)
    start = torch.clamp(x + radius * (2 * noise - 1), low, high).requires_grad_()
    with frozen_statistics(step.model), quick_slope(step.model, start) as to_images:
        log_probability = log_softmax(full_precision(step.model(start)), 1)
    with to_images():
        slope = input_gradient(log_probability, start, step.target)
    moved = (start.detach() - x - _OVERSHOOT * radius * slope.sign()).clamp(-radius, radius)
    return torch.clamp(x + moved, low, high)


@contextmanager
def whitened_on_the_way(
    model: nn.Module, layers: tuple[str, ...], group_size: int | None, images: Tensor
) -> Iterator[None]:
    """Let the layers of these names pass on their features of `images` whitened, with the statistics of the batch."""

    def hook(name: str) -> Callable[..., Tensor]:
        def white(module: nn.Module, _i: Any, output: Tensor) -> Tensor:
            z = channels_first(output, module, images)
            result = whiten(z, group_size, layer=name).to(output.dtype)
            return result if z is output else result.movedim(1, -1)

        return white

    handles = [m.register_forward_hook(hook(name)) for name, m in [(name, layer(model, name)) for name in layers]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@term(label="cross-entropy of whitened features (nats)", source=_PAPER, gradient=False)
def whitened_classification(
    step: Step, *, group_size: Annotated[int | None, Between(1)] = 16, layers: tuple[str, ...] = ()
) -> Tensor:
    """Cross-entropy of a second pass, in which the features of the layers are whitened on their way to the loss.

    This branch shares all weights with the plain pass and is absent at inference. What reconciles the two is that the
    same weights have to classify both ways. The options are those of the decorrelation term.
    """
    _ = step.logits
    with whitened_on_the_way(step.model, step.layers, group_size, step.images), frozen_statistics(step.model):
        logits = step.model(step.images)
    return cross_entropy(full_precision(logits), step.target)


@term(label="cross-entropy on images with holes (nats)", source="arXiv:1704.04811", gradient=False)
def deleted_classification(step: Step) -> Tensor:
    """Cross-entropy on images of which random patches are deleted: they become 0, the mean colour.

    The patches are those of `patch_grid`; each is deleted with a probability that is drawn for every image, uniform in
    [0, 1] (ours; one half in Singh and Lee 2017). Batch norm averages over these images, since there is no other pass.
    """
    x, grid = step.images, patch_grid(step.images)
    device = x.device if step.generator is None else step.generator.device
    sizes = ((len(x), 1, 1), (len(x), grid, grid))
    share, draw = (drawn(torch.rand, size, generator=step.generator, device=device) for size in sizes)
    rows, columns = (cells(pixels, grid, x.device) for pixels in x.shape[2:])
    holes = (draw < share).to(x.device)[:, rows][:, :, columns]
    return cross_entropy(full_precision(logits_of(step.model, x.masked_fill(holes[:, None], 0))), step.target)


def patch_grid(images: Tensor) -> int:
    """How many patches lie along each side of images (B, C, H, W): most of 8 to 4 that divides it, else 8, uneven ones.

    Images of fewer than 8 pixels have a patch for each.
    """
    height, width = images.shape[2:]
    even = (n for n in range(8, 3, -1) if height % n == width % n == 0)
    return min(next(even, 8), height, width)


def with_whitening(model: nn.Module, images: Tensor) -> nn.Module:
    """Put group-wise ZCA behind the last block: before the average over positions, else behind the last convolution.

    Both are those of `sdecor.models.default_layers`, which takes the `images` too.
    """
    modules, found = dict(model.named_modules()), default_layers(model, images)
    if not isinstance(modules[found[0]], nn.Conv2d):
        raise ValueError(f"whitening needs a convolution to go behind, and {type(model).__name__} has none")
    conv, name = found[0], averaged(model, images) or found[0]
    with torch.no_grad(), frozen_eval(model), capture(model, (name,)) as features:
        logits_of(model, images[:1], finite=False)
    old, parent = modules[name], model.get_submodule(name.rpartition(".")[0])
    white = GroupWhitening(features[name].shape[1])
    setattr(parent, name.rpartition(".")[2], nn.Sequential(*([old, white] if name == conv else [white, old])))
    return model


_BOTH: dict[Any, float] = {classification: 1, consistency: 1, decorrelation: 1}
_PENALTY: dict[Any, float] = {classification: 1, decorrelation: 1}
# ZCA, in all the places where the caption of the paper's Fig. 1 may mean it
METHODS["decorrelation-zca"] = Method(
    _PENALTY, settings={"penalty": "zca"}, label="distance to ZCA", source=_PAPER, colour="#66c2a5", dash="--"
)
METHODS["zca-in-training"] = Method(
    {classification: 1, whitened_classification: 1}, label="ZCA in training only", colour="#8da0cb", source=_PAPER
)
METHODS["whitening-layer"] = Method(
    {classification: 1}, network=with_whitening, label="whitening layer", source="arXiv:1804.08450", colour="#a6761d"
)
METHODS["decorrelation-after"] = Method(
    _PENALTY, settings={"place": "after"}, label="decorrelation after ReLU", colour="#1b7837", dash=":"
)
METHODS["saliencydecor-zca"] = Method(
    _BOTH,
    settings={"score": "absolute", "penalty": "zca"},
    label="both, distance to ZCA",
    source=_PAPER,
    colour="#542788",
)
METHODS["hide-and-seek"] = Method(
    {deleted_classification: 1}, label="hide and seek", source="arXiv:1704.04811", colour="#999999", dash=":"
)
# the same computing time, and what acts on the gradient itself
METHODS["standard-long"] = Method({classification: 1}, label="standard, time of both", colour="#7f7f7f", dash="--")
METHODS["gradient-penalty"] = Method(
    {classification: 1, gradient_penalty: 0.01},
    label="input-gradient penalty",
    source="arXiv:1712.09936",
    colour="#e7298a",
)
METHODS["adversarial"] = Method(
    {classification: 1, adversarial: 1},
    label="adversarial training, FGSM",
    source="arXiv:2001.03994",
    colour="#66a61e",
    dash=":",
)

__all__ = [
    "adversarial",
    "attacked",
    "deleted_classification",
    "gradient_penalty",
    "patch_grid",
    "whitened_classification",
    "with_whitening",
]
