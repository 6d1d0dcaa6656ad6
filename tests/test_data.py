"""Data sets: splits, options, own data sets, folders, files, and every bad input with its exact message."""

from __future__ import annotations

import doctest
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from pictures import exactly, fake_mnist, generator
from PIL import Image

from sdecor import config, data, images
from sdecor.config import Run
from sdecor.data import ImageData, ImageStream, Request, dataset, load
from sdecor.prepare import data_of
from sdecor.registers import DATASETS
from sdecor.store import Store


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(data).failed == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 training images in two classes, 24 x 32 pixels, in three formats' spellings; a test split without class b."""
    rng = np.random.default_rng(0)
    for split, label, count in (("train", "a", 12), ("train", "b", 8), ("test", "a", 3)):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(count):
            name = tmp_path / split / label / f"{i:02}.{('png', 'jpg', 'JPEG')[i % 3]}"
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(name)
    return tmp_path


# Names, options, embedded sets


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mnits",
            {},
            "unknown data set 'mnits'; known: mnist, cifar10, cifar10-jpeg, caltech101, imagenet10, digits, "
            "shapes, or an image folder (folder:PATH)",
        ),
        ("mnist", {"cue_copies": 3}, "data set 'mnist' has no option 'cue_copies'; it has: image_size, download"),
        ("digits", {"download": True}, "data set 'digits' has no option 'download'; it has: image_size"),
        ("digits", {"limit": 0}, "limit must be at least 1, got 0"),
        ("digits", {"image_size": 0}, "image_size must be at least 1, got 0"),
        ("shapes", {"cue_strength": 1.5}, "cue_strength must be from 0 to 1, got 1.5"),
        ("shapes", {"cue_copies": 13}, "cue_copies must be from 0 to 12, got 13"),
        ("shapes", {"samples": 0}, "samples must be at least 1, got 0"),
        ("shapes", {"samples": 0.5}, "samples must be of type int, got 0.5 (float)"),
    ],
)
def test_bad_requests_are_named_by_a_run_as_by_load(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        load(name, **options)
    limit = options.pop("limit", None)
    with pytest.raises(ValueError, match=exactly(message)):
        config.Data(name, limit, tuple(options.items()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digits", "split": "dev"}, "unknown split 'dev'; known: train, val, test"),
        ({"name": "shapes", "image_size": 48}, "image_size=48 is not possible for 'shapes'; use 32 or 64"),
    ],
)
def test_bad_splits_and_sizes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        load(**arguments)


def test_a_size_that_is_the_usual_one_makes_no_other_run() -> None:
    assert config.Data("digits", options=(("image_size", 28),)) == config.Data("digits")
    assert config.Data("digits", options=(("image_size", 8),)).options == (("image_size", 8),)


@pytest.mark.parametrize(("name", "channels"), [("digits", 1), ("shapes", 3)])
def test_embedded_sets_have_disjoint_splits_on_one_scale(name: str, channels: int) -> None:
    parts = [load(name, split=split) for split in data.SPLITS]
    assert [len(p) for p in parts] == ([1000, 297, 500] if name == "digits" else [2000, 500, 1000])
    assert len({(p.mean, p.std, p.classes) for p in parts}) == 1
    seen: set[bytes] = set()
    for p in parts:
        assert isinstance(p, ImageData) and p.name == name and p.channels == channels
        assert p.images.dtype == torch.uint8 and p.labels.dtype == torch.int64
        assert set(p.labels.tolist()) == set(range(p.num_classes))
        own = {image.numpy().tobytes() for image in p.images}
        assert not own & seen
        seen |= own


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    d = load("digits", image_size=8)
    assert isinstance(d, ImageData)
    order = torch.randperm(1797, generator=generator(0))[:1000]
    expected = (torch.from_numpy(load_digits().images)[order] * 255 / 16).round()
    assert torch.equal(d.images[:, 0].double(), expected)
    assert load("digits").image_size == 28


# Shapes


def test_seeds_and_splits_of_shapes_are_streams_of_their_own() -> None:
    first = [load("shapes", split=split, seed=seed, samples=40) for seed in (0, 1) for split in data.SPLITS]
    assert len({d.images.numpy().tobytes() for d in first if isinstance(d, ImageData)}) == 6


# Own data sets


@pytest.fixture
def entered() -> Iterator[None]:
    """What a test enters is taken out again."""
    before = set(DATASETS)
    yield
    for name in set(DATASETS) - before:
        del DATASETS[name]


@pytest.mark.usefixtures("entered")
def test_the_ten_lines_of_the_docstring_make_a_data_set() -> None:
    _, _, example = (data.__doc__ or "").partition("\n\n    @")
    exec(dedent("    @" + example), {**vars(data), "__name__": "own"})
    parts = [load("ramps", split=split, limit=50, image_size=8, steep=1) for split in data.SPLITS]
    assert len({(d.mean, d.std, d.classes, d.name) for d in parts}) == 1
    train, _, test = parts
    assert isinstance(train, ImageData) and isinstance(test, ImageData)
    assert (test.name, test.split, test.classes) == ("ramps", "test", ("rising", "falling"))
    assert train.images.shape == (50, 1, 8, 8) and train.images.dtype == torch.uint8
    left, right = (test.images[test.labels == c].float().mean((0, 1, 2))[[0, -1]] for c in (0, 1))
    assert left[0] < left[1] and right[0] > right[1]
    whole = load("ramps", image_size=8, steep=1)
    assert isinstance(whole, ImageData) and train.mean == whole.mean == images.moments(whole.images)[0]
    run = config.Run.of(data="ramps", data_options={"steep": 1})
    assert run.data.options == (("steep", 1.0),) and "steep" in str(run.to_dict())
    with pytest.raises(ValueError, match=exactly("steep must be from 0 to 1, got 2.0")):
        load("ramps", steep=2)


@pytest.mark.usefixtures("entered")
def test_masks_ink_and_numbers_of_classes_come_from_the_entry() -> None:
    @dataset(classes=3, ink=True)
    def halves(request: Request, *, exact: bool = False) -> tuple[torch.Tensor, ...]:
        x = torch.zeros(6, 1, 8, 8)
        x[:, :, :, 4:] = 0.5
        masks = torch.zeros(6, 8, 8, dtype=torch.bool)
        masks[:, 4:] = True
        return (x, torch.arange(6) % 2, masks) if exact else (x, torch.arange(6) % 2)

    inked, exact = load("halves"), load("halves", split="test", exact=True, image_size=16)
    assert isinstance(inked, ImageData) and isinstance(exact, ImageData)
    assert inked.classes == ("0", "1", "2") and inked.image_size == 8 and inked.masks is None
    assert inked.object_masks is not None and torch.equal(inked.object_masks, inked.images[:, 0] > 0)
    assert exact.masks is not None and exact.object_masks is exact.masks
    assert exact.masks.shape == (6, 16, 16) and exact.masks[:, 8:].all() and not exact.masks[:, :8].any()


@pytest.mark.usefixtures("entered")
def test_what_is_no_data_is_named() -> None:
    @dataset(classes=2)
    def nothing(request: Request) -> None:
        return None

    message = "data set 'nothing' must give ImageData, ImageStream, (images, labels) or (images, labels, masks)"
    with pytest.raises(TypeError, match=exactly(f"{message}, it gave NoneType")):
        load("nothing")


# Image folders


def test_a_folder_is_read_split_and_scaled(folder: Path) -> None:
    train, val, test = (load(f"folder:{folder}", split=split) for split in data.SPLITS)
    assert isinstance(train, ImageData) and isinstance(val, ImageData) and isinstance(test, ImageData)
    assert [len(d) for d in (train, val, test)] == [18, 2, 3]
    assert train.image_size == 24 and train.channels == 3 and train.classes == test.classes == ("a", "b")
    assert train.mean == val.mean == test.mean == images.moments(train.images)[0]
    pixels = {image.numpy().tobytes() for image in train.images} | {image.numpy().tobytes() for image in val.images}
    assert len(pixels) == 20
    assert load(str(folder), image_size=16).image_size == 16
    original = np.asarray(Image.open(folder / "test" / "a" / "00.png"))[:, 4:28]
    assert np.array_equal(test.images[0].movedim(0, -1).numpy(), original)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_folder_is_streamed_with_equal_batches(folder: Path, workers: int) -> None:
    held = load(str(folder), limit=15)
    streamed = load(str(folder), limit=15, memory_limit=100, workers=workers)
    assert isinstance(held, ImageData) and isinstance(streamed, ImageStream)
    for name in ("channels", "image_size", "num_classes", "classes", "mean", "std", "name", "split", "paths"):
        assert getattr(held, name) == getattr(streamed, name)
    both = [
        list(d.batches(4, shuffle=True, generator=generator(), augment=("crop", "flip")))
        for d in (held, streamed.to("cpu"))
    ]
    assert len(held) == len(streamed) == 15
    for (a, b), (c, e) in zip(*both, strict=True):
        assert torch.equal(a, c) and torch.equal(b, e)
    assert torch.equal(streamed.subset(5).labels, held.subset(5).labels)
    assert not streamed.has_masks and not held.has_masks


def test_so_many_of_each_class(folder: Path) -> None:
    for name, how in (("digits", {}), (str(folder), {}), (str(folder), {"memory_limit": 0})):
        whole, few, fewer = (load(name, per_class=n, **how) for n in (None, 3, 2))
        assert fewer.labels.bincount().tolist() == [2] * whole.num_classes
        assert few.labels.bincount().tolist() == [3] * whole.num_classes
        assert (few.mean, few.std) == (whole.mean, whole.std) and set(fewer.paths) <= set(few.paths) <= set(whole.paths)
    assert len(load("digits", per_class=3, limit=7)) == 7
    with pytest.raises(ValueError, match=r"^per_class=999, but there is a class with \d+ images$"):
        load("digits", per_class=999)
    run = Run.of(data="digits", per_class=2)
    assert len(data_of(run, Store("nowhere"), "train")) == 20 and len(data_of(run, Store("nowhere"), "test")) == 500


def test_an_unreadable_image_is_named(folder: Path) -> None:
    broken = folder / "train" / "b" / "03.png"
    for content, error in ((b"not an image", "UnidentifiedImageError"), (broken.read_bytes()[:60], "OSError")):
        broken.write_bytes(content)
        for options in ({}, {"memory_limit": 1, "workers": 0}, {"memory_limit": 1, "workers": 1}):
            with pytest.raises(
                ValueError, match=exactly(f"cannot read image {broken} ({error}); remove or replace it")
            ):
                list(load(str(folder), **options).batches(20))


def test_missing_and_empty_folders_are_named(folder: Path, tmp_path: Path) -> None:
    def fails(message: str, kind: type[Exception] = ValueError, split: str = "train", path: Path = folder) -> None:
        with pytest.raises(kind, match=exactly(message)):
            load(f"folder:{path}", split=split)

    empty = tmp_path / "empty"
    fails(f"image folder {empty} does not exist", FileNotFoundError, path=empty)
    empty.mkdir()
    lacks = f"image folder {empty} has no train split, %s; put images in {empty}/train/CLASS, classes and scale come %s"
    fails(lacks % ("nor another one", "from them"), FileNotFoundError, path=empty)
    for name in ("val", "test"):
        (empty / name).mkdir()
    fails(lacks % ("only val and test", "from them"), FileNotFoundError, path=empty)
    for name in ("val", "test"):
        (empty / name).rmdir()
    (empty / "train").mkdir()
    fails(f"{empty}/train holds no class folders; put the images in {empty}/train/CLASS", path=empty)
    (empty / "train" / "a").mkdir()
    fails(f"{empty}/train/a holds no images; add some or delete it", path=empty)
    Image.new("RGB", (8, 8)).save(empty / "train" / "a" / "x.png")
    fails(f"{empty}/train holds 1 image; at least 2 are needed, one to validate on", path=empty)
    (folder / "test" / "c").mkdir()
    fails(f"{folder}/test/c is a class that the training images lack", split="test")
    (folder / "test").rename(folder / "Testing")
    fails(f"{folder}/Testing is no split; the name of that is 'test'")
    (folder / "Testing").rename(tmp_path / "elsewhere")
    message = f"put images in {folder}/test/CLASS, or use the split 'val' (of a run: evaluate_on='val')"
    fails(f"image folder {folder} has no test split; {message}", FileNotFoundError, "test")
    (folder / "val").mkdir()
    fails(f"{folder}/val holds no class folders; put the images in {folder}/val/CLASS")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a data set be whole with fewer images."""

    def expect(name: str, classes: Any, **images: int) -> None:
        layout = DATASETS[name].layouts[0]
        changed = ({**layout, "images": {part.replace("_", "."): n for part, n in images.items()}},)
        monkeypatch.setitem(DATASETS._entries, name, replace(DATASETS[name], classes=classes, layouts=changed))

    return expect


def test_ten_classes_of_imagenet_are_a_folder_below_the_root(
    folder: Path, tmp_path: Path, few: Callable[..., None]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    folder_of = {split: folder / split for split in ("train", "test")}
    (root / "imagenet10").mkdir()
    for split, path in folder_of.items():
        path.rename(root / "imagenet10" / split)
    problem = f"{root}/imagenet10/train holds 2 class folders instead of 10"
    assert data.check("imagenet10", root)[:2] == [problem, f"{root}/imagenet10/train holds 20 images instead of 4500"]
    how = (
        "has no download; put the files there as imagenet10/train/CLASS/*.jpg and imagenet10/test/CLASS/*.jpg, "
        "or set SDECOR_DATA to the folder that holds them"
    )
    for split in data.SPLITS:
        with pytest.raises(
            ValueError, match=exactly(f"ImageNet, 10 classes under {root} is not whole ({problem}) and {how}")
        ):
            load("imagenet10", root, split)
    few("imagenet10", 2, train=20, test=3)
    (root / "imagenet10" / "test" / "b").mkdir()
    problem = f"{root}/imagenet10/test holds 3 images instead of 4"
    few("imagenet10", 2, train=20, test=4)
    assert data.check("imagenet10", root) == [problem]
    Image.new("RGB", (8, 8)).save(root / "imagenet10" / "test" / "b" / "x.PNG")
    (root / "imagenet10" / "test" / "b" / "._x.PNG").write_bytes(b"of a Mac")
    assert data.check("imagenet10", root) == []
    train, val, test = (load("imagenet10", root, split=split) for split in data.SPLITS)
    assert [len(d) for d in (train, val, test)] == [18, 2, 4]
    assert train.name == "imagenet10" and train.image_size == 64 and train.mean == test.mean
    assert isinstance(test, ImageData) and test.paths[-1] == "test/b/x.PNG"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(root / "imagenet10" / "test" / "b" / "x.PNG")
    changed = load("imagenet10", root, split="test")
    assert isinstance(changed, ImageData) and changed.images[-1, 0].min() == 255 and changed.digest != test.digest


def test_a_relative_root_is_that_of_the_folder_one_is_in(
    folder: Path, tmp_path: Path, few: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    few("imagenet10", 2, train=20, test=6)
    shutil.copytree(folder / "test" / "a", folder / "test" / "b")
    found = []
    for place in ("one", "two"):
        (tmp_path / place / "imagenet10").mkdir(parents=True)
        for split in ("train", "test"):
            shutil.copytree(folder / split, tmp_path / place / "imagenet10" / split)
    path = next((tmp_path / "two" / "imagenet10" / "test").rglob("*.png"))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    for place in ("one", "two"):
        monkeypatch.chdir(tmp_path / place)
        found.append(load("imagenet10", ".", "test").digest)
    assert found[0] != found[1]


# Files of known data sets


def test_broken_mnist_files_are_named(tmp_path: Path) -> None:
    raw = fake_mnist(tmp_path)
    assert len(load("mnist", tmp_path, "val", limit=5, download=False)) == 5
    file = raw / "train-labels-idx1-ubyte"
    how = (
        "could not be downloaded (download=False); put the files there, set SDECOR_DATA, or use data='digits' which "
        "needs no download"
    )

    def fails(problem: str) -> None:
        with pytest.raises(
            ValueError, match=exactly(f"MNIST under {tmp_path} is not whole ({file} {problem}) and {how}")
        ):
            load("mnist", tmp_path, download=False)
        assert data.check("mnist", tmp_path) == [f"{file} {problem}"]
        assert not next(source for source in data.available(tmp_path) if source.name == "mnist").present

    for length in (1000, 0):
        os.truncate(file, length)
        fails(f"is truncated: {length} bytes instead of 60008")
    file.write_bytes((0x801).to_bytes(4, "big") + bytes(60_005))
    fails("is too long: 60009 bytes instead of 60008")
    file.write_bytes(b"<htm" + bytes(60_004))
    fails("starts with 3c68746d instead of 00000801")
    file.unlink()
    fails("is missing")


def test_torchvisions_cifar10_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    base, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = np.zeros((10_000, 3072), np.uint8)
        pixels[:, 0] = rng.integers(0, 256, 10_000)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": rng.integers(0, 10, 10_000).tolist()}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    first = base / "data_batch_1"
    problem = f"{first} is truncated: {first.stat().st_size} bytes instead of 31035704"
    assert data.check("cifar10", tmp_path)[0] == problem
    unsized = replace(DATASETS["cifar10"], layouts=({**DATASETS["cifar10"].layouts[0], "bytes": {}},))
    monkeypatch.setitem(DATASETS._entries, "cifar10", unsized)
    with pytest.raises(ValueError, match=exactly(f"{base} is incomplete or corrupt; delete it and fetch again")):
        load("cifar10", tmp_path)
    assert data.check("cifar10", tmp_path)[0].startswith(f"{base / 'data_batch_1'} has another md5 sum than c99cafc1")
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    train, val, test = (load("cifar10", tmp_path, split) for split in data.SPLITS)
    assert [len(d) for d in (train, val, test)] == [45_000, 5_000, 10_000]
    assert isinstance(train, ImageData) and isinstance(test, ImageData) and train.name == "cifar10"
    assert np.array_equal(test.images[0].flatten().numpy(), pixels[0])
    assert train.mean == test.mean and train.classes == DATASETS["cifar10"].classes


def test_the_jpeg_copy_of_cifar10_is_a_data_set_of_its_own(tmp_path: Path, few: Callable[..., None]) -> None:
    classes = DATASETS["cifar10"].classes
    assert DATASETS["cifar10-jpeg"].classes == classes == tuple(sorted(DATASETS["cifar10"].classes))  # type: ignore[arg-type]
    assert config.Run.of(data="cifar10").key != config.Run.of(data="cifar10-jpeg").key
    digits = ("zero", "one")  # by the last bit of their images
    for part, number in (("train", 30), ("test", 4)):
        for label in ("one", "zero"):
            (tmp_path / "cifar10" / part / label).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "cifar10" / part / digits[i % 2] / f"{i:02}.png")
    train = tmp_path / "cifar10" / "train"
    assert data.check("cifar10-jpeg", tmp_path)[0] == f"{train} has no folder for the class airplane"
    with pytest.raises(FileNotFoundError, match="needs no download$"):
        load("cifar10", tmp_path, download=False)
    few("cifar10-jpeg", ("one", "zero"), train=30, test=4)
    with pytest.raises(
        FileNotFoundError, match="needs no download; CIFAR-10 \\(JPEG copy\\) is there: data='cifar10-jpeg'$"
    ):
        load("cifar10", tmp_path, download=False)
    with pytest.raises(ValueError, match="^data set 'cifar10-jpeg' has no option 'download'; it has: image_size$"):
        load("cifar10-jpeg", tmp_path, download=False)
    d = load("cifar10-jpeg", tmp_path)
    assert isinstance(d, ImageData) and d.name == "cifar10-jpeg" and d.classes == ("one", "zero") and len(d) == 30
    everything = [f"train/{digits[odd]}/{i:02}.png" for odd in (1, 0) for i in range(odd, 30, 2)]
    assert d.paths == tuple(everything[i] for i in images.permutation(30).tolist())
    assert d.images[:, 0, 0, 0].tolist() == [int(path[-6:-4]) for path in d.paths]
    test = load("cifar10-jpeg", tmp_path, "test")
    assert test.paths == ("test/one/01.png", "test/one/03.png", "test/zero/00.png", "test/zero/02.png")
    (tmp_path / "cifar10" / "test" / "one" / "01.png").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/cifar10/test holds 3 images instead of 4"):
        load("cifar10-jpeg", tmp_path)


def test_an_incomplete_caltech101_is_named(tmp_path: Path, few: Callable[..., None]) -> None:
    ants = tmp_path / "caltech101" / "101_ObjectCategories" / "ant"
    ants.mkdir(parents=True)
    for i in range(30):
        Image.new("RGB", (8, 8)).save(ants / f"image_{i:04}.jpg")
    problem = f"{ants.parent} holds 1 class folders instead of 101"
    assert data.check("caltech101", tmp_path) == [problem, f"{ants.parent} holds 30 images instead of 8677"]
    start = f"Caltech-101 under {tmp_path} is not whole ({problem}) and could not be downloaded (download=False); "
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        load("caltech101", tmp_path, download=False)
    few("caltech101", 1, _=30)
    with pytest.raises(ValueError, match=exactly(f"{ants} holds 30 images, Caltech-101 has at least 31")):
        load("caltech101", tmp_path)


# The real thing


def test_real_mnist(real_data: Path) -> None:
    parts = [load("mnist", real_data, split, download=False) for split in data.SPLITS]
    assert [len(d) for d in parts] == [50_000, 10_000, 10_000]
    train, val, test = parts
    assert isinstance(train, ImageData) and isinstance(val, ImageData) and isinstance(test, ImageData)
    assert train.images.shape[1:] == (1, 28, 28) and len({(d.mean, d.std) for d in parts}) == 1
    assert (train.mean[0], train.std[0]) == pytest.approx((0.1307, 0.3081), abs=3e-4)
    from torchvision.datasets import MNIST

    official = MNIST(str(real_data))
    both = torch.cat([train.images, val.images])[:, 0]
    key = [image.numpy().tobytes() for image in both]
    assert sorted(key) == sorted(image.numpy().tobytes() for image in official.data)
    assert torch.equal(test.images[:, 0], MNIST(str(real_data), train=False).data)
    assert data.check("mnist", real_data) == []


def test_real_cifar10_as_jpeg_files(real_data: Path) -> None:
    if not (real_data / "cifar10").is_dir():
        pytest.skip("no JPEG copy of CIFAR-10 there")
    val = load("cifar10-jpeg", real_data, "val", limit=64)
    test = load("cifar10-jpeg", real_data, "test", limit=64)
    assert isinstance(val, ImageData) and isinstance(test, ImageData) and val.mean == test.mean
    assert val.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert val.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)
    assert val.images.shape == (64, 3, 32, 32) and val.classes == DATASETS["cifar10"].classes
    assert data.check("cifar10-jpeg", real_data) == []


def test_real_caltech101(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = load("caltech101", real_data, "val", limit=8, download=False)
    assert isinstance(val, ImageData) and val.images.shape == (8, 3, 96, 96) and val.num_classes == 101
    taken: dict[str, list[str]] = {}

    def only_paths(files: tuple[str, ...], size: int, objects: None = None) -> tuple[torch.Tensor, None]:
        taken["last"] = list(files)
        return torch.zeros(len(files), 3, 2, 2, dtype=torch.uint8), None

    monkeypatch.setattr(data, "_decoded", only_paths)
    for split, low, high in (("train", 25, 25), ("val", 5, 5), ("test", 1, 50)):
        counts = load("caltech101", real_data, split, download=False).labels.bincount()
        taken[split] = taken["last"]
        assert (len(counts), int(counts.min()), int(counts.max())) == (101, low, high)
    assert len(set(taken["train"]) | set(taken["val"]) | set(taken["test"])) == 2525 + 505 + 2945
    assert data.check("caltech101", real_data) == []


def test_real_imagenet10(real_data: Path) -> None:
    if not (real_data / "imagenet10").is_dir():
        pytest.skip("no imagenet10 there")
    parts = [load("imagenet10", real_data, split) for split in data.SPLITS]
    assert [len(d) for d in parts] == [4050, 450, 1000] and len({(d.mean, d.classes) for d in parts}) == 1
    train, _, test = parts
    assert isinstance(train, ImageData) and train.images.shape[1:] == (3, 64, 64) and train.num_classes == 10
    assert test.labels.bincount().tolist() == [100] * 10 and "goldfish" in test.classes
    assert data.check("imagenet10", real_data) == []
