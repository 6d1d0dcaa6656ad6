"""Where data lies: the data root, what is there, downloads, and the check against what the register says of the files.

A data set says all this in its entry, see `sdecor.registers.Dataset`. A layout is a folder below the data root with
either ``files``, their checksums by name, and the ``algorithm`` of these; or ``images``, the number of JPEG files by
folder, below which lie folders of classes, of which ``without`` does not count. What is absent and cannot be downloaded
is a FileNotFoundError, and a name that no data set has a ValueError. Every `root` is as `data_root` takes it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdecor.registers import DATASETS, Dataset


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Where data lies: `root`, else ``$SDECOR_DATA``, else the per-user cache ``$XDG_CACHE_HOME/sdecor``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sdecor")
    return Path(os.environ.get("SDECOR_DATA") or cache if root is None else root).expanduser()


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, as its entry says, and whether it is at hand (embedded sets always are)."""

    name: str
    title: str
    source: str
    licence: str
    cite: str
    present: bool


def _present(entry: Dataset, root: Path) -> bool:
    return entry.present is None or entry.present(root)


def _absent(entry: Dataset, root: Path, reason: str) -> FileNotFoundError:
    how = (
        f"could not be downloaded ({reason}); put the files there, set SDECOR_DATA, or use data='digits' which needs "
        "no download"
    )
    if entry.download is None:
        files = [f"{x['folder']}/{part}/CLASS/*.jpg" for x in entry.layouts for part in x.get("images", ())]
        there = f"there{' as ' * bool(files)}{' and '.join(files)}"
        how = f"has no download; put the files {there}, or set SDECOR_DATA to the folder that holds them"
    return FileNotFoundError(f"{entry.title} not found under {root} and {how}")


def provide(name: str, root: Path, *, download: bool = False) -> None:
    """Make sure that a data set is there; it is downloaded only if it may be."""
    if not _present(DATASETS[name], root):
        if not download:
            raise _absent(DATASETS[name], root, "download=False")
        fetch(name, root)


def available(root: str | os.PathLike[str] | None = None) -> list[Source]:
    """Every data set by name, with its source and licence, and whether it is present under `root`."""
    where = data_root(root)
    named = (entry for name, entry in DATASETS.items() if name != "folder")
    return [Source(e.name, e.title, e.source, e.licence, e.cite, _present(e, where)) for e in named]


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Download a data set if it is not there; returns the data root. Two processes take turns."""
    where, entry = data_root(root), DATASETS.get(name)
    if entry is None or entry.download is None:
        known = ", ".join(other for other, e in DATASETS.items() if e.download)
        raise ValueError(f"nothing to fetch for '{name}'; data sets to fetch: {known}")
    if not _present(entry, where):
        try:
            where.mkdir(parents=True, exist_ok=True)
            with FileLock(where / f".{name}.lock"):
                entry.download(str(where))
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise _absent(entry, where, (lines or [type(error).__name__])[-1]) from error
    return where


def check(name: str, root: str | os.PathLike[str] | None = None) -> list[str]:
    """Compare the files of a data set with its entry: a sentence for each problem, none if all is well.

    These are checksums, or numbers of images where only those are known.
    """
    entry, where = DATASETS[name], data_root(root)
    if not _present(entry, where):
        return [f"{entry.title} is not under {where}"]
    layout: Mapping[str, Any] = next((x for x in entry.layouts if (where / x["folder"]).is_dir()), {})
    base, problems = where / layout.get("folder", ""), []
    for file, expected in layout.get("files", {}).items():
        if not (base / file).is_file():
            problems.append(f"{base / file} is missing")
        elif hashlib.new(layout["algorithm"], (base / file).read_bytes()).hexdigest() != expected:
            problems.append(f"{base / file} has another {layout['algorithm']} sum than {expected}")
    for folder, expected in layout.get("images", {}).items():
        inside = [p for c in (base / folder).glob("*") if c.name != layout.get("without") for p in c.glob("*.jpg")]
        if len(inside) != expected:
            problems.append(f"{base / folder} holds {len(inside)} images instead of {expected}")
    return problems
