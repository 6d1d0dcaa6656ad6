"""Methods that replace parts of an image and watch the model: they ask for no gradient and score whole pixels."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from sdecor.attribution.gradients import Count, Value, by_captum
from sdecor.registers import ATTRIBUTIONS, Between
from sdecor.saliency import checked_images

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
    samples: Count = 1000,
    grid: Count = 7,
    keep: Annotated[float, Between(0.001, 1)] = 0.5,
    baseline: Value = 0.0,
) -> Tensor:
    """Mean probability of the class over masked images in which a pixel is seen.

    Each of `samples` masks keeps the share `keep` of a coarse `grid` of cells, enlarged and shifted; `baseline` is seen
    elsewhere.
    """
    h, w = x.shape[2:]
    cell = -(-h // grid), -(-w // grid)
    coarse = (torch.rand(samples, 1, grid, grid) < keep).to(x)
    shift = (torch.rand(samples, 2) * torch.tensor(cell)).long()
    total, size = torch.zeros_like(x[:, 0]), [(grid + 1) * side for side in cell]
    for small, shifts in zip(coarse.split(rows), shift.split(rows), strict=True):
        large = F.interpolate(small, size, mode="bilinear", align_corners=False)
        masks = torch.stack([m[:, i : i + h, j : j + w] for m, (i, j) in zip(large, shifts.tolist(), strict=True)])
        with torch.no_grad():
            probability = model(baseline + (x - baseline) * masks).softmax(1)[:, y]
        total += (probability[..., None] * masks[:, 0]).sum(0)
    return total / (samples * keep)


@attribution(label="Superpixel ablation", source="arXiv:2009.07896", per_channel=False, slow=True)
def feature_ablation(
    model: Module, x: Tensor, y: Tensor, rows: int, *, segments: Parts = 64, baseline: Value = 0.0
) -> Tensor:
    """How much the logit falls when a superpixel is replaced with `baseline`; see `superpixels` for `segments`."""
    return _by_region("FeatureAblation", model, x, y, rows, segments, baseline)


@attribution(label="Kernel SHAP", source="arXiv:1705.07874", per_channel=False, slow=True)
def kernel_shap(
    model: Module, x: Tensor, y: Tensor, rows: int, *, segments: Parts = 64, samples: Count = 500, baseline: Value = 0.0
) -> Tensor:
    """Shapley values of superpixels, fitted to the logits of `samples` images with some of them replaced."""
    return _by_region("KernelShap", model, x, y, rows, segments, baseline, n_samples=samples)


@attribution(label="Shapley value sampling", source="doi:10.1016/j.cor.2008.04.004", per_channel=False, slow=True)
def shapley_sampling(
    model: Module, x: Tensor, y: Tensor, rows: int, *, segments: Parts = 64, samples: Count = 10, baseline: Value = 0.0
) -> Tensor:
    """Shapley values of superpixels: what each adds to the logit, over `samples` random orders to put them back."""
    return _by_region("ShapleyValueSampling", model, x, y, rows, segments, baseline, n_samples=samples)


def _by_region(
    kind: str, model: Module, x: Tensor, y: Tensor, rows: int, segments: int | Tensor, baseline: Value, **more: int
) -> Tensor:
    labels = segments if isinstance(segments, Tensor) else superpixels(x, segments)
    mask: Tensor = labels.unique(return_inverse=True)[1].unsqueeze(1)
    if not mask.any():
        raise ValueError("segments must have at least two regions in each image")
    how = {"baselines": baseline, "feature_mask": mask, "perturbations_per_eval": rows, **more}
    return by_captum(kind, model, x, y, **how)[:, 0]


def superpixels(x: Tensor, segments: int = 64) -> Tensor:
    """Cut each image ``(B, C, H, W)`` into about so many connected regions of similar colour.

    Their labels ``(B, H, W)`` are int64, from 0 without gaps in each image. An `x` that is no batch of finite images is
    a ValueError. It is SLIC, Achanta et al. 2012 (doi:10.1109/TPAMI.2012.120).
    """
    from skimage.segmentation import slic

    checked_images(x)
    pixels = x.detach().permute(0, 2, 3, 1).double().cpu().numpy()
    compactness = 30 if x.shape[1] == 3 else 0.3  # lightness in Lab goes to 100, grey to 1
    labels = [slic(p, segments, compactness, sigma=1, start_label=0, channel_axis=-1) for p in pixels]
    return torch.from_numpy(np.stack(labels)).to(x.device, torch.int64)
