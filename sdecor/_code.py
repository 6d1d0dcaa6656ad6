"""The user's own code that a run depends on: its files, with what they import of their neighbours, as one short hash.

What is read are the sources, without running them: an import that is computed, and files that the code reads, do not
count. Of an installed package only its own modules do. What is defined in a notebook has no file: see `_made_of`.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def home(function: Callable[..., Any]) -> str:
    """Name of the module that a function was written in."""
    return str(_meant(function).__module__)


def foreign(function: Callable[..., Any]) -> bool:
    """Whether a function is from outside this package."""
    return home(function).partition(".")[0] not in HOUSE


def file_of(module: str) -> Path | None:
    """The file of a module, which is not imported, though the packages around it are; None if it has none."""
    try:
        spec = None if module in sys.modules else importlib.util.find_spec(module)
    except (ImportError, ValueError):  # whoever imports it will say so
        return None
    path = getattr(sys.modules.get(module), "__file__", None) or (spec and spec.origin)
    return Path(path).resolve() if path and Path(path).is_file() else None


def code(functions: Iterable[Any] = (), modules: Iterable[str] = ()) -> str:
    """Sixteen hexadecimal digits of the sources of functions and modules, empty if there are none."""
    functions = list(functions)
    named = (*modules, *map(home, functions))
    files = {file: name for name in named if (file := file_of(name))}
    parts = sorted({part for file, name in files.items() for part in _with_imports(file, name)})
    more = (f for f in functions if not file_of(home(f)) or not _is_text(f))
    texts = sorted(repr(_made_of(function, {})) for function in more)
    return hashlib.sha256(repr((parts, texts)).encode()).hexdigest()[:16] if parts or texts else ""


_loaded: WeakKeyDictionary[types.ModuleType, str] = WeakKeyDictionary()


def check_loaded(name: str) -> None:
    """Raise ValueError if the file of a loaded module is not that of the first time that this was asked of it."""
    file, module = file_of(name), sys.modules.get(name)
    if file and module and _loaded.setdefault(module, now := code(modules=[name])) != now:
        raise ValueError(f"{file}, or what it imports, has changed since it was loaded; start Python anew")


def _is_text(thing: Any) -> bool:
    """Whether the file that defines something says all of it, and nothing was given to it later."""
    return inspect.isclass(thing) or (inspect.isfunction(thing) and thing.__closure__ is None)


def _made_of(thing: Any, seen: dict[int, Any]) -> Any:
    """What something consists of, as far as it is from a notebook: its instructions, and all that they reach.

    What it reaches in files of the user's own counts by these, numbers and texts by themselves, what is installed by
    its name, and objects of installed classes by how they are printed.
    """
    if isinstance(thing, bool | int | float | complex | str | bytes | None):
        return repr(thing)
    if id(thing) in seen:
        return ""
    seen[id(thing)] = thing  # kept, so that no other one is given its id
    label, parts = _parts(thing)
    return [label, *(_made_of(part, seen) for part in parts)]


def _parts(thing: Any) -> tuple[Any, list[Any]]:
    """What can be said of a thing at once, and what of it is to be looked into."""
    if isinstance(thing, Mapping):
        return "", [part for key in sorted(thing, key=str) for part in (key, thing[key])]
    if isinstance(thing, tuple | list | set | frozenset):
        return "", sorted(thing, key=repr) if isinstance(thing, set | frozenset) else [*thing]
    if isinstance(thing, partial):
        return "", [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.MethodType | staticmethod | classmethod):
        return "", [thing.__func__, getattr(thing, "__self__", None)]
    if isinstance(thing, property):
        return "", [thing.fget, thing.fset]
    if isinstance(thing, types.ModuleType):
        return _files(thing.__name__), []
    named = thing if inspect.isfunction(thing) or inspect.isclass(thing) else type(thing)
    label, files = named.__qualname__, _files(named.__module__)
    if inspect.isfunction(thing):
        return _of_function(thing) if not files else ((label, files), _cells(thing))
    if inspect.isclass(thing):
        own = {} if files else {n: v for n, v in vars(thing).items() if _matters(n, v)}
        return (label, files, sorted(own)), [*thing.__bases__, *(own[name] for name in sorted(own))]
    if hasattr(thing, "__wrapped__"):  # by `functools.cache`, say
        return label, [thing.__wrapped__]
    if files == [named.__module__]:  # which may be anything
        text = repr(thing)
        return label if " at 0x" in text else text, []
    return label, [named, getattr(thing, "__dict__", {})]


def _files(module: str) -> list[Any]:
    """Names and hashes of a module's files, if it is the user's own; its name, if not; nothing of a notebook."""
    file = file_of(module)
    if file is None:
        return [] if module == "__main__" else [module]
    installed = _INSTALLED & set(file.parts) or any(file.is_relative_to(path) for path in _STANDARD)
    if installed or module.partition(".")[0] in HOUSE:
        return [module]
    check_loaded(module)
    return sorted(_with_imports(file, module))


def _cells(function: types.FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]


def _matters(name: str, value: Any) -> bool:
    """Whether something in the namespace of a class was written there."""
    written = isinstance(value, types.FunctionType | property | staticmethod | classmethod)
    return written or not (name.startswith("__") and name.endswith("__"))


def _of_function(function: types.FunctionType) -> tuple[Any, list[Any]]:
    names, imports = _names(function.__code__)
    reached = [function.__globals__[name] for name in names if name in function.__globals__]
    label = _instructions(function.__code__), names, [_files(name) for name in imports]
    return label, [*_cells(function), function.__defaults__, function.__kwdefaults__, *reached]


def _names(body: types.CodeType) -> tuple[list[str], list[str]]:
    """Globals that instructions read, and modules that they import."""
    found: tuple[set[str], set[str]] = (set(), set())
    for step in dis.get_instructions(body):
        found[0].update([step.argval] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ())
        found[1].update([step.argval] if step.opname == "IMPORT_NAME" else ())
    for inner in (constant for constant in body.co_consts if isinstance(constant, types.CodeType)):
        for mine, more in zip(found, _names(inner), strict=True):
            mine.update(more)
    return sorted(found[0]), sorted(found[1])


def _instructions(body: types.CodeType) -> tuple[Any, ...]:
    def one(constant: Any) -> Any:
        if isinstance(constant, frozenset):  # in another order in every process
            return sorted(map(repr, constant))
        return _instructions(constant) if isinstance(constant, types.CodeType) else constant

    constants = [one(constant) for constant in body.co_consts]
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
