"""Cost of attributions beside that of captum's and of RISE's authors: ``python tests/benchmarks/attributions.py``.

Timed as in `run.py` beside it. Both sides explain the same images one by one, and where they draw alike they must find
the same. On the side of RISE's authors the masks are not timed: their code makes them once, and keeps them in a file.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum import __version__ as VERSION
from captum.attr import IntegratedGradients, KernelShap, NoiseTunnel, Saliency, ShapleyValueSampling
from run import Step, medians
from skimage.transform import resize
from torch import Tensor, nn

from sdecor.attribution import attribute
from sdecor.models import build
from sdecor.saliency import frozen_eval

ALIKE = ("smoothgrad", "integrated_gradients", "shapley_sampling")


def masks_of(count: int, side: int, grid: int = 7, keep: float = 0.5) -> Tensor:
    """Masks as the authors of RISE publish them (arXiv:1806.07421), in our words."""
    cell = -(-side // grid)
    coarse = (np.random.rand(count, grid, grid) < keep).astype("float32")
    masks = np.empty((count, 1, side, side), dtype="float32")
    for mask, cells in zip(masks, coarse, strict=True):
        i, j = np.random.randint(0, cell, 2)
        large = resize(cells, ((grid + 1) * cell,) * 2, order=1, mode="reflect", anti_aliasing=False)
        mask[0] = large[i : i + side, j : j + side]
    return torch.from_numpy(masks)


@torch.no_grad()
def rise(model: nn.Module, x: Tensor, masks: Tensor, rows: int, keep: float = 0.5) -> Tensor:
    """The sum of the masks by the probabilities of all classes, as the authors make it."""
    stack = masks * x
    probabilities = torch.cat([model(part).softmax(1) for part in stack.split(rows)])
    return (probabilities.T @ masks.flatten(1)).view(-1, *x.shape[2:]) / len(masks) / keep


def steps_of(given: argparse.Namespace) -> dict[str, Step]:
    """Every method, ours and theirs."""
    torch.manual_seed(0)
    model = build(given.model, given.channels, 10, given.size).eval()
    x = torch.rand(given.images, given.channels, given.size, given.size)
    y, side = torch.arange(given.images) % 10, torch.arange(given.size) * 6 // given.size
    labels, masks = (6 * side[:, None] + side).expand(1, -1, -1), masks_of(given.samples, given.size)
    regions = {"feature_mask": labels[None], "perturbations_per_eval": 64}

    def noisy(x: Tensor, k: int) -> Tensor:
        how = {"nt_samples": 25, "stdevs": 0.15 * float(x.max() - x.min()), "abs": False}
        return NoiseTunnel(Saliency(model)).attribute(x, target=k, **how)

    def kernel(x: Tensor, k: int) -> Tensor:
        return KernelShap(model).attribute(x, target=k, n_samples=given.samples // 2, **regions)[:, 0]

    def orders(x: Tensor, k: int) -> Tensor:
        return ShapleyValueSampling(model).attribute(x, target=k, n_samples=10, **regions)[:, 0]

    of_regions = {"segments": labels.expand(given.images, -1, -1)}
    methods: dict[str, tuple[dict[str, Any], Callable[[Tensor, int], Tensor]]] = {
        "rise": ({"samples": given.samples}, lambda x, k: rise(model, x, masks, 64)[k][None]),
        "smoothgrad": ({}, noisy),
        "integrated_gradients": ({}, lambda x, k: IntegratedGradients(model).attribute(x, target=k)),
        "kernel_shap": ({"samples": given.samples // 2, **of_regions}, kernel),
        "shapley_sampling": (of_regions, orders),
    }
    steps: dict[str, Step] = {}
    for name, (options, one) in methods.items():

        def ours(name: str = name, options: dict[str, Any] = options) -> Tensor:
            return attribute(model, x, y, name, **options)

        def theirs(one: Callable[[Tensor, int], Tensor] = one) -> Tensor:
            parts = []
            with frozen_eval(model):
                for image, k in zip(x.split(1), y.tolist(), strict=True):
                    torch.manual_seed(0)
                    parts.append(one(image, k).detach())
            return torch.cat(parts)

        difference = (ours() - theirs()).abs().max() / ours().abs().max()
        if name in ALIKE and not difference < 1e-3:
            raise SystemExit(f"{name}: the results differ by {difference:.2g}, so the times cannot be compared")
        steps |= {f"{name}, ours": ours, f"{name}, theirs": theirs}
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument(
        "--samples", type=int, default=1000, help="masks of RISE, and twice the coalitions of Kernel SHAP"
    )
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--size", type=int, default=28)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("sdecor").setLevel(logging.ERROR)  # an untrained network's maps are mostly noise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of captum
        seconds = medians(steps_of(given), given.rounds)
    print(f"{given.images} images of {given.size} px, a {given.model}, {given.rounds} rounds, captum {VERSION}")
    print(f"{'method':24s} {'ours ms':>10s} {'theirs ms':>10s}   ratio")
    for name in dict.fromkeys(step.split(",")[0] for step in seconds):
        ours, theirs = (1e3 * seconds[f"{name}, {side}"] for side in ("ours", "theirs"))
        print(f"{name:24s} {ours:10.1f} {theirs:10.1f}   ours / theirs {ours / theirs:.2f} (should be <= 1.1)")


if __name__ == "__main__":
    main()
