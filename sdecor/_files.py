"""Files that are either whole or absent, whatever happens while they are written, and locks between processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


def replace_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it into place.

    The partial file has a fixed name, so that a killed writer leaves at most one, which the next writer overwrites.
    Two writers of one path need a lock.

    Raises:
        OSError: If the disk is full or not writable; `path` is then as it was, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"could not write {path}: {error.strerror}; nothing was changed") from error
        raise


def set_aside(path: Path) -> Path:
    """Rename an unreadable file to ``NAME.corrupt`` (numbered if there is one), so that nothing is lost."""
    aside, n = path.with_name(path.name + ".corrupt"), 1
    while aside.exists():
        n += 1
        aside = path.with_name(f"{path.name}.corrupt{n}")
    with suppress(FileNotFoundError):  # another process was quicker
        path.rename(aside)
    return aside


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of that name, which dies with its process; yields False if it is taken and `wait` is off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # safe: who waits on the old file sees that it lost its name, and opens anew
        held.release()
