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
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

HOUSE = ("sdecor", "sdecor_book")
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}


def _meant(function: Callable[..., Any]) -> Any:
    """What was written down: the function in a decorator or `partial`, the class of an object that can be called."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isclass(function) or hasattr(function, "__code__") else type(function)


def foreign(function: Callable[..., Any]) -> bool:
    """Whether a function is from outside this package."""
    return _meant(function).__module__.partition(".")[0] not in HOUSE


def file_of(module: str) -> Path | None:
    """The file of a module, which is not imported, though the packages around it are; None if it has none."""
    try:
        spec = None if module in sys.modules else importlib.util.find_spec(module)
    except (ImportError, ValueError):  # whoever imports it will say so
        return None
    path = getattr(sys.modules.get(module), "__file__", None) or (spec and spec.origin)
    return Path(path).resolve() if path and Path(path).is_file() else None


def code(functions: Iterable[Callable[..., Any]] = (), modules: Iterable[str] = ()) -> str:
    """Sixteen hexadecimal digits of the sources of functions and modules, empty if there are none."""
    meant = [_meant(function) for function in functions]
    files = {file: name for name in (*modules, *(f.__module__ for f in meant)) if (file := file_of(name))}
    parts = sorted({part for file, name in files.items() for part in _with_imports(file, name)})
    texts = sorted(_text(f) for f in meant if not file_of(f.__module__))  # such as of a notebook's cell
    return hashlib.sha256(repr((parts, texts)).encode()).hexdigest()[:16] if parts or texts else ""


_loaded: WeakKeyDictionary[Callable[..., Any], str] = WeakKeyDictionary()


def check_loaded(function: Callable[..., Any]) -> None:
    """Raise ValueError if the sources of a function are not those of the first time that this was asked of it."""
    meant = _meant(function)
    if _loaded.setdefault(meant, now := code([meant])) != now:
        problem = f"{file_of(meant.__module__)}, or what it imports, has changed since it was loaded"
        raise ValueError(f"{problem}; start Python anew")


def _text(function: Any) -> str:
    """Source of what was defined in a cell, else its instructions."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        body = getattr(function, "__code__", None)
        return repr(_instructions(body)) if body else str(function.__qualname__)


def _instructions(body: types.CodeType) -> tuple[Any, ...]:
    constants = [_instructions(c) if isinstance(c, types.CodeType) else c for c in body.co_consts]
    return body.co_code, body.co_names, constants


def _with_imports(file: Path, module: str) -> Iterator[tuple[str, str]]:
    """Name below its root, and hash, of a module's file and of all that it imports from where the user's code lies."""
    own = file.parents[module.count(".") + (file.name == "__init__.py")] if "." in module else file.parent
    installed = bool(_INSTALLED & set(file.parts))
    on_path = [Path(p or ".").resolve() for p in sys.path]
    free = [p for p in on_path if not _INSTALLED & set(p.parts) and not any(p.is_relative_to(s) for s in _STANDARD)]
    roots = [own, *(() if installed else free)]
    todo, seen = [(own, file)], set()
    while todo:
        root, path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        stat, name = path.stat(), path.relative_to(root)
        digest, names = _read(path, name.parts[:-1], (stat.st_mtime_ns, stat.st_size, stat.st_ino))
        yield name.as_posix(), digest
        for parts in (name.split(".") for name in names):
            if parts[0] not in HOUSE and (
                not installed or parts[0] == file.relative_to(own).parts[0].removesuffix(".py")
            ):
                steps = [(r, r.joinpath(*parts[:n])) for r in roots for n in range(1, len(parts) + 1)]
                near = [(r, p) for r, s in steps for p in (s.with_suffix(".py"), s / "__init__.py")]
                todo += [(r, p) for r, p in near if p.is_file()]


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
