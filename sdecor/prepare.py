"""The images of a run as it trains on them: fewer, with other labels, or without what a network found salient."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sdecor._bits import packed
from sdecor.attribution import attribute
from sdecor.config import Run, fingerprint
from sdecor.data import load
from sdecor.images import ImageData, ImageStream, permutation
from sdecor.masking import lowest, masked
from sdecor.saliency import pixel_score
from sdecor.store import Store
from sdecor.training import device_of


def data_of(
    run: Run, store: Store, split: str, *, root: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> ImageData | ImageStream:
    """The images and labels of a split as `run` has them.

    If pixels are removed, the network that says which lies in `store`, and `device` is where it is asked. What is
    absent is a FileNotFoundError; a folder that is not the one that was described, a ValueError.
    """
    d = run.data
    if d.path is not None and (found := fingerprint(d.path)) != d.fingerprint:
        problem = f"its fingerprint is {found}, the run was described for {d.fingerprint}"
        raise ValueError(f"{d.path} has changed: {problem}; describe the run anew")
    data = load(d.name, root, split, **(d.part if split == "train" else {}), **dict(d.options))
    if d.permuted_labels and split == "train":
        data = replace(data, labels=data.labels[permutation(len(data), run.seed)])
    if not d.removed:
        return data
    model = None if d.removed_by == "random" else store.model(without_removal(run)).to(device_of(device))
    return remove_salient(data, model, d.removed_by, d.removed)


def without_removal(run: Run) -> Run:
    """The run whose network says which pixels go."""
    return run.but(removed=0.0, removed_by="gradient")


def remove_salient(
    data: ImageData | ImageStream,
    model: nn.Module | None,
    method: str,
    fraction: float,
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> ImageData | ImageStream:
    """Replace the most salient pixels of every image by the mean colour: the data of remove and retrain (ROAR).

    The result is new and keeps the masks of objects. The attribution `method` explains the class that `model` predicts;
    without a model, pixels go at random. `fraction` is their share, in (0, 1). For a stream, which pixels go is found
    out now and kept in a temporary file, one bit a pixel, as long as the result is; see `sdecor._bits.packed`.

    Source: Hooker et al. 2019 (arXiv:1806.10758).
    """
    gone = _most_salient(data, model, method, fraction, batch_size, seed)
    if isinstance(data, ImageStream):
        bits = packed(data.image_size, (mask.cpu().numpy() for mask in gone))
        return replace(data, removed=(*data.removed, (bits, torch.arange(len(data)))))
    colour = data.colour.to(data.device).view(1, -1, 1, 1)
    batches = zip(data.images.split(batch_size or data.pass_size), gone, strict=True)
    parts = [masked(images, mask.to(data.device), colour.expand_as(images)) for images, mask in batches]
    return replace(data, images=torch.cat(parts), masks=data.object_masks)  # the mean colour is no ink


def _most_salient(
    data: ImageData | ImageStream,
    model: nn.Module | None,
    method: str,
    fraction: float,
    batch_size: int | None,
    seed: int,
) -> Iterator[Tensor]:
    """The pixels that go, bool (B, H, W), batch by batch."""
    draws = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device if model is not None else data.device
    for x, _ in data.batches(batch_size or data.pass_size):
        if model is None:
            score = torch.rand(len(x), *x.shape[2:], generator=draws)
        else:
            score = pixel_score(attribute(model, x.to(device), None, method, seed=seed, progress=False))
        yield lowest(-score, fraction)
