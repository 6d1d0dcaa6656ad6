"""Labelled images, in memory or streamed from files, and the batches that training takes from them.

Images are uint8 (N, C, H, W) with H = W, labels int64 (N,), masks of objects bool (N, H, W). What is impossible is a
ValueError.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, Self

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms import functional as pil

from sdecor._bits import Bits
from sdecor.config import AUGMENTATIONS
from sdecor.processes import drawn, mine
from sdecor.registers import DATASETS, Between, OneOf


class _Marks(Protocol):
    """Where the objects of image files lie, as far as that is known: see `sdecor.objects.Objects`."""

    def __contains__(self, file: str) -> bool: ...

    def __call__(self, path: str, width: int, height: int, side: int) -> np.ndarray:
        """Pixels of the objects of an image file of that width and height, in the square of that side it becomes."""


_CPU = torch.device("cpu")
_TASK = 16  # images that a thread decodes at once
_PIECE = 1 << 22  # bytes of decoded images that a process hands over at once
_GREY = (128, 128, 128)  # stands for what is transparent: black objects and white ones can be seen on it
_TURNED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow looks for an orientation
_SCALES = {"1": 255, "L;2": 85, "L;4": 17}  # by which Pillow spreads such values, and not the transparent one


def permutation(n: int, seed: int = 0) -> Tensor:
    """Random order of ``0..n-1`` that depends on nothing but `n` and `seed`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def moments(images: Tensor | Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (at least 1/255) of each channel, in [0, 1] units; images may come in parts."""
    value, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    parts = [images] if isinstance(images, Tensor) else images
    counts = sum(torch.stack([c.flatten().bincount(minlength=256) for c in x.cpu().unbind(1)]) for x in parts)
    for count in torch.as_tensor(counts):
        share = count.double() / int(count.sum())
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
    x = x.movedim(1, -1)[index, rows[:, :, None], cols[:, None, :]].movedim(-1, 1)
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
    image_size: Any

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
    def _read(self, order: Tensor, size: int, masks: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield `size` images after another in this order, labels and, if they are asked for and known, masks."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether `batches_with_masks` gives masks."""

    @property
    @abstractmethod
    def with_objects(self) -> Self:
        """The images whose object is known."""

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
        index = index if len(index) else index.long()  # of an empty list torch makes floats
        return self._at(torch.arange(len(self))[index])

    @property
    def pass_size(self) -> int:
        """How many images a pass of a network takes at once where nothing else is asked for: 500, fewer above 64 px."""
        return max(1, min(500, 500 * 64**2 // int(self.image_size) ** 2))

    @property
    def colour(self) -> Tensor:
        """The mean colour, uint8 (C,)."""
        return torch.tensor(self.mean).mul(255).round().to(torch.uint8)

    def _paths_at(self, index: Tensor) -> tuple[str, ...]:
        return tuple(self.paths[i] for i in index.tolist()) if self.paths else ()

    def _statistics(self, x: Tensor) -> Iterator[Tensor]:
        return (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))

    def _normalize(self, images: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        mean, std = self._statistics(images)
        return images.to(torch.float32, memory_format=layout).div_(255).sub_(mean).div_(std)

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
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over ``(x, y)``: float32 normalized (B, C, H, W) and int64 (B,).

        The `generator` (torch's global one without) draws the order, if it is to `shuffle`, and for `augmented`: one
        state, one set of bits. A last batch may be smaller, unless `drop_last` leaves it out. `layout` is that of x in
        memory; files are decoded to ``torch.channels_last``, so that this one costs a stream nothing.
        """
        how: dict[str, Any] = {"shuffle": shuffle, "generator": generator, "augment": augment, "drop_last": drop_last}
        for x, y, _ in self._batches(batch_size, masks=False, layout=layout, **how):
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
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        at = _CPU if generator is None else generator.device
        order = torch.randperm(len(self), generator=generator, device=at) if shuffle else torch.arange(len(self))
        if drop_last:
            order = order[: len(order) // batch_size * batch_size]
        parts = [mine(part) for part in order.split(batch_size)]
        for images, y, mask in self._read(torch.cat(parts), max(len(parts[0]), 1), masks):
            if augment:  # the mask as one more channel, so that it goes where the pixels go
                images = images if mask is None else torch.cat([images, mask[:, None].to(images.dtype)], 1)
                images = augmented(images, augment, generator)
                mask, images = None if mask is None else images[:, -1].bool(), images[:, : self.channels]
            x = self._normalize(images, layout)
            del images  # while x is used, and while other processes start, which keep what there is then
            yield x, y, mask


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
    def with_objects(self) -> Self:
        """The images whose mask is not empty; none if there are no masks."""
        masks = self.object_masks
        return self.subset([] if masks is None else masks.flatten(1).any(1).nonzero()[:, 0])

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

    def _read(self, order: Tensor, size: int, masks: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        known = self.object_masks if masks else None
        for start in range(0, len(order), size):
            index = order[start : start + size].to(self.device)
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


def upright_size(path: str, *, whole: bool = False) -> tuple[int, int]:
    """Width and height of an image file, turned as its EXIF orientation says.

    They are read from its head, where an orientation that stands behind the pixels is not seen, or from the `whole`.
    """
    with _opened(path) as image:
        if whole:
            return _colours(image).size
        return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else (image.width, image.height)


def _orientation(image: Image.Image) -> int:
    turned: int = image.getexif().get(ExifTags.Base.Orientation, 1) if image.info.keys() & _TURNED else 1
    return turned


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
    turned = _orientation(image)
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
    paths: Sequence[str], size: int, small: dict[str, int] | None = None, objects: _Marks | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `decode_all`, and the pixels of the `objects`, bool (N, size, size): see `sdecor.objects`."""
    images, masks = _decode(paths, size, small, objects)
    squares = torch.from_numpy(images).movedim(-1, 1).contiguous()
    return squares, None if masks is None else torch.from_numpy(masks)


def _decode(
    paths: Sequence[str], size: int, small: dict[str, int] | None = None, objects: _Marks | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, size, size, 3), and masks; a thread per core, one if this is one of several processes that decode."""
    out = np.empty((len(paths), size, size, 3), np.uint8)
    masks = None if objects is None else np.empty((len(paths), size, size), bool)

    def fill(start: int) -> None:
        for i, path in enumerate(paths[start : start + _TASK], start):
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

    threads = 1 if get_worker_info() else os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(0, len(paths), _TASK)))
    return out, masks


@dataclass(frozen=True)
class _Decoder:
    """What a process needs to decode images of a stream: nothing of it grows with their number, but for `objects`."""

    root: str
    size: int
    objects: _Marks | None
    removed: tuple[Bits, ...]
    colour: tuple[int, ...]

    def __getitem__(self, piece: tuple[list[str], list[list[int]]]) -> tuple[Tensor, ...] | str:
        """Images (N, size, size, 3) by path and, for what was removed, by row, and masks; or the message of an error.

        A DataLoader would wrap an error in tracebacks.
        """
        paths, rows = piece
        try:
            images, masks = _decode([os.path.join(self.root, path) for path in paths], self.size, objects=self.objects)
            for gone, its in zip(self.removed, rows, strict=True):
                images[gone.at(its)] = self.colour
        except (ValueError, OSError) as error:
            return str(error)
        return tuple(torch.from_numpy(part) for part in (images, masks) if part is not None)


@dataclass(frozen=True, eq=False)
class ImageStream(_Images):
    """As `ImageData`, for image files too many to hold: decoded while training goes on.

    Every image is brought to a side of `image_size`; batches are put on `device`, where they are augmented and
    normalized; `paths` are relative to `root`; `objects` says where objects lie, as `sdecor.objects` reads it; pixels
    that are `removed` have the mean colour, whose masks are told apart by the rows of the images in them.

    The first batch is decoded in this process, since often it is the only one. For the others, `workers` processes
    start, if not 0, and end with the loop, however it ends. They decode ahead by a batch and two pieces each, of 4 MiB.
    One that is killed, for lack of memory say, raises ChildProcessError.
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
    objects: _Marks | None = None
    removed: tuple[tuple[Bits, Tensor], ...] = ()

    @property
    def has_masks(self) -> bool:
        """Whether the folder says where objects lie."""
        return self.objects is not None

    @property
    def with_objects(self) -> Self:
        """The images of which the folder says where the object lies."""
        return self.subset(
            [i for i, path in enumerate(self.paths) if self.objects is not None and path in self.objects]
        )

    def to(self, device: str | torch.device) -> ImageStream:
        """The same data, batches put on `device`."""
        return replace(self, device=torch.device(device))

    def _at(self, index: Tensor) -> Self:
        removed = tuple((gone, rows[index]) for gone, rows in self.removed)
        return replace(self, paths=self._paths_at(index), labels=self.labels[index], removed=removed)

    def _held(self) -> Iterator[Tensor | str]:
        yield self.labels
        yield torch.tensor([self.image_size, *(os.path.getsize(os.path.join(self.root, p)) for p in self.paths)])
        yield from self.paths
        if self.objects is not None:
            yield str(self.objects)
        for gone, rows in self.removed:
            yield gone.digest
            yield rows

    def _read(self, order: Tensor, size: int, masks: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        order, marks = order.cpu(), self.objects if masks else None
        removed, colour = tuple(gone for gone, _ in self.removed), tuple(self.colour.tolist())
        decoder = _Decoder(self.root, self.image_size, marks, removed, colour)
        copied: deque[torch.cuda.Event] = deque()
        with closing(self._pieces(order, size, decoder)) as pieces:
            for index in (order[start : start + size] for start in range(0, len(order), size)):
                if self.device.type == "cuda":  # no more than two batches are held until they are copied
                    copied.append(torch.cuda.current_stream(self.device).record_event())
                    if len(copied) > 1:
                        copied.popleft().synchronize()
                yield self._whole(pieces, index, marks is not None)

    def _whole(self, pieces: Iterator[Any], index: Tensor, masks: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """A batch, put together on the device."""
        shape, done = (len(index), self.image_size, self.image_size), 0
        images = torch.empty(*shape, 3, dtype=torch.uint8, device=self.device)
        known = torch.empty(shape, dtype=torch.bool, device=self.device) if masks else None
        while done < len(index):
            if isinstance(read := next(pieces), str):
                raise ValueError(read)
            piece = slice(done, done := done + len(read[0]))
            images[piece].copy_(read[0], non_blocking=True)
            if known is not None:
                known[piece].copy_(read[1], non_blocking=True)
        return images.movedim(-1, 1), self.labels[index].to(self.device, non_blocking=True), known

    def _pieces(self, order: Tensor, size: int, decoder: _Decoder) -> Generator[Any, None, None]:
        """What the decoder makes, in order, of the batches of this size or, by other processes, of parts of them."""
        here = order[:size] if self.workers else order
        yield from (decoder[piece] for piece in self._asked(here, size, size))
        if not len(rest := order[len(here) :]):
            return
        most = min(max(_PIECE // (3 * self.image_size**2), 1), size)
        pieces = math.ceil(min(size, len(rest)) / most)  # of a batch
        workers = min(self.workers, pieces * math.ceil(len(rest) / size))
        how: dict[str, Any] = {"num_workers": workers, "prefetch_factor": 1 + math.ceil(pieces / workers)}
        gpu = self.device.type == "cuda"
        dataset: Any = decoder
        asked: Any = self._asked(rest, size, most)
        # a generator of its own, as it would else take a draw from that of training
        files = DataLoader(dataset, None, sampler=asked, pin_memory=gpu, generator=torch.Generator(), **how)
        with torch.cuda.device(self.device) if gpu else nullcontext():
            running = iter(files)
        why = ""
        try:
            yield from running
        except (RuntimeError, OSError, EOFError) as error:  # the latter two come from one that is just ending
            why = f"{type(error).__name__}: {error}".splitlines()[0]  # its traceback would keep the processes
        finally:
            del running  # and with it the processes
        if why:
            what = f"a process that decodes images of {self.root} broke down"
            raise ChildProcessError(f"{what} ({why}); it may lack memory")

    def _asked(self, order: Tensor, size: int, most: int) -> Iterator[tuple[list[str], list[list[int]]]]:
        """Paths and rows of the images in this order, of at most so many at once, and of one batch each time."""
        for start in range(0, len(order), size):
            for piece in order[start : start + size].split(most):
                paths = [self.paths[i] for i in piece.tolist()]
                yield paths, [rows[piece].tolist() for _, rows in self.removed]


def checked_set(name: str, data: Any) -> ImageData | ImageStream:
    """The data, if they are of one of these classes."""
    if not isinstance(data, ImageData | ImageStream):
        make = "ImageData.from_tensors(images, labels) makes the first"
        raise ValueError(f"{name} must be ImageData or ImageStream, got {type(data).__name__}; {make}")
    return data
