"""Registers: what has a name is entered where it is defined; tables, figures, command line and help follow.

A decorator enters a function and gives it back unchanged. Its keyword-only parameters are its options: their defaults,
types and limits are read from the signature, so that one place says what there is and one place checks it. A register
imports the modules that fill it when it is first asked for a name, and with them what ``SDECOR_USE`` lists: modules or
files of your own, separated as in ``PATH``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

USE = "SDECOR_USE"
T = TypeVar("T", bound="Entry")
F = TypeVar("F", bound=Callable[..., Any])


class UnknownName(ValueError, KeyError):
    """A name that no register knows."""

    __str__ = BaseException.__str__


class WrongType(ValueError, TypeError):
    """Something of one's own that is of another kind than it has to be."""


@dataclass(frozen=True)
class Between:
    """Limits of an option, as in ``Annotated[float, Between(0, 1)]``; `ends` says whether they may be reached."""

    low: float
    high: float = float("inf")
    ends: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if `value` lies outside, or is not finite."""
        low, high = f"{self.low:g}", f"{self.high:g}"
        inside = self.low <= value <= self.high if self.ends else self.low < value < self.high
        if not inside or value == float("inf"):
            wanted = f"from {low} to {high}" if self.ends else f"strictly between {low} and {high}"
            if self.high == float("inf"):
                finite = "" if type(value) is int else "finite and "
                wanted = f"{finite}{'at least' if self.ends else 'greater than'} {low}"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class OneOf:
    """Known values of an option, as in ``Annotated[str, OneOf(FILLS)]``: a tuple, or a register."""

    known: Any

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if `value`, or one of several, is not known."""
        for one in value if isinstance(value, tuple) else (value,):
            if one not in self.known:
                raise UnknownName(f"unknown {name} '{one}'; known: {', '.join(self.known)}")


@dataclass(frozen=True)
class OnlyWith:
    """Says of an option that it has an effect only where another one has this value."""

    option: str
    value: Any

    def check(self, name: str, value: Any) -> None:
        """Alone, no value is wrong."""

    def check_with(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raise ValueError if the other option has another value."""
        if settings.get(self.option) != self.value:
            raise ValueError(f"{name} has no effect with {self.option}={settings.get(self.option)!r}")


@dataclass(frozen=True)
class Option:
    """An option of a registered function: a keyword-only parameter."""

    name: str
    default: Any
    hint: Any

    @property
    def limits(self) -> tuple[Any, ...]:
        """What its values are held to."""
        return _parts(self.hint)[1]

    @property
    def type_name(self) -> str:
        """Its type in words, for help."""
        sequence, names = "a,b,...", {type(None): "none"}
        kinds = (sequence if typing.get_origin(k) is tuple else names.get(k, k) for k in _parts(self.hint)[0])
        return "|".join(getattr(kind, "__name__", str(kind)) for kind in kinds)

    def checked(self, value: Any) -> Any:
        """`value` in the option's own type, else ValueError; anything goes where the type is no plain one."""
        kinds, limits = _parts(self.hint)
        if value is None and type(None) in kinds:
            return None
        plain = [kind for kind in kinds if kind in (bool, int, float, str)]
        sequence = any(typing.get_origin(kind) is tuple for kind in kinds)
        if sequence and isinstance(value, str | list | tuple):
            value = tuple(filter(None, value.split(","))) if isinstance(value, str) else tuple(value)
        elif plain or sequence:
            fits = [k for k in plain if isinstance(value, (int, float) if k is float else k)]
            fits = [k for k in fits if isinstance(value, bool) == (k is bool)]
            others = [kind.__name__ for kind in kinds if kind not in (*plain, type(None))] if not sequence else []
            if not fits and others and not isinstance(value, bool | int | float | str | None):
                return value  # a tensor, say, which the function itself judges
            if not fits:
                wanted = " or ".join([kind.__name__ for kind in plain] + others + ["a sequence"] * sequence)
                raise ValueError(f"{self.name} must be of type {wanted}, got {value!r} ({type(value).__name__})")
            value = fits[0](value)
        for limit in limits if isinstance(value, int | float | str | tuple) else ():
            limit.check(self.name, value)
        return value

    def of_text(self, text: str) -> Any:
        """The value that `text` means, checked."""
        kinds = _parts(self.hint)[0]
        if text.lower() == "none" and type(None) in kinds:
            return None
        return self.checked(text if str in kinds else literal(text))


def literal(text: str) -> Any:
    """The Python literal in `text`, or `text` itself; ``true`` and ``false`` are literals here."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _parts(hint: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The types that a hint allows, and the limits that it is annotated with."""
    annotated = typing.get_origin(hint) is typing.Annotated
    base, limits = (hint.__origin__, hint.__metadata__) if annotated else (hint, ())
    union = typing.get_origin(base) in (types.UnionType, typing.Union)
    return (typing.get_args(base) if union else (base,)), limits


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a function, or of a class when called, by name."""
    try:
        owner = function.__init__ if inspect.isclass(function) else function
        hints = typing.get_type_hints(owner, include_extras=True)
    except (NameError, TypeError):  # names that only a type checker imports; an object that can be called
        hints = {}
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    guesses = {p.name: Any if p.default in (None, p.empty) else type(p.default) for p in own}
    return {p.name: Option(p.name, p.default, hints.get(p.name, guesses[p.name])) for p in own}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a register holds: a function with a name, and what is said of it."""

    name: str = ""  #: In the register.
    function: Callable[..., Any] = field(default=lambda: None, repr=False)  #: What the decorator was put on.
    label: str = ""  #: For tables and figures; by default the name, without underscores.
    source: str = ""  #: Where it is published.
    colour: str = ""  #: In figures; by default the next that is free.
    kind: str = field(default="", repr=False)  #: Of the register, for messages.

    @property
    def title(self) -> str:
        """Label for tables and figures."""
        return self.label or self.name.replace("_", " ")

    @property
    def about(self) -> str:
        """What help shows: the docstring of the function, or its title."""
        return inspect.getdoc(self.function) or self.title

    @cached_property
    def options(self) -> dict[str, Option]:
        """Options by name."""
        return options_of(self.function)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of all that the function takes."""
        return tuple(inspect.signature(self.function).parameters)

    def ask(self, available: Mapping[str, Any]) -> Any:
        """Call the function with what it asks for, by the names of its parameters."""
        if unknown := [name for name in self.parameters if name not in available]:
            raise ValueError(f"{self.kind} '{self.name}' asks for '{unknown[0]}'; it can have: {', '.join(available)}")
        return self.function(**{name: available[name] for name in self.parameters})

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A value for every option: the given ones, checked, and the defaults of the others."""
        if unknown := [name for name in given if name not in self.options]:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"{self.kind} '{self.name}' has no option '{unknown[0]}'; it has: {known}")
        return {n: o.checked(given[n]) if n in given else o.default for n, o in self.options.items()}


class Register(MutableMapping[str, T], Generic[T]):
    """Names and entries of one kind; `homes` are the modules that fill it, imported when it is first asked."""

    def __init__(self, kind: str, entry: type[T], *homes: str) -> None:
        self.kind, self.entry, self.homes = kind, entry, homes
        self._entries: dict[str, T] = {}
        self._filled = False

    @typing.overload
    def register(self, name: F) -> F: ...
    @typing.overload
    def register(self, name: str = "", **fields: Any) -> Callable[[F], F]: ...
    def register(self, name: Any = "", **fields: Any) -> Any:
        """Decorator that enters a function, by its own name or the one given; the function stays what it is."""
        if callable(name):
            return self.register()(name)

        def enter(function: F) -> F:
            self[name or function.__name__] = self.entry(function=function, **fields)
            return function

        return enter

    def _go_home(self) -> None:
        for home in self.homes:
            importlib.import_module(home)

    def _fill(self) -> None:
        if not self._filled:
            self._filled = True
            try:
                self._go_home()
                use(*os.environ.get(USE, "").split(os.pathsep))
            except BaseException:
                self._filled = False
                raise

    def __setitem__(self, name: str, entry: T) -> None:
        if entry.function is Entry.function:  # of a method: it has none, and belongs to the module that enters it
            function = types.FunctionType(Entry.function.__code__, {"__name__": sys._getframe(1).f_globals["__name__"]})
            entry = replace(entry, function=function)
        if entry.function.__module__ not in self.homes:  # what is entered from outside comes after what is there
            self._go_home()
        new, old = replace(entry, name=name, kind=self.kind), self._entries.get(name)
        # a module or a cell that runs again may replace what it entered itself, and nothing else
        elsewhere = old is not None and old.function.__module__ != new.function.__module__
        if old is not None and old != new and (elsewhere or old.function is new.function):
            raise ValueError(f"{self.kind} '{name}' is there already ({old.function.__module__}); choose another name")
        self._entries[name] = new

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._fill()
        if name not in self._entries:
            raise UnknownName(f"unknown {self.kind} '{name}'; known: {', '.join(self)}")
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        self._fill()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<register of kind '{self.kind}': {', '.join(self)}>"


def use(*names: str) -> None:
    """Import modules, or Python files, whose registrations are wanted; each once."""
    for name in filter(None, names):
        if not name.endswith(".py"):
            unknown = f"no module '{name}' to use; give a module on PYTHONPATH, or a file FILE.py"
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(unknown)
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if not (name + ".").startswith(f"{error.name}."):
                    raise
                raise ValueError(unknown) from None
            continue
        path = Path(name).resolve()
        alias = f"sdecor_use_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if getattr(sys.modules.get(alias), "__file__", None) == str(path):
            continue
        if not path.is_file():
            raise ValueError(f"no file '{name}' to use")
        spec = importlib.util.spec_from_file_location(alias, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[alias]  # else it would count as used, next time
            if not isinstance(error, Exception):
                raise
            raise ValueError(f"cannot use '{name}': {type(error).__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Term(Entry):
    """A term of the objective: ``Step -> scalar``; see `sdecor.objective.Step`."""

    gradient: bool = True  #: Whether it looks at the input gradient; without, the graph to the images is spared.

    def __post_init__(self) -> None:
        if self.name == "total":
            raise ValueError("a term cannot be called 'total': that is the sum of the terms")


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A way to train: named terms and their weights."""

    terms: Mapping[Any, float] = field(default_factory=dict, kw_only=False)  #: Name of a term, or itself, to weight.
    settings: Mapping[str, Any] = field(default_factory=dict)  #: Options of terms that are the method's for good.
    dash: Any = "-"  #: Line style in figures, as matplotlib takes it.
    network: Callable[[Any, Any], Any] | None = None  #: What it makes of a network before training, and of an image.

    def __post_init__(self) -> None:
        named = {t if isinstance(t, str) else t.__name__: float(weight) for t, weight in self.terms.items()}
        object.__setattr__(self, "terms", named)

    @property
    def about(self) -> str:
        """The terms, their weights and settings."""
        total = " + ".join(f"{weight:g} {term}" for term, weight in self.terms.items())
        return ", ".join([f"{self.title}: {total}", *(f"{name}={value}" for name, value in self.settings.items())])


@dataclass(frozen=True, kw_only=True)
class Attribution(Entry):
    """A method of `sdecor.attribution.attribute`."""

    per_channel: bool = True  #: Whether it scores channels, ``(B, C, H, W)``, or whole pixels, ``(B, H, W)``.
    slow: bool = False  #: Whether it takes dozens of forward passes or more for an image.
    predicts: bool = False  #: Whether it finds the predicted class by itself, in the pass that it makes anyway.
    single: bool | None = None  #: Whether it takes one image at a time, and variants of it; by default if it is slow.


@dataclass(frozen=True, kw_only=True)
class Measure(Entry):
    """A measure of maps; what it needs of a `sdecor.measures.case.Case` are the names of its parameters."""

    better: str = "higher"  #: Or ``lower``; for sharpness, the direction that is sharper.
    low: float = float("-inf")  #: Least value that it can have.
    high: float = float("inf")  #: Largest.
    family: str = ""  #: Such as ``sharpness`` or ``localization``; by default the module.

    @property
    def heading(self) -> str:
        """Title with an arrow in the better direction."""
        return f"{self.title} {'↑' if self.better == 'higher' else '↓'}"


@dataclass(frozen=True, kw_only=True)
class Dataset(Entry):
    """A data set: a function from a `sdecor.data.Request` to one split. All have the option ``image_size``."""

    classes: int | tuple[str, ...] = 0  #: Number, or names; 0 where that depends on the files.
    size: int = 0  #: Side of an image in pixels unless another is asked for; 0 where that depends on the files.
    licence: str = ""  #: Terms of use, as its authors state them.
    cite: str = ""  #: Publication to cite.
    download: Callable[[str], Any] | None = None  #: Function of a folder that fetches it, if there is one.
    present: Callable[[Path], bool] | None = None  #: Whether it is below a data root; without, it needs no files.
    layouts: tuple[Mapping[str, Any], ...] = ()  #: Where its files lie, and checksums or numbers: `sdecor.sources`.
    ink: bool = False  #: Whether the object is every pixel above 0.

    @cached_property
    def options(self) -> dict[str, Option]:
        """Options by name: the side of its images, and its own."""
        hint: Any = Annotated[int, Between(1)] if self.size else Annotated[int | None, Between(1)]
        return {"image_size": Option("image_size", self.size or None, hint), **options_of(self.function)}


PENALTIES: Register[Entry] = Register("penalty", Entry, "sdecor.decorrelation")
TERMS: Register[Term] = Register("term", Term, "sdecor.objective", "sdecor.baselines")
METHODS: Register[Method] = Register("method", Method, "sdecor.objective", "sdecor.baselines")
ATTRIBUTIONS: Register[Attribution] = Register("attribution", Attribution, "sdecor.attribution")
MEASURES: Register[Measure] = Register("measure", Measure, "sdecor.measures")
DATASETS: Register[Dataset] = Register("data set", Dataset, "sdecor.data")
MODELS: Register[Entry] = Register("model", Entry, "sdecor.models")
FILLS: Register[Entry] = Register("fill", Entry, "sdecor.masking")
SCORES: Register[Entry] = Register("score", Entry, "sdecor.saliency")

#: All of them, by the name that ``sdecor list`` takes.
REGISTERS: dict[str, Register[Any]] = {
    **{"penalties": PENALTIES, "terms": TERMS, "methods": METHODS, "attributions": ATTRIBUTIONS, "measures": MEASURES},
    **{"datasets": DATASETS, "models": MODELS, "fills": FILLS, "scores": SCORES},
}
