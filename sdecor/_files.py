"""Which files are data, files that are either whole or absent whatever happens, and locks between processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

#: Suffixes of image files that are read.
IMAGES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pfm .pgm .png .pnm .ppm .qoi .tga "
    ".tif .tiff .webp".split()
)
_OTHER_IMAGES = frozenset(
    ".ai .arw .cr2 .cr3 .cur .dcm .dds .dng .emf .eps .exr .fit .fits .hdr .heic .heif .icns .ico .jxl .nef .nii .npy "
    ".npz .orf .pcx .pdf .ps .psd .raf .raw .rw2 .sgi .svg .svgz .wmf .xbm .xcf .xpm".split()
)
_LEFT_BY_TOOLS = frozenset(
    "__macosx thumbs.db ehthumbs.db desktop.ini @eadir #recycle @recycle $recycle.bin lost+found __pycache__".split()
) | {"icon\r", "system volume information", "temporary items", "network trash folder"}

_NAME = attrgetter("name")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` for a home; ValueError if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def cache_folder() -> Path:
    """Folder of this package in the user's cache."""
    return expanded(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sdecor"))


def left_by_tools(name: str) -> bool:
    """Whether a file or folder of that name is no data: hidden, or left there by a system or an editor."""
    return name.startswith(".") or name.lower() in _LEFT_BY_TOOLS


def is_image(path: str) -> bool:
    """Whether a file has one of the suffixes `IMAGES`, in any case; an image of a kind not read is a ValueError."""
    suffix = "." + path.rpartition(".")[2].lower()
    if suffix in _OTHER_IMAGES:
        raise ValueError(f"{path} is of a kind of image that is not read; save it as PNG or JPEG, or move it away")
    return suffix in IMAGES


def inside(folder: str | os.PathLike[str]) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Folders and files in a folder, by name, links followed, without what tools leave.

    A ValueError names what is neither (a broken link, a pipe), and a folder that cannot be listed.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if left_by_tools(entry.name):
                    continue
                if entry.is_file():
                    files.append(entry)
                elif entry.is_dir():
                    folders.append(entry)
                else:
                    raise ValueError(f"{entry.path} is a broken link, or neither a file nor a folder; remove it")
    except OSError as error:
        raise ValueError(f"cannot list {error.filename or folder} ({error.strerror})") from error
    return sorted(folders, key=_NAME), sorted(files, key=_NAME)


def files_below(
    folder: str | os.PathLike[str], around: frozenset[tuple[int, int]] = frozenset()
) -> list[os.DirEntry[str]]:
    """Files in a folder and in all below it, as `inside` gives them, by folder and then by name.

    A link back to a folder `around` it is a ValueError.
    """
    status, (folders, files) = os.stat(folder), inside(folder)
    here = (status.st_dev, status.st_ino)
    if here in around:
        raise ValueError(f"{os.fspath(folder)} is a link to a folder that it lies in; remove it")
    if not folders:
        return files
    files += [file for each in folders for file in files_below(each.path, around | {here})]
    return sorted(files, key=lambda file: os.path.split(file.path))


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
    from filelock import FileLock, Timeout  # takes a tenth of what the command line needs to start

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
