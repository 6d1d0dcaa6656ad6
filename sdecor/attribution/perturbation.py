"""Methods that replace parts of an image and watch the model: they ask for no gradient and score whole pixels."""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from sdecor.attribution.gradients import Count, Samples, Value, by_captum, noisy, signs, sums_like
from sdecor.registers import ATTRIBUTIONS, Between
from sdecor.saliency import checked_images, logits_of

attribution = ATTRIBUTIONS.register
Side = Annotated[int | None, Between(1)]
Parts = Annotated[int | Tensor, Between(2)]


@attribution(label="Occlusion", source="arXiv:1311.2901", per_channel=False, slow=True)
def occlusion(
    model: Module, x: Tensor, y: Tensor, rows: int, *, window: Side = None, stride: Side = None, baseline: Value = 0.0
) -> Tensor:
    """How much the logit falls where a square window of `baseline` covers the image, as a mean over the windows.

    The `window` has a sixth of the image's shorter side, and moves by a `stride` of half of itself, unless given.
    """
    side = min(x.shape[2:])
    window = max(1, round(side / 6)) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window <= side:
        raise ValueError(f"need 1 <= stride <= window <= {side}, got window={window} and stride={stride}")
    shape, step = ((x.shape[1], length, length) for length in (window, stride))
    how = {"sliding_window_shapes": shape, "strides": step, "baselines": baseline, "perturbations_per_eval": rows}
    return by_captum("Occlusion", model, x, y, **how)[:, 0]


@attribution(label="RISE", source="arXiv:1806.07421", per_channel=False, slow=True)
def rise(
    model: Module,
    x: Tensor,
    y: Tensor,
    rows: int,
    *,
    samples: Samples = 1000,
    grid: Count = 7,
    keep: Annotated[float, Between(0.001, 1)] = 0.5,
    baseline: Value = 0.0,
) -> Tensor:
    """Mean probability of the class over masked images in which a pixel is seen.

    Each of `samples` masks keeps the share `keep` of a coarse `grid` of cells, enlarged and shifted; `baseline` is seen
    elsewhere. Beyond the centres of the outer cells a mask goes on as it is there, where the authors' code reflects it.
    """
    sides = x.shape[2:]
    cells = [-(-side // grid) for side in sides]
    coarse = (torch.rand(samples, grid, grid) < keep).to(x)
    shift = (torch.rand(samples, 2) * torch.tensor(cells)).long().to(x.device)
    down, across = (_enlarged(grid, *pair).to(x) for pair in zip(cells, sides, strict=True))
    sums, way, factors = sums_like(x[:, 0]), x - baseline, signs(samples).to(x)
    for some, (i, j), factor in zip(coarse.split(rows), shift.T.split(rows, 1), factors.split(rows, 1), strict=True):
        masks = down[i] @ some @ across[j].mT
        with torch.no_grad():
            logits = logits_of(model, torch.addcmul(torch.as_tensor(baseline), way, masks.unsqueeze(1)))
        sums += (factor * logits.softmax(1)[:, y].T) @ masks.flatten(1)
    result, alternating = (sums / (samples * keep)).unbind()
    noisy(alternating - alternating.mean(), result - result.mean())  # it is the shape that one looks at
    mean: Tensor = result.view(1, *sides)
    return mean


def _enlarged(grid: int, cell: int, side: int) -> Tensor:
    """Weights ``(cell + ..., side, grid)`` of linear interpolation to ``grid + 1`` cells, for each shift by a pixel."""
    size = (grid + 1) * cell
    place = ((torch.arange(size) + 0.5) * (grid / size) - 0.5).clamp(0, grid - 1)
    return (1 - (place.unsqueeze(1) - torch.arange(grid)).abs()).clamp(min=0).unfold(0, side, 1).mT


@attribution(label="Superpixel ablation", source="arXiv:2009.07896", per_channel=False, slow=True)
def feature_ablation(
    model: Module, x: Tensor, y: Tensor, rows: int, *, segments: Parts = 64, baseline: Value = 0.0
) -> Tensor:
    """How much the logit falls when a superpixel is replaced with `baseline`; see `superpixels` for `segments`."""
    regions = _regions(x, segments)[0].unsqueeze(1)
    how = {"baselines": baseline, "feature_mask": regions, "perturbations_per_eval": rows}
    return by_captum("FeatureAblation", model, x, y, **how)[:, 0]


@attribution(label="Kernel SHAP", source="arXiv:1705.07874", per_channel=False, slow=True)
def kernel_shap(
    model: Module, x: Tensor, y: Tensor, rows: int, *, segments: Parts = 64, samples: Count = 500, baseline: Value = 0.0
) -> Tensor:
    """Shapley values of superpixels, fitted to the logits of `samples` images with some of them replaced.

    They are exact if so many are all there are, 2^M - 2 for M regions. Else these are drawn in pairs, the other regions
    replaced in the second (Covert and Lee 2021, arXiv:2012.01536), and must be 4 M or more: with 2 M there are no more
    equations than unknowns, and the fit is noise. The sum is the change of the logit.
    """
    labels, count = _regions(x, segments)
    exact = 2**count - 2
    if samples < min(exact, 4 * count):
        raise ValueError(f"samples must be at least {min(exact, 4 * count)} for {count} regions, got {samples}")
    sizes = torch.arange(1, count)
    kernel = 1 / (sizes * (count - sizes)).double()  # for all sets of a size together
    if samples < exact:
        halves = _sets(kernel, count, samples // 2)
        weight = torch.ones(len(halves), 1, dtype=torch.float64)
    else:
        halves = torch.tensor([(False, *rest) for rest in product((False, True), repeat=count - 1)][1:])
        each = kernel / torch.tensor([math.comb(count, size) for size in sizes.tolist()])
        weight = each[halves.sum(1, keepdim=True) - 1].sqrt()
    (empty, whole), played = _played(model, x, y, rows, labels, torch.as_tensor(baseline), torch.cat([halves, ~halves]))
    there, gone = played.view(2, -1, 1)
    share, equations = (whole - empty) / count, (halves.double() - 0.5) * weight
    free = equations - equations.mean(1, keepdim=True)  # of the sum, which is known
    wanted = (there - gone) / 2 * weight - share * equations.sum(1, keepdim=True)
    inverse = torch.linalg.pinv(free)
    values = inverse @ wanted
    if samples < exact:
        residual = wanted - free @ values
        own = 1 - (free * inverse.T).sum(1, keepdim=True)  # share of a residual that its equation does not decide
        usual = residual.square().sum() / (len(free) - count + 1)
        error = torch.where(own > 1e-6, residual.square() / own, usual).sqrt()
        noisy(inverse * error.T, values + share)
    result: Tensor = (values[:, 0] + share).to(x)[labels]
    return result


def _sets(kernel: Tensor, count: int, number: int) -> Tensor:
    """Random sets of regions, drawn again if they leave values undecided, as one draw in a hundred of few may."""
    while True:
        sizes = torch.multinomial(kernel, number, replacement=True) + 1
        sets = torch.rand(number, count).argsort(1).argsort(1) < sizes.unsqueeze(1)
        equations = sets.double()
        if torch.linalg.matrix_rank(equations - equations.mean(1, keepdim=True)) == count - 1:
            return sets


@attribution(label="Shapley value sampling", source="doi:10.1016/j.cor.2008.04.004", per_channel=False, slow=True)
def shapley_sampling(
    model: Module,
    x: Tensor,
    y: Tensor,
    rows: int,
    *,
    segments: Parts = 64,
    samples: Samples = 10,
    baseline: Value = 0.0,
) -> Tensor:
    """Shapley values of superpixels: what each adds to the logit, over `samples` random orders to put them back."""
    labels, count = _regions(x, segments)
    places = torch.stack([torch.randperm(count) for _ in range(samples)]).argsort(1)
    seen = places.unsqueeze(1) < torch.arange(1, count).unsqueeze(1)
    ends, played = _played(model, x, y, rows, labels, torch.as_tensor(baseline), seen.flatten(0, 1))
    first, last = ends.expand(samples, 2).split(1, 1)
    added = torch.cat([first, played.view(samples, -1), last], 1).diff(dim=1).gather(1, places)
    noisy(added.std(0) / samples**0.5, added.mean(0))
    return added.mean(0).to(x)[labels]


def _regions(x: Tensor, segments: int | Tensor) -> tuple[Tensor, int]:
    """Labels ``(1, H, W)`` of an image's regions, without gaps, and how many there are."""
    found, labels = (segments if isinstance(segments, Tensor) else superpixels(x, segments)).unique(return_inverse=True)
    if len(found) < 2:
        raise ValueError("segments must have at least two regions in each image")
    return labels, len(found)


def _played(
    model: Module, x: Tensor, y: Tensor, rows: int, labels: Tensor, baseline: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits where no region is seen, or all of them, (2,), and where those of each row of `seen` (n, M) are, (n,)."""
    ends = torch.tensor([[False], [True]]).expand(2, seen.shape[1])
    with torch.no_grad():
        parts = (part.to(x.device)[:, labels] for part in torch.cat([ends, seen]).split(rows))
        logits = torch.cat([logits_of(model, torch.where(part, x, baseline))[:, y] for part in parts])
    return logits[:2, 0].double().cpu(), logits[2:, 0].double().cpu()


def superpixels(x: Tensor, segments: int = 64) -> Tensor:
    """Cut each image ``(B, C, H, W)`` into about so many connected regions of similar colour.

    Their labels ``(B, H, W)`` are int64, from 0 without gaps in each image. An `x` that is no batch of finite images is
    a ValueError. It is SLIC, Achanta et al. 2012 (doi:10.1109/TPAMI.2012.120).
    """
    from skimage.segmentation import slic

    Between(2).check("segments", segments)
    checked_images(x)
    pixels = x.detach().permute(0, 2, 3, 1).double().cpu().numpy()
    compactness = 30 if x.shape[1] == 3 else 0.3  # lightness in Lab goes to 100, grey to 1
    labels = [slic(p, segments, compactness, sigma=1, start_label=0, channel_axis=-1) for p in pixels]
    return torch.from_numpy(np.stack(labels)).to(x.device, torch.int64)
