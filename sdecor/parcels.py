"""Records on their way: packed where a plan was run, merged where they are wanted.

A parcel is a few plain tar files with the layout of a store, see `sdecor.store.Store`. Reading one executes nothing:
records are JSON, maps are safetensors, and every file must have the name that its run gives it.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch

from sdecor._files import replace_atomically
from sdecor.config import Run
from sdecor.store import Record, Store

SUFFIXES = {"results": ".json", "exhibits": ".safetensors", "tables": ".csv", "failed": ".txt", "weights": ".safetensors"}
PACKED = ("results", "exhibits", "failed")
_NAME = re.compile(r"(?:\./)?(?:.*/)?(results|exhibits|tables|failed|weights)/([\w-]+)/([0-9a-f]{16})(\.\w+)")


def pack(runs: list[Run], store: Store, out: Path, name: str, *, largest: int = 15 << 20) -> list[Path]:
    """Put what a store has of some runs into ``OUT/NAME.tar``, and ``NAME.2.tar`` and so on past `largest` bytes each.

    Files of that name are replaced, each as a whole. Weights stay where they are.
    """
    found = [store.path(kind, run, SUFFIXES[kind]) for run in runs for kind in PACKED]
    files = sorted({path for path in found if path.exists()})
    volumes: list[list[Path]] = [[]]
    size = 0
    for path in files:
        room = path.stat().st_size + 2048  # header and padding
        if volumes[-1] and size + room > largest:
            volumes.append([])
            size = 0
        volumes[-1].append(path)
        size += room
    written = []
    for number, volume in enumerate(volumes, start=1):
        target = out / (f"{name}.tar" if number == 1 else f"{name}.{number}.tar")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path in volume:
                info = tarfile.TarInfo(str(path.relative_to(store.root)))
                content = path.read_bytes()
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        content = buffer.getvalue()
        replace_atomically(target, lambda file, content=content: file.write(content))  # type: ignore[misc]
        written.append(target)
    return written


@dataclass
class Taken:
    """What a merge did."""

    new: list[Record] = field(default_factory=list)  #: Records that were not there.
    known: int = 0  #: Records that were there already.
    failed: int = 0  #: Notes of runs that broke down.
    left: list[str] = field(default_factory=list)  #: Files that belong to no store, by name.


def merge(source: Path, store: Store) -> Taken:
    """Take what a store, a parcel, or a folder of parcels has into `store`; a second time changes nothing.

    A record that says something else of a run than the one already there, an unreadable or misnamed one, raises
    ValueError before anything is written; a missing source FileNotFoundError.
    """
    taken, files, folders = Taken(), dict[tuple[str, str], bytes](), dict[str, str]()
    records: dict[str, Record] = {}
    for name, content in _contents(source):
        match = _NAME.fullmatch(name)
        if match is None or match[4] != SUFFIXES[match[1]]:
            if not name.endswith((".lock", ".partial", ".pt")):
                taken.left.append(name)
            continue
        kind, folders[match[3]], key = match[1], match[2], match[3]
        if files.setdefault((kind, key), content) != content:
            raise ValueError(f"{source} has two different files for {kind} of run {key}")
        if kind == "results":
            records[key] = _record(name, key, content)
        if kind == "exhibits":
            _maps(name, content)
    todo: list[tuple[Path, bytes]] = []
    for key, record in records.items():
        old = store.record(record.run)
        if old is not None and old.to_json() != record.to_json():
            differ = [m for m in {**old.metrics, **record.metrics} if old.metrics.get(m) != record.metrics.get(m)]
            what = f"{differ[0]} is {old.metrics.get(differ[0])} there, {record.metrics.get(differ[0])} in {source}"
            said = f"the record of {record.run.method}, seed {record.run.seed} ({key}) contradicts the one already there"
            raise ValueError(f"{said}: {what if differ else 'their circumstances differ'}; remove one of the two")
        taken.known += old is not None
        if old is None:
            taken.new.append(record)
        for kind in ("weights", "exhibits", "tables", "results"):  # the record last: it says that all is there
            path = store.path(kind, record.run, SUFFIXES[kind])
            if (kind, key) in files and not path.exists():
                todo.append((path, files[kind, key]))
    for (kind, key), content in files.items():
        if kind == "failed":
            path = store.root / "failed" / folders[key] / f"{key}.txt"
            if not path.exists():
                taken.failed += 1
                todo.append((path, content))
    for path, content in todo:
        replace_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return taken


def _record(name: str, key: str, content: bytes) -> Record:
    try:
        record = Record.of_json(content.decode())
    except ValueError as error:
        raise ValueError(f"record {name} is not readable ({error})") from error
    if record.run.key != key:
        raise ValueError(f"record {name} describes another run, {record.run.key}")
    return record


def _maps(name: str, content: bytes) -> None:
    try:
        safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"exhibit {name} is not readable ({error})") from error


def _contents(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of a store, a parcel or a folder of parcels."""
    if not source.exists():
        raise FileNotFoundError(f"nothing to merge: {source} does not exist")
    if source.is_file():
        try:
            with tarfile.open(source) as tar:
                for member in tar:
                    if member.isfile() and (file := tar.extractfile(member)) is not None:
                        yield member.name, file.read()
        except tarfile.TarError as error:
            raise ValueError(f"{source} is not a readable tar file ({error})") from error
        return
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        if path.suffix == ".tar":
            yield from _contents(path)
        else:
            yield str(path.relative_to(source)), path.read_bytes()


__all__ = ["Taken", "merge", "pack"]
