"""The user's own code that a run depends on: its files, with what they import of their neighbours, as one short hash.

What is read are the sources, without running them: an import that is computed, and files that the code reads, do not
count. Of an installed package only its own modules do.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

HOUSE = ("sdecor", "sdecor_book")
_INSTALLED = {"site-packages", "dist-packages"}


def file_of(function: Callable[..., Any]) -> Path | None:
    """The file that a function or class was defined in, None for a cell of a notebook."""
    try:
        path = Path(inspect.getsourcefile(function) or "")
    except TypeError:
        return None
    return path.resolve() if path.is_file() else None


def file_of_module(name: str) -> Path | None:
    """The file of a module, which is not imported, though the packages around it are; None if there is none."""
    try:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
    except (ImportError, ValueError):  # whoever imports it will say so
        return None
    path = getattr(sys.modules.get(name), "__file__", None) or (spec and spec.origin)
    return Path(path).resolve() if path and Path(path).is_file() else None


def foreign(function: Callable[..., Any]) -> bool:
    """Whether a function is from outside this package."""
    return function.__module__.partition(".")[0] not in HOUSE


def code(functions: Iterable[Callable[..., Any]] = (), files: Iterable[Path] = ()) -> str:
    """Sixteen hexadecimal digits of the sources of these functions and files, empty if there are none."""
    functions = list(functions)
    places = {file for f in functions if (file := file_of(f))} | set(files)
    parts = {path.relative_to(root).as_posix(): digest for file in places for root, path, digest in _with_imports(file)}
    texts = sorted(_text(f) for f in functions if not file_of(f))
    if not parts and not texts:
        return ""
    return hashlib.sha256(repr((sorted(parts.items()), texts)).encode()).hexdigest()[:16]


_loaded: WeakKeyDictionary[Callable[..., Any], str] = WeakKeyDictionary()


def check_loaded(function: Callable[..., Any]) -> None:
    """Raise ValueError if the sources of a function are not those of the first time that this was asked of it."""
    if _loaded.setdefault(function, now := code([function])) != now:
        raise ValueError(f"{file_of(function)}, or what it imports, has changed since it was loaded; start Python anew")


def _text(function: Callable[..., Any]) -> str:
    """Source of what was defined in a cell, else its instructions."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        body = getattr(function, "__code__", None)
        return repr((body.co_code, body.co_consts, body.co_names)) if body else type(function).__qualname__


def _with_imports(file: Path) -> Iterator[tuple[Path, Path, str]]:
    """Root of the imports, path and hash of a file and of all that it imports from below the root."""
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    own = file.relative_to(root).parts[0].removesuffix(".py") if _INSTALLED & set(file.parts) else ""
    todo, seen = [file], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        stat = path.stat()
        digest, names = _read(path, path.relative_to(root).parts[:-1], (stat.st_mtime_ns, stat.st_size, stat.st_ino))
        yield root, path, digest
        for name in names:
            top, *_ = parts = name.split(".")
            if top not in HOUSE and own in ("", top):
                steps = [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
                todo += [p for s in steps for p in (s.with_suffix(".py"), s / "__init__.py") if p.is_file()]


@lru_cache(maxsize=1024)
def _read(path: Path, package: tuple[str, ...], stamp: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """Hash of a file, and the full names of what it may import."""
    text = path.read_text(encoding="utf-8", errors="replace")
    names: list[str] = []
    try:
        tree = ast.parse(text)
    except SyntaxError:  # whoever imports it will say so
        tree = ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names += [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return hashlib.sha256(text.encode()).hexdigest(), tuple(names)
