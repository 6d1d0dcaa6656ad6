"""Data sets by name, with fixed splits that keep the test images out of every choice.

A data set is a function that `dataset` enters: from a `Request`, and options of its own, to one split. Ten lines make
another one; `load` brings its images to the asked size and scales them as the training split is scaled::

    @dataset(classes=("rising", "falling"), size=16, licence="MIT", source="computed", cite="this file")
    def ramps(request: Request, *, steep: Annotated[float, Between(0, 1)] = 0.5) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(3 * request.seed + SPLITS.index(request.split))
        labels = torch.randint(2, (200,), generator=draw)
        ramp = torch.linspace(-steep / 2, steep / 2, 16) * (1 - 2 * labels[:, None])
        return torch.rand(200, 1, 16, 16, generator=draw) / 4 + ramp[:, None, None, :] / 2 + 0.3, labels
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median_low
from typing import Annotated, Any

import torch
from torch import Tensor
from torchvision import datasets

from sdecor._files import IMAGES, files_below, inside, is_image
from sdecor.config import checked_data
from sdecor.images import ImageData, ImageStream, decode_with_masks, moments, permutation, side_of
from sdecor.objects import Objects, read_objects
from sdecor.registers import DATASETS, Between, Dataset, OneOf, WrongType
from sdecor.shapes import CLASSES, MEAN, STD, Copies, Strength, generate
from sdecor.sources import available, check, data_root, fetch, provide

SPLITS = ("train", "val", "test")
_MEANT = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
CIFAR = "cifar-10-batches-py"
CALTECH = "caltech101/101_ObjectCategories"
#: Files of MNIST under MNIST/raw: magic number, size in bytes, SHA-256 sum.
MNIST = {
    "train-images-idx3-ubyte": (0x803, 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (0x801, 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (0x803, 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (0x801, 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
#: Sizes in bytes of the files of CIFAR-10 under cifar-10-batches-py.
_BATCHES = {
    **{"data_batch_1": 31_035_704, "data_batch_2": 31_035_320, "data_batch_3": 31_035_999, "data_batch_4": 31_035_696},
    **{"data_batch_5": 31_035_623, "test_batch": 31_035_526, "batches.meta": 158},
}
_LISTED = datasets.CIFAR10.train_list + datasets.CIFAR10.test_list
Files = list[tuple[str, int]]  # paths, and labels
Parts = dict[str, Files]
Samples = Annotated[int | None, Between(1)]
Workers = Annotated[int | None, Between(0)]

dataset = DATASETS.register
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a data set is asked for.

    `root` is the data root, or the image folder; `image_size` the side asked for, else the data set's own, or None if
    that depends on its files. `load` keeps `limit` images, as `ImageData.subset` does; a data set may give only these.
    `seed` is for images that are drawn.
    """

    root: Path
    split: str
    image_size: int | None
    limit: int | None
    seed: int


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    limit: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    **options: Any,
) -> ImageData | ImageStream:
    """Load one split (``train``, ``val`` or ``test``) of a data set.

    `name` is in `sdecor.registers.DATASETS`, or an image folder: its path, or ``folder:PATH``, with images in
    ``PATH/train/CLASS`` and perhaps ``val`` and ``test`` beside ``train``. A missing validation split is
    drawn from the training images, and from those of any split `per_class` images of each class and `limit` images of
    these or of all, by constant seeds; `seed` is for sets that are drawn themselves, such as ``shapes``. The side
    `image_size` is by default that of the data set, and for a folder the median of the short sides of 64 training
    images, drawn by a constant seed, at most 224; smaller images are enlarged. `root` is as `data_root` takes it;
    ``sdecor list datasets NAME`` shows the `options`.

    Every file below a class folder counts whose suffix is in `sdecor._files.IMAGES`; `decode_all` says how it is read.
    Files that are no images are left out with a warning, and so are folders that are neither a split nor called
    ``masks``. Hidden files and what systems and tools leave, such as ``Thumbs.db``, are no data.

    What is unknown, impossible or broken is a ValueError; data that is absent and cannot be downloaded a
    FileNotFoundError; and a data set that gives something else than images and labels a TypeError.

    >>> data = load("shapes", split="val")
    >>> len(data), data.channels, data.image_size, data.num_classes
    (500, 3, 32, 8)
    """
    sized = {} if image_size is None else {"image_size": image_size}
    entry, folder, checked = checked_data(name, limit, {**sized, **options})
    OneOf(SPLITS).check("split", split)
    all_of = limit if per_class is None else None
    request = Request(folder or data_root(root), split, checked.pop("image_size"), all_of, seed)
    data = _completed(entry, request, checked)
    if per_class is not None:
        data = data.subset(_of_each(data.labels.cpu(), per_class))
    return data if limit is None or limit >= len(data) else data.subset(limit)


def _of_each(labels: Tensor, count: int) -> Tensor:
    """Indices, in order, of so many images of each class, drawn by a constant seed; ValueError if one has fewer."""
    Between(1).check("per_class", count)
    order = permutation(len(labels))
    chosen = [order[labels[order] == c][:count] for c in labels.unique()]
    if (fewest := min(map(len, chosen))) < count:
        raise ValueError(f"per_class={count}, but there is a class with {fewest} images")
    return torch.cat(chosen).sort().values


def _completed(entry: Dataset, request: Request, options: dict[str, Any]) -> ImageData | ImageStream:
    """The split; if it comes as tensors, with the classes of the entry and the statistics of the training split."""
    given = entry.function(request, **options)
    if isinstance(given, ImageData | ImageStream):
        return given
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        wanted = "ImageData, ImageStream, (images, labels) or (images, labels, masks)"
        raise WrongType(f"data set '{entry.name}' must give {wanted}, it gave {type(given).__name__}")
    images, labels, masks = (*given, None)[:3]
    whole, size, split = replace(request, split="train", limit=None), request.image_size, request.split
    train = None if split == "train" else _completed(entry, whole, options)
    classes = tuple(map(str, range(entry.classes))) if isinstance(entry.classes, int) else entry.classes
    return ImageData.from_tensors(
        images, labels, classes=classes or None, masks=masks, train=train, image_size=size, name=entry.name, split=split
    )


def _divided(images: Tensor, labels: Tensor, split: str, train: int) -> tuple[Tensor, Tensor]:
    """The first `train` of a constant permutation for training, the rest for validation; a test split as it is."""
    if split == "test":
        return images, labels
    order = permutation(len(labels))
    index = order[:train] if split == "train" else order[train:]
    return images[index], labels[index]


@dataset(
    "mnist",
    label="MNIST",
    classes=10,
    size=28,
    ink=True,
    source="https://ossci-datasets.s3.amazonaws.com/mnist/ (by torchvision.datasets.MNIST)",
    licence="research use",
    cite="LeCun et al.: Gradient-based learning applied to document recognition, 1998, doi:10.1109/5.726791",
    download=lambda root: datasets.MNIST(root, download=True),
    present=lambda root: (root / "MNIST" / "raw").is_dir(),
    layouts=(
        {
            "folder": "MNIST/raw",
            "algorithm": "sha256",
            "files": {name: e[2] for name, e in MNIST.items()},
            "bytes": {name: e[1] for name, e in MNIST.items()},
            "starts": {name: e[0].to_bytes(4) for name, e in MNIST.items()},
        },
    ),
)
def mnist(request: Request, *, download: bool = True) -> tuple[Tensor, Tensor]:
    """Handwritten digits, grey: 50,000 / 10,000 / 10,000 images; `download` fetches what is missing."""
    provide("mnist", request.root, download=download)
    try:
        source = datasets.MNIST(str(request.root), train=request.split != "test")
    except RuntimeError as error:
        raise ValueError(f"MNIST under {request.root} is damaged ({error}); delete it and fetch again") from error
    return _divided(source.data[:, None], source.targets, request.split, 50_000)


@dataset(
    "cifar10",
    label="CIFAR-10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    size=32,
    source="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (by torchvision.datasets.CIFAR10)",
    licence="research use",
    cite="Krizhevsky: Learning multiple layers of features from tiny images, University of Toronto, 2009",
    download=lambda root: datasets.CIFAR10(root, download=True),
    present=lambda root: (root / CIFAR).is_dir(),
    layouts=(
        {
            "folder": CIFAR,
            "algorithm": "md5",
            "files": dict(_LISTED) | {"batches.meta": datasets.CIFAR10.meta["md5"]},
            "bytes": _BATCHES,
        },
    ),
)
def cifar10(request: Request, *, download: bool = True) -> tuple[Tensor, Tensor]:
    """Photographs, colour: 45,000 / 5,000 / 10,000 images; `download` fetches what is missing."""
    provide("cifar10", request.root, download=download)
    try:
        source = datasets.CIFAR10(str(request.root), train=request.split != "test")
    except RuntimeError as error:
        raise ValueError(f"{request.root / CIFAR} is incomplete or corrupt; delete it and fetch again") from error
    images = torch.from_numpy(source.data).movedim(-1, 1)
    return _divided(images, torch.tensor(source.targets), request.split, 45_000)


@dataset(
    "cifar10-jpeg",
    label="CIFAR-10 (JPEG copy)",
    classes=DATASETS["cifar10"].classes,
    size=32,
    source="https://www.cs.toronto.edu/~kriz/cifar.html (a copy as JPEG files, put there by you)",
    licence="research use",
    cite="Krizhevsky: Learning multiple layers of features from tiny images, University of Toronto, 2009",
    present=lambda root: (root / "cifar10").is_dir(),
    layouts=({"folder": "cifar10", "images": {"train": 50_000, "test": 10_000}},),
)
def cifar10_jpeg(request: Request) -> ImageData | ImageStream:
    """Photographs, colour, with the loss of JPEG: 45,000 / 5,000 / 10,000 images.

    The validation images are others than those of ``cifar10``.
    """
    provide("cifar10-jpeg", request.root)
    base = request.root / "cifar10"
    files, classes = _labelled(base / "train")
    files = _shuffled(files)
    parts = {"train": files[:45_000], "val": files[45_000:], "test": _labelled(base / "test", classes)[0]}
    return _from_files(request, "cifar10-jpeg", base, classes, parts)


@dataset(
    "caltech101",
    label="Caltech-101",
    classes=101,
    size=96,
    source="https://data.caltech.edu/records/mzrjq-6wc02 (by torchvision.datasets.Caltech101)",
    licence="research use; the CaltechDATA record says CC BY 4.0",
    cite="Fei-Fei, Fergus, Perona: Learning generative visual models, 2004, doi:10.1109/CVPR.2004.383",
    download=lambda root: datasets.Caltech101(root, download=True),
    present=lambda root: (root / CALTECH).is_dir(),
    layouts=({"folder": CALTECH, "without": "BACKGROUND_Google", "images": {".": 8677}},),
)
def caltech101(request: Request, *, download: bool = True) -> ImageData | ImageStream:
    """Photographs, colour; `download` fetches what is missing.

    Of each class 25 images are for training, 5 for validation, and up to 50 of the others for the test.
    """
    provide("caltech101", request.root, download=download)
    files, classes = _labelled(request.root / CALTECH, without="BACKGROUND_Google")
    parts: Parts = {split: [] for split in SPLITS}
    for c, name in enumerate(classes):
        own = [file for file in files if file[1] == c]
        if len(own) < 31:
            raise ValueError(f"{request.root / CALTECH / name} holds {len(own)} images, Caltech-101 has at least 31")
        own = _shuffled(own, seed=c)[:80]
        for split, part in zip(SPLITS, (own[:25], own[25:30], own[30:]), strict=True):
            parts[split] += part
    return _from_files(request, "caltech101", request.root / CALTECH, classes, parts)


@dataset(
    "imagenet10",
    label="ImageNet, 10 classes",
    classes=10,
    size=64,
    source="https://www.image-net.org (ten classes of Tiny ImageNet, put there by you)",
    licence="research use",
    cite="Deng et al.: ImageNet: a large-scale hierarchical image database, 2009, doi:10.1109/CVPR.2009.5206848",
    present=lambda root: (root / "imagenet10").is_dir(),
    layouts=({"folder": "imagenet10", "images": {"train": 4500, "test": 1000}},),
)
def imagenet10(request: Request) -> ImageData | ImageStream:
    """Photographs, colour, of ten classes: 4,050 / 450 / 1,000 images."""
    provide("imagenet10", request.root)
    return _tree(request, request.root / "imagenet10", "imagenet10")


@dataset(
    "digits",
    label="Optical recognition of handwritten digits (8 x 8)",
    classes=10,
    size=28,
    ink=True,
    source="inside scikit-learn (sklearn.datasets.load_digits)",
    licence="CC BY 4.0, as the UCI Machine Learning Repository states",
    cite="Alpaydin, Kaynak: Optical recognition of handwritten digits, 1998, doi:10.24432/C50P49",
)
def digits(request: Request) -> tuple[Tensor, Tensor]:
    """Handwritten digits, grey, 8 x 8 enlarged: 1,000 / 297 / 500 images."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(source.target)
    index = torch.split(permutation(len(labels)), [1000, 297, 500])[SPLITS.index(request.split)]
    return images[index], labels[index]


@dataset(
    "shapes",
    label="Shapes (procedural)",
    classes=CLASSES,
    size=32,
    source="made by sdecor.shapes.generate",
    licence="MIT, as the code that makes it",
    cite="this repository",
)
def shapes(
    request: Request, *, samples: Samples = None, cue_strength: Strength = 0.5, cue_copies: Copies = 2
) -> ImageData:
    """Outlines with exact masks, colour, and a cue that may betray the class, see `sdecor.shapes.generate`.

    There are 2,000 / 500 / 1,000 images, or as many `samples` as asked for.
    """
    samples = samples or {"train": 2000, "val": 500, "test": 1000}[request.split]
    seed = 3 * request.seed + SPLITS.index(request.split)  # no two splits of any seeds share a stream
    images, labels, masks, _ = generate(
        samples, image_size=request.image_size or 32, cue_strength=cue_strength, cue_copies=cue_copies, seed=seed
    )
    return ImageData(images, labels, CLASSES, MEAN, STD, masks, "shapes", request.split)


@dataset("folder", label="image folder", source="yours", present=lambda root: False)  # it lies below no data root
def folder(
    request: Request, *, memory_limit: Annotated[int, Between(0)] = 2 << 30, workers: Workers = None
) -> ImageData | ImageStream:
    """Images of your own, see `load`.

    If more than `memory_limit` bytes of decoded images, they are streamed, by so many `workers` (processes; 4 at most,
    and no more than there are cores, by default).
    """
    if not request.root.is_dir():
        raise FileNotFoundError(f"image folder {request.root} does not exist")
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    name = os.path.basename(os.path.abspath(request.root))
    return _tree(request, request.root, f"folder:{name}", (memory_limit, workers))


def _tree(request: Request, root: Path, name: str, stream: tuple[int, int] | None = None) -> ImageData | ImageStream:
    """Images under ``root/SPLIT/CLASS``; a constant tenth of the training images validates if there is no ``val``."""
    there = _splits(root)
    if "train" not in there:
        only = f"only {' and '.join(there)}" if there else "nor another one"
        where = f"put images in {root / 'train'}/CLASS, classes and scale come from them"
        raise FileNotFoundError(f"image folder {root} has no train split, {only}; {where}")
    files, classes = _labelled(root / "train")
    parts = {split: _labelled(root / split, classes)[0] for split in there if split != "train"} | {"train": files}
    size = request.image_size or min(224, median_low(side_of(path) for path, _ in _shuffled(files)[:64]))
    if "val" not in parts:
        if len(files) < 2:
            raise ValueError(f"{root / 'train'} holds 1 image; at least 2 are needed, one to validate on")
        files, held = _shuffled(files), max(1, len(files) // 10)
        parts |= {"val": files[:held], "train": files[held:]}
    if request.split not in parts:
        instead = f"put images in {root / 'test'}/CLASS, or use the split 'val' (of a run: evaluate_on='val')"
        raise FileNotFoundError(f"image folder {root} has no test split; {instead}")
    every = [path for part in parts.values() for path, _ in part]
    objects = read_objects(root, _below(root, every))
    return _from_files(replace(request, image_size=size), name, root, classes, parts, stream, objects)


def _splits(root: Path) -> list[str]:
    """The splits that a folder has; what else it holds is said, but for single files and masks."""
    folders, files = ([entry.name for entry in entries] for entries in inside(root))
    for name in folders:
        meant = _MEANT.get(name.lower(), name.lower())
        if meant in SPLITS and name not in SPLITS:
            raise ValueError(f"{root / name} is no split; the name of that is '{meant}'")
    others = [name for name in folders if name not in (*SPLITS, "masks")]
    if others := others + [name for name in files if os.path.splitext(name)[1].lower() in IMAGES]:
        log.warning("%s is in no split and is left out, as are %d others beside it", root / others[0], len(others) - 1)
    return [split for split in SPLITS if split in folders]


def _labelled(root: Path, classes: Sequence[str] | None = None, *, without: str = "") -> tuple[Files, tuple[str, ...]]:
    """Sorted image files below ``root/CLASS``, labelled, and the classes: those found, or `classes` if given."""
    folders, beside = inside(root)
    folders = [folder for folder in folders if folder.name != without]
    if not folders:
        raise ValueError(f"{root} holds no class folders; put the images in {root}/CLASS")
    names = tuple([folder.name for folder in folders] if classes is None else classes)
    if unknown := [folder.path for folder in folders if folder.name not in names]:
        raise ValueError(f"{unknown[0]} is a class that the training images lack")
    if stray := [file.path for file in beside if is_image(file.path)]:
        raise ValueError(f"{stray[0]} lies beside the class folders; put it into one of them")
    files, others = [], [file.path for file in beside]
    for folder in folders:
        label, below = names.index(folder.name), [file.path for file in files_below(folder.path)]
        images = [(path, label) for path in below if is_image(path)]
        if not images:
            raise ValueError(f"{folder.path} holds no images; add some or delete it")
        files += images
        if len(images) < len(below):
            others += [path for path in below if not is_image(path)]
    if others:
        log.warning("%s is no image and is left out, as are %d others in %s", others[0], len(others) - 1, root)
    return files, names


def _shuffled(files: Files, seed: int = 0) -> Files:
    return [files[i] for i in permutation(len(files), seed).tolist()]


def _decoded(paths: tuple[str, ...], size: int, objects: Objects | None = None) -> tuple[Tensor, Tensor | None]:
    """As `decode_with_masks`, once, because a grid loads a set for every run; again if a file has changed."""
    stats = [os.stat(path) for path in paths]
    stamps = tuple((s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino, s.st_dev) for s in stats)
    return _decoded_once(paths, size, objects, stamps)


@lru_cache(maxsize=6)
def _decoded_once(
    paths: tuple[str, ...], size: int, objects: Objects | None, stamps: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor | None]:
    return decode_with_masks(paths, size, objects=objects)


def _from_files(
    request: Request,
    name: str,
    root: Path,
    classes: tuple[str, ...],
    parts: Parts,
    stream: tuple[int, int] | None = None,
    objects: Objects | None = None,
) -> ImageData | ImageStream:
    """The asked part, in memory if it fits; mean and std from a constant sample of the training part.

    More bytes than the first number of `stream` are streamed, by so many workers as the second says. Without, the files
    belong to a data set that does not change, and stay in memory for the next run. `root` is where they lie, and
    `objects` what is known of objects in them.
    """
    size, split, files = request.image_size or 0, request.split, parts[request.split]
    small: dict[str, int] = {}
    read = partial(decode_with_masks, small=small) if stream else _decoded
    sample = tuple(path for path, _ in _shuffled(parts["train"])[:2048])
    step = 256 if stream else 2048  # not all at once where there may be no room for them
    mean, std = moments(read(sample[i : i + step], size)[0] for i in range(0, len(sample), step))
    if request.limit is not None and request.limit < len(files):  # before decoding; the same choice as `subset` makes
        files = [files[i] for i in sorted(permutation(len(files))[: request.limit].tolist())]
    paths, labels = tuple(path for path, _ in files), torch.tensor([label for _, label in files], dtype=torch.int64)
    below = _below(root, paths)
    if objects is not None and (unknown := [file for file in below if file not in objects]):
        which = f"{len(unknown)} of {len(below)} {split} images, such as {unknown[0]}"
        log.warning("nothing says where the object is of %s; measures of localization leave them out", which)
    streamed = stream and len(paths) * 3 * size**2 > stream[0]
    images, masks = (torch.empty(0), None) if streamed else read(paths, size, objects=objects)
    if masks is not None and objects is not None:
        gone = [file for file, mask in zip(below, masks, strict=True) if file in objects and not mask.any()]
        if gone:
            which = f"{len(gone)} of {len(below)} {split} images, such as {gone[0]}"
            log.warning("the objects of %s are cut off, or too small; measures of localization leave them out", which)
    if small:
        first = f"{min(small)}, whose short side is {small[min(small)]},"
        log.warning("%s is enlarged more than eightfold to %d pixels, as are %d others", first, size, len(small) - 1)
    if stream and streamed:
        how: dict[str, Any] = {"workers": stream[1], "root": str(root), "objects": objects}
        return ImageStream(below, labels, classes, mean, std, size, name, split, **how)
    return ImageData(images, labels, classes, mean, std, masks, name, split, below)


def _below(root: Path, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path.removeprefix(str(root)).lstrip(os.sep) for path in paths)


__all__ = ["ImageData", "ImageStream", "Request", "available", "check", "data_root", "dataset", "fetch", "load"]
