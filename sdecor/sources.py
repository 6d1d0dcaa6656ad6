"""Where data lies: the data root, what is there, downloads, and the check against what the register says of the files.

A data set says all this in its entry, see `sdecor.registers.Dataset`. A layout is a folder below the data root with
either ``files``, their checksums by name, the ``algorithm`` of these, and perhaps their ``bytes`` and how each
``starts``; or ``images``, the number of image files by folder, below which lie folders of the entry's classes, of which
``without`` does not count. Of several layouts the first that is there counts.

Present means whole, as far as names, numbers, sizes and first bytes tell: `check` alone reads all bytes. What is absent
and cannot be downloaded is a FileNotFoundError; what is there in part, and a name that no data set has, a ValueError.
Every `root` is as `data_root` takes it.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdecor._files import cache_folder, expanded, files_below, inside, is_image, locked
from sdecor.registers import DATASETS, Dataset

log = logging.getLogger(__name__)


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Where data lies: `root`, else ``$SDECOR_DATA``, else the per-user cache ``$XDG_CACHE_HOME/sdecor``."""
    return expanded(os.environ.get("SDECOR_DATA") or cache_folder() if root is None else root)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, as its entry says, and whether it is at hand (embedded sets always are)."""

    name: str
    title: str
    source: str
    licence: str
    cite: str
    present: bool


def _layout(entry: Dataset, root: Path) -> Mapping[str, Any]:
    return next((x for x in entry.layouts if (root / x["folder"]).is_dir()), {})


def _wrong_files(base: Path, layout: Mapping[str, Any]) -> Iterator[str]:
    for name in layout.get("files", {}):
        path = base / name
        if not path.is_file():
            yield f"{path} is missing"
            continue
        length, start = path.stat().st_size, layout.get("starts", {}).get(name, b"")
        size = layout.get("bytes", {}).get(name, length)
        with path.open("rb") as file:
            begins = file.read(len(start))
        if len(begins) == len(start) and begins != start:
            yield f"{path} starts with {begins.hex()} instead of {start.hex()}"
        elif length != size:
            yield f"{path} is {'truncated' if length < size else 'too long'}: {length} bytes instead of {size}"


def _wrong_images(base: Path, layout: Mapping[str, Any], classes: int | tuple[str, ...]) -> Iterator[str]:
    names: tuple[str, ...] = () if isinstance(classes, int) else classes
    number = classes if isinstance(classes, int) else len(classes)
    for part, expected in layout.get("images", {}).items():
        if not (base / part).is_dir():
            yield f"{base / part} is missing"
            continue
        folders, files = inside(base / part)
        folders = [folder for folder in folders if folder.name != layout.get("without")]
        found = tuple(folder.name for folder in folders)
        if lacking := [name for name in names if name not in found]:
            yield f"{base / part} has no folder for the class {lacking[0]}"
        elif number and len(found) != number:
            yield f"{base / part} holds {len(found)} class folders instead of {number}"
        files += [file for folder in folders for file in files_below(folder.path)]
        if (images := sum(is_image(file.path) for file in files)) != expected:
            yield f"{base / part} holds {images} images instead of {expected}"
        names = names or found


def _problems(entry: Dataset, root: Path) -> list[str]:
    """A sentence for all that keeps a data set from being whole, at little expense."""
    if not _there(entry, root):
        return [f"{entry.title} is not under {root}"]
    layout = _layout(entry, root)
    base = root / layout.get("folder", "")
    try:
        return [*_wrong_files(base, layout), *_wrong_images(base, layout, entry.classes)]
    except ValueError as error:  # of a folder that cannot be listed
        return [str(error)]


def _there(entry: Dataset, root: Path) -> bool:
    return entry.present is None or entry.present(root)


def _absent(entry: Dataset, root: Path, problem: str, reason: str) -> OSError | ValueError:
    """What to raise of a data set that is not whole, and was not downloaded for that `reason`."""
    how = (
        f"could not be downloaded ({reason}); put the files there, set SDECOR_DATA, or use data='digits' which needs "
        "no download"
    )
    if entry.download is None:
        files = [f"{x['folder']}/{part}/CLASS/*.jpg" for x in entry.layouts for part in x.get("images", ())]
        there = f"there{' as ' * bool(files)}{' and '.join(files)}"
        how = f"has no download; put the files {there}, or set SDECOR_DATA to the folder that holds them"
    family = (e for e in DATASETS.values() if e != entry and e.name.split("-")[0] == entry.name.split("-")[0])
    how += "".join(f"; {e.title} is there: data='{e.name}'" for e in family if not _problems(e, root))
    if not _there(entry, root):
        return FileNotFoundError(f"{entry.title} not found under {root} and {how}")
    return ValueError(f"{entry.title} under {root} is not whole ({problem}) and {how}")


def _lock(name: str, root: Path) -> Path:
    return root / f".{name}.lock"


@contextmanager
def _turn(name: str, root: Path) -> Iterator[None]:
    """Hold the lock of a data set; that it has to be waited for is said."""
    with locked(_lock(name, root), wait=False) as free:
        if free:
            yield
            return
    log.warning("another process downloads %s to %s; waiting for it", name, root)
    with locked(_lock(name, root)):
        yield


def provide(name: str, root: Path, *, download: bool = False) -> None:
    """Make sure that a data set is there and whole; it is downloaded only if it may be.

    If another process is about to download it, its end is waited for.
    """
    entry = DATASETS[name]
    problems = _problems(entry, root)
    if problems and download:
        fetch(name, root)
        return
    if problems and _lock(name, root).exists():
        with _turn(name, root):
            problems = _problems(entry, root)
    if problems:
        raise _absent(entry, root, problems[0], "download=False")


def available(root: str | os.PathLike[str] | None = None) -> list[Source]:
    """Every data set by name, with its source and licence, and whether it is present under `root`."""
    where = data_root(root)
    named = (entry for name, entry in DATASETS.items() if name != "folder")
    return [Source(e.name, e.title, e.source, e.licence, e.cite, not _problems(e, where)) for e in named]


def _download(entry: Dataset, root: Path) -> None:
    """Let the files appear one by one, each whole, whenever it ends."""
    assert entry.download is not None
    aside = root / f".{entry.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        aside.mkdir(parents=True)
        entry.download(str(aside))
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = root / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Download a data set unless it is there and whole; returns the data root. Two processes take turns."""
    where, entry = data_root(root), DATASETS.get(name)
    if entry is None or entry.download is None:
        known = ", ".join(other for other, e in DATASETS.items() if e.download)
        raise ValueError(f"nothing to fetch for '{name}'; data sets to fetch: {known}")
    if problems := _problems(entry, where):
        try:
            with _turn(name, where):
                if _problems(entry, where):  # still, after another process may have been at work
                    _download(entry, where)
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise _absent(entry, where, problems[0], (lines or [type(error).__name__])[-1]) from error
        if problems := _problems(entry, where):
            raise ValueError(f"{entry.title} is not whole after a download: {problems[0]}; delete that and fetch again")
    return where


def check(name: str, root: str | os.PathLike[str] | None = None) -> list[str]:
    """Compare the files of a data set with its entry: a sentence for each problem, none if all is well.

    These are checksums, or numbers of images where only those are known.
    """
    entry, where = DATASETS[name], data_root(root)
    problems, layout = _problems(entry, where), _layout(entry, where)
    for file, expected in () if problems else layout.get("files", {}).items():
        path = where / layout["folder"] / file
        if hashlib.new(layout["algorithm"], path.read_bytes()).hexdigest() != expected:
            problems.append(f"{path} has another {layout['algorithm']} sum than {expected}")
    return problems
