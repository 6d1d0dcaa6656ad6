"""Labelled images, in memory or streamed from files, and the batches that training takes from them.

Images are uint8 (N, C, H, W) with H = W, labels int64 (N,), masks of objects bool (N, H, W). What is impossible is a
ValueError.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader
from torchvision.transforms import functional as pil

from sdecor.config import AUGMENTATIONS
from sdecor.processes import drawn, mine
from sdecor.registers import DATASETS, Between, OneOf

#: Pixels of the objects of an image file, by its path, its width and height, and the side of the square it becomes.
Marks = Callable[[str, int, int, int], np.ndarray]
_CPU = torch.device("cpu")
_GREY = (128, 128, 128)  # stands for what is transparent: black objects and white ones can be seen on it
_TURNED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow looks for an orientation
_SCALES = {"1": 255, "L;2": 85, "L;4": 17}  # by which Pillow spreads such values, and not the transparent one


def permutation(n: int, seed: int = 0) -> Tensor:
    """Random order of ``0..n-1`` that depends on nothing but `n` and `seed`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (at least 1/255) of each channel, in [0, 1] units."""
    value, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    for channel in images.cpu().unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float(share @ value))
        std.append(max(float((share @ (value - mean[-1]).square()).sqrt()), 1 / 255))
    return tuple(mean), tuple(std)


def augmented(x: Tensor, names: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
    """Change each image at random, in the order of this list, whatever that of the names.

    - ``flip``: left-right with probability 1/2;
    - ``crop``: a shift by up to H // 8 pixels, where black moves in at the border;
    - ``cutout``: a black square of side H // 2, centred on any pixel and cut at the border (arXiv:1708.04552).

    The `generator` draws on its own device: one on the CPU gives the same images on every device.
    """
    OneOf(AUGMENTATIONS).check("augmentation", tuple(names))
    b, _, h, w = x.shape
    at = _CPU if generator is None else generator.device
    rows, cols = torch.arange(h, device=x.device).expand(b, h), torch.arange(w, device=x.device).expand(b, w)
    inside = (rows[:, :, None], cols[:, None, :])
    if "flip" in names:
        flipped = drawn(torch.rand, (b, 1), generator=generator, device=at).to(x.device) < 0.5
        cols = torch.where(flipped, w - 1 - cols, cols)
    if "crop" in names:
        reach = max(h // 8, 1)
        x = pad(x, (reach, reach, reach, reach))
        below = partial(torch.randint, 2 * reach + 1)
        shift = drawn(below, (2, b, 1), along=1, generator=generator, device=at).to(x.device)
        rows, cols = rows + shift[0], cols + shift[1]
    index = torch.arange(b, device=x.device)[:, None, None]
    x = x.movedim(1, -1)[index, rows[:, :, None], cols[:, None, :]].movedim(-1, 1).contiguous()
    if "cutout" in names:
        side = max(h // 2, 1)
        centres = (drawn(partial(torch.randint, n), (b, 1, 1), generator=generator, device=at) for n in (h, w))
        starts = (centre.to(x.device) - side // 2 for centre in centres)
        hole = [(start <= place) & (place < start + side) for start, place in zip(starts, inside, strict=True)]
        x = x.masked_fill((hole[0] & hole[1])[:, None], 0)
    return x


class _Images(ABC):
    """What both kinds have in common; their batches are equal, bit for bit."""

    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    paths: tuple[str, ...]

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

    @abstractmethod
    def _read(self, parts: list[Tensor], masks: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield images, labels and, if they are asked for and known, masks at each of the index vectors `parts`."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether `batches_with_masks` gives masks."""

    @abstractmethod
    def _at(self, index: Tensor) -> Self:
        """The images at these indices, from 0 on, on the CPU."""

    @abstractmethod
    def _held(self) -> Iterator[Tensor | str]:
        """All that `digest` tells apart, beside classes and scale."""

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with what it holds, equal on every device.

        In memory these are images, labels, masks, classes, mean and std; of a stream, the sizes of the files stand for
        the images, and their `paths` count too. It is found out once.
        """
        total = hashlib.blake2b(repr((self.classes, self.mean, self.std)).encode(), digest_size=8)
        for part in self._held():
            if isinstance(part, Tensor):
                total.update(repr((part.dtype, part.shape)).encode())
                total.update(part.detach().cpu().contiguous().numpy().data)
            else:
                total.update(os.fsencode(part) + b"\0")
        return total.hexdigest()

    def subset(self, which: int | Sequence[int] | Tensor) -> Self:
        """The images at these indices; a number draws that many by a constant seed (nested, order kept)."""
        if isinstance(which, int):
            Between(0).check("the number of images", which)
            which = permutation(len(self))[:which].sort().values
        index = torch.as_tensor(which).cpu()
        return self._at(torch.arange(len(self))[index])

    def _paths_at(self, index: Tensor) -> tuple[str, ...]:
        return tuple(self.paths[i] for i in index.tolist()) if self.paths else ()

    def _statistics(self, x: Tensor) -> Iterator[Tensor]:
        return (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))

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

        The `generator` (torch's global one without) draws the order, if it is to `shuffle`, and for `augmented`: one
        state, one set of bits. A last batch may be smaller, unless `drop_last` leaves it out.
        """
        how: dict[str, Any] = {"shuffle": shuffle, "generator": generator, "augment": augment, "drop_last": drop_last}
        for x, y, _ in self._batches(batch_size, masks=False, **how):
            yield x, y

    def batches_with_masks(self, batch_size: int, **how: Any) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The same with the pixels of the objects (B, H, W), bool, changed as the images are; None if not known."""
        yield from self._batches(batch_size, masks=True, **how)

    def _batches(
        self,
        batch_size: int,
        masks: bool,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Sequence[str] = (),
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        at = _CPU if generator is None else generator.device
        order = torch.randperm(len(self), generator=generator, device=at) if shuffle else torch.arange(len(self))
        parts = [part for part in order.split(batch_size) if len(part) >= (batch_size if drop_last else 1)]
        for images, y, mask in self._read([mine(part) for part in parts], masks):
            if augment:  # the mask as one more channel, so that it goes where the pixels go
                both = images if mask is None else torch.cat([images, mask[:, None].to(images.dtype)], 1)
                both = augmented(both, augment, generator)
                images, mask = both[:, : self.channels], None if mask is None else both[:, -1].bool()
            yield self._normalize(images), y, mask


@dataclass(frozen=True, eq=False)
class ImageData(_Images):
    """One split of a labelled image set, in memory, on any device.

    Its `mean` and `std` are those of each channel of the *training* split, in [0, 1] units; `masks` are the pixels of
    the object where they are known; `name` is what results should call the data set; `paths` are the files that the
    images come from, relative to the folder of the data set, if they come from files. Masks of your own are set by
    ``dataclasses.replace(data, masks=masks)``, such as those that `sdecor.measures.localization.box_masks` makes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masks: Tensor | None = None
    name: str = "custom"
    split: str = "train"
    paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.masks is not None:
            if not isinstance(self.masks, Tensor):
                raise ValueError(f"masks must be a tensor, got {type(self.masks).__name__}; use torch.as_tensor")
            if self.masks.dtype != torch.bool and not ((self.masks == 0) | (self.masks == 1)).all():
                raise ValueError("masks must be bool, or hold nothing but 0 and 1")
            if self.masks.shape != (wanted := self.images[:, 0].shape):
                raise ValueError(f"masks must have shape {tuple(wanted)}, got {tuple(self.masks.shape)}")
            object.__setattr__(self, "masks", self.masks.to(self.images.device, torch.bool))

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

        Images may also be floats in [0, 1], which are rounded to 255 steps. Classes are called ``"0", "1", ...`` up to
        the largest label by default. `train` is the training split, whose classes, mean and std this split takes over;
        None if this is it. Images and masks are brought to a side of `image_size` pixels, without aliasing.

        >>> data = ImageData.from_tensors(torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> len(data), data.num_classes
        (6, 3)
        """
        if images.ndim != 4 or not len(images) or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images must have shape (N, C, H, W) with N > 0 and H = W, got {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need labels of shape ({len(images)},), got {tuple(labels.shape)}")
        if masks is not None and masks.shape != images[:, 0].shape:
            raise ValueError(f"masks must have shape {tuple(images[:, 0].shape)}, got {tuple(masks.shape)}")
        if images.is_floating_point():
            if n := len(bad := (~images.isfinite()).nonzero()):
                first = f"(first at index {int(bad[0, 0])})"
                raise ValueError(f"images hold {n} non-finite values {first}; clean them before training")
            low, high = float(images.min()), float(images.max())
            if low < 0 or high > 1:
                raise ValueError(f"float images must lie in [0, 1], got {low:g} to {high:g}; rescale or pass uint8")
            images = images.mul(255).round().to(torch.uint8)
        elif images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 or float, got {images.dtype}")
        if image_size is not None and image_size != images.shape[-1]:
            pixels = interpolate(images.float(), (image_size, image_size), mode="bilinear", antialias=True)
            images = pixels.round().clamp(0, 255).to(torch.uint8)
            if masks is not None:
                masks = interpolate(masks[:, None].float(), image_size, mode="nearest-exact")[:, 0]
        labels = labels.long()
        if train is not None:
            classes = train.classes
        elif classes is None:
            classes = [str(i) for i in range(max(int(labels.max()) + 1, 1))]
        if len(wrong := ((labels < 0) | (labels >= len(classes))).nonzero()):
            i = int(wrong[0])
            raise ValueError(f"labels must lie in 0..{len(classes) - 1}, got {int(labels[i])} at index {i}")
        mean, std = moments(images) if train is None else (train.mean, train.std)
        if len(mean) != images.shape[1]:
            raise ValueError(f"images have {images.shape[1]} channels, those of the training split have {len(mean)}")
        return cls(images, labels, tuple(classes), mean, std, masks, name, split)

    @property
    def object_masks(self) -> Tensor | None:
        """Pixels of the objects: exact ones, or the ink of a data set of ink, or None if not known."""
        ink = self.masks is None and self.name in DATASETS and DATASETS[self.name].ink
        return (self.images > 0).any(1) if ink else self.masks

    @property
    def has_masks(self) -> bool:
        """Whether there are `object_masks`."""
        return self.object_masks is not None

    @property
    def image_size(self) -> int:
        """Height, equal to the width, in pixels."""
        return self.images.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.images.device

    def _each(self, change: Callable[[Tensor], Tensor], **kept: Any) -> Self:
        masks = None if self.masks is None else change(self.masks)
        return replace(self, images=change(self.images), labels=change(self.labels), masks=masks, **kept)

    def to(self, device: str | torch.device) -> ImageData:
        """The same data on `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def _at(self, index: Tensor) -> Self:
        return self._each(lambda tensor: tensor[index.to(self.device)], paths=self._paths_at(index))

    def _held(self) -> Iterator[Tensor | str]:
        yield from (part for part in (self.images, self.labels, self.masks) if part is not None)

    def normalized(self, indices: slice | Sequence[int] | Tensor = slice(None)) -> Tensor:
        """Images as float32 (B, C, H, W): ``(images / 255 - mean) / std``."""
        return self._normalize(self.images[indices])

    def _read(self, parts: list[Tensor], masks: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        known = self.object_masks if masks else None
        for index in (part.to(self.device) for part in parts):
            yield self.images[index], self.labels[index], None if known is None else known[index]


class _Unfit(Exception):
    """Says why an image that can be read is of no use."""


def _open(path: str) -> ImageFile:
    try:
        return Image.open(path)
    except UnidentifiedImageError:  # another thread may have been about to load what reads this one
        Image.init()
        return Image.open(path)


@contextmanager
def _opened(path: str) -> Iterator[ImageFile]:
    try:
        with _open(path) as image:
            yield image
    except Exception as error:  # a damaged file makes Pillow raise nearly everything
        why = str(error) if isinstance(error, _Unfit) else type(error).__name__
        raise ValueError(f"cannot read image {path} ({why}); remove or replace it") from error


def side_of(path: str) -> int:
    """Short side of an image file in pixels."""
    with _opened(path) as image:
        return min(image.size)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits divided by 257 and rounded, with the alpha that a transparent value means."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey


def _depths(image: ImageFile) -> list[int]:
    """Bits less one of each component of a JPEG 2000 file, plus 128 if it is signed, from the head of its stream."""
    with open(image.filename, "rb") as file:
        content = file.read()
    head = content[content.find(b"\xff\x4f\xff\x51") :]
    return [head[42 + 3 * i] for i in range(int.from_bytes(head[40:42]))]


def _colours(image: ImageFile) -> Image.Image:
    """RGB of 8 bits, upright and without transparency; an image for which these are not certain is `_Unfit`."""
    tags, args = getattr(image, "tag_v2", {}), image.tile[0][3] if image.tile else None
    stored = str(args[0] if isinstance(args, tuple) and args else args)  # how values lie in the file, by Pillow's name
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # those of cameras begin with the image
        raise _Unfit(f"{frames} frames or pages; save one of them")
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    inverted = wide and tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    signed = 2 in tags.get(ExifTags.Base.SampleFormat, ())
    if (image.mode in ("I", "F") and not wide) or stored == "I;12" or inverted or signed:
        raise _Unfit(f"mode {image.mode}, stored as {stored}, has no certain range; save it with 8 or 16 bits")
    if image.format == "JPEG2000" and _depths(image) not in ([7], [15], [7, 7], [7, 7, 7], [7, 7, 7, 7]):
        raise _Unfit("JPEG 2000 with other than 8 bits, or 16 of grey, is not read rightly; save it as PNG")
    deep = tags.get(ExifTags.Base.SamplesPerPixel, 1) > 1 and 16 in tags.get(ExifTags.Base.BitsPerSample, ())
    if deep and tags.get(ExifTags.Base.PlanarConfiguration) == 2 and image.tile and image.tile[0][0] == "raw":
        raise _Unfit("TIFF with 16 bits and a plane for each colour is not read rightly; save it as PNG")
    transparent = image.has_transparency_data
    if transparent and stored == "RGB;16B":
        raise _Unfit("mode RGB with 16 bits and a transparent colour; save it with 8 bits or an alpha channel")
    if transparent and stored in _SCALES:
        image.info["transparency"] = min(image.info["transparency"] * _SCALES[stored], 255)
    image.load()
    # read after the pixels, as it may lie behind them; of a TIFF, Pillow has turned it
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) if image.info.keys() & _TURNED else 1
    plain: Image.Image = _eight_bits(image) if wide else image
    if transparent:
        plain = plain.convert("RGBA")
        alpha, backdrop = plain.getchannel("A"), Image.new("RGB", plain.size, _GREY)
        seen = Image.composite(plain.convert("RGB"), backdrop, alpha)
        if alpha.getextrema() != (255, 255) and seen.getextrema() == backdrop.getextrema():
            raise _Unfit(f"mode {image.mode}, and nothing of it can be seen on grey, which stands for transparency")
        plain = seen
    plain = plain.convert("RGB")
    if turned != 1:
        plain.info.clear()
        plain.getexif()[ExifTags.Base.Orientation] = turned
        ImageOps.exif_transpose(plain, in_place=True)
    return plain


def decode_all(paths: Sequence[str], size: int, small: dict[str, int] | None = None) -> Tensor:
    """Read image files, a thread per core: RGB (N, 3, size, size), resized by the short side and cropped to the centre.

    Images are turned upright as their EXIF orientation says. Grey values of 16 bits are divided by 257; of colours with
    16 bits Pillow keeps the upper 8. What is transparent lies on mid grey, (128, 128, 128). Smaller images are
    enlarged; `small` takes the short sides of those enlarged more than eightfold, by path. A file that is no readable
    image, or whose values are not certain (floats, 12 or 32 bits, several frames), is named.
    """
    return decode_with_masks(paths, size, small)[0]


def decode_with_masks(
    paths: Sequence[str], size: int, small: dict[str, int] | None = None, objects: Marks | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `decode_all`, and the pixels of the `objects`, bool (N, size, size): see `sdecor.objects`."""
    out = np.empty((len(paths), size, size, 3), np.uint8)
    masks = None if objects is None else np.empty((len(paths), size, size), bool)

    def fill(start: int) -> None:
        for i, path in enumerate(paths[start : start + 64], start):
            with _opened(path) as image:
                square = _colours(image)
                upright = square.size
                short, long = sorted(upright)
                if short * 8 < size and small is not None:
                    small[path] = short
                if size * size * long > short * 2**26:
                    raise _Unfit(f"{square.width} x {square.height} pixels are too long a strip")
                if square.size != (size, size):
                    square = pil.center_crop(pil.resize(square, size), [size, size])
                out[i] = np.array(square)
            if objects is not None and masks is not None:
                masks[i] = objects(path, *upright, size)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(0, len(paths), 64)))
    images = torch.from_numpy(out).movedim(-1, 1).contiguous()
    return images, None if masks is None else torch.from_numpy(masks)


def _decoded_or_said(paths: Sequence[str], size: int, objects: Marks | None) -> tuple[Tensor, Tensor | None] | str:
    """Images and masks, or the message of the error, since a DataLoader wraps errors of its processes in tracebacks."""
    try:
        return decode_with_masks(paths, size, objects=objects)
    except ValueError as error:
        return str(error)


@dataclass(frozen=True, eq=False)
class ImageStream(_Images):
    """As `ImageData`, for image files too many to hold: decoded by a DataLoader while training goes on.

    Every image is brought to a side of `image_size`; `workers` processes decode, 0 decodes in this one; batches are put
    on `device`; `paths` are relative to `root`; `objects` says where objects lie, as `sdecor.objects` reads it.
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
    root: str = ""
    objects: Marks | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the folder says where objects lie."""
        return self.objects is not None

    def to(self, device: str | torch.device) -> ImageStream:
        """The same data, batches put on `device`."""
        return replace(self, device=torch.device(device))

    def _at(self, index: Tensor) -> Self:
        return replace(self, paths=self._paths_at(index), labels=self.labels[index])

    def _held(self) -> Iterator[Tensor | str]:
        yield self.labels
        yield torch.tensor([self.image_size, *(os.path.getsize(os.path.join(self.root, p)) for p in self.paths)])
        yield from self.paths
        if self.objects is not None:
            yield str(self.objects)

    def _read(self, parts: list[Tensor], masks: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        chosen: Any = [[os.path.join(self.root, self.paths[i]) for i in part.tolist()] for part in parts]
        decode = partial(_decoded_or_said, size=self.image_size, objects=self.objects if masks else None)
        files: Iterable[Any] = DataLoader(chosen, None, collate_fn=decode, num_workers=self.workers)
        for part, read in zip(parts, files, strict=True):
            if isinstance(read, str):
                raise ValueError(read)
            images, mask = read[0].to(self.device, non_blocking=True), read[1]
            known = None if mask is None else mask.to(self.device, non_blocking=True)
            yield images, self.labels[part.cpu()].to(self.device), known


def checked_set(name: str, data: Any) -> ImageData | ImageStream:
    """The data, if they are of one of these classes."""
    if not isinstance(data, ImageData | ImageStream):
        make = "ImageData.from_tensors(images, labels) makes the first"
        raise ValueError(f"{name} must be ImageData or ImageStream, got {type(data).__name__}; {make}")
    return data
