"""Deletion curves that are fair between networks: all of them have learned first what deletions look like.

A network that was trained on masked images keeps its accuracy under masking for longer than others, whatever its maps
are worth. So a copy of each network is trained on, for the same few epochs, with random patches deleted, and is then
judged by deleting patches in the order of its own maps. The idea is that of Hesse, Schaub-Meyer and Roth 2024
(arXiv:2407.11910), who delete one patch at a time; the curves, the patches and the length of this training are ours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sdecor.baselines import patch_grid
from sdecor.config import Objective, Schedule
from sdecor.images import ImageData, ImageStream
from sdecor.measures.faithfulness import ORDERS, STEPS, area_between, perturbation_curve
from sdecor.measures.localization import relevance_mass
from sdecor.measures.robustness import spearman
from sdecor.measures.sharpness import gini
from sdecor.saliency import logits_and_gradient, pixel_score
from sdecor.training import fit


def tuned(
    model: nn.Module, train: ImageData | ImageStream, schedule: Schedule, *, seed: int = 0, device: str = "cpu"
) -> nn.Module:
    """A copy of a classifier, trained on for the epochs of `schedule` with random patches deleted.

    That is the method ``hide-and-seek``; see `sdecor.baselines.deleted_classification`.
    """
    with torch.inference_mode(False):
        network = copy.deepcopy(model)
    fit(network, train, Objective("hide-and-seek"), schedule, seed=seed, device=device, progress=False)
    return network.eval()


def deletion_curves(
    model: nn.Module, data: ImageData | ImageStream, *, batch_size: int | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Whether each image is still right as a growing share of its patches is deleted, and the maps that rank them.

    The curves are (N, 11) float64, at the shares `sdecor.measures.faithfulness.STEPS`, by the order of deletion:
    ``most`` or ``least`` salient first, or ``random``. The maps (N, H, W) are the magnitude of the gradient of the
    predicted class; patches are ranked by their sum, and become the mean colour of the training images. `model` and
    `data` are on one device.
    """
    curves: dict[str, list[Tensor]] = {order: [] for order in ORDERS}
    maps = []
    generator = torch.Generator().manual_seed(seed)
    for x, y in data.batches(batch_size or data.pass_size):
        maps.append(pixel_score(logits_and_gradient(model, x)[1]))
        how: dict[str, Any] = {"fill": "constant", "output": "correct", "grid": patch_grid(x), "generator": generator}
        for order, parts in curves.items():
            parts.append(perturbation_curve(model, x, y, maps[-1], order=order, own_order=True, **how))
    return {order: torch.cat(parts) for order, parts in curves.items()}, torch.cat(maps)


def deletion_scores(
    model: nn.Module,
    train: ImageData | ImageStream,
    held_out: ImageData | ImageStream,
    schedule: Schedule,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What `deletion_curves` say of a network as it is and, with the prefix ``fair_``, of the `tuned` copy.

    ``deletion_area`` is the area between the curves of the least and of the most salient patches, of accuracy, in
    [-1, 1]: higher is more faithful. Of the copy there are also its ``tuned_accuracy``, ``tuned_gini`` and, where
    masks are known, ``tuned_relevance_mass``, and ``tuned_similarity``, the rank correlation of its maps with those of
    the network as it was. The curves are means over images, as ``deletion_most`` and so on.
    """
    data = held_out.to(device)
    metrics: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    copied = tuned(model, train, schedule, seed=seed, device=device)
    maps: dict[str, Tensor] = {}
    for prefix, network in {"": model, "fair_": copied}.items():
        found, maps[prefix] = deletion_curves(network, data, seed=seed)
        curves |= {f"{prefix}deletion_{order}": curve.mean(0).tolist() for order, curve in found.items()}
        metrics[f"{prefix}deletion_area"] = float(area_between(found["most"], found["least"], STEPS).mean())
    metrics["tuned_accuracy"] = curves["fair_deletion_most"][0]
    metrics["tuned_gini"] = float(gini(maps["fair_"]).nanmean())
    metrics["tuned_similarity"] = float(spearman(maps[""], maps["fair_"]).nanmean())
    if data.has_masks:
        masks = [mask for _, _, mask in data.batches_with_masks(len(data)) if mask is not None]
        metrics["tuned_relevance_mass"] = float(relevance_mass(maps["fair_"], torch.cat(masks)).nanmean())
    return metrics, curves
