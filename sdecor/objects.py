"""Where the objects of an image folder lie: its ``boxes.csv`` or its ``masks/``, brought to the square of each image.

``boxes.csv`` has the columns file, x0, y0, x1, y1: an image by its path in the folder, and the first and the last
column and row of a box in pixels of the file, upright, from 0. A file may have several rows, for several objects.
``masks/`` has for an image such as ``train/rose/1.jpg`` a file such as ``masks/train/rose/1.png`` of the same size,
which holds 0 outside of the objects and one other value inside. Images without either have no mask that is known.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as pil

from sdecor._files import files_below, is_image
from sdecor.images import upright_size
from sdecor.measures.localization import box_masks

log = logging.getLogger("sdecor")
BOXES, MASKS = "boxes.csv", "masks"
COLUMNS = ("file", "x0", "y0", "x1", "y1")
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Objects:
    """Boxes, with their lines in the file, or files of masks, by image; paths are relative to the folder `root`."""

    root: str
    boxes: tuple[tuple[str, int, Box], ...] = ()
    masks: tuple[tuple[str, str, int], ...] = ()  #: Image, mask, and when that was changed last, in nanoseconds.

    @cached_property
    def _boxes(self) -> dict[str, list[tuple[int, Box]]]:
        found: dict[str, list[tuple[int, Box]]] = {}
        for file, line, box in self.boxes:
            found.setdefault(file, []).append((line, box))
        return found

    @cached_property
    def _masks(self) -> dict[str, str]:
        return {file: mask for file, mask, _ in self.masks}

    def __str__(self) -> str:
        """What it says, wherever the folder lies; of masks, which images have one."""
        return repr((self.boxes, [self._masks]))

    def __contains__(self, file: str) -> bool:
        return file in self._boxes or file in self._masks

    def __call__(self, path: str, width: int, height: int, side: int) -> np.ndarray:
        """Pixels of the objects, bool (side, side), of an image file of that size, resized and cropped as the image is.

        A pixel belongs to a box if its centre lies in it, and to a mask that covers half of it. All are False where
        nothing is known. ValueError for a box that lies outside, and for a mask of another size or without an object.
        """
        file = os.path.relpath(path, self.root).replace(os.sep, "/")
        if file in self._masks:
            return self._drawn(file, width, height, side)
        edges = [self._edges(file, line, box, width, height) for line, box in self._boxes.get(file, ())]
        if not edges:
            return np.zeros((side, side), bool)
        short = min(width, height)
        new = [side if n == short else int(side * n / short) for n in (width, height)]  # as torchvision rounds them
        scale = torch.tensor([new[0] / width, new[1] / height] * 2, dtype=torch.float64)
        start = torch.tensor([int(round((n - side) / 2)) for n in new] * 2)
        boxes = torch.tensor(edges, dtype=torch.float64) * scale - start
        square: np.ndarray = box_masks(boxes, side, side).any(0).numpy()
        return square

    def _edges(self, file: str, line: int, box: Box, width: int, height: int) -> Box:
        x0, y0, x1, y1 = box
        if x1 >= width or y1 >= height:
            size = f"{width} x {height} pixels, columns 0 to {width - 1} and rows 0 to {height - 1}"
            raise ValueError(f"{self._line(line)}: box {x0}, {y0}, {x1}, {y1} lies outside of {file}, which has {size}")
        return x0, y0, x1 + 1, y1 + 1

    def _opened(self, file: str, width: int, height: int, whole: bool = True) -> tuple[str, Image.Image]:
        """The mask of an image of that size, and its name."""
        name = os.path.join(self.root, self._masks[file])
        try:
            with Image.open(name) as image:
                if whole:
                    image.load()
        except Exception as error:  # a damaged file makes Pillow raise nearly everything
            raise ValueError(f"cannot read mask {name} ({type(error).__name__}); remove or replace it") from error
        if image.size != (width, height):
            size = f"{image.width} x {image.height} pixels, its image {file} has {width} x {height}"
            raise ValueError(f"mask {name} has {size}; both must have one size")
        return name, image

    def check(self) -> None:
        """Raise ValueError for a box outside of its image, and for a mask of another size; it reads heads of files."""
        for file in self._boxes | self._masks:
            path = os.path.join(self.root, file)
            try:
                self._fit(file, *upright_size(path))
            except ValueError:
                self._fit(file, *upright_size(path, whole=True))

    def _fit(self, file: str, width: int, height: int) -> None:
        for line, box in self._boxes.get(file, ()):
            self._edges(file, line, box, width, height)
        if file in self._masks:
            self._opened(file, width, height, whole=False)

    def _drawn(self, file: str, width: int, height: int, side: int) -> np.ndarray:
        name, image = self._opened(file, width, height)
        if len(image.getbands()) > 1:
            raise ValueError(f"mask {name} has {len(image.getbands())} channels; save it as grey, 0 outside of objects")
        values = np.asarray(image)
        if (inside := len(np.unique(values[values != 0]))) != 1:
            what = f"{inside} values other than 0" if inside else "no object"
            raise ValueError(f"mask {name} has {what}; it must hold 0 outside of objects, and one other value inside")
        square = pil.center_crop(pil.resize(Image.fromarray((values != 0).astype(np.uint8) * 255), side), [side, side])
        return np.asarray(square) > 127

    def _line(self, line: int) -> str:
        return f"{os.path.join(self.root, BOXES)}, line {line}"


def read_objects(root: Path, files: Collection[str]) -> Objects | None:
    """What the folder `root` says of objects in `files`, paths relative to it; None if it says nothing.

    ValueError, with the line, for rows that are no box, for boxes outside of their image and masks of another size, for
    boxes or masks of images that are not among `files`, and where there are none at all.
    """
    boxes, masks = (root / BOXES).is_file(), (root / MASKS).is_dir()
    if boxes and masks:
        raise ValueError(f"{root} has both {BOXES} and {MASKS}; keep the one that is to count")
    if not boxes and not masks:
        for entry in root.glob("*.[cC][sS][vV]"):
            if "box" in entry.name.lower():
                log.warning("%s is not read: boxes have to be in a file of the name %s", entry, BOXES)
        return None
    parts: dict[str, Any] = {"boxes": _rows(root / BOXES, set(files))} if boxes else {"masks": _mirrored(root, files)}
    found = Objects(str(root), **parts)
    if not any(parts.values()):
        raise ValueError(f"{root / BOXES} has no boxes" if boxes else f"{root / MASKS} holds no masks")
    _check(found)
    return found


@lru_cache(maxsize=8)
def _check(objects: Objects) -> None:
    """`Objects.check`, once for what several splits and runs of this process share."""
    objects.check()


def _rows(path: Path, files: set[str]) -> tuple[tuple[str, int, Box], ...]:
    out = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = csv.reader(f, strict=True)
            if tuple(name.strip() for name in next(rows, ())) != COLUMNS:
                raise ValueError(f"{path}, line 1: the columns must be {', '.join(COLUMNS)}")
            for row in rows:
                if row:
                    out.append((*_box(row, f"{path}, line {rows.line_num}", files), rows.line_num))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text of comma separated values ({error})") from error
    return tuple((file, line, box) for file, box, line in out)


def _box(row: list[str], place: str, files: set[str]) -> tuple[str, Box]:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{place}: it has {len(row)} values, not {len(COLUMNS)}: {', '.join(COLUMNS)}")
    file, numbers = row[0].strip().replace("\\", "/").removeprefix("./"), row[1:]
    try:
        x0, y0, x1, y1 = (int(number) for number in numbers)
    except ValueError:
        raise ValueError(f"{place}: {', '.join(numbers)} are not four whole numbers of pixels") from None
    if x0 > x1 or y0 > y1:
        raise ValueError(f"{place}: box {x0}, {y0}, {x1}, {y1} is empty; it needs x0 <= x1 and y0 <= y1")
    if x0 < 0 or y0 < 0:
        raise ValueError(f"{place}: box {x0}, {y0}, {x1}, {y1} lies outside of {file}; pixels count from 0")
    if file not in files:
        raise ValueError(f"{place}: there is no image '{file}' in the folder; a file is named as train/CLASS/1.jpg is")
    return file, (x0, y0, x1, y1)


def _mirrored(root: Path, files: Collection[str]) -> tuple[tuple[str, str, int], ...]:
    stems: dict[str, list[str]] = {}
    for file in files:
        stems.setdefault(os.path.splitext(file)[0], []).append(file)
    out: dict[str, tuple[str, str, int]] = {}
    for entry in files_below(root / MASKS):
        if not is_image(entry.path):
            raise ValueError(f"{entry.path} is no mask; {MASKS} holds image files alone")
        stem = os.path.splitext(os.path.relpath(entry.path, root / MASKS))[0]
        named = stems.get(stem, [])
        if len(named) != 1:
            what = (
                f"{len(named)} images, {' and '.join(named)}" if named else f"no image: there is no {stem}.* in {root}"
            )
            raise ValueError(f"{entry.path} mirrors {what}")
        if named[0] in out:
            raise ValueError(f"{entry.path} is one of two masks of {root / named[0]}")
        out[named[0]] = (named[0], os.path.relpath(entry.path, root), entry.stat().st_mtime_ns)
    return tuple(out.values())
