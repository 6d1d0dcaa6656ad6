"""Folders of images as people have them: the right pixels, classes and files for each, or a refusal by name."""

from __future__ import annotations

import io
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sdecor.config import fingerprint
from sdecor.data import ImageData, ImageStream, load
from sdecor.images import permutation

Pixels = NDArray[Any]
SIDE = 6


def png(values: Pixels, depth: int, kind: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG file, written by hand: `values` (H, W) or (H, W, C), of so many bits, of that kind of colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = []
    for row in values.reshape(len(values), -1):
        bits = "".join(f"{int(v):0{depth}b}" for v in row)
        bits += "0" * (-len(bits) % 8)
        rows.append(b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], len(values), depth, kind, 0, 0, 0))
    alpha = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + alpha + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


def tiff(values: Pixels, bits: int, **tags: int) -> bytes:
    """A grey TIFF file, written by hand."""
    known = {"BitsPerSample": 258, "Photometric": 262, "SampleFormat": 339}
    content = values.tobytes()
    own = {256: values.shape[1], 257: len(values), 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: len(values)}
    own |= {279: len(content)} | {known[name]: value for name, value in tags.items()}
    own[273] = 14 + 12 * len(own)
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(own.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(own)) + fields + bytes(4) + content


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def grey(values: Pixels) -> Pixels:
    return np.repeat(values[:, :, None], 3, 2).astype(np.uint8)


def on_grey(colours: Pixels, alpha: Pixels) -> Pixels:
    a = alpha[:, :, None].astype(float)
    return np.floor((colours * a + 128 * (255 - a)) / 255 + 0.5).astype(np.uint8)


def key(colours: Pixels, seen: Pixels) -> Pixels:
    return on_grey(colours, 255 * seen.astype(int))


@dataclass
class Draw:
    """Random values for one image."""

    height: int
    width: int
    rng: np.random.Generator

    def values(self, channels: int = 0, below: int = 256) -> Pixels:
        shape = (self.height, self.width, channels) if channels else (self.height, self.width)
        out = self.rng.integers(0, below, shape)
        out.flat[0] = 0  # so that something is seen
        return out

    def rgb(self) -> Pixels:
        return self.values(3).astype(np.uint8)


Made = tuple[bytes, Pixels | str]  # a file, and its RGB values (H, W, 3) or what the refusal says
KINDS: dict[str, tuple[str, Callable[[Draw], Made]]] = {}


def kind(suffix: str) -> Callable[[Callable[[Draw], Made]], Callable[[Draw], Made]]:
    def enter(function: Callable[[Draw], Made]) -> Callable[[Draw], Made]:
        KINDS[function.__name__] = (suffix, function)
        return function

    return enter


def lossless(name: str, suffix: str, file: str, mode: str = "RGB", **how: Any) -> None:
    def make(draw: Draw) -> Made:
        x = draw.rgb()
        if mode == "L":
            return saved(Image.fromarray(x[:, :, 0]), file, **how), grey(x[:, :, 0])
        if mode == "1":
            x = grey(255 * (x[:, :, 0] > 99))
        return saved(Image.fromarray(x).convert(mode), file, **how), x

    KINDS[name] = (suffix, make)


for name, suffix, file, how in (
    ("png", "png", "PNG", {}),
    ("bmp", "bmp", "BMP", {}),
    ("dib", "dib", "DIB", {}),
    ("tif", "tif", "TIFF", {}),
    ("tiff_lzw", "tiff", "TIFF", {"compression": "tiff_lzw"}),
    ("ppm", "ppm", "PPM", {}),
    ("webp", "webp", "WEBP", {"lossless": True}),
    ("tga", "tga", "TGA", {}),
    ("jp2", "jp2", "JPEG2000", {}),
    ("png_named_jpg", "jpg", "PNG", {}),
):
    lossless(name, suffix, file, **how)
for name, suffix, file, mode in (
    ("grey_png", "png", "PNG", "L"),
    ("grey_pgm", "pgm", "PPM", "L"),
    ("grey_tif", "tif", "TIFF", "L"),
    ("grey_gif", "gif", "GIF", "L"),
    ("bits_png", "png", "PNG", "1"),
    ("bits_pbm", "pbm", "PPM", "1"),
    ("bits_tif", "tif", "TIFF", "1"),
    ("bits_bmp", "bmp", "BMP", "1"),
):
    lossless(name, suffix, file, mode)


@kind("jpeg")
def jpeg(draw: Draw) -> Made:
    content = saved(Image.fromarray(draw.rgb()), "JPEG")
    return content, np.asarray(Image.open(io.BytesIO(content)))


@kind("jpg")
def jpeg_of_a_camera_with_a_preview(draw: Draw) -> Made:
    first, second = (Image.fromarray(draw.rgb()) for _ in range(2))
    content = saved(first, "MPO", save_all=True, append_images=[second])
    return content, np.asarray(Image.open(io.BytesIO(saved(first, "JPEG"))))


@kind("png")
def grey_16_png(draw: Draw) -> Made:
    v = draw.values(below=65_536)
    return png(v, 16, 0), grey(np.round(v / 257))


@kind("tif")
def grey_16_tif(draw: Draw) -> Made:
    v = draw.values(below=65_536).astype(np.uint16)
    return saved(Image.fromarray(v), "TIFF"), grey(np.round(v / 257))


@kind("tif")
def grey_16_tif_of_another_order(draw: Draw) -> Made:
    v = draw.values(below=65_536)
    content = tiff(v.astype("<u2"), 16)
    swapped = saved(Image.frombytes("I;16B", v.shape[::-1], v.astype(">u2").tobytes()), "TIFF")
    return (content if draw.rng.random() < 0.5 else swapped), grey(np.round(v / 257))


@kind("pgm")
def grey_16_pgm(draw: Draw) -> Made:
    v = draw.values(below=65_536)
    return b"P5 %d %d 65535\n" % v.shape[::-1] + v.astype(">u2").tobytes(), grey(np.round(v / 257))


@kind("jp2")
def grey_16_jp2(draw: Draw) -> Made:
    v = draw.values(below=65_536).astype(np.uint16)
    return saved(Image.fromarray(v), "JPEG2000"), grey(np.round(v / 257))


@kind("png")
def rgb_16_png(draw: Draw) -> Made:
    v = draw.values(3, below=65_536)
    return png(v, 16, 2), (v // 256).astype(np.uint8)


@kind("png")
def grey_of_few_bits_with_a_transparent_value(draw: Draw) -> Made:
    depth = int(draw.rng.choice([1, 2, 4, 8]))
    v = draw.values(below=2**depth)
    v[0, 0], hidden = 0, int(draw.rng.integers(1, 2**depth))
    return png(v, depth, 0, (hidden,)), key(grey(v * 255 // (2**depth - 1)), v != hidden)


@kind("png")
def grey_16_with_a_transparent_value(draw: Draw) -> Made:
    v = draw.values(below=4) * 257
    return png(v, 16, 0, (257,)), key(grey(v // 257), v != 257)


@kind("png")
def rgb_with_a_transparent_colour(draw: Draw) -> Made:
    v = draw.values(3, below=2)
    return png(v, 8, 2, (1, 1, 1)), key(v, v.sum(2) != 3)


@kind("png")
def palette(draw: Draw) -> Made:
    v, colours = draw.values(below=16).astype(np.uint8), draw.rng.integers(0, 256, (16, 3), dtype=np.uint8)
    image = Image.fromarray(v, "P")
    image.putpalette(colours.tobytes())
    return saved(image, "PNG"), colours[v]


@kind("png")
def palette_with_alpha(draw: Draw) -> Made:
    v, colours = draw.values(below=16).astype(np.uint8), draw.rng.integers(0, 100, (16, 3), dtype=np.uint8)
    alpha = draw.rng.integers(1, 256, 16, dtype=np.uint8)
    image = Image.fromarray(v, "P")
    image.putpalette(colours.tobytes())
    return saved(image, "PNG", transparency=alpha.tobytes()), on_grey(colours[v], alpha[v])


@kind("gif")
def gif_with_a_transparent_colour(draw: Draw) -> Made:
    v, colours = draw.values(below=16).astype(np.uint8), draw.rng.integers(0, 256, (16, 3), dtype=np.uint8)
    image = Image.fromarray(v, "P")
    image.putpalette(colours.tobytes())
    return saved(image, "GIF", transparency=3), key(colours[v], v != 3)


def with_alpha(name: str, suffix: str, file: str, **how: Any) -> None:
    def make(draw: Draw) -> Made:
        x, alpha = draw.rgb(), draw.values().astype(np.uint8)
        alpha[0, 0] = 255
        return saved(Image.fromarray(np.dstack([x, alpha])), file, **how), on_grey(x, alpha)

    KINDS[name] = (suffix, make)


with_alpha("rgba_png", "png", "PNG")
with_alpha("rgba_tif", "tif", "TIFF")
with_alpha("rgba_tga", "tga", "TGA")
with_alpha("rgba_webp", "webp", "WEBP", lossless=True, exact=True)


@kind("png")
def grey_with_alpha(draw: Draw) -> Made:
    v, alpha = draw.values(), draw.values()
    alpha[0, 0] = 255
    return png(np.dstack([v, alpha]), 8, 4), on_grey(grey(v), alpha)


@kind("png")
def opaque_alpha(draw: Draw) -> Made:
    x = draw.rgb()
    return saved(Image.fromarray(np.dstack([x, np.full_like(x[:, :, 0], 255)])), "PNG"), x


@kind("png")
def an_object_drawn_in_alpha(draw: Draw) -> Made:
    colour = int(draw.rng.choice([0, 255]))
    seen = draw.values(below=2)
    seen[0, 0] = 1
    x = np.full((*seen.shape, 3), colour)
    return png(np.dstack([x, 255 * seen]), 8, 6), key(x, seen)


@kind("tif")
def cmyk_tif(draw: Draw) -> Made:
    v = draw.values(4).astype(np.uint8)
    ink, black = v[:, :, :3].astype(float), v[:, :, 3:].astype(float)
    light = 255 - black - np.floor(ink * (255 - black) / 255 + 0.5)
    return saved(Image.fromarray(v, "CMYK"), "TIFF"), light.clip(0, 255).astype(np.uint8)


TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def turned(name: str, suffix: str, file: str, **how: Any) -> None:
    def make(draw: Draw) -> Made:
        x, tag = draw.rgb(), int(draw.rng.integers(1, 9))
        exif = Image.Exif()
        exif[274] = tag
        content = saved(Image.fromarray(x), file, exif=exif, **how)
        if file == "JPEG":
            x = np.asarray(Image.open(io.BytesIO(content)))
        return content, np.ascontiguousarray(TURNS[tag](x))

    KINDS[name] = (suffix, make)


turned("turned_jpg", "JPG", "JPEG")
turned("turned_png", "png", "PNG")
turned("turned_webp", "webp", "WEBP", lossless=True)
turned("turned_tif", "tif", "TIFF")


def refused(name: str, suffix: str, content: Callable[[Draw], bytes], said: str) -> None:
    KINDS[name] = (suffix, lambda draw: (content(draw), said))


def frames(file: str) -> Callable[[Draw], bytes]:
    return lambda draw: saved(
        Image.fromarray(draw.rgb()), file, save_all=True, append_images=[Image.fromarray(255 - draw.rgb())]
    )


def cut(file: str) -> Callable[[Draw], bytes]:
    def make(draw: Draw) -> bytes:
        whole = saved(Image.fromarray(draw.rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)), file)
        return whole[: int(draw.rng.integers(0, len(whole) // 2))]

    return make


def of_type(kind: type, file: str) -> Callable[[Draw], bytes]:
    return lambda draw: saved(Image.fromarray(draw.values().astype(kind)), file)


NOT_READ = "is of a kind of image that is not read"
refused("floats", "tif", of_type(np.float32, "TIFF"), "(mode F, stored as F;32F, has no certain range; save it with ")
refused("pfm", "pfm", of_type(np.float32, "PPM"), "(mode F, stored as F;32F, has no certain range; save it with ")
refused("integers", "tif", of_type(np.int32, "TIFF"), "(mode I, stored as I;32S, has no certain range; save it with ")
refused("signed_16", "tif", lambda d: tiff(d.values().astype("<i2"), 16, SampleFormat=2), "mode I, stored as I;16S")
refused("signed_8", "tif", lambda d: tiff(d.values().astype("i1"), 8, SampleFormat=2), "mode L, stored as L")
refused("white_is_0", "tif", lambda d: tiff(d.values().astype("<u2"), 16, Photometric=0), "mode I;16, stored as I;16")


def planes(draw: Draw) -> bytes:
    """A TIFF of three colours of 16 bits, each in a plane of its own, written by hand."""
    content, n = draw.values(3, below=65_536).astype("<u2").transpose(2, 0, 1).tobytes(), draw.height * draw.width * 2
    at = 8 + len(content)
    entries = [(256, 4, 1, draw.width), (257, 4, 1, draw.height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 3, at + 6), (277, 3, 1, 3), (278, 4, 1, draw.height), (279, 4, 3, at + 18), (284, 3, 1, 2)]
    more = struct.pack("<6H", *[16] * 3, 0, 0, 0)[:6] + struct.pack("<6I", 8, 8 + n, 8 + 2 * n, n, n, n)
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", at + 30) + content + more + struct.pack("<H", 10) + fields + bytes(4)


def deep_jp2(depth: int) -> Callable[[Draw], bytes]:
    """A JPEG 2000 file of three colours that says it has so many bits, plus 128 if they are signed."""

    def content(draw: Draw) -> bytes:
        made = bytearray(saved(Image.fromarray(draw.rgb()), "JPEG2000"))
        at = made.find(b"\xff\x4f\xff\x51") + 42
        made[at : at + 9 : 3] = bytes([depth - 1] * 3)
        return bytes(made)

    return content


refused(
    "planes_of_16", "tif", planes, "(TIFF with 16 bits and a plane for each colour is not read rightly; save it as PNG)"
)
for bits in (10, 12, 16, 8 + 128):
    refused(
        f"jp2_{bits}", "jp2", deep_jp2(bits), "(JPEG 2000 with other than 8 bits, or 16 of grey, is not read rightly"
    )
refused("bits_12", "tif", lambda d: tiff(np.zeros((d.height, d.width * 2), "u1"), 12), "mode I;16, stored as I;12")
refused("rgb_16_key", "png", lambda d: png(d.values(3), 16, 2, (1, 2, 3)), "RGB with 16 bits and a transparent colour")
refused("transparent", "png", lambda d: png(np.dstack([d.rgb(), 0 * d.values()]), 8, 6), "mode RGBA, and nothing of it")
refused("grey_on_grey", "png", lambda d: png(np.dstack([0 * d.rgb() + 128, d.values()]), 8, 6), "nothing of it can be")
for name, file in (("gif", "GIF"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF")):
    refused(f"frames_{name}", name, frames(file), "(2 frames or pages; save one of them)")
for name, file in (("png", "PNG"), ("jpg", "JPEG"), ("bmp", "BMP"), ("tif", "TIFF"), ("webp", "WEBP"), ("ppm", "PPM")):
    refused(f"cut_{name}", name, cut(file), "cannot read image")
refused("text", "png", lambda d: b"no image", "UnidentifiedImageError")
refused("empty", "jpg", lambda d: b"", "UnidentifiedImageError")
refused(
    "strip", "png", lambda d: saved(Image.new("1", (SIDE * 2**23, 1)), "PNG"), "(50331648 x 1 pixels are too long a"
)
for suffix in ("heic", "svg", "psd", "ico", "npy", "pdf"):
    refused(suffix, suffix, lambda d: b"something", NOT_READ)
COSTLY = {"strip"}


def brought(pixels: Pixels, side: int) -> torch.Tensor:
    """(3, side, side), resized by the short side and cropped to the centre."""
    image = Image.fromarray(pixels)
    short = min(image.size)
    if image.size != (side, side):
        image = image.resize([side * n // short for n in image.size], Image.Resampling.BILINEAR)
        left, top = (round((n - side) / 2) for n in image.size)
        image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


@dataclass
class Folder:
    """An image folder, and what is right for it."""

    root: Path
    pixels: dict[str, Pixels] = field(default_factory=dict)  # by path relative to the root
    faults: list[tuple[str, str]] = field(default_factory=list)  # path or its end, and what is said of it
    others: int = 0  # files that are left out with a warning

    def write(self, path: str, content: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content)

    def put(self, path: str, content: bytes, right: Pixels | str) -> None:
        self.write(path, content)
        if isinstance(right, str):
            self.faults.append((str(self.root / path), right))
        else:
            self.pixels[path] = right


def check(folder: Folder) -> None:
    """Load it, in memory and as a stream, and compare."""

    def loaded(**options: Any) -> ImageData | ImageStream:
        return load(str(folder.root), image_size=SIDE, **options)

    before = fingerprint(folder.root) if not folder.faults else ""
    if folder.faults:
        for options in ({}, {"memory_limit": 0, "workers": 0}):
            with pytest.raises(ValueError, match=".") as refusal:
                list(loaded(**options).batches(1000))
            said = str(refusal.value)
            assert any(path in said and why in said for path, why in folder.faults), said
            assert "\n" not in said
        return
    held, streamed = loaded(), loaded(memory_limit=0, workers=0)
    assert isinstance(held, ImageData) and isinstance(streamed, ImageStream)
    paths = sorted(folder.pixels, key=lambda path: (path.split("/")[1], os.path.split(path)))
    assert held.paths == streamed.paths == tuple(paths)
    assert held.classes == tuple(sorted({path.split("/")[1] for path in paths}))
    assert [held.classes[label] for label in held.labels.tolist()] == [path.split("/")[1] for path in paths]
    for path, image in zip(paths, held.images, strict=True):
        assert torch.equal(image, brought(folder.pixels[path], SIDE)), path
    for (a, b), (c, d) in zip(held.batches(3), streamed.batches(3), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert fingerprint(folder.root) == before


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two classes with an image each, and one to validate on."""
    made = Folder(tmp_path / "images")
    for i, path in enumerate(("train/a/0.png", "train/b/0.png")):
        content, right = KINDS["png"][1](Draw(SIDE, SIDE, np.random.default_rng(i)))
        made.put(path, content, right)
    made.write("val/a/0.png", content)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_right_or_refused(name: str, folder: Folder) -> None:
    suffix, make = KINDS[name]
    for i, (height, width) in enumerate([(SIDE, SIDE)] * 8 + [(9, 7), (2, 3), (1, 1)]):
        one = Folder(folder.root, dict(folder.pixels))
        path = f"train/a/x.{suffix.upper() if i % 2 else suffix}"
        one.put(path, *make(Draw(height, width, np.random.default_rng(i))))
        check(one)
        (one.root / path).unlink()
        if name in COSTLY:
            break


NAMES = ("a", "b b", "ünïcode", "日本", "c.jpg", "-d", "E", "it's", "%20")
TOOLS = ("._x.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/x-checkpoint.png", "@eaDir/x.png")
TOOLS += ("@Recycle/x.png", "Temporary Items/x.png", "Network Trash Folder/x.png")
TOOLS += ("__MACOSX/a/._x.png", "lost+found/x.jpg", "__pycache__/x.png", ".x.png.swp")
OTHERS = ("notes.txt", "labels.csv", "x.json", "x.png.bak", "README", "film.mp4", "x.xml")


def plant(data: st.DataObject, folder: Folder, elsewhere: Path) -> None:
    """Put into the training folder what `data` draws."""
    classes = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    faulty = data.draw(st.integers(0, 3)) == 0
    kinds = [k for k in KINDS if k not in COSTLY]
    for c in classes:
        for i in range(data.draw(st.integers(1, 4))):
            name = data.draw(st.sampled_from(kinds))
            suffix, make = KINDS[name]
            suffix = data.draw(st.sampled_from((suffix, suffix.upper(), suffix.title())))
            height, width = data.draw(st.sampled_from(((SIDE, SIDE), (SIDE, SIDE), (1, 1), (11, 5), (5, 40))))
            content, right = make(Draw(height, width, np.random.default_rng(data.draw(st.integers(0, 99)))))
            if isinstance(right, str) and not faulty:
                continue
            below = data.draw(st.sampled_from(("", "", "deeper/", "x.png/", "deep er/still/")))
            if data.draw(st.integers(0, 5)) == 0:  # a link to a file elsewhere
                path, target = f"train/{c}/{below}{i}.{suffix}", elsewhere / f"{len(list(elsewhere.iterdir()))}"
                target.write_bytes(content)
                folder.put(path, content, right)
                (folder.root / path).unlink()
                (folder.root / path).symlink_to(target)
            else:
                folder.put(f"train/{c}/{below}{i}.{suffix}", content, right)
        if not any(path.startswith(f"train/{c}/") for path in folder.pixels):
            folder.put(f"train/{c}/one.png", *KINDS["png"][1](Draw(SIDE, SIDE, np.random.default_rng(1))))
        for name in data.draw(st.lists(st.sampled_from(TOOLS), max_size=3, unique=True)):
            folder.write(data.draw(st.sampled_from((f"train/{c}/{name}", f"train/{name}", name))), b"of a tool")
        for name in data.draw(st.lists(st.sampled_from(OTHERS), max_size=2, unique=True)):
            folder.write(f"train/{c}/{name}", b"no image")
            folder.others += 1
    c = classes[0]
    wrong = data.draw(st.sampled_from(("", "", "", "broken", "circle", "stray", "pipe"))) if faulty else ""
    at = folder.root / "train" / c
    if wrong == "broken":
        (at / "gone.png").symlink_to("nowhere.png")
        folder.faults.append((str(at / "gone.png"), "is a broken link"))
    elif wrong == "circle":
        (at / "round").symlink_to(folder.root / "train")
        folder.faults.append((f"{at}/round/{c}", "is a link to a folder that it lies in"))
    elif wrong == "stray":
        folder.write("train/x.png", b"")
        folder.faults.append((str(folder.root / "train" / "x.png"), "lies beside the class folders"))
    elif wrong == "pipe":
        os.mkfifo(at / "pipe.png")
        folder.faults.append((str(at / "pipe.png"), "neither a file nor a folder"))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_folder_is_right_or_refused(caplog: pytest.LogCaptureFixture, data: st.DataObject) -> None:
    where = Path(tempfile.mkdtemp())
    try:
        (where / "elsewhere").mkdir()
        folder = Folder(where / "images")
        plant(data, folder, where / "elsewhere")
        folder.write(f"val/{min(folder.pixels).split('/')[1]}/0.bmp", saved(Image.new("RGB", (8, 8)), "BMP"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check(folder)
        said = [m for m in caplog.messages if "is no image and is left out" in m]
        if not folder.faults:
            assert bool(said) == bool(folder.others)
            assert all(m.endswith(f"as are {folder.others - 1} others in {folder.root}/train") for m in said)
    finally:
        shutil.rmtree(where)


# Sizes


def sized(root: Path, *sizes: tuple[int, int]) -> Path:
    for i, (width, height) in enumerate(sizes):
        (root / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (i, i, i)).save(root / "train" / "a" / f"{i:03}.png")
    return root


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(1, 1)] + [(30, 20)] * 9, 20),
        ([(30, 20)] * 9 + [(1, 1)], 20),
        ([(300, 260)] * 3, 224),
        ([(10, 12), (14, 20)], 10),
        ([(10, 90), (11, 90), (500, 400)], 11),
    ],
)
def test_the_side_is_the_median_of_the_short_sides(sizes: list[tuple[int, int]], side: int, tmp_path: Path) -> None:
    parts = [load(str(sized(tmp_path, *sizes)), split=split) for split in ("train", "val")]
    assert [p.image_size for p in parts if isinstance(p, ImageData)] == [side, side]


def test_a_rotated_file_has_the_sides_that_it_is_shown_with(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    x = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    for i in range(2):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(tmp_path / "train" / "a" / f"{i}.png", exif=exif)
    d = load(str(tmp_path))
    assert isinstance(d, ImageData) and d.image_size == 8
    assert np.array_equal(d.images[0].movedim(0, -1).numpy(), np.rot90(x, -1)[2:10])


def test_what_is_enlarged_very_much_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = sized(tmp_path, (2, 1), (1, 1), *[(20, 20)] * 8)
    d = load(str(root), image_size=16)
    assert isinstance(d, ImageData) and d.images.shape == (9, 3, 16, 16)
    small = f"{root}/train/a/000.png, whose short side is 1,"
    assert caplog.messages == [f"{small} is enlarged more than eightfold to 16 pixels, as are 1 others"]
    assert all(torch.equal(image, image[:, :1, :1].expand_as(image)) for image in d.images)
    caplog.clear()
    load(str(root), image_size=8)
    assert caplog.messages == []


# Splits, names, links


def test_what_is_in_no_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = sized(tmp_path, *[(8, 8)] * 4)
    for name in ("roses", ".git", "__MACOSX"):
        (root / name).mkdir()
    for name in ("notes.csv", "README.md", "paper.pdf", ".DS_Store", "Thumbs.db"):
        (root / name).write_bytes(b"")
    load(str(root))
    assert caplog.messages == [f"{root}/roses is in no split and is left out, as are 0 others beside it"]
    caplog.clear()
    (root / "x.JPG").write_bytes(b"")
    load(str(root))
    assert caplog.messages == [f"{root}/roses is in no split and is left out, as are 1 others beside it"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("valid", "val"), ("Validation", "val"), ("TEST", "test"), ("training", "train"), ("Val", "val")],
)
def test_splits_of_another_name_are_refused(name: str, meant: str, tmp_path: Path) -> None:
    root = sized(tmp_path, *[(8, 8)] * 4)
    (root / name).mkdir()
    with pytest.raises(ValueError, match=f"^{root}/{name} is no split; the name of that is '{meant}'$"):
        load(str(root))


def test_a_folder_may_be_named_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sized(tmp_path / "my images", *[(8, 8)] * 4)
    link = tmp_path / "link"
    link.symlink_to(root)
    monkeypatch.chdir(root)
    spellings = [str(root), ".", "../my images", f"folder:{link}", "folder:../my images/"]
    parts = [load(name) for name in spellings]
    assert {part.digest for part in parts} == {parts[0].digest}
    assert {part.paths for part in parts} == {tuple(f"train/a/{i:03}.png" for i in permutation(4).tolist()[1:])}
    assert [part.name for part in parts] == ["folder:my images"] * 3 + ["folder:link", "folder:my images"]
    streams = [load(name, memory_limit=0, workers=0) for name in spellings]
    assert {stream.digest for stream in streams} == {streams[0].digest}
    assert {stream.paths for stream in streams} == {parts[0].paths}
    assert all(torch.equal(next(stream.batches(9))[0], next(parts[0].batches(9))[0]) for stream in streams)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    root = sized(tmp_path / "images", *[(8, 8)] * 4)
    (root / "b").symlink_to(root / "train")  # no circle
    assert len(fingerprint(root)) == 16
    (root / "b").unlink()
    (root / "train" / "a" / "up").symlink_to(root)
    message = f"^{root}/train/a/up is a link to a folder that it lies in; remove it$"
    with pytest.raises(ValueError, match=message):
        fingerprint(root)
    with pytest.raises(
        ValueError, match=f"^{root}/train/a/up/train/a is a link to a folder that it lies in; remove it$"
    ):
        load(str(root))
    (root / "train" / "a" / "up").unlink()
    (root / "train" / "self").symlink_to("self")
    for function in (fingerprint, load):
        with pytest.raises(
            ValueError, match=f"^cannot list {root}/train/self \\(Too many levels of symbolic links\\)$"
        ):
            function(root if function is fingerprint else str(root))  # type: ignore[arg-type]


def test_the_fingerprint_sees_folders_that_change_places(tmp_path: Path) -> None:
    root = sized(tmp_path, *[(8, 8)] * 2)
    (root / "train" / "b").mkdir()
    (root / "train" / "a" / "001.png").rename(root / "train" / "b" / "000.png")
    for path in root.rglob("*.png"):
        path.write_bytes(bytes([path.parent.name == "a"]) * 60)
        os.utime(path, (1, 1))
    seen = [fingerprint(root)]
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / "train" / old).rename(root / "train" / new)
    seen.append(fingerprint(root))
    one = root / "train" / "a" / "000.png"
    one.write_bytes(one.read_bytes()[:-1] + b"x")
    os.utime(one, (1, 1))
    seen.append(fingerprint(root))
    assert len(set(seen)) == 3
    for name in (
        "Thumbs.db",
        "train/.x.png",
        "train/a/._000.png",
        "__MACOSX/x.png",
        "train/a/.ipynb_checkpoints/x.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    assert fingerprint(root) == seen[-1]
    (root / "boxes.csv").write_bytes(b"")
    assert fingerprint(root) != seen[-1]


def test_names_that_are_no_text_have_a_fingerprint(tmp_path: Path) -> None:
    root = sized(tmp_path, *[(8, 8)] * 2)
    before = fingerprint(root)
    os.rename(os.fsencode(root / "train" / "a" / "000.png"), os.fsencode(root / "train" / "a") + b"/\xff.png")
    assert fingerprint(root) != before and len(load(str(root))) == 1
