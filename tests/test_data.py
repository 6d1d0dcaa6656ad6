"""Data sets: splits, normalization, batches, the procedural images, and every bad input with its exact message."""

from __future__ import annotations

import doctest
import json
import os
import pickle
import re
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdecor import data, images, shapes, sources
from sdecor.data import ImageData, ImageStream, load


def exactly(message: object) -> str:
    return f"^{re.escape(str(message))}$"


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("module", [data, images, shapes, sources])
def test_the_examples_in_the_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def toy(n: int = 10, channels: int = 3, size: int = 16) -> ImageData:
    pixels = torch.randint(256, (n, channels, size, size), generator=generator(), dtype=torch.uint8)
    return ImageData.from_tensors(pixels, torch.arange(n) % 5)


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


def fake_mnist(root: Path) -> Path:
    """Files of the right size and magic number, all zero behind the header."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, (magic, size) in sources.MNIST.items():
        images_ = magic == 0x803
        items = (size - 16) // 784 if images_ else size - 8
        head = b"".join(v.to_bytes(4, "big") for v in ((magic, items, 28, 28) if images_ else (magic, items)))
        with (raw / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
    return raw


# ImageData


def test_normalization_is_that_of_the_formula_and_is_undone() -> None:
    d = toy()
    x = d.normalized()
    mean, std = (torch.tensor(v)[:, None, None] for v in (d.mean, d.std))
    torch.testing.assert_close(x, (d.images / 255 - mean) / std)
    torch.testing.assert_close(d.denormalize(x), d.images / 255)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3))
    assert torch.equal(d.normalized([3, 1]), x[[3, 1]])
    assert torch.equal(d.normalized(slice(2, 4)), x[2:4])


def test_constant_images_stay_finite() -> None:
    assert ImageData.from_tensors(torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])).normalized().isfinite().all()


def test_batches_cover_every_image_once_and_leave_the_data_alone() -> None:
    d = toy()
    before = d.images.clone()
    parts = list(d.batches(4, shuffle=True, generator=generator(), augment=True))
    assert [len(x) for x, _ in parts] == [4, 4, 2]
    assert [len(x) for x, _ in d.batches(4, drop_last=True)] == [4, 4]
    assert torch.equal(torch.cat([x for x, _ in d.batches(4)]), d.normalized())
    shuffled = torch.cat([x for x, _ in d.batches(4, shuffle=True, generator=generator())])
    assert sorted(shuffled.flatten(1).sum(1).tolist()) == sorted(d.normalized().flatten(1).sum(1).tolist())
    assert torch.equal(d.images, before)


@pytest.mark.parametrize("augment", [False, True, "flip", "crop"])
def test_one_generator_state_gives_one_set_of_bits(augment: bool | str) -> None:
    d = toy(50)
    runs = [list(d.batches(16, shuffle=True, generator=generator(7), augment=augment)) for _ in range(2)]
    for (a, b), (c, e) in zip(*runs, strict=True):
        assert torch.equal(a, c) and torch.equal(b, e)
    other = next(d.batches(16, shuffle=True, generator=generator(8), augment=augment))
    assert not torch.equal(other[0], runs[0][0][0])


def test_augmented_images_are_flips_and_shifts_of_the_originals() -> None:
    x = toy(40).images
    for how, pads, flips in (("flip", (0,), (False, True)), ("crop", range(5), (False,))):
        seen = set()
        for original, new in zip(x, images.augmented(x, how, generator()), strict=True):
            wide = torch.nn.functional.pad(original, (2, 2, 2, 2)) if how == "crop" else original
            found = [
                (i, j, f)
                for i in pads
                for j in pads
                for f in flips
                if torch.equal((wide.flip(-1) if f else wide)[:, i : i + 16, j : j + 16], new)
            ]
            assert len(found) == 1
            seen.add(found[0])
        assert len(seen) == (2 if how == "flip" else len(seen)) and len(seen) > 1


def test_grey_images_are_shifted_but_not_flipped_by_default() -> None:
    d = toy(30, channels=1)
    default, crop = (next(d.batches(30, generator=generator(), augment=a))[0] for a in (True, "crop"))
    assert torch.equal(default, crop)


def test_subsets_are_nested_and_keep_the_order() -> None:
    d = load("shapes", split="val")
    small, large = d.subset(20), d.subset(50)
    assert isinstance(small, ImageData) and isinstance(large, ImageData) and isinstance(d, ImageData)
    sums = [t.images.flatten(1).sum(1).tolist() for t in (small, large, d)]
    assert len(small) == 20 and set(sums[0]) <= set(sums[1]) <= set(sums[2])
    assert sums[1] == [s for s in sums[2] if s in sums[1]]
    picked = d.subset([4, 2])
    assert torch.equal(picked.labels, d.labels[[4, 2]])
    assert picked.masks is not None and d.masks is not None and torch.equal(picked.masks, d.masks[[4, 2]])
    limited = load("shapes", split="val", limit=50)
    assert isinstance(limited, ImageData) and torch.equal(large.images, limited.images)


def test_a_users_tensors_share_the_training_splits_scale() -> None:
    train = toy()
    val = ImageData.from_tensors(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), train=train, split="val")
    assert (val.mean, val.std, val.classes) == (train.mean, train.std, train.classes)
    assert (len(val), val.channels, val.image_size, val.num_classes, val.split) == (4, 3, 16, 5, "val")
    assert val.to("cpu").device == torch.device("cpu")


def bad(value: float, at: int) -> torch.Tensor:
    x = torch.full((10, 1, 4, 4), 0.25)
    x[at, 0, 0, :3] = value
    return x


DIGITS = tuple("0123456789")
GOOD = torch.zeros(10, 1, 4, 4)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (
            bad(float("nan"), 7),
            torch.zeros(10),
            "images hold 3 non-finite values (first at index 7); clean them before training",
        ),
        (
            bad(float("-inf"), 0),
            torch.zeros(10),
            "images hold 3 non-finite values (first at index 0); clean them before training",
        ),
        (bad(2.0, 1), torch.zeros(10), "float images must lie in [0, 1], got 0.25 to 2; rescale or pass uint8"),
        (GOOD, torch.tensor([0, 1, 2, 3, 12, 1, 1, 1, 1, -1]), "labels must lie in 0..9, got 12 at index 4"),
        (GOOD, torch.tensor([0] * 9 + [-1]), "labels must lie in 0..9, got -1 at index 9"),
        (GOOD, torch.zeros(9), "10 images need labels of shape (10,), got (9,)"),
        (GOOD.int(), torch.zeros(10), "images must be uint8 or float, got torch.int32"),
        (GOOD[0], torch.zeros(1), "images must have shape (N, C, H, W) with N > 0 and H = W, got (1, 4, 4)"),
        (GOOD[:0], torch.zeros(0), "images must have shape (N, C, H, W) with N > 0 and H = W, got (0, 1, 4, 4)"),
    ],
)
def test_bad_tensors_are_named(pixels: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        ImageData.from_tensors(pixels, labels, classes=DIGITS)


def test_bad_batches_are_named() -> None:
    with pytest.raises(ValueError, match=exactly("batch_size must be at least 1, got 0")):
        list(toy().batches(0))
    with pytest.raises(ValueError, match=exactly("unknown augment 'spin'; known: crop, flip, flip-crop")):
        list(toy().batches(4, augment="spin"))


# Names, options, embedded sets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "mnits"},
            "unknown data set 'mnits'; known: mnist, cifar10, caltech101, digits, shapes, "
            "or an image folder (folder:PATH)",
        ),
        ({"name": "digits", "split": "dev"}, "unknown split 'dev'; known: train, val, test"),
        ({"name": "mnist", "cue_copies": 3}, "data set 'mnist' has no option 'cue_copies'; it has download"),
        ({"name": "digits", "download": True}, "data set 'digits' has no option 'download'; it has none"),
        ({"name": "digits", "limit": 0}, "limit must be at least 1, got 0"),
        ({"name": "digits", "image_size": 0}, "image_size must be at least 1, got 0"),
        ({"name": "shapes", "image_size": 48}, "image_size=48 is not possible for 'shapes'; use 32 or 64"),
        ({"name": "shapes", "cue_strength": 1.5}, "cue_strength=1.5 must lie in [0, 1]"),
        ({"name": "shapes", "cue_copies": 13}, "cue_copies=13 must be a whole number in 0..12"),
        ({"name": "shapes", "samples": 0}, "samples=0 must be a positive whole number"),
    ],
)
def test_bad_requests_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        load(**arguments)  # type: ignore[arg-type]


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


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 40),
    size=st.sampled_from([32, 64]),
    strength=st.floats(0, 1),
    copies=st.integers(0, shapes.MAX_COPIES),
    seed=st.integers(0, 2**31),
)
def test_shapes_hold_what_they_promise(samples: int, size: int, strength: float, copies: int, seed: int) -> None:
    arguments = {"image_size": size, "cue_strength": strength, "seed": seed}
    x, labels, masks, cues = shapes.generate(samples, cue_copies=copies, **arguments)
    plain, same_labels, same_masks, same_cues = shapes.generate(samples, cue_copies=0, **arguments)
    assert x.shape == (samples, 3, size, size) and x.dtype == torch.uint8 and masks.dtype == torch.bool
    assert torch.equal(labels, same_labels) and torch.equal(masks, same_masks) and torch.equal(cues, same_cues)
    counts = labels.bincount(minlength=8)
    assert counts.max() - counts.min() <= 1
    share = masks.float().mean((1, 2))
    assert share.min() > 0.04 and share.max() < 0.2
    # The copies are all that differs; they are alike, lie apart from each other and never on the object.
    side, changed = size * 4 // 32, (x != plain).any(1)
    assert not (changed & masks).any()
    assert changed.flatten(1).sum(1).max() <= copies * side**2
    patch = (shapes._hue(cues / 8) * 255).round().to(torch.uint8)
    alike = (x == patch[:, :, None, None]).all(1)
    assert (alike.flatten(1).sum(1) >= copies * side**2).all()
    again = shapes.generate(samples, cue_copies=copies, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, labels, masks, cues), strict=True))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_cue_agrees_with_the_class_as_often_as_asked(strength: float) -> None:
    n = 4000
    _, labels, _, cues = shapes.generate(n, cue_strength=strength, seed=5)
    p = strength + (1 - strength) / 8
    assert abs(float((labels == cues).float().mean()) - p) <= 4 * (p * (1 - p) / n) ** 0.5
    assert float(torch.bincount(8 * labels + cues, minlength=64).min()) > (0 if strength < 1 else -1)


def test_objects_stand_out_and_their_outline_is_all_that_tells_the_class() -> None:
    x, labels, masks, _ = shapes.generate(1600, cue_copies=0, seed=3)
    luma = (x.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1) / 255
    inside = (luma * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (luma * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    assert (inside - outside).abs().quantile(0.01) > 0.12
    area = masks.float().mean((1, 2))
    for value in (area, inside, outside):
        by_class = torch.stack([value[labels == c].mean() for c in range(8)])
        assert by_class.std() < 0.35 * value.std()


@pytest.mark.parametrize("options", [{}, {"image_size": 64}, {"cue_copies": 0}, {"cue_strength": 1.0, "cue_copies": 4}])
def test_the_constants_of_shapes_fit_its_pixels(options: dict[str, float]) -> None:
    x = load("shapes", limit=500, **options)  # type: ignore[arg-type]
    assert isinstance(x, ImageData)
    mean, std = images.moments(x.images)
    assert max(abs(a - b) for a, b in zip(mean + std, shapes.MEAN + shapes.STD, strict=True)) < 0.03


def test_seeds_and_splits_of_shapes_are_streams_of_their_own() -> None:
    first = [load("shapes", split=split, seed=seed, samples=40) for seed in (0, 1) for split in data.SPLITS]
    assert len({d.images.numpy().tobytes() for d in first if isinstance(d, ImageData)}) == 6


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
    for name in ("channels", "image_size", "num_classes", "classes", "mean", "std", "name", "split"):
        assert getattr(held, name) == getattr(streamed, name)
    both = [list(d.batches(4, shuffle=True, generator=generator(), augment=True)) for d in (held, streamed.to("cpu"))]
    assert len(held) == len(streamed) == 15
    for (a, b), (c, e) in zip(*both, strict=True):
        assert torch.equal(a, c) and torch.equal(b, e)
    assert torch.equal(streamed.subset(5).labels, held.subset(5).labels)


def test_an_unreadable_image_is_named(folder: Path) -> None:
    broken = folder / "train" / "b" / "03.png"
    for content, error in ((b"not an image", "UnidentifiedImageError"), (broken.read_bytes()[:60], "OSError")):
        broken.write_bytes(content)
        for options in ({}, {"memory_limit": 1, "workers": 0}):
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
    fails(
        f"{empty}/train holds no class folders; put the images in {empty}/train/CLASS (.png, .jpg, .jpeg)", path=empty
    )
    (empty / "train" / "a").mkdir(parents=True)
    fails(f"{empty}/train/a holds no images (.png, .jpg, .jpeg); add some or delete it", path=empty)
    Image.new("RGB", (8, 8)).save(empty / "train" / "a" / "x.png")
    fails(f"{empty}/train holds 1 image; at least 2 are needed, one to validate on", path=empty)
    (folder / "test" / "c").mkdir()
    fails(f"{folder}/test/c is a class that the training images lack", split="test")
    (folder / "test").rename(folder / "tests")
    fails(f"image folder {folder} has no test split; put images in {folder}/test/CLASS", FileNotFoundError, "test")


# Files of known data sets


def test_broken_mnist_files_are_named(tmp_path: Path) -> None:
    raw = fake_mnist(tmp_path)
    assert len(load("mnist", tmp_path, "val", limit=5, download=False)) == 5
    file = raw / "train-labels-idx1-ubyte"
    os.truncate(file, 1000)
    message = f"{file} is truncated: 1000 bytes instead of 60008; delete it and fetch again"
    with pytest.raises(ValueError, match=exactly(message)):
        load("mnist", tmp_path, download=False)
    os.truncate(file, 0)
    with pytest.raises(ValueError, match=exactly(message.replace("1000 bytes", "0 bytes"))):
        load("mnist", tmp_path, download=False)
    file.write_bytes((0x801).to_bytes(4, "big") + bytes(60_005))
    with pytest.raises(
        ValueError, match=exactly(f"{file} is too long: 60009 bytes instead of 60008; delete it and fetch again")
    ):
        load("mnist", tmp_path, download=False)
    file.write_bytes(b"<htm" + bytes(60_004))
    message = f"{file} has magic number 0x3c68746d instead of 0x801; delete it and fetch again"
    with pytest.raises(ValueError, match=exactly(message)):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize(
    ("name", "title"), [("mnist", "MNIST"), ("cifar10", "CIFAR-10"), ("caltech101", "Caltech-101")]
)
def test_no_data_and_no_network_is_said(name: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = (
        f"{title} not found under {tmp_path} and could not be downloaded (%s); put the files there, set SDECOR_DATA, "
        "or use data='digits' which needs no download"
    )
    with pytest.raises(FileNotFoundError, match=exactly(message % "download=False")):
        load(name, tmp_path, download=False)
    monkeypatch.setenv("SDECOR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=exactly(message % "<urlopen error Network is unreachable>")):
        load(name)


def test_the_root_is_the_argument_the_variable_or_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDECOR_DATA", "/elsewhere")
    assert data.data_root("~/x") == Path.home() / "x" and data.data_root() == Path("/elsewhere")
    monkeypatch.delenv("SDECOR_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data.data_root() == Path("/cache/sdecor")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.data_root() == Path.home() / ".cache" / "sdecor"


def test_torchvisions_cifar10_is_preferred_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    base, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = np.zeros((10_000, 3072), np.uint8)
        pixels[:, 0] = rng.integers(0, 256, 10_000)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": rng.integers(0, 10, 10_000).tolist()}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(ValueError, match=exactly(f"{base} is incomplete or corrupt; delete it and fetch again")):
        load("cifar10", tmp_path)
    assert data.check("cifar10", tmp_path)[0].startswith(f"{base / 'data_batch_1'} has another md5 sum than c99cafc1")
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    train, val, test = (load("cifar10", tmp_path, split) for split in data.SPLITS)
    assert [len(d) for d in (train, val, test)] == [45_000, 5_000, 10_000]
    assert isinstance(train, ImageData) and isinstance(test, ImageData) and train.name == "cifar10"
    assert np.array_equal(test.images[0].flatten().numpy(), pixels[0])
    assert train.mean == test.mean and train.classes == tuple("abcdefghij")


def test_the_registry_names_every_set_and_torchvisions_sums(root: Path) -> None:
    from torchvision.datasets import CIFAR10

    listed = data.available("/nowhere")
    assert [s.name for s in listed] == ["mnist", "cifar10", "caltech101", "digits", "shapes"]
    assert [s.present for s in listed] == [False, False, False, True, True]
    assert all(s.title and s.source and s.licence and s.cite for s in listed)
    registry = json.loads((root / "data" / "sources.json").read_text())
    sums = dict(CIFAR10.train_list + CIFAR10.test_list) | {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    assert registry["cifar10"]["layouts"][0]["files"] == sums
    assert registry["mnist"]["layouts"][0]["files"].keys() == sources.MNIST.keys()


def test_check_and_fetch_name_what_is_wrong(tmp_path: Path) -> None:
    assert data.check("shapes", tmp_path) == [] == data.check("digits", tmp_path)
    assert data.check("mnist", tmp_path) == [f"MNIST is not under {tmp_path}"]
    raw = fake_mnist(tmp_path)
    assert data.fetch("mnist", tmp_path) == tmp_path  # it is there: no network is touched
    problems = data.check("mnist", tmp_path)
    assert len(problems) == 4 and problems[0].startswith(
        f"{raw}/train-images-idx3-ubyte has another sha256 sum than ba89"
    )
    with pytest.raises(ValueError, match="^unknown data set 'x'; known: mnist, cifar10, caltech101, digits, shapes$"):
        data.check("x")
    with pytest.raises(ValueError, match="^nothing to fetch for 'x'; data sets to fetch: mnist, cifar10, caltech101$"):
        data.fetch("x")


def test_an_incomplete_caltech101_is_named(tmp_path: Path) -> None:
    ants = tmp_path / "caltech101" / "101_ObjectCategories" / "ant"
    ants.mkdir(parents=True)
    for i in range(30):
        Image.new("RGB", (8, 8)).save(ants / f"image_{i:04}.jpg")
    with pytest.raises(ValueError, match=exactly(f"{ants} holds 30 images, Caltech-101 has at least 31")):
        load("caltech101", tmp_path)
    assert data.check("caltech101", tmp_path) == [f"{ants.parent} holds 30 images instead of 8677"]


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
    val = load("cifar10", real_data, "val", limit=64, download=False)
    test = load("cifar10", real_data, "test", limit=64, download=False)
    assert isinstance(val, ImageData) and isinstance(test, ImageData) and val.mean == test.mean
    if val.name == "cifar10-jpeg":
        assert val.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
        assert val.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)
    assert val.images.shape == (64, 3, 32, 32) and val.classes[0] == "airplane"
    assert data.check("cifar10", real_data) == []


def test_real_caltech101(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = load("caltech101", real_data, "val", limit=8, download=False)
    assert isinstance(val, ImageData) and val.images.shape == (8, 3, 96, 96) and val.num_classes == 101
    taken: dict[str, list[str]] = {}

    def only_paths(files: tuple[str, ...], size: int) -> torch.Tensor:
        taken["last"] = list(files)
        return torch.zeros(len(files), 3, 2, 2, dtype=torch.uint8)

    monkeypatch.setattr(data, "_decoded", only_paths)
    for split, low, high in (("train", 25, 25), ("val", 5, 5), ("test", 1, 50)):
        counts = load("caltech101", real_data, split, download=False).labels.bincount()
        taken[split] = taken["last"]
        assert (len(counts), int(counts.min()), int(counts.max())) == (101, low, high)
    assert len(set(taken["train"]) | set(taken["val"]) | set(taken["test"])) == 2525 + 505 + 2945
    assert data.check("caltech101", real_data) == []
