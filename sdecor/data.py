"""Data sets by name, with fixed splits that keep the test images out of every choice."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import datasets
from torchvision.datasets.folder import make_dataset

from sdecor import shapes
from sdecor.images import ImageData, ImageStream, decode_all, moments, permutation, side_of
from sdecor.sources import CALTECH, CIFAR, MNIST, available, check, data_root, fetch, provide

SPLITS = ("train", "val", "test")
EXTENSIONS = (".png", ".jpg", ".jpeg")
_DIGITS = tuple("0123456789")
_SAMPLE = 2048  # training images whose pixels give mean and std of sets that are decoded from files


@dataclass(frozen=True)
class _Request:
    """What `load` was asked for."""

    root: Path
    split: str
    image_size: int | None
    limit: int | None
    seed: int
    options: dict[str, Any]


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> ImageData | ImageStream:
    """Load one split of a data set.

    Args:
        name: ``mnist``, ``cifar10``, ``caltech101``, ``digits``, ``shapes``, or an image folder: its path, or
            ``folder:PATH``, with ``PATH/train/CLASS/*.png|jpg|jpeg`` and perhaps ``val`` and ``test`` beside ``train``.
        root: Data root, see `data_root`.
        split: ``train``, ``val`` or ``test``. Where the set has no validation split, one is drawn from its training
            images by a constant seed.
        image_size: Side in pixels; by default 28 (mnist, digits), 32 (cifar10, shapes), 96 (caltech101), and the
            short side of its first image, at most 224, for a folder.
        limit: Keep so many images, drawn by a constant seed.
        seed: Of the generator of ``shapes``; nothing else depends on it.
        **options: ``download`` (mnist, cifar10, caltech101; default True: fetch what is missing); ``samples``,
            ``cue_strength``, ``cue_copies`` (shapes, see `sdecor.shapes.generate`); ``memory_limit`` (folder; bytes of
            decoded images, default 2 GiB, above which it is streamed) and ``workers`` (folder; decoding processes).

    Raises:
        ValueError: If a name, split or option is unknown or impossible, or a file is broken.
        FileNotFoundError: If the data is absent and cannot be downloaded.

    >>> data = load("shapes", split="val")
    >>> len(data), data.channels, data.image_size, data.num_classes
    (500, 3, 32, 8)
    """
    kind = "folder" if name.startswith("folder:") or (name not in _LOADERS and Path(name).is_dir()) else name
    if kind not in _LOADERS or name == "folder":
        known = ", ".join(n for n in _LOADERS if n != "folder")
        raise ValueError(f"unknown data set '{name}'; known: {known}, or an image folder (folder:PATH)")
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    loader, allowed = _LOADERS[kind]
    for option in options:
        if option not in allowed:
            raise ValueError(f"data set '{name}' has no option '{option}'; it has {', '.join(allowed) or 'none'}")
    for argument, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    where = Path(name.removeprefix("folder:")).expanduser() if kind == "folder" else data_root(root)
    data = loader(_Request(where, split, image_size, limit, seed, options))
    return data if limit is None or limit >= len(data) else data.subset(limit)


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-1] == size:
        return images
    x = interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _in_memory(
    request: _Request, name: str, classes: Sequence[str], parts: dict[str, tuple[Tensor, Tensor]]
) -> ImageData:
    """The asked part, resized, with the statistics of the training part at that size."""
    mean, std = moments(_resized(parts["train"][0], request.image_size))
    images, labels = parts[request.split]
    images = _resized(images, request.image_size)
    return ImageData(images, labels.long(), tuple(classes), mean, std, name=name, split=request.split)


def _divided(images: Tensor, labels: Tensor, train: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first `train` of a constant permutation for training, the rest for validation."""
    order = permutation(len(labels))
    index = {"train": order[:train], "val": order[train:]}
    return {split: (images[i], labels[i]) for split, i in index.items()}


def _digits(request: _Request) -> ImageData:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(source.target)
    order = torch.split(permutation(len(labels)), [1000, 297, 500])
    parts = {split: (images[i], labels[i]) for split, i in zip(SPLITS, order, strict=True)}
    return _in_memory(replace(request, image_size=request.image_size or 28), "digits", _DIGITS, parts)


def _shapes(request: _Request) -> ImageData:
    options = {"samples": {"train": 2000, "val": 500, "test": 1000}[request.split], **request.options}
    seed = 3 * request.seed + SPLITS.index(request.split)  # no two splits of any seeds share a stream
    images, labels, masks, _ = shapes.generate(**options, image_size=request.image_size or 32, seed=seed)
    return ImageData(images, labels, shapes.CLASSES, shapes.MEAN, shapes.STD, masks, "shapes", request.split)


def _mnist(request: _Request) -> ImageData:
    provide("mnist", request.root, download=request.options.get("download", True))
    for name, (magic, expected) in MNIST.items():
        path = request.root / "MNIST" / "raw" / name
        with path.open("rb") as file:
            found = int.from_bytes(file.read(4), "big")
        size = path.stat().st_size
        if size >= 4 and found != magic:
            raise ValueError(f"{path} has magic number {found:#x} instead of {magic:#x}; delete it and fetch again")
        if size != expected:
            what = "is truncated" if size < expected else "is too long"
            raise ValueError(f"{path} {what}: {size} bytes instead of {expected}; delete it and fetch again")
    source = datasets.MNIST(str(request.root))
    parts = _divided(source.data[:, None], source.targets, 50_000)
    if request.split == "test":
        source = datasets.MNIST(str(request.root), train=False)
        parts["test"] = (source.data[:, None], source.targets)
    return _in_memory(request, "mnist", _DIGITS, parts)


def _cifar10(request: _Request) -> ImageData | ImageStream:
    provide("cifar10", request.root, download=request.options.get("download", True))
    if not (request.root / CIFAR).is_dir():  # the copy as JPEG files is another data set: its name says so
        files, labels, classes = _folder_files(request.root / "cifar10" / "train")
        order = permutation(len(labels))
        chosen = {"train": order[:45_000].tolist(), "val": order[45_000:].tolist()}
        parts = {split: ([files[i] for i in index], labels[index]) for split, index in chosen.items()}
        parts["test"] = _folder_files(request.root / "cifar10" / "test", classes)[:2]
        return _from_files(request, "cifar10-jpeg", classes, parts, request.image_size or 32)
    try:
        sources = [datasets.CIFAR10(str(request.root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f"{request.root / CIFAR} is incomplete or corrupt; delete it and fetch again") from error
    (images, labels), test = ((torch.from_numpy(s.data).movedim(-1, 1), torch.tensor(s.targets)) for s in sources)
    return _in_memory(request, "cifar10", sources[0].classes, {**_divided(images, labels, 45_000), "test": test})


def _caltech101(request: _Request) -> ImageData | ImageStream:
    """Of each class 25 images for training, 5 for validation, and up to 50 of the others for the test."""
    provide("caltech101", request.root, download=request.options.get("download", True))
    files, labels, classes = _folder_files(request.root / CALTECH, without="BACKGROUND_Google")
    index: dict[str, list[int]] = {split: [] for split in SPLITS}
    for c, name in enumerate(classes):
        own = (labels == c).nonzero()[:, 0]
        if len(own) < 31:
            raise ValueError(f"{request.root / CALTECH / name} holds {len(own)} images, Caltech-101 has at least 31")
        own = own[permutation(len(own), seed=c)][:80]
        for split, part in zip(SPLITS, torch.split(own, [25, 5, len(own) - 30]), strict=True):
            index[split] += part.tolist()
    parts = {split: ([files[i] for i in chosen], labels[chosen]) for split, chosen in index.items()}
    return _from_files(request, "caltech101", classes, parts, request.image_size or 96)


def _folder(request: _Request) -> ImageData | ImageStream:
    root, split = request.root, request.split
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist")
    files, labels, classes = _folder_files(root / "train")
    size = request.image_size or min(224, side_of(files[0]))
    parts = {"train": (files, labels)}
    for other in ("val", "test"):
        if (root / other).is_dir():
            parts[other] = _folder_files(root / other, classes)[:2]
    if "val" not in parts:
        if len(files) < 2:
            raise ValueError(f"{root / 'train'} holds 1 image; at least 2 are needed, one to validate on")
        order, held = permutation(len(labels)), max(1, len(labels) // 10)
        for name, index in (("val", order[:held]), ("train", order[held:])):
            parts[name] = ([files[i] for i in index.tolist()], labels[index])
    if split not in parts:
        raise FileNotFoundError(f"image folder {root} has no test split; put images in {root / 'test'}/CLASS")
    return _from_files(request, f"folder:{root.name}", classes, parts, size)


def _folder_files(
    folder: Path, classes: Sequence[str] | None = None, *, without: str = ""
) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """Sorted image files under ``folder/CLASS``, their labels, and the classes: those found, or `classes` if given."""
    inside = folder.iterdir() if folder.is_dir() else ()
    found = [p.name for p in inside if p.is_dir() and p.name != without and not p.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} holds no class folders; put the images in {folder}/CLASS ({', '.join(EXTENSIONS)})")
    names = tuple(sorted(found) if classes is None else classes)
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"{folder / unknown[0]} is a class that the training images lack")
    pairs = make_dataset(folder, {c: i for i, c in enumerate(names)}, EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    for c, count in zip(names, counts, strict=True):
        if c in found and not count:
            raise ValueError(f"{folder / c} holds no images ({', '.join(EXTENSIONS)}); add some or delete it")
    return [path for path, _ in pairs], labels, names


@lru_cache(maxsize=6)
def _decoded(files: tuple[str, ...], size: int) -> Tensor:
    return decode_all(files, size)  # kept, because a grid loads the same set for every run


def _from_files(
    request: _Request, name: str, classes: Sequence[str], parts: dict[str, tuple[list[str], Tensor]], size: int
) -> ImageData | ImageStream:
    """The asked part, in memory if it fits; mean and std from a constant sample of the training part."""
    own = name.startswith("folder:")
    read = decode_all if own else _decoded
    some = permutation(len(parts["train"][0]))[:_SAMPLE].tolist()
    mean, std = moments(read(tuple(parts["train"][0][i] for i in some), size))
    files, labels = parts[request.split]
    if request.limit is not None and request.limit < len(files):  # before decoding; the same choice as `subset` makes
        chosen = permutation(len(files))[: request.limit].sort().values
        files, labels = [files[i] for i in chosen.tolist()], labels[chosen]
    names, split = tuple(classes), request.split
    if own and len(files) * 3 * size**2 > request.options.get("memory_limit", 2 << 30):
        workers = request.options.get("workers", min(4, os.cpu_count() or 1))
        return ImageStream(tuple(files), labels, names, mean, std, size, name, split, workers)
    return ImageData(read(tuple(files), size), labels, names, mean, std, name=name, split=split)


_LOADERS: dict[str, tuple[Callable[[_Request], ImageData | ImageStream], tuple[str, ...]]] = {
    "mnist": (_mnist, ("download",)),
    "cifar10": (_cifar10, ("download",)),
    "caltech101": (_caltech101, ("download",)),
    "digits": (_digits, ()),
    "shapes": (_shapes, ("samples", "cue_strength", "cue_copies")),
    "folder": (_folder, ("memory_limit", "workers")),
}

__all__ = ["SPLITS", "ImageData", "ImageStream", "available", "check", "data_root", "fetch", "load"]
