"""Masks of more images than memory holds: one bit a pixel, in a temporary file."""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Bits:
    """Masks (N, side, side) in a file that goes with what `packed` gave; copies in other processes read it too."""

    path: str
    side: int
    count: int  #: N.
    digest: str  #: Sixteen hexadecimal digits of all of them.

    def at(self, rows: Sequence[int]) -> np.ndarray:
        """The masks in these rows, bool (n, side, side)."""
        width = -(-(self.side**2) // 8)
        file = np.memmap(self.path, np.uint8, "r", shape=(self.count, width))
        pixels = np.unpackbits(file[list(rows)], axis=1, count=self.side**2)
        return pixels.view(bool).reshape(-1, self.side, self.side)


def packed(side: int, parts: Iterable[np.ndarray]) -> Bits:
    """Write masks, given in parts (n, side, side), bool, to the folder of temporary files (``TMPDIR`` chooses it).

    The file is removed when its `Bits` are, or when the process ends; one that is killed leaves it. A full disk raises
    OSError.
    """
    digest, count = hashlib.blake2b(digest_size=8), 0
    file = tempfile.NamedTemporaryFile(prefix="sdecor-", suffix=".bits", delete=False)
    try:
        with file:
            for part in parts:
                content = np.packbits(part.reshape(len(part), -1), axis=1).tobytes()
                file.write(content)
                digest.update(content)
                count += len(part)
        bits = Bits(file.name, side, count, digest.hexdigest())
    except BaseException:
        _remove(file.name, os.getpid())
        raise
    weakref.finalize(bits, _remove, file.name, os.getpid())
    return bits


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # and not one that was forked from it
        with suppress(FileNotFoundError):
            os.unlink(path)
