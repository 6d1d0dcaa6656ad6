"""Where data lies: the data root, what is there, downloads, and the check against what the register says of the files.

A data set says all this in its entry, see `sdecor.registers.Dataset`. A layout is a folder below the data root with
either ``files``, their checksums by name, and the ``algorithm`` of these; or ``images``, the number of JPEG files by
folder, below which lie folders of classes, of which ``without`` does not count.
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
    if root is None:
        root = os.environ.get("SDECOR_DATA") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sdecor")
    return Path(root).expanduser()


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


def _absent(entry: Dataset, root: Path, reason: str) -> str:
    if entry.download is None:
        files = [f"{x['folder']}/{part}/CLASS/*.jpg" for x in entry.layouts for part in x.get("images", ())]
        return (
            f"{entry.title} not found under {root} and has no download; put the files there"
            f"{' as ' * bool(files)}{' and '.join(files)}, or set SDECOR_DATA to the folder that holds them"
        )
    return (
        f"{entry.title} not found under {root} and could not be downloaded ({reason}); put the files there, set "
        "SDECOR_DATA, or use data='digits' which needs no download"
    )


def provide(name: str, root: Path, *, download: bool = False) -> None:
    """Make sure that a data set is there.

    Raises:
        FileNotFoundError: If it is absent and cannot, or may not, be downloaded.
    """
    if not _present(DATASETS[name], root):
        if not download:
            raise FileNotFoundError(_absent(DATASETS[name], root, "download=False"))
        fetch(name, root)


def available(root: str | os.PathLike[str] | None = None) -> list[Source]:
    """Every data set by name, with its source and licence, and whether it is present under `root`."""
    where = data_root(root)
    named = (entry for name, entry in DATASETS.items() if name != "folder")
    return [Source(e.name, e.title, e.source, e.licence, e.cite, _present(e, where)) for e in named]


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Download a data set if it is not there; returns the data root. Two processes take turns.

    Raises:
        ValueError: If there is nothing to download by that name.
        FileNotFoundError: If it cannot be downloaded.
    """
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
            raise FileNotFoundError(_absent(entry, where, lines[-1] if lines else type(error).__name__)) from error
    return where


def check(name: str, root: str | os.PathLike[str] | None = None) -> list[str]:
    """Compare the files of a data set with its entry: checksums, or numbers of images where only those are known.

    Returns:
        One sentence for each problem; none if all is well.

    Raises:
        ValueError: If there is no data set of that name.
    """
    entry, where = DATASETS[name], data_root(root)
    if not _present(entry, where):
        return [f"{entry.title} is not under {where}"]
    none: Mapping[str, Any] = {"folder": "."}
    layout = next((x for x in entry.layouts if (where / x["folder"]).is_dir()), none)
    base, problems = where / layout["folder"], []
    for file, expected in layout.get("files", {}).items():
        if not (base / file).is_file():
            problems.append(f"{base / file} is missing")
        elif hashlib.new(layout["algorithm"], (base / file).read_bytes()).hexdigest() != expected:
            problems.append(f"{base / file} has another {layout['algorithm']} sum than {expected}")
    for folder, expected in layout.get("images", {}).items():
        inside = (p for c in (base / folder).glob("*") if c.name != layout.get("without") for p in c.glob("*.jpg"))
        if (found := sum(1 for _ in inside)) != expected:
            problems.append(f"{base / folder} holds {found} images instead of {expected}")
    return problems
