"""Chapters with code: pairs of ``x.md``, the source that people edit, and ``x.ipynb``, the same cells with outputs."""

from __future__ import annotations

import ast
import base64
import csv
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
import papermill
from PIL import Image
from traitlets.config import Config

from sdecor._files import locked, replace_atomically
from sdecor.registers import Option

from . import BOOK

COLUMNS = ("chapter", "seconds", "device", "cores", "threads", "python", "torch", "sdecor", "date", "commit")
# Runs after the last cell of a chapter that is published, and is not kept.
_PROBE = """
import json, os, torch
from sdecor.store import environment
device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
print(json.dumps({"cores": os.cpu_count(), **environment(device)}))
"""
_KEPT = {"name": "python", "pygments_lexer": "ipython3"}  # not the version, which differs between machines
_TYPES: dict[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str)}


def known() -> tuple[str, ...]:
    """Names of all chapters with code, such as ``experiments/mnist``."""
    sources = (p for p in BOOK.glob("**/*.md") if p.read_text(encoding="utf-8").startswith("---\njupytext:"))
    return tuple(sorted(p.relative_to(BOOK).with_suffix("").as_posix() for p in sources))


def notebook_of(name: str) -> Path:
    """The notebook of a chapter, named by itself or by the path of either file.

    Raises:
        ValueError: If there is no such chapter.
    """
    short = name.removeprefix("./").removeprefix("book/").removesuffix(".ipynb").removesuffix(".md")
    if short not in known():
        raise ValueError(f"unknown chapter '{name}'; known: {', '.join(known())}")
    return BOOK / f"{short}.ipynb"


def _source(path: Path) -> Any:
    """The cells of the source, with ids that do not change from one reading to the next."""
    notebook = jupytext.read(path.with_suffix(".md"))
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    return notebook


def is_stale(name: str) -> bool:
    """Whether the notebook is absent, or its cells are not those of its source."""
    path = notebook_of(name)
    if not path.exists():
        return True
    pair = (_source(path), nbformat.read(path, as_version=4))  # type: ignore[no-untyped-call]
    source, notebook = ([(c.cell_type, c.source, dict(c.metadata)) for c in n.cells] for n in pair)
    return source != notebook


def _parameters(notebook: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Values of the given texts, by the types in the cell tagged ``parameters``.

    Raises:
        ValueError: If a name is unknown or a text is not of its type.
    """
    cells = (c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    lines = (s for s in ast.parse(next(cells, "")).body if isinstance(s, ast.AnnAssign))
    types = {ast.unparse(s.target): _TYPES.get(ast.unparse(s.annotation), Any) for s in lines}
    for name in given:
        if name not in types:
            raise ValueError(f"unknown parameter '{name}'; known: {', '.join(types) or 'none'}")
    return {name: Option(name, None, types[name]).of_text(text) for name, text in given.items()}


def table() -> Path:
    """The file that holds, for every published chapter, how long it ran, where, when, and with what."""
    return BOOK.parent / "data" / "chapters.csv"


def _commit(source: Path) -> str:
    """The commit that is checked out; with a + if the modules, the records or the chapter have changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(BOOK.parent), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    parts = ["sdecor", "book/tools", *(f"data/{kind}" for kind in ("results", "weights", "exhibits", "tables"))]
    try:
        changed = git("status", "--porcelain", "--", *parts, str(source))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return "unknown"


def _note(name: str, row: Mapping[str, Any]) -> None:
    """Put the row of a chapter into the table; rows are in the order of the names, one for every chapter there is."""
    path = table()
    with locked(path.with_suffix(".lock")):
        rows = {name: {"chapter": name, **row}}
        if path.exists():
            with path.open(encoding="utf-8", newline="") as f:
                rows = {old["chapter"]: old for old in csv.DictReader(f)} | rows
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[known_name] for known_name in known() if known_name in rows)
        replace_atomically(path, lambda f: f.write(text.getvalue().encode()))


@contextmanager
def own_sockets() -> Iterator[dict[str, Any]]:
    """Arguments of papermill for a kernel reached through files; two at a time may both take the same free port."""
    with tempfile.TemporaryDirectory(prefix="sdecor-") as folder:
        yield {"config": Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})}


def run(name: str, given: Mapping[str, str], *, out: str = "", publish: bool = False) -> Path:
    """Execute a chapter.

    Args:
        name: Of the chapter.
        given: Parameters, as text.
        out: File to write; empty for a temporary one. It must not be in the book.
        publish: Replace the chapter's notebook, once all its cells have run, without traces of time and machine; those
            go to `table`.

    Returns:
        The file written.

    Raises:
        ValueError: If the chapter, a parameter, or `out` is impossible, or a cell raises ValueError or TypeError.
        ChildProcessError: If a cell fails otherwise.
    """
    committed = notebook_of(name)
    target = Path(out).resolve() if out else Path(tempfile.mkdtemp(prefix="sdecor-")) / committed.name
    if target.suffix != ".ipynb" or target.is_relative_to(BOOK):
        raise ValueError(f"out must be a file .ipynb outside of {BOOK}, got {out}")
    source = _source(committed)
    values = _parameters(source, given)
    if publish:
        source.cells.append(nbformat.v4.new_code_cell(_PROBE, id="probe"))  # type: ignore[no-untyped-call]
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with own_sockets() as how:
            done = papermill.execute_notebook(
                nbformat.from_dict(source),  # type: ignore[no-untyped-call]
                target,
                values,
                kernel_name="python3",
                progress_bar=sys.stderr.isatty(),
                coalesce_streams=True,
                **how,
            )
    except papermill.PapermillExecutionError as error:
        kind = ValueError if error.ename in ("ValueError", "TypeError", "FileNotFoundError") else ChildProcessError
        raise kind(f"{error.ename} in cell {error.exec_count} of {name}: {error.evalue} (see {target})") from None
    if publish:
        _publish(done, committed, round(time.monotonic() - started))
        target.unlink()
        target.parent.rmdir()
    return committed if publish else target


def light(svg: str) -> str:
    """A figure that looks the same in fewer bytes.

    Coordinates are kept to a hundredth of a point, pictures with few colours as a palette, and fewer line breaks.
    """

    def path(found: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{round(float(number[0]), 2):g}", " ".join(found[0].split()))

    svg = re.sub(r'(?<= d=")[^"]*', path, svg)
    svg = re.sub(r'(?<=image/png;base64,)[^"]*', lambda found: _by_palette("".join(found[0].split())), svg)
    return re.sub(r"\n\s+", "\n", svg)


def _by_palette(png: str) -> str:
    """The same picture, in base64; with at most 256 colours, all opaque, as their numbers in a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode != "RGBA" or image.getcolors(256) is None or image.getchannel("A").getextrema() != (255, 255):
        return png
    colours, number = np.unique(np.asarray(image)[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
    plain = Image.fromarray(number.reshape(image.height, image.width).astype(np.uint8), "P")
    plain.putpalette(colours.astype(np.uint8).tobytes())
    plain.save(buffer := io.BytesIO(), "png", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode(), key=len)


def _publish(done: Any, committed: Path, seconds: int) -> None:
    """Put an executed chapter in place of its notebook, and its time and machine into the table."""
    (probed,) = done.cells.pop().outputs
    source = _source(committed)
    for cell, original in zip(done.cells, source.cells, strict=True):
        cell.metadata, cell.id = original.metadata, original.id
        for drawn in (o.data for o in cell.get("outputs", ()) if "image/svg+xml" in o.get("data", ())):
            drawn["image/svg+xml"] = light(drawn["image/svg+xml"])
    done.metadata = {"kernelspec": source.metadata["kernelspec"], "language_info": _KEPT}
    nbformat.write(done, committed)  # type: ignore[no-untyped-call]
    name = committed.relative_to(BOOK).with_suffix("").as_posix()
    _note(name, {**json.loads(probed.text), "seconds": seconds, "commit": _commit(committed.with_suffix(".md"))})
