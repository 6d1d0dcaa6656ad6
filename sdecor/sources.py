"""Where the data sets come from: root, presence, download, and the check against ``data/sources.json``."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torchvision import datasets

CIFAR = Path("cifar-10-batches-py")
CALTECH = Path("caltech101", "101_ObjectCategories")
#: Files of MNIST under MNIST/raw: magic number and size in bytes.
MNIST = {
    "train-images-idx3-ubyte": (0x803, 16 + 60_000 * 784),
    "train-labels-idx1-ubyte": (0x801, 8 + 60_000),
    "t10k-images-idx3-ubyte": (0x803, 16 + 10_000 * 784),
    "t10k-labels-idx1-ubyte": (0x801, 8 + 10_000),
}
_DOWNLOADS: dict[str, Callable[[str], Any]] = {
    "mnist": lambda root: datasets.MNIST(root, download=True),
    "cifar10": lambda root: datasets.CIFAR10(root, download=True),
    "caltech101": lambda root: datasets.Caltech101(root, download=True),
}


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Where data lies: `root`, else ``$SDECOR_DATA``, else the per-user cache ``$XDG_CACHE_HOME/sdecor``."""
    if root is None:
        root = os.environ.get("SDECOR_DATA") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sdecor")
    return Path(root).expanduser()


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: an entry of ``data/sources.json``, and whether it is at hand.

    Args:
        name: As `load` takes it.
        title: As people call it.
        source: Address, or the package that holds it.
        licence: Terms of use, as its authors state them.
        cite: Publication to cite.
        present: Whether it lies under the data root (always so for embedded sets).
    """

    name: str
    title: str
    source: str
    licence: str
    cite: str
    present: bool


def _registry() -> dict[str, dict[str, Any]]:
    path = Path(__file__).resolve().parents[1] / "data" / "sources.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: listing and checking data needs a checkout of the repository")
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _present(name: str, root: Path) -> bool:
    if name == "mnist":
        return all((root / "MNIST" / "raw" / file).is_file() for file in MNIST)
    folders = {"cifar10": (CIFAR, Path("cifar10", "train")), "caltech101": (CALTECH,)}.get(name)
    return folders is None or any((root / folder).is_dir() for folder in folders)


def provide(name: str, root: Path, *, download: bool) -> None:
    """Make sure that a data set is there.

    Raises:
        FileNotFoundError: If it is absent and cannot, or may not, be downloaded.
    """
    if not _present(name, root):
        if not download:
            raise FileNotFoundError(_absent(name, root, "download=False"))
        fetch(name, root)


def _absent(name: str, root: Path, reason: str) -> str:
    title = {"mnist": "MNIST", "cifar10": "CIFAR-10", "caltech101": "Caltech-101"}[name]
    return (
        f"{title} not found under {root} and could not be downloaded ({reason}); put the files there, set SDECOR_DATA, "
        "or use data='digits' which needs no download"
    )


def available(root: str | os.PathLike[str] | None = None) -> list[Source]:
    """Every data set in the registry, with its source and licence, and whether it is present under `root`."""
    return [
        Source(name, entry["title"], entry["source"], entry["licence"], entry["cite"], _present(name, data_root(root)))
        for name, entry in _registry().items()
    ]


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Download a data set through torchvision if it is not there; returns the data root. Two processes take turns.

    Raises:
        ValueError: If there is nothing to download by that name.
        FileNotFoundError: If it cannot be downloaded.
    """
    where = data_root(root)
    if name not in _DOWNLOADS:
        raise ValueError(f"nothing to fetch for '{name}'; data sets to fetch: {', '.join(_DOWNLOADS)}")
    if not _present(name, where):
        try:
            where.mkdir(parents=True, exist_ok=True)
            with FileLock(where / f".{name}.lock"):
                _DOWNLOADS[name](str(where))
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise FileNotFoundError(_absent(name, where, lines[-1] if lines else type(error).__name__)) from error
    return where


def check(name: str, root: str | os.PathLike[str] | None = None) -> list[str]:
    """Compare the files of a data set with the registry: checksums, or numbers of images where only those are known.

    Returns:
        One sentence for each problem; none if all is well.

    Raises:
        ValueError: If the registry does not know the data set.
    """
    registry, where = _registry(), data_root(root)
    if name not in registry:
        raise ValueError(f"unknown data set '{name}'; known: {', '.join(registry)}")
    if not _present(name, where):
        return [f"{registry[name]['title']} is not under {where}"]
    layouts = registry[name].get("layouts", [])
    layout: dict[str, Any] = next((x for x in layouts if (where / x["folder"]).is_dir()), {"folder": "."})
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
