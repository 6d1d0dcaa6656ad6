"""Labelled images, in memory or streamed from files, and the batches that training takes from them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as pil

from sdecor.config import AUGMENTATIONS
from sdecor.registers import DATASETS, OneOf

_CPU = torch.device("cpu")


def permutation(n: int, seed: int = 0) -> Tensor:
    """Random order of ``0..n-1`` that depends on nothing but `n` and `seed`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (at least 1/255) per channel of uint8 images (N, C, H, W), in [0, 1] units."""
    value, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    for channel in images.cpu().unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float(share @ value))
        std.append(max(float((share @ (value - mean[-1]).square()).sqrt()), 1 / 255))
    return tuple(mean), tuple(std)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images (N, C, H, W) brought to a side of `size` pixels, bilinearly and without aliasing."""
    if images.shape[-1] == size:
        return images
    x = interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def augmented(x: Tensor, names: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
    """Change each image at random, in the order of the list below, whatever the order of the names.

    - ``flip``: left-right with probability 1/2;
    - ``crop``: a shift by up to H // 8 pixels, where black moves in at the border;
    - ``cutout``: a black square of side H // 2, centred on any pixel and cut at the border (arXiv:1708.04552).

    Args:
        x: Images (B, C, H, W), uint8 as black is 0, on any device.
        names: Some of `sdecor.config.AUGMENTATIONS`.
        generator: Source of the draws, made on its own device: a CPU generator gives the same images on every device.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in names:
        OneOf(AUGMENTATIONS).check("augmentation", name)
    b, _, h, w = x.shape
    at = _CPU if generator is None else generator.device
    rows, cols = torch.arange(h, device=x.device).expand(b, h), torch.arange(w, device=x.device).expand(b, w)
    inside = (rows[:, :, None], cols[:, None, :])
    if "flip" in names:
        flipped = torch.rand(b, 1, generator=generator, device=at).to(x.device) < 0.5
        cols = torch.where(flipped, w - 1 - cols, cols)
    if "crop" in names:
        reach = max(h // 8, 1)
        x = pad(x, (reach, reach, reach, reach))
        shift = torch.randint(2 * reach + 1, (2, b, 1), generator=generator, device=at).to(x.device)
        rows, cols = rows + shift[0], cols + shift[1]
    index = torch.arange(b, device=x.device)[:, None, None]
    x = x.movedim(1, -1)[index, rows[:, :, None], cols[:, None, :]].movedim(-1, 1).contiguous()
    if "cutout" in names:
        side = max(h // 2, 1)
        starts = (torch.randint(n, (b, 1, 1), generator=generator, device=at).to(x.device) - side // 2 for n in (h, w))
        hole = [(start <= place) & (place < start + side) for start, place in zip(starts, inside, strict=True)]
        x = x.masked_fill((hole[0] & hole[1])[:, None], 0)
    return x


class _Images(ABC):
    """What both kinds have in common; their batches are equal, bit for bit."""

    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Colour channels C."""
        return len(self.mean)

    @property
    def num_classes(self) -> int:
        """Number of classes; every label lies below it."""
        return len(self.classes)

    @property
    def object_masks(self) -> Tensor | None:
        """Pixels of the objects, bool (N, H, W): exact ones, or the ink of a data set of ink, or None if not known."""
        return None

    @abstractmethod
    def _read(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the uint8 images and the labels at each of the index vectors `parts`."""

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return mean, std

    def _normalize(self, images: Tensor) -> Tensor:
        mean, std = self._statistics(images)
        return images.float().div_(255).sub_(mean).div_(std)

    def denormalize(self, x: Tensor) -> Tensor:
        """Undo the normalization: float (B, C, H, W) back to [0, 1] units."""
        mean, std = self._statistics(x)
        return x * std + mean

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Sequence[str] = (),
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over ``(x, y)``: float32 normalized (B, C, H, W) and int64 (B,).

        The same state of `generator` gives the same bits.

        Args:
            batch_size: Images per batch; the last batch may be smaller.
            shuffle: Draw the order from `generator` (without one, from torch's global state).
            generator: Source of order and augmentation, best on the CPU: then every device sees the same draws.
            augment: Names for `augmented`.
            drop_last: Leave a smaller last batch out.

        Raises:
            ValueError: If `batch_size` or `augment` is impossible.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        at = _CPU if generator is None else generator.device
        order = torch.randperm(len(self), generator=generator, device=at) if shuffle else torch.arange(len(self))
        parts = torch.split(order, batch_size) if len(order) else ()
        for images, y in self._read([part for part in parts if len(part) == batch_size or not drop_last]):
            yield self._normalize(augmented(images, augment, generator) if augment else images), y


@dataclass(frozen=True, eq=False)
class ImageData(_Images):
    """One split of a labelled image set, in memory, on any device.

    Args:
        images: uint8 (N, C, H, W), H = W.
        labels: int64 (N,), below the number of classes.
        classes: Their names.
        mean: Of each channel of the *training* split, in [0, 1] units.
        std: As `mean`.
        masks: bool (N, H, W), the pixels of the object where they are known, else None.
        name: Of the data set, as results should call it.
        split: ``train``, ``val`` or ``test``.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masks: Tensor | None = None
    name: str = "custom"
    split: str = "train"

    @classmethod
    def from_tensors(
        cls,
        images: Tensor,
        labels: Tensor,
        *,
        classes: Sequence[str] | None = None,
        masks: Tensor | None = None,
        train: ImageData | ImageStream | None = None,
        image_size: int | None = None,
        name: str = "custom",
        split: str = "train",
    ) -> ImageData:
        """Check a user's own tensors and wrap them.

        Args:
            images: (N, C, H, W), uint8 or float in [0, 1] (rounded to 255 steps).
            labels: Whole numbers (N,).
            classes: Names; by default ``"0", "1", ...`` up to the largest label.
            masks: bool (N, H, W) or None.
            train: The training split, whose classes, mean and std this split takes over; None if this is it.
            image_size: Side in pixels that images and masks are brought to; by default their own.
            name: Of the data set.
            split: Name of the split.

        Raises:
            ValueError: If shapes do not fit, an image is not finite or out of range, or a label has no class.

        >>> data = ImageData.from_tensors(torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> len(data), data.num_classes
        (6, 3)
        """
        if images.ndim != 4 or not len(images) or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images must have shape (N, C, H, W) with N > 0 and H = W, got {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need labels of shape ({len(images)},), got {tuple(labels.shape)}")
        if masks is not None and masks.shape != (len(images), *images.shape[-2:]):
            raise ValueError(f"masks must have shape {(len(images), *images.shape[-2:])}, got {tuple(masks.shape)}")
        if images.is_floating_point():
            bad = ~images.isfinite()
            if n := int(bad.sum()):
                i = int(bad.flatten(1).any(1).nonzero()[0])
                raise ValueError(f"images hold {n} non-finite values (first at index {i}); clean them before training")
            low, high = float(images.min()), float(images.max())
            if low < 0 or high > 1:
                raise ValueError(f"float images must lie in [0, 1], got {low:g} to {high:g}; rescale or pass uint8")
            images = images.mul(255).round().to(torch.uint8)
        elif images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 or float, got {images.dtype}")
        if image_size is not None:
            images = resized(images, image_size)
        if image_size is not None and masks is not None:
            masks = interpolate(masks[:, None].float(), size=(image_size, image_size), mode="nearest-exact")[:, 0]
        labels = labels.long()
        if train is not None:
            classes = train.classes
        elif classes is None:
            classes = [str(i) for i in range(max(int(labels.max()) + 1, 1))]
        wrong = (labels < 0) | (labels >= len(classes))
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"labels must lie in 0..{len(classes) - 1}, got {int(labels[i])} at index {i}")
        mean, std = moments(images) if train is None else (train.mean, train.std)
        if len(mean) != images.shape[1]:
            raise ValueError(f"images have {images.shape[1]} channels, those of the training split have {len(mean)}")
        return cls(images, labels, tuple(classes), mean, std, None if masks is None else masks.bool(), name, split)

    @property
    def object_masks(self) -> Tensor | None:  # noqa: D102
        if self.masks is None and self.name in DATASETS and DATASETS[self.name].ink:
            return (self.images > 0).any(1)
        return self.masks

    @property
    def image_size(self) -> int:
        """Height, equal to the width, in pixels."""
        return self.images.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.images.device

    def to(self, device: str | torch.device) -> ImageData:
        """The same data on `device`."""
        masks = None if self.masks is None else self.masks.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), masks=masks)

    def subset(self, which: int | Sequence[int] | Tensor) -> ImageData:
        """The images at these indices; a number draws that many by a constant seed (nested, order kept)."""
        index = _chosen(which, len(self)).to(self.device)
        masks = None if self.masks is None else self.masks[index]
        return replace(self, images=self.images[index], labels=self.labels[index], masks=masks)

    def normalized(self, indices: slice | Sequence[int] | Tensor = slice(None)) -> Tensor:
        """Images as float32 (B, C, H, W): ``(images / 255 - mean) / std``."""
        return self._normalize(self.images[indices])

    def _read(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            index = part.to(self.device)
            yield self.images[index], self.labels[index]


def _chosen(which: int | Sequence[int] | Tensor, n: int) -> Tensor:
    return permutation(n)[:which].sort().values if isinstance(which, int) else torch.as_tensor(which)


def side_of(path: str) -> int:
    """Short side of an image file in pixels."""
    with _named(path), Image.open(path) as image:
        return min(image.size)


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {path} ({type(error).__name__}); remove or replace it") from error


def _decode(path: str, size: int) -> NDArray[np.uint8]:
    """RGB, short side resized to `size`, cropped to the centre: (size, size, 3)."""
    with _named(path), Image.open(path) as image:
        square = image.convert("RGB")
        if square.size != (size, size):
            square = pil.center_crop(pil.resize(square, size), [size, size])
        return np.array(square)


def decode_all(paths: Sequence[str], size: int) -> Tensor:
    """Read image files, with one thread per core: uint8 RGB (N, 3, size, size), resized by the short side and cropped.

    Raises:
        ValueError: If a file is not a readable image; names it.
    """
    out = np.empty((len(paths), size, size, 3), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + 64, len(paths))):
            out[i] = _decode(paths[i], size)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(0, len(paths), 64)))
    return torch.from_numpy(out).movedim(-1, 1).contiguous()


class _Files(Dataset[Tensor]):
    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(_decode(self.paths[index], self.size)).movedim(-1, 0)


@dataclass(frozen=True, eq=False)
class ImageStream(_Images):
    """As `ImageData`, for image files too many to hold: decoded by a DataLoader while training goes on.

    Args:
        paths: Of the files.
        image_size: Height and width that every image is brought to.
        workers: Processes that decode; 0 decodes in this one.
        device: Where batches are put.
    """

    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    name: str = "custom"
    split: str = "train"
    workers: int = 0
    device: torch.device = _CPU

    def to(self, device: str | torch.device) -> ImageStream:
        """The same data, batches put on `device`."""
        return replace(self, device=torch.device(device))

    def subset(self, which: int | Sequence[int] | Tensor) -> ImageStream:
        """As `ImageData.subset`."""
        index = _chosen(which, len(self))
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()), labels=self.labels[index])

    def _read(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = [part.tolist() for part in parts]
        files = DataLoader(_Files(self.paths, self.image_size), batch_sampler=chosen, num_workers=self.workers)
        for part, images in zip(parts, files, strict=True):
            yield images.to(self.device, non_blocking=True), self.labels[part.cpu()].to(self.device)
