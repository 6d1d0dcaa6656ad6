"""Images in memory: normalization, batches, augmentation, object masks, and every bad tensor with its exact message."""

from __future__ import annotations

import doctest
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import exactly, generator, toy
from PIL import Image

from sdecor import images
from sdecor.data import ImageData, ImageStream, load
from sdecor.images import augmented
from sdecor.measures.localization import box_masks


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(images).failed == 0


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
    parts = list(d.batches(4, shuffle=True, generator=generator(), augment=("crop", "flip", "cutout")))
    assert [len(x) for x, _ in parts] == [4, 4, 2]
    assert [len(x) for x, _ in d.batches(4, drop_last=True)] == [4, 4]
    assert torch.equal(torch.cat([x for x, _ in d.batches(4)]), d.normalized())
    shuffled = torch.cat([x for x, _ in d.batches(4, shuffle=True, generator=generator())])
    assert sorted(shuffled.flatten(1).sum(1).tolist()) == sorted(d.normalized().flatten(1).sum(1).tolist())
    assert torch.equal(d.images, before)


@pytest.mark.parametrize("augment", [(), ("flip", "crop"), ("flip",), ("crop",), ("cutout",)])
def test_one_generator_state_gives_one_set_of_bits(augment: tuple[str, ...]) -> None:
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
        for original, new in zip(x, augmented(x, (how,), generator()), strict=True):
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


def test_the_order_of_augmentations_is_not_that_of_their_names() -> None:
    x = toy(30).images
    both = augmented(x, ("crop", "flip"), generator())
    assert torch.equal(both, augmented(x, ("flip", "crop"), generator()))
    draws = generator()  # the flips are drawn first
    flipped = torch.rand(30, 1, generator=draws)[:, 0] < 0.5
    shifts = torch.randint(5, (2, 30, 1), generator=draws)[:, :, 0]
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for i, (down, right) in enumerate(shifts.T.tolist()):
        # the columns of the flipped image are looked up before they are shifted
        rows, columns = torch.arange(16) + down, torch.arange(16).flip(0) if flipped[i] else torch.arange(16)
        assert torch.equal(both[i], wide[i][:, rows][:, :, columns + right])


@pytest.mark.parametrize("size", [16, 9])
def test_cutout_blackens_one_square_that_the_border_may_cut(size: int) -> None:
    x = torch.full((400, 3, size, size), 200, dtype=torch.uint8)
    black = augmented(x, ("cutout",), generator()) == 0
    assert torch.equal(black.any(1), black.all(1)) and set(augmented(x, ("cutout",)).unique().tolist()) == {0, 200}
    side, corners = size // 2, set()
    for hole in black[:, 0]:
        rows, columns = (hole.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
        assert hole.sum() == len(rows) * len(columns)  # a rectangle
        for found in (rows, columns):
            assert found == list(range(found[0], found[-1] + 1))
            assert len(found) == side or (side // 2 <= len(found) < side and (found[0] == 0 or found[-1] == size - 1))
        corners.add((rows[0], rows[-1]))
    assert len(corners) == size  # any row may be the centre
    assert torch.equal(black[:, 0], (augmented(x, ("cutout", "cutout"), generator()) == 0)[:, 0])


def test_objects_are_masks_if_there_are_any_else_the_ink_of_digits() -> None:
    digits, drawn = load("digits", limit=20), load("shapes", limit=20, samples=20)
    assert isinstance(digits, ImageData) and isinstance(drawn, ImageData)
    assert drawn.object_masks is drawn.masks is not None
    assert digits.object_masks is not None and torch.equal(digits.object_masks, digits.images[:, 0] > 0)
    kept = replace(digits, images=digits.images + 1, masks=digits.object_masks)
    assert kept.object_masks is not None and torch.equal(kept.object_masks, digits.object_masks)
    assert toy().object_masks is None


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


def test_images_from_files_know_their_names(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "train" / "ab"[i % 2] / f"{i:02}.png")
    held, streamed = (load(str(tmp_path), memory_limit=limit, workers=0) for limit in (1 << 30, 0))
    assert isinstance(held, ImageData) and isinstance(streamed, ImageStream)

    def seen(data: ImageData) -> list[str]:
        return [f"train/{'ab'[i % 2]}/{i:02}.png" for i in data.images[:, 0, 0, 0].tolist()]

    chosen: list[Any] = [4, [5, 0, 0], torch.tensor([3, -1]), torch.arange(11) % 3 == 1, np.array([2, 7]), range(3, 5)]
    for d in (held, held.to("cpu"), *(held.subset(which) for which in chosen)):
        assert list(d.paths) == seen(d)
    for which in chosen:
        assert streamed.subset(which).paths == held.subset(which).paths
        assert torch.equal(streamed.subset(which).labels, held.subset(which).labels)
    assert load(str(tmp_path), limit=4).paths == held.subset(4).paths
    assert toy().paths == () == toy().subset([1, 2]).paths


def test_masks_of_ones_own_are_set_in_one_line() -> None:
    data = toy(6, size=8)
    boxes = torch.tensor([[i, 1, i + 2, 4] for i in range(6)])
    data = replace(data, masks=box_masks(boxes, 8, 8))
    masks = torch.zeros(6, 8, 8, dtype=torch.bool)
    for i in range(6):
        masks[i, 1:4, i : i + 2] = True
    assert data.object_masks is not None and torch.equal(data.object_masks, masks)
    part = data.subset([4, 1]).to("cpu")
    assert part.object_masks is not None and torch.equal(part.object_masks, masks[[4, 1]])
    numbers = replace(data, masks=masks.float())
    assert numbers.masks is not None and numbers.masks.dtype == torch.bool and torch.equal(numbers.masks, masks)
    with pytest.raises(ValueError, match=exactly("masks must have shape (6, 8, 8), got (5, 8, 8)")):
        replace(data, masks=masks[1:])


def test_the_digest_changes_with_what_is_held() -> None:
    data = toy(6, size=8)
    assert data.digest == toy(6, size=8).digest == data.to("cpu").digest == data.subset(range(6)).digest
    assert len(data.digest) == 16 and int(data.digest, 16) >= 0
    assert replace(data, images=data.images.contiguous(memory_format=torch.channels_last)).digest == data.digest
    assert replace(data, name="x", split="test", paths=tuple("abcdef")).digest == data.digest
    changed = data.images.clone()
    changed[5, 2, 7, 7] ^= 1
    masks = torch.zeros(6, 8, 8, dtype=torch.bool)
    others = [
        replace(data, images=changed),
        replace(data, images=data.images.reshape(6, 3, 4, 16)),
        replace(data, labels=data.labels.flip(0)),
        replace(data, classes=tuple("vwxyz")),
        replace(data, mean=(0.5, 0.5, 0.5)),
        replace(data, std=(0.5, 0.5, 0.5)),
        replace(data, masks=masks),
        replace(data, masks=~masks),
        data.subset([1, 0, 2, 3, 4, 5]),
        data.subset(5),
    ]
    assert len({d.digest for d in (data, *others)}) == 11


def test_the_digest_of_a_stream_goes_by_names_and_sizes(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.bin").write_bytes(bytes(i))
    stream = ImageStream(
        ("0.bin", "1.bin", "2.bin"), torch.arange(3), tuple("abc"), (0.5,), (0.5,), 8, root=str(tmp_path)
    )
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert stream.digest == replace(stream, root=str(tmp_path / "copy"), workers=3).digest == stream.to("cpu").digest
    seen = {stream.digest, replace(stream, labels=torch.tensor([0, 2, 1])).digest, replace(stream, image_size=9).digest}
    seen |= {stream.subset([1, 2]).digest, replace(stream, classes=tuple("abd")).digest}
    (tmp_path / "2.bin").write_bytes(bytes(7))
    seen.add(replace(stream).digest)
    assert len(seen) == 6


def test_the_digest_of_mnist_is_quick() -> None:
    data = ImageData.from_tensors(torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8), torch.zeros(60_000))
    times = []
    for _ in range(3):
        start = time.process_time()
        assert len(replace(data).digest) == 16
        times.append(time.process_time() - start)
    assert min(times) < 0.2
    start = time.process_time()
    assert data.digest == data.digest
    assert time.process_time() - start < 0.4


def test_a_users_tensors_share_the_training_splits_scale() -> None:
    train = toy()
    val = ImageData.from_tensors(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), train=train, split="val")
    assert (val.mean, val.std, val.classes) == (train.mean, train.std, train.classes)
    assert (len(val), val.channels, val.image_size, val.num_classes, val.split) == (4, 3, 16, 5, "val")
    assert val.to("cpu").device == torch.device("cpu")


def test_images_and_masks_are_brought_to_a_size_before_they_are_measured() -> None:
    x, masks = torch.rand(4, 1, 8, 8), torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[:, 2:4, 2:4] = True
    d = ImageData.from_tensors(x, torch.arange(4), masks=masks, image_size=16)
    assert d.image_size == 16 and d.mean == images.moments(d.images)[0]
    assert d.masks is not None and torch.equal(d.masks[:, 1::2, ::2], masks) and d.masks.dtype == torch.bool


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
    with pytest.raises(ValueError, match=exactly("unknown augmentation 'spin'; known: crop, flip, cutout")):
        list(toy().batches(4, augment=("spin",)))


def test_masks_are_checked_as_measures_check_them() -> None:
    data = ImageData.from_tensors(torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.arange(2))
    for masks in (torch.full((2, 3, 3), torch.nan), torch.full((2, 3, 3), 0.3), torch.full((2, 3, 3), 2)):
        with pytest.raises(ValueError, match="^masks must be bool, or hold nothing but 0 and 1$"):
            replace(data, masks=masks)
    with pytest.raises(ValueError, match="^masks must be a tensor, got ndarray; use torch.as_tensor$"):
        replace(data, masks=torch.zeros(2, 3, 3).numpy())
    whole = replace(data, masks=torch.ones(2, 3, 3, dtype=torch.int64)).masks
    assert whole is not None and whole.dtype == torch.bool and whole.all()
    with pytest.raises(ValueError, match="^the number of images must be at least 0, got -1$"):
        data.subset(-1)


# --- streams --------------------------------------------------------------------------------------------------------

SIDE = 12


@dataclass(frozen=True)
class Logged:
    """Says that every other image is an object, and in a file which images were decoded, by whatever process."""

    log: str

    def __call__(self, path: str, width: int, height: int, side: int) -> np.ndarray:
        with open(self.log, "a") as file:
            file.write(f"{os.path.basename(path)}\n")
        return np.full((side, side), int(os.path.basename(path)[:3]) % 2 == 1)

    def seen(self) -> list[str]:
        return Path(self.log).read_text().split() if os.path.exists(self.log) else []


@pytest.fixture
def stream(tmp_path: Path) -> ImageStream:
    """Sixty images of noise, and a log of what is decoded."""
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i:03}.png")
    names = tuple(f"{i:03}.png" for i in range(60))
    logged = Logged(str(tmp_path / "log"))
    how: dict[str, Any] = {"root": str(tmp_path), "objects": logged}
    return ImageStream(names, torch.arange(60) % 3, tuple("abc"), (0.4, 0.5, 0.6), (0.3,) * 3, SIDE, **how)


def in_memory(stream: ImageStream) -> ImageData:
    pixels = images.decode_all([os.path.join(stream.root, path) for path in stream.paths], SIDE)
    masks = (torch.arange(60) % 2 == 1)[:, None, None].expand(60, SIDE, SIDE)
    return ImageData(pixels, stream.labels, stream.classes, stream.mean, stream.std, masks, paths=stream.paths)


HOW: list[dict[str, Any]] = [{}, {"shuffle": True}, {"shuffle": True, "augment": ("crop", "flip", "cutout")}]


def same(stream: ImageStream, held: ImageData) -> None:
    """Values, and how they lie in memory."""
    for how in HOW:
        for layout in (torch.contiguous_format, torch.channels_last):
            both = [
                list(d.batches_with_masks(7, layout=layout, drop_last=True, generator=generator(3), **how))
                for d in (stream, held)
            ]
            assert len(both[0]) == 60 // 7
            for (x, y, mask), (a, b, marks) in zip(*both, strict=True):
                assert x.stride() == a.stride() and x.is_contiguous(memory_format=layout)
                assert torch.equal(x, a) and torch.equal(y, b) and torch.equal(mask, marks)


def test_a_stream_gives_the_batches_of_memory(stream: ImageStream) -> None:
    same(stream, in_memory(stream))


def test_a_stream_decodes_a_batch_when_it_is_asked_for(stream: ImageStream) -> None:
    batches = stream.batches_with_masks(8)
    for count in (8, 16, 24):
        next(batches)
        assert sorted(stream.objects.seen()) == list(stream.paths[:count])


def test_a_stream_of_nothing(stream: ImageStream) -> None:
    assert list(replace(stream.subset(0), workers=2).batches(4)) == []
    assert list(replace(stream, workers=2).batches(61, drop_last=True)) == []


@pytest.mark.slow
@pytest.mark.parametrize("piece", [1 << 22, 3 * 3 * SIDE**2, 1])
def test_other_processes_give_the_batches_of_memory(
    stream: ImageStream, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_PIECE", piece)
    state = torch.get_rng_state()
    same(replace(stream, workers=2), in_memory(stream))
    assert torch.equal(torch.get_rng_state(), state)  # so that what training draws is that of memory
    next_to_each_other = zip(*(replace(stream, workers=1).batches(20) for _ in range(2)), strict=True)
    assert all(torch.equal(a, b) for (a, _), (b, _) in next_to_each_other)


@pytest.mark.slow
def test_processes_start_for_a_second_batch_and_end_with_the_loop(stream: ImageStream) -> None:
    stream = replace(stream, workers=2, objects=None)
    batches = stream.batches(20)
    next(batches)
    assert not multiprocessing.active_children()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()
    for n, _ in enumerate(stream.batches(20)):
        if n == 1:
            break
    assert not multiprocessing.active_children()
    assert len(list(stream.batches(20))) == 3 and not multiprocessing.active_children()
    batches = stream.batches(30)
    next(batches), next(batches)  # a batch is left, in one piece
    assert len(multiprocessing.active_children()) <= 1
    with pytest.raises(KeyError) as kept:  # what an error keeps alive, such as the frame of the loop, holds no process
        for n, _ in enumerate(stream.batches(20)):
            if n == 1:
                raise KeyError
    assert kept.tb and len(multiprocessing.active_children()) <= 1


@pytest.mark.slow
def test_a_broken_file_is_named_and_ends_the_processes(stream: ImageStream) -> None:
    for name in ("041.png", "043.png"):
        Path(stream.root, name).write_bytes(b"no image")
    said = f"cannot read image {os.path.join(stream.root, '041.png')} (UnidentifiedImageError); remove or replace it"
    with pytest.raises(ValueError, match=exactly(said)) as kept:
        list(replace(stream, workers=2).batches(4))
    assert kept.tb and not multiprocessing.active_children()


@pytest.mark.slow
def test_what_is_decoded_ahead_is_bounded(stream: ImageStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a batch and two pieces for each process, whatever the length of the epoch."""
    monkeypatch.setattr(images, "_PIECE", 2 * 3 * SIDE**2)  # two images
    batches = replace(stream, workers=2).batches_with_masks(6)
    next(batches)
    for taken in (12, 18, 24):
        next(batches)
        before = -1
        while before != (now := len(stream.objects.seen())):  # until the processes wait
            before = now
            time.sleep(0.5)
        assert taken < now <= taken + 6 + 2 * 2 * 2


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_of_one_line(stream: ImageStream) -> None:
    batches = replace(stream, workers=1, objects=None).batches(1)
    next(batches), next(batches)
    (process,) = multiprocessing.active_children()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own raises wherever we happen to be
    try:
        time.sleep(0.5)  # until it waits, and holds no lock
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError) as error:
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)
    said = str(error.value)
    assert said.startswith(f"a process that decodes images of {stream.root} broke down (")
    assert said.endswith("); it may lack memory") and "\n" not in said
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_processes_that_begin_with_nothing_decode_too(stream: ImageStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems that cannot fork."""
    context = multiprocessing.get_start_method()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    multiprocessing.set_start_method("spawn", force=True)
    try:
        stream = replace(stream, workers=1, objects=None)
        held = in_memory(stream)
        for (x, y), (a, b) in zip(stream.batches(20), held.batches(20), strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)
    finally:
        multiprocessing.set_start_method(context, force=True)


def test_a_pass_takes_fewer_images_where_these_are_large() -> None:
    sizes = {28: 500, 64: 500, 65: 484, 96: 222, 224: 40, 4096: 1}
    for side, count in sizes.items():
        stream = ImageStream((), torch.zeros(0, dtype=torch.int64), ("a",), (0.5,), (0.5,), side)
        assert stream.pass_size == count
    assert toy().pass_size == 500
