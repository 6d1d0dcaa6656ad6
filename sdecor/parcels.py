"""Records on their way: packed where a plan was run, merged where they are wanted.

A parcel is a few plain tar files with the layout of a store, see `sdecor.store.Store`. Reading one executes nothing:
records are JSON, maps are safetensors. Where a file goes follows from its run, whatever folders its name has in front.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from sdecor._files import locked, replace_atomically
from sdecor.config import Run
from sdecor.store import Record, Store

PACKED = {"results": ".json", "exhibits": ".safetensors", "failed": ".txt"}
TAKEN = {**PACKED, "weights": ".safetensors", "tables": ".csv .json"}
_Id = tuple[str, str, str]  # kind, key and suffix
_NAME = re.compile(rf"(?:.*/)?({'|'.join(TAKEN)})/([\w-]+)/([0-9a-f]{{16}})(\.\w+)", re.DOTALL)
_UNDER_WAY = re.compile(r"(?:.*/)?unfinished/.*|.*\.(?:lock|partial)", re.DOTALL)
_DAMAGED = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def pack(runs: list[Run], store: Store, out: Path, name: str, *, largest: int = 15 << 20) -> list[Path]:
    """Put what a store has of some runs into ``OUT/NAME.tar``, and ``NAME.2.tar`` and so on past `largest` bytes each.

    The files of a run stay together, so one whose files are larger has a volume of its own. Files of these names are
    replaced, each as a whole, and volumes of before that are not needed any more removed. Weights stay where they are.
    Several processes may pack into one place.
    """
    with locked(out / f"{name}.lock"):
        return _pack(runs, store, out, name, largest)


def _pack(runs: list[Run], store: Store, out: Path, name: str, largest: int) -> list[Path]:
    volumes: list[list[Path]] = [[]]
    size = 0
    for run in dict.fromkeys(runs):
        files = [path for kind, suffix in PACKED.items() if (path := store.path(kind, run, suffix)).exists()]
        room = sum(path.stat().st_size + 2048 for path in files)  # header and padding
        if volumes[-1] and size + room > largest:
            volumes.append([])
            size = 0
        volumes[-1] += files
        size += room
    written = []
    for number, volume in enumerate(volumes, start=1):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path in volume:
                info, content = tarfile.TarInfo(path.relative_to(store.root).as_posix()), path.read_bytes()
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        _put(written_to := _volume(out, name, number), buffer.getvalue())
        written.append(written_to)
    number = len(volumes) + 1
    while (old := _volume(out, name, number)).exists():
        old.unlink()
        number += 1
    return written


def _volume(out: Path, name: str, number: int) -> Path:
    return out / (f"{name}.tar" if number == 1 else f"{name}.{number}.tar")


def _put(path: Path, content: bytes) -> None:
    replace_atomically(path, lambda file: file.write(content))


@dataclass
class Taken:
    """What a merge did."""

    new: list[Record] = field(default_factory=list)  #: Records that were not there.
    known: int = 0  #: Records that were there already, with the same results.
    files: int = 0  #: Exhibits, tables and weights that were not there.
    failed: int = 0  #: Notes of runs that broke down, of which there was none.
    busy: list[Record] = field(
        default_factory=list
    )  #: Records of runs that are being done there, which were not taken.
    differ: list[str] = field(default_factory=list)  #: Exhibits and the like unlike those there, which stay; by name.
    left: list[str] = field(
        default_factory=list
    )  #: Files that belong to no store, or to no record; notes of done runs.


@dataclass
class _Found:
    """What a source has, by key; of files that may be large only their names and sums."""

    records: dict[str, Record] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)  # of the records
    notes: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)  # of broken runs: name, folder, content
    others: dict[_Id, tuple[str, str]] = field(default_factory=dict)


def merge(source: Path, store: Store) -> Taken:
    """Take what a store, a parcel, or a folder of parcels has into `store`; a second time changes nothing.

    Two records of one run with other results, an unreadable or misnamed one, or weights that are not those of their
    record, raise ValueError before anything is written; a missing source FileNotFoundError. What is there stays: other
    circumstances of the same results, such as the date, are no reason to replace a record. The record of a run that is
    being done there is not taken. Only one process may merge into a store at a time.
    """
    taken = Taken()
    found = _find(source, taken)
    for record in found.records.values():
        old = store.record(record.run)
        if old is None:
            taken.new.append(record)
        else:
            _agree(old, record, f"in {store.root}", f"in {source}")
            taken.known += 1
    wanted = _wanted(found, store, taken)
    notes = {store.root / "failed" / folder / f"{key}.txt": text for key, (_, folder, text) in found.notes.items()}
    for name, content in _contents(source):  # again: it is not kept, since weights may be many and large
        if (path := wanted.pop(_id(name), None)) is not None:
            _put(path, content)
            taken.files += 1
    for path, content in notes.items():
        if not path.exists():
            _put(path, content)
            taken.failed += 1
    for record in list(taken.new):  # the records last: they say that all is there
        path = store.path("results", record.run, ".json")
        with _left_alone(record.run, store) as alone:
            if alone:
                _put(path, found.texts[record.run.key])
            else:
                taken.new.remove(record)
                taken.busy.append(record)
    return taken


@contextmanager
def _left_alone(run: Run, store: Store) -> Iterator[bool]:
    """Whether nobody is at a run; and nobody begins it meanwhile."""
    checkpoint = store.checkpoint(run)
    if not checkpoint.parent.exists():  # then nobody is at any, and the store stays free of that folder
        yield True
        return
    with locked(checkpoint.with_suffix(".lock"), wait=False) as mine:
        yield mine


def _find(source: Path, taken: Taken) -> _Found:
    """Read and check all there is."""
    found = _Found()
    for name, content in _contents(source):
        kind, key, suffix = known = _id(name)
        if not kind:
            if not _UNDER_WAY.fullmatch(name):
                taken.left.append(name)
        elif kind == "results":
            record = _record(name, key, content)
            _agree(found.records.setdefault(key, record), record, f"in {source}", f"in another file of it, {name}")
            found.texts.setdefault(key, content)
        elif kind == "failed":
            found.notes.setdefault(key, (name, name.split("/")[-2], content))
        else:
            if kind == "exhibits":
                _maps(name, content)
            digest = hashlib.sha256(content).hexdigest()
            if found.others.setdefault(known, (name, digest))[1] != digest:
                taken.differ.append(name)
    return found


def _wanted(found: _Found, store: Store, taken: Taken) -> dict[_Id, Path]:
    """Where the other files go, if they are not there. What has no record is left, and so is a note of a done run."""
    homes = {path.stem: path for path in store.root.glob("results/*/*.json")}
    homes |= {key: store.path("results", record.run, ".json") for key, record in found.records.items()}
    wanted: dict[_Id, Path] = {}
    for (kind, key, suffix), (name, digest) in found.others.items():
        if key not in homes:
            taken.left.append(name)
            continue
        if kind == "weights":
            record = found.records.get(key) or _record(str(homes[key]), key, homes[key].read_bytes())
            if digest != record.weights_sha256:
                raise ValueError(f"weights {name} are not those that the record of run {key} describes")
        path = store.root / kind / homes[key].parent.name / f"{key}{suffix}"
        if not path.exists():
            wanted[kind, key, suffix] = path
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            taken.differ.append(name)
    for key in found.notes.keys() & homes.keys():
        taken.left.append(found.notes.pop(key)[0])
    return wanted


def _id(name: str) -> _Id:
    """Kind, key and suffix of a file of a store; empty if the name is none of such a file."""
    match = _NAME.fullmatch(name)
    return (match[1], match[3], match[4]) if match and match[4] in TAKEN[match[1]].split() else ("", "", "")


def _agree(one: Record, other: Record, here: str, there: str) -> None:
    """Raise ValueError that names the first result in which two records of a run differ."""

    def results(record: Record) -> dict[tuple[str, str], str]:
        others = {"shape": record.shape, "weights_sha256": record.weights_sha256}
        parts: dict[str, Mapping[str, Any]] = {"metric": record.metrics, "curve": record.curves, "": others}
        # As text, NaN is equal to itself.
        return {(part, name): json.dumps(value) for part, named in parts.items() for name, value in named.items()}

    a, b = results(one), results(other)
    if differ := [which for which in {**a, **b} if a.get(which) != b.get(which)]:
        run, which = one.run, differ[0]
        what = f"{which[1]} is {a.get(which, 'absent')} {here} and {b.get(which, 'absent')} {there}"
        said = f"two records of {run.method}, seed {run.seed} ({run.key}) contradict each other"
        raise ValueError(f"{said}: {what}; remove one of the two")


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
    """Name and content of every file of a store, a parcel or a folder of parcels; of foreign files the name alone."""
    if not source.exists():
        raise FileNotFoundError(f"nothing to merge: {source} does not exist")
    if source.is_file():
        try:
            yield from _members(source)
        except _DAMAGED as error:
            said = str(error).splitlines()[0].rstrip(":")
            raise ValueError(f"{source} is not a readable tar file ({said})") from error
        return
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        if path.suffix == ".tar":
            yield from _contents(path)
        else:
            name = path.relative_to(source).as_posix()
            yield name, path.read_bytes() if _id(name)[0] else b""


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(source) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() and _id(member.name)[0] else None
            if file is not None:
                yield member.name, file.read()
            elif not member.isdir():  # links, too, are only named
                yield (member.name if member.isfile() else f"{member.name} (a link)"), b""
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)  # tarfile itself takes a broken header for the end
        end = tar.fileobj.read(2 * tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError("it breaks off")


__all__ = ["Taken", "merge", "pack"]
