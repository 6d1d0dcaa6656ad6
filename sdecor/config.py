"""What a run is: frozen descriptions, their checks, and the key that equal ones share. Nothing here needs torch.

A key hashes only what differs from the defaults, so that a setting that is added later moves no key. What is impossible
is a ValueError that names the setting, what it got and what would work.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache, cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from sdecor import registers
from sdecor._code import HOUSE, check_loaded, code, foreign, home
from sdecor._files import cache_folder, expanded, files_below, replace_atomically
from sdecor.registers import Between, Dataset, Entry, OneOf, OnlyWith, Option, UnknownName

C = TypeVar("C", bound=type)
Pairs = tuple[tuple[str, Any], ...]
OPTIMIZERS, SHAPES, AUGMENTATIONS = ("adamw", "sgd"), ("cosine", "one-cycle", "constant"), ("crop", "flip", "cutout")
FOLDER = "folder:"
LONG = 1 << 30  # bytes of a folder that takes long to read
Count = Annotated[int, Between(1)]
Positive = Between(0, ends=False)


def setting(default: Any, meaning: str) -> Any:
    """A field: its default, or the class that makes it, and what it means, for docstring and command line alike."""
    how = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**how, metadata={"help": meaning})


def described(cls: C) -> C:
    """Put the meanings of the fields into the docstring of their class."""
    meanings = [f"    {f.name}: {f.metadata['help']}" for f in fields(cls) if "help" in f.metadata]
    cls.__doc__ = "\n\n".join([cls.__doc__ or "", "\n".join(["Args:", *meanings])])
    return cls


@cache
def _options(cls: type) -> dict[str, Option]:
    hints, known = get_type_hints(cls, include_extras=True), fields(cls)
    return {f.name: Option(f.name, f.default, hints[f.name]) for f in known if f.init}


def _check(instance: Any, *names: str) -> None:
    """Put every field, or those named, into its own type; raise if it is of another or outside its limits."""
    for name, option in _options(type(instance)).items():  # type: ignore[arg-type]
        if not names or name in names:
            object.__setattr__(instance, name, option.checked(getattr(instance, name)))


def _chosen(entry: Entry, options: Mapping[str, Any]) -> Pairs:
    """Those of an entry's options that are not the defaults, in order of name."""
    return tuple((name, options[name]) for name in sorted(options) if options[name] != entry.options[name].default)


def pairs(values: Any, name: str) -> Pairs:
    """Names and values, of a mapping or of pairs, in order of name; lists as tuples."""
    try:
        return tuple(sorted((str(k), tuple(v) if isinstance(v, list) else v) for k, v in dict(values).items()))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be names with values, such as {{'a': 1}}, got {values!r}") from None


@lru_cache(maxsize=32)
def _known(files: tuple[tuple[str, tuple[int, ...]], ...], root: str) -> str:
    """What `_content` says; of folders that take long to read it is kept in the user's cache."""
    if sum(size for _, (size, *_) in files) < LONG:
        return _content(files, root)
    of = hashlib.blake2b(repr((root, files)).encode(), digest_size=16).hexdigest()
    try:
        path = cache_folder() / "fingerprints" / of
        known = path.read_text(encoding="ascii") if path.exists() else ""
    except (OSError, ValueError):  # without a cache nothing is lost but time
        return _content(files, root)
    if len(known) != 16:
        known = _content(files, root)
        with suppress(OSError):
            replace_atomically(path, lambda file: file.write(known.encode()))
    return known


def _content(files: tuple[tuple[str, tuple[int, ...]], ...], root: str) -> str:
    """Hash of names and contents; the numbers among `files` say when to read them again."""

    def one(file: tuple[str, tuple[int, ...]]) -> bytes:
        with Path(root, file[0]).open("rb") as f:
            return hashlib.file_digest(f, "blake2b").digest()

    total = hashlib.blake2b(digest_size=8)
    with ThreadPoolExecutor(8) as threads:
        for (name, _), digest in zip(files, threads.map(one, files), strict=True):
            total.update(os.fsencode(name) + b"\0" + digest)
    return total.hexdigest()


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change when a file of `folder` is added, removed, renamed or edited.

    It is made of names and *content*, not of sizes and times: a copy on another machine is the same data, and two
    pictures of one size that change places are not. Training reads every byte many times, so that reading it once more
    is cheap. Hidden files and what tools leave do not count. Within a process a folder is read again only when the
    size, a time or the inode of a file has changed, and a folder of more than a gigabyte also in other processes: what
    was found is kept in ``fingerprints/`` of the user's cache, ``$XDG_CACHE_HOME/sdecor``.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    found = sorted((Path(file.path).relative_to(folder), file.stat()) for file in files_below(folder))
    seen = [(n.as_posix(), (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)) for n, s in found]
    return _known(tuple(seen), str(folder.resolve()))


def checked_data(
    name: str, limit: int | None, options: Mapping[str, Any]
) -> tuple[Dataset, Path | None, dict[str, Any]]:
    """The entry of a data set, the folder if `name` is one (``folder:PATH`` or a directory), and all its options."""
    path = None
    if name in ("", FOLDER):
        raise ValueError(f"data must be a data set or an image folder (folder:PATH), got {name!r}")
    if name.startswith(FOLDER) or (name not in registers.DATASETS and Path(name).is_dir()):
        path = expanded(name.removeprefix(FOLDER))
    elif name not in registers.DATASETS or name == "folder":
        known = ", ".join(other for other in registers.DATASETS if other != "folder")
        raise UnknownName(f"unknown data set '{name}'; known: {known}, or an image folder (folder:PATH)")
    _options(Data)["limit"].checked(limit)
    entry = registers.DATASETS[name if path is None else "folder"]
    return entry, path, entry.checked(options)


@described
@dataclass(frozen=True)
class Data:
    """The images of a run."""

    name: str = setting("shapes", "Name in the register of data sets, or an image folder (folder:PATH).")
    limit: Annotated[int | None, Between(1)] = setting(None, "Use only so many training images.")
    options: Pairs = setting((), "Options of the data set.")
    per_class: Annotated[int | None, Between(1)] = setting(None, "Use only so many training images of each class.")
    permuted_labels: bool = setting(False, "Train on labels in random order, for the sanity check by labels.")
    removed: Annotated[float, Between(0, 1)] = setting(
        0.0, "Remove and retrain (ROAR, arXiv:1806.10758): share of the pixels of every image that has the mean colour."
    )
    removed_by: str = setting(
        "gradient",
        "How they are chosen: an attribution, the most salient ones for the class that the same run without removal "
        "predicts; or random.",
    )
    fingerprint: str = setting("", "Of the files of a folder; found out if it is not given.")

    def __post_init__(self) -> None:
        entry, path, options = checked_data(self.name, self.limit, dict(pairs(self.options, "data_options")))
        object.__setattr__(self, "options", _chosen(entry, options))
        _check(self)
        if path is not None:
            object.__setattr__(self, "name", FOLDER + self.name.removeprefix(FOLDER))
            object.__setattr__(self, "fingerprint", self.fingerprint or fingerprint(path))
        elif self.fingerprint:
            raise ValueError(f"fingerprint belongs to image folders; '{self.name}' is a data set by name")
        if self.removed == 1:
            raise ValueError("removed must leave something, got 1.0")
        if self.removed_by not in ("gradient", "random"):
            OneOf((*registers.ATTRIBUTIONS, "random")).check("removed_by", self.removed_by)
        if not self.removed and self.removed_by != "gradient":
            raise ValueError(f"removed_by='{self.removed_by}' has no effect without removed")

    @property
    def part(self) -> dict[str, Any]:
        """Which of the training images it has, as `sdecor.data.load` takes it."""
        return {"limit": self.limit, "per_class": self.per_class}

    @property
    def entry(self) -> str:
        """Its name in the register of data sets."""
        return "folder" if self.path else self.name

    @property
    def path(self) -> Path | None:
        """Absolute path of an image folder, None for a data set by name."""
        folder = self.name.startswith(FOLDER)
        return expanded(self.name.removeprefix(FOLDER)).resolve() if folder else None


@described
@dataclass(frozen=True)
class Model:
    """The network of a run."""

    name: str = setting("lenet", "Name in the register of models, or package.module:factory.")
    options: Pairs = setting((), "Options of the model.")

    def __post_init__(self) -> None:
        given = pairs(self.options, "model_options")
        if ":" not in self.name:
            if self.name not in registers.MODELS:
                known = ", ".join(registers.MODELS)
                raise UnknownName(f"unknown model '{self.name}'; known: {known}, or package.module:factory")
            given = _chosen(registers.MODELS[self.name], registers.MODELS[self.name].checked(dict(given)))
        object.__setattr__(self, "options", given)


@described
@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: Count = setting(8, "Passes over the training data.")
    batch_size: Count = setting(256, "Images per step; a last smaller batch is dropped when there is a full one.")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = setting("adamw", "adamw, or sgd with Nesterov momentum.")
    lr: Annotated[float, Positive] = setting(1e-3, "Peak learning rate.")
    momentum: Annotated[float, Between(0, 1)] = setting(0.9, "Of sgd.")
    weight_decay: Annotated[float, Between(0)] = setting(1e-4, "Of the optimizer.")
    shape: Annotated[str, OneOf(SHAPES)] = setting(
        "cosine",
        "Of the learning rate: cosine (5 % linear warm-up, then half a cosine to 0), one-cycle (straight up to the "
        "peak at 30 %, and straight down) or constant.",
    )
    clip: Annotated[float | None, Positive] = setting(5.0, "Largest norm of the parameter gradient; none to leave it.")
    augment: Annotated[tuple[str, ...], OneOf(AUGMENTATIONS)] = setting(
        (), "Of the training images, on the device: some of crop, flip and cutout."
    )

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "augment", tuple(name for name in AUGMENTATIONS if name in self.augment))
        if self.optimizer != "sgd" and self.momentum != 0.9:
            raise ValueError(f"momentum has no effect with optimizer '{self.optimizer}'")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`."""
        if self.shape == "constant":
            return self.lr
        if self.shape == "one-cycle":
            peak = max(1, round(0.3 * steps))
            return self.lr * ((step + 1) / peak if step < peak else (steps - step) / (steps - peak + 1))
        warm = max(1, round(0.05 * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


class Objective:
    """What training minimizes: a method's terms with their weights, and the settings of these terms.

    `weights` come in place of the method's own, by term; 0 leaves a term out. `settings` are options of the terms, such
    as ``fraction=0.3``; those of a term that is left out are dropped. The attribute ``terms`` has the weights of the
    terms that are left, and ``settings`` all their options.

    Example:
        >>> Objective("consistency-absolute", {"consistency": 3}).terms
        {'classification': 1.0, 'consistency': 3.0}
    """

    def __init__(
        self, method: str = "saliencydecor-absolute", weights: Mapping[str, float] | None = None, **settings: Any
    ) -> None:
        own, given = registers.METHODS[method], weights or {}
        for name, weight in given.items():
            if name not in own.terms:
                raise ValueError(f"method '{method}' has no term '{name}'; it has: {', '.join(own.terms)}")
            Option(f"weight of '{name}'", 1.0, Annotated[float, Between(0)]).checked(weight)
        self.method = method
        self.weights = {name: float(given.get(name, weight)) or 0.0 for name, weight in own.terms.items()}
        self.terms = {name: weight for name, weight in self.weights.items() if weight}
        if not self.terms:
            raise ValueError(f"all terms of method '{method}' have weight 0")
        options = _settings_of(method)
        for name, value in {**own.settings, **settings}.items():
            if name not in options:
                known = ", ".join(n for n in options if n not in own.settings) or "none"
                raise ValueError(f"method '{method}' has no setting '{name}'; it has: {known}")
            if name in own.settings and value != own.settings[name]:
                raise ValueError(f"{name}={own.settings[name]!r} belongs to method '{method}'; choose another method")
        checked = {name: options[name].checked(value) for name, value in {**settings, **own.settings}.items()}
        used = {name for term in self.terms for name in registers.TERMS[term].options}
        self.settings = {n: checked.get(n, o.default) for n, o in options.items() if n in used}
        for name, value in self.settings.items():
            for limit in options[name].limits:
                if isinstance(limit, OnlyWith) and value != options[name].default:
                    limit.check_with(name, self.settings)

    def of(self, term: str) -> dict[str, Any]:
        """Settings of one of the terms."""
        return {name: self.settings[name] for name in registers.TERMS[term].options}

    def difference(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The weights and the settings that are not the method's own."""
        own = registers.METHODS[self.method]
        plain = {name: option.default for name, option in _settings_of(self.method).items()} | {**own.settings}
        weights = {name: weight for name, weight in self.weights.items() if weight != own.terms[name]}
        return weights, {name: value for name, value in self.settings.items() if value != plain[name]}

    def __repr__(self) -> str:
        return f"Objective({self.method!r}, {self.weights}, {self.settings})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Objective) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def _settings_of(method: str) -> dict[str, Option]:
    """Options of a method's terms; of two with one name the first counts."""
    options: dict[str, Option] = {}
    for term in registers.METHODS[method].terms:
        options |= {**registers.TERMS[term].options, **options}
    return options


@described
@dataclass(frozen=True, eq=False)
class Run:
    """Description of one training run; runs with equal keys are equal.

    `Run.of` makes one from flat names (``Run.of(data="mnist", lr=2e-3)``), which the command line and plans use too.
    """

    data: Data = setting(Data, "The images.")
    model: Model = setting(Model, "The network.")
    method: str = setting("standard", "Name in the register of methods.")
    weights: Pairs = setting((), "Weights of terms in place of the method's own.")
    settings: Pairs = setting((), "Options of the method's terms.")
    schedule: Schedule = setting(Schedule, "How long and how fast to train.")
    seed: Annotated[int, Between(0)] = setting(0, "Of initialization, order and masks.")
    evaluate_on: Annotated[str, OneOf(("val", "test"))] = setting("test", "test for final numbers, val for choices.")
    curve_images: Annotated[int | None, Between(1)] = setting(
        None, "Held-out images for the curves of masked accuracy; none takes all."
    )
    tuning_epochs: Annotated[int, Between(0)] = setting(
        0, "Passes of fine-tuning on images with deleted patches, for deletion curves that are fair; 0 leaves them out."
    )
    code: str = setting("", "Of one's own code that it depends on; found out if it is not given.")
    objective: Objective = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self, "seed", "evaluate_on", "curve_images", "tuning_epochs")
        weights, settings = (dict(pairs(getattr(self, name), name)) for name in ("weights", "settings"))
        objective = Objective(self.method, weights, **settings)
        complete = {"weights": tuple(objective.weights.items()), "settings": tuple(sorted(objective.settings.items()))}
        parts = {n: NESTED[n](v) for n in ("data", "model") if isinstance(v := getattr(self, n), str)}
        for name, value in {"objective": objective, **complete, **parts}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "code", self.code or self.code_now())

    @classmethod
    def of(cls, **flat: Any) -> Run:
        """A run from flat names."""
        return Run()._changed({"weights": (), "settings": (), **flat})

    def but(self, **flat: Any) -> Run:
        """The same run with some settings changed, by flat names; another method keeps what fits of the others."""
        if flat.get("method", self.method) != self.method:
            weights, settings = fitting(flat["method"], dict(self.weights), dict(self.settings))
            flat = {"weights": weights, "settings": settings, **flat}
        return self._changed(flat)

    def _changed(self, flat: Mapping[str, Any]) -> Run:
        parts: dict[str, dict[str, Any]] = {name: {} for name in ("", *NESTED)}
        for name, value in flat.items():
            if name not in _flat():
                raise ValueError(f"unknown setting '{name}'; known: {', '.join(_flat())}")
            part, f = _flat()[name]
            parts[part][f.name] = value
        if "name" in parts["data"]:  # other files
            parts["data"].setdefault("fingerprint", "")
        if parts["data"].keys() | parts["model"].keys() or parts[""].keys() & {"method", "weights", "settings"}:
            parts[""].setdefault("code", "")
        own = {part: replace(getattr(self, part), **parts[part]) for part in NESTED if parts[part]}
        return replace(self, **parts[""], **own)

    @property
    def thorough(self) -> bool:
        """Whether it is measured in full: choices, and what a network learns from spoilt data, go by accuracy."""
        return self.evaluate_on == "test" and not self.data.permuted_labels and not self.data.removed

    @property
    def tuning(self) -> Schedule | None:
        """How it is trained on images with deletions before it is measured: a tenth of the rate; None if it is not."""
        return replace(self.schedule, epochs=n, lr=self.schedule.lr / 10) if (n := self.tuning_epochs) else None

    def code_now(self) -> str:
        """What `code` would be if the run were described now; empty where it depends on this package alone."""
        own, known = self.objective.settings, registers
        method, terms = known.METHODS[self.method], [known.TERMS[term] for term in self.objective.terms]
        entries = [known.DATASETS[self.data.entry], *terms]
        named = [(known.MODELS, self.model.name), (known.ATTRIBUTIONS, self.data.removed_by)]
        for option in (option for term in terms for option in term.options.values()):
            named += [(limit.known, own[option.name]) for limit in option.limits if isinstance(limit, OneOf)]
        entries += [of[name] for of, name in named if isinstance(of, known.Register) and name in of]
        used = [entry.function for entry in entries] + ([method.network] if method.network else [])
        module, _, factory = self.model.name.partition(":")
        if factory and hasattr(made := getattr(sys.modules.get(module), factory, None), "__module__"):
            used.append(made)  # of a notebook there is no file
        modules = [module] if factory and module.partition(".")[0] not in HOUSE else []
        modules += [method.function.__module__] if foreign(method.function) else []  # its weights, say
        for function in (mine := [function for function in used if foreign(function)]):
            check_loaded(home(function))
        return code(mine, modules)

    def _values(self) -> dict[str, Any]:
        return {n: getattr(getattr(self, part) if part else self, f.name) for n, (part, f) in _flat().items()}

    def flat(self) -> dict[str, Any]:
        """Every setting by a name of its own, for tables: options as ``data NAME``, weights as ``weight TERM``."""
        out: dict[str, Any] = {}
        prefixes = {"weights": "weight ", "data_options": "data ", "model_options": "model "}
        for name, value in self._values().items():
            if name == "settings":
                out |= {f"setting {key}" if key in _flat() else key: one for key, one in value}
            else:
                out |= {prefixes[name] + key: one for key, one in value} if name in PAIRED else {name: value}
        return out

    def difference(self) -> dict[str, Any]:
        """What differs from the defaults, by flat names; the files of a folder stand for its path."""
        weights, settings = self.objective.difference()
        values = {**self._values(), "weights": weights or (), "settings": settings or ()}
        out = {n: v for n, v in values.items() if v != _flat()[n][1].default}
        return out | ({"data": "folder"} if self.data.path else {})

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits made of the difference."""
        return hashlib.sha256(json.dumps(self.difference(), sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Run.from_dict, (self.to_dict(),)  # to other processes goes the description, no entry of a register

    def to_dict(self) -> dict[str, Any]:
        """The whole description, as a record holds it: what a default is today is written down too."""
        return {name: dict(value) if name in PAIRED else value for name, value in self._values().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """Inverse of `to_dict`, also after a journey through JSON."""
        return cls.of(**values)


NESTED: dict[str, Any] = {"data": Data, "model": Model, "schedule": Schedule}
PAIRED = ("data_options", "model_options", "weights", "settings")


@cache
def _flat() -> dict[str, tuple[str, Field[Any]]]:
    """Flat name to the part of a run that it lies in (or none) and its field: ``data`` is the name of the data."""
    out: dict[str, tuple[str, Field[Any]]] = {}
    for f in fields(Run):
        if f.name in NESTED:
            names = {"name": f.name, "options": f"{f.name}_options"}
            out |= {names.get(inner.name, inner.name): (f.name, inner) for inner in fields(NESTED[f.name])}
        elif f.init:
            out[f.name] = ("", f)
    return out


def flat_fields() -> dict[str, Field[Any]]:
    """Flat name to dataclass field, in order: what the command line and plans may set."""
    return {name: f for name, (_, f) in _flat().items()}


def flat_options() -> dict[str, Option]:
    """The same with their types, to turn texts into values."""
    return {n: replace(_options(NESTED.get(part, Run))[f.name], name=n) for n, (part, f) in _flat().items()}


def fitting(
    method: str, weights: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Those of the weights and settings that a method has, and may be given."""
    free = _settings_of(method).keys() - registers.METHODS[method].settings.keys()
    terms = registers.METHODS[method].terms
    return {n: w for n, w in weights.items() if n in terms}, {n: v for n, v in settings.items() if n in free}


def method_grid(seeds: Iterable[int], methods: Iterable[str] | None = None, **flat: Any) -> list[Run]:
    """Runs of every method with every seed, all else equal; weights and settings go to the methods that have them.

    Without `methods`, those are left out that differ from an earlier one in their name alone, as the arms of a plan do
    that only train for longer.
    """
    unlike: dict[Any, str] = {}
    for name, method in registers.METHODS.items():
        objective = Run.of(method=name).objective
        unlike.setdefault((repr((objective.weights, objective.settings)), method.network), name)
    names = list(unlike.values() if methods is None else methods)
    given = [dict(pairs(flat.pop(name, ()), name)) for name in ("weights", "settings")]
    fits = {name: fitting(name, *given) for name in names}
    for place, kind in enumerate(("weight", "setting")):
        if unused := [n for n in given[place] if not any(n in fit[place] for fit in fits.values())]:
            raise ValueError(f"none of the methods {', '.join(names)} takes the {kind} '{unused[0]}'")
    return [Run.of(method=m, seed=s, weights=fits[m][0], settings=fits[m][1], **flat) for s, m in product(seeds, names)]
