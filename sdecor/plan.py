"""Plans: an experiment before it is run, read from a TOML file that is committed before its results.

A plan says what all runs share, which arms there are, which weights are tried and how one of them is chosen on
validation data, how many seeds, and what is claimed. A *preset* is a size of it: how much data, how long. What a plan
does not know, and what cannot be run, is an error that names it, whatever preset it belongs to. Tables of the file:

- ``title``; ``[shared]``: flat settings of every run (`sdecor.config.flat_fields`).
- ``[choice]``: ``seed`` of the trials, ``price`` (accuracy that the strongest weight may cost), ``rates`` (learning
  rates, tried with the first arm), ``images`` (how many validation images there are, for its standard error).
- ``[arms.NAME]``: ``method`` (by default NAME), ``label``, flat settings; ``try = {weight or option = [...]}``, with
  the ``rule`` ``strongest`` or ``most accurate``; ``from`` (an earlier arm whose weights and options are taken over);
  ``length`` (its epochs, as a multiple); ``seeds`` (0 for a choice that others take over), and ``later`` (after all
  seeds of the other arms).
- ``[doses.NAME]``: an ``arm`` (by default NAME), its ``try`` list, each value of which is an arm of its own,
  ``seeds`` and ``later``. What the arm itself tries, if that is something else, they take over as it was chosen.
- ``[presets.NAME]``: ``seeds``, ``trial`` (settings of the trials alone, no weights), ``tries`` (so many
  values of each list, from its middle), ``only`` (these arms), ``amp``, ``arms`` (changes of arms), flat settings.
- ``[[claims]]``: see `Claim`.

Where settings meet, those of the arm count, then what is taken over, then those of the trials, of the preset, and the
shared ones. Weights, and options of terms, meet one by one; any other setting as a whole.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from sdecor import choice
from sdecor.choice import Trial
from sdecor.config import PAIRED, Run, fitting, flat_options, pairs
from sdecor.measures.case import RECOMMENDED, needs
from sdecor.registers import MEASURES, METHODS, Between, OneOf, Option, UnknownName

Table = Mapping[str, Any]
RULES = ("strongest", "most accurate")
DIRECTIONS = ("higher", "lower", "equal")
OF_LAYERS = ("correlation", "effective_rank", "participation_ratio", "condition_number")
OF_OBJECTS = ("box_accuracy", "max_box_accuracy", "box_overlap") + tuple(
    f"{part}_only_{name}" for part in ("object", "background") for name in ("accuracy", "gini", "relevance_mass")
)
OF_DELETION = ("deletion_area", "fair_deletion_area") + tuple(
    f"tuned_{name}" for name in ("accuracy", "gini", "similarity", "relevance_mass")
)
_FLAT = {n: o for n, o in flat_options().items() if n not in ("method", "seed", "evaluate_on", "fingerprint", "code")}
_ARM = ("method", "label", "try", "rule", "from", "length", "seeds", "later")
_CHOICE = {"seed": Annotated[int, Between(0)], "price": Annotated[float, Between(0, 1)], "rates": Any}
_CHOICE |= {"images": Annotated[int, Between(1)]}
_PRESET = {"seeds": Annotated[int, Between(1)], "tries": Annotated[int | None, Between(1)], "amp": bool}
_PRESET |= {"trial": Any, "only": Any, "arms": Any}


@contextmanager
def within(place: str) -> Iterator[None]:
    """Let a ValueError say where it arose."""
    try:
        yield
    except ValueError as error:
        kind = UnknownName if isinstance(error, UnknownName) else ValueError
        raise kind(f"{place}: {error}") from error


def _table(given: Any, place: str, known: Iterable[str] | None = None) -> Table:
    """What was given, if it is a table, has known keys alone, and its flat settings have their types."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{place} must be a table, got {given!r}")
    names = list(given if known is None else known)
    with within(place):
        for name, value in given.items():
            if name not in names:
                raise UnknownName(f"unknown key '{name}'; known: {', '.join(names)}")
            if known is not None and name in _FLAT:
                pairs(value, name) if name in PAIRED else _FLAT[name].checked(value)
    return given


def _list(given: Any, what: str, kind: Any) -> tuple[Any, ...]:
    """What was given, if it is a list of values of one kind that differ."""
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{what} must be a list that is not empty, got {given!r}")
    values = tuple(Option(what, None, kind).checked(one) for one in given)
    if len(set(values)) < len(values):
        raise ValueError(f"{what} has a value twice: {given!r}")
    return values


def _typed(given: Table, hints: Table) -> dict[str, Any]:
    """Those of the values for which there are types, in them and within their limits."""
    return {name: Option(name, None, hints[name]).checked(given[name]) for name in hints if name in given}


def _merged(*tables: Table) -> dict[str, Any]:
    """Flat settings, those of later tables in place of earlier ones; weights and options of terms one by one."""
    out: dict[str, Any] = {}
    for table in tables:
        joined = {n: {**out.get(n, {}), **dict(pairs(table[n], n))} for n in ("weights", "settings") if n in table}
        out |= {**table, **joined}
    return out


@dataclass(frozen=True)
class _Typed:
    """A dataclass that holds its fields to their types and limits."""

    def __post_init__(self) -> None:
        for name, value in _typed(vars(self), get_type_hints(type(self), include_extras=True)).items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Claim(_Typed):
    """What is claimed of two arms, and what decides it: see `sdecor.report.verdicts.verdict`."""

    name: str  #: Short, for tables.
    text: str  #: In words.
    measure: str  #: That records hold.
    arm: str  #: Of the plan.
    against: str  #: Another one.
    direction: Annotated[str, OneOf(DIRECTIONS)]  #: ``higher`` or ``lower`` in `arm`, or ``equal``.
    smallest: Annotated[float, Between(0, ends=False)]  #: Difference that matters, in units of the measure.

    def __post_init__(self) -> None:
        super().__post_init__()
        held = ["accuracy", "grid_pointing_game", *OF_OBJECTS, *OF_DELETION]
        held += [m for m in MEASURES if m in RECOMMENDED or {*needs(m)} <= {"mask"}]
        if self.measure not in held and not self.measure.startswith(tuple(f"{name}_" for name in OF_LAYERS)):
            known = ", ".join([*held, *(f"{name}_LAYER" for name in OF_LAYERS)])
            raise UnknownName(f"unknown measure '{self.measure}'; records hold: {known}")
        if self.arm == self.against:
            raise ValueError(f"it sets arm '{self.arm}' against itself")


@dataclass(frozen=True)
class Arm(_Typed):
    """One way to train in a plan."""

    name: str
    method: Annotated[str, OneOf(METHODS)]
    label: str = ""  #: For tables and figures; without, it is made of what tells arms of one method apart.
    settings: Mapping[str, Any] = field(default_factory=dict)  #: Flat settings over the shared ones.
    tried: str = ""  #: Name of the weight or option that is tried.
    values: tuple[float, ...] = ()  #: The values tried.
    rule: Annotated[str, OneOf(RULES)] = RULES[0]  #: Which chooses among them.
    takes: str = ""  #: Arm whose weights and options are taken over.
    length: Annotated[float, Between(0, ends=False)] = 1.0  #: Epochs, as a multiple of the preset's.
    seeds: Annotated[int | None, Between(0)] = None  #: In place of the preset's.
    later: bool = False  #: After all seeds of the arms that are not.

    def __post_init__(self) -> None:
        super().__post_init__()
        objective = Run.of(method=self.method).objective
        known = [*objective.weights, *(n for n in objective.settings if n not in METHODS[self.method].settings)]
        if self.tried and self.tried not in known:
            raise UnknownName(f"unknown weight or option '{self.tried}' to try; known: {', '.join(known)}")
        if any(self.tried in dict(pairs(self.settings.get(kind, ()), kind)) for kind in ("weights", "settings")):
            raise ValueError(f"{self.tried} is tried, so a value of its own has no effect")
        longer = "" if self.length == 1 else f", {self.length:g} times as long"
        title = METHODS[self.method].title + longer + (f", {self.rule}" if self.rule != RULES[0] else "")
        object.__setattr__(self, "label", self.label or title)

    def at(self, value: float) -> dict[str, dict[str, float]]:
        """The weight or the option tried, at a value."""
        kind = "weights" if self.tried in METHODS[self.method].terms else "settings"
        return {kind: {self.tried: value}}

    def strength(self, run: Run) -> float:
        """The value that a trial tried."""
        return float({**run.objective.settings, **dict(run.weights)}[self.tried])


def _arm(name: str, *tables: Any) -> Arm:
    """An arm as tables describe it, the later ones in place of the earlier."""
    given = _merged({"method": name}, *(_table(table, f"arm '{name}'", (*_ARM, *_FLAT)) for table in tables))
    with within(f"arm '{name}'"):
        own = {key: given[key] for key in _ARM if key in given}
        own["takes"] = Option("from", None, str).checked(own.pop("from", ""))
        if (tries := own.pop("try", None)) is not None:
            if len(_table(tries, "try")) != 1:
                raise ValueError(f"try must name one weight or option, got {tries!r}")
            [(own["tried"], values)] = tries.items()
            own["values"] = _list(values, f"try of {own['tried']}", int | float)
        elif "rule" in own:
            raise ValueError("rule has no effect, since it tries nothing")
        return Arm(name, settings={key: value for key, value in given.items() if key in _FLAT}, **own)


def _doses(name: str, given: Any, arms: Mapping[str, Arm]) -> Iterator[Arm]:
    """An arm for every value of a list."""
    own = {"arm": name, **_table(given, f"doses '{name}'", ("arm", "try", "seeds", "later"))}
    with within(f"doses '{name}'"):
        base = own.pop("arm")
        OneOf(list(arms)).check("arm", base)
        listed = _arm(name, {**own, "method": arms[base].method})
        if not listed.values:
            raise ValueError("they need a try list")
    for value in listed.values:
        yield replace(
            arms[base],
            name=f"{name} {value:g}",
            label=f"{arms[base].label}, {listed.tried} {value:g}",
            settings=_merged(arms[base].settings, listed.at(value)),
            tried="",
            values=(),
            takes=base if arms[base].tried not in ("", listed.tried) else arms[base].takes,
            seeds=listed.seeds,
            later=listed.later,
        )


@dataclass(frozen=True)
class Plan:
    """An experiment, as a file describes it; `at` gives it in one of its sizes."""

    name: str
    title: str
    shared: Table
    choice: Table
    arms: Mapping[str, Table]
    doses: Mapping[str, Table]
    presets: Mapping[str, Table]
    claims: tuple[Claim, ...]

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a file; what is unknown or impossible, in any preset, is a ValueError that names the file."""
        with within(str(path)):
            return cls.of(Path(path).stem, tomllib.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def of(cls, name: str, given: Table) -> Plan:
        """The plan that a dictionary describes, as `read` finds it in a file."""
        known: dict[str, Any] = {"shared": _FLAT, "choice": _CHOICE, "arms": None, "doses": None, "presets": None}
        _table(given, "a plan", ("title", *known, "claims"))
        parts = {n: _table(given.get(n, {}), f"[{n}]", k) for n, k in known.items()}
        if missing := [part for part in ("arms", "presets") if not parts[part]]:
            raise ValueError(f"a plan needs [{missing[0]}.NAME]")
        with within("[choice]"):
            rules = _typed(parts["choice"], _CHOICE)
            if ("rates" in rules) != ("images" in rules):
                raise ValueError("it needs both rates and images, the number of validation images, or neither")
            if "rates" in rules:
                rules["rates"] = _list(rules["rates"], "rates", float)
        if not isinstance(listed := given.get("claims", []), list | tuple):
            raise ValueError(f"claims must be tables with the heading [[claims]], got {listed!r}")
        claims = tuple(map(_claim, listed))
        if twice := [name for name, times in Counter(claim.name for claim in claims).items() if times > 1]:
            raise ValueError(f"two claims have the name '{twice[0]}'")
        title = Option("title", None, str).checked(given.get("title", name))
        plan = cls(name, title, **{**parts, "choice": rules}, claims=claims)
        for preset in plan.presets:
            plan.at(preset)
        return plan

    def at(self, preset: str, **over: Any) -> Course:
        """The plan at a preset; `over` are flat settings, or ``seeds``, in place of its own.

        Options of data, or of a model, go with what they are options of.
        """
        OneOf(list(self.presets)).check("preset", preset)
        own = _table(self.presets[preset], place := f"preset '{preset}'")
        named = {**self.shared, **own}
        gone = [f"{name}_options" for name in ("data", "model") if over.get(name, named.get(name)) != named.get(name)]
        given = _table({**{n: v for n, v in own.items() if n not in gone}, **over}, place, (*_PRESET, *_FLAT))
        with within(place):
            own = _typed(given, _PRESET)
            arms = self._arms(_table(own.get("arms", {}), "arms", self.arms))
            for claim in self.claims:
                with within(f"claim '{claim.name}'"):
                    OneOf(list(arms)).check("arm", (claim.arm, claim.against))
            only = _list(own.get("only", list(arms)), "only", str)
            OneOf(list(arms)).check("arm in only", only)
            course = Course(
                plan=self,
                preset=preset,
                shared=_merged(
                    {n: v for n, v in self.shared.items() if n not in gone},
                    {n: v for n, v in given.items() if n in _FLAT},
                ),
                trial=_table(own.get("trial", {}), "trial", _FLAT),
                arms={n: arm for n, arm in arms.items() if n in only},
                seeds=own.get("seeds", 5),
                tries=own.get("tries"),
                amp=own.get("amp", False),
            )
            course.check(first=next(iter(arms)))
        return course

    def _arms(self, changes: Table) -> dict[str, Arm]:
        arms = {name: _arm(name, given, changes.get(name, {})) for name, given in self.arms.items()}
        for name, dose in self.doses.items():
            for arm in _doses(name, dose, arms):
                if arm.name in arms:
                    raise ValueError(f"doses '{name}': there is another arm '{arm.name}'")
                arms[arm.name] = arm
        return arms


def _claim(given: Any) -> Claim:
    names = [f.name for f in fields(Claim)]
    place = f"claim '{_table(given, 'a claim').get('name', '?')}'"
    _table(given, place, names)
    with within(place):
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"it lacks '{missing[0]}'")
        return Claim(**given)


@dataclass(frozen=True)
class State:
    """How far the choices of a plan have come."""

    trials: Mapping[str, tuple[Run, ...]]  #: What is to be tried, by arm, as far as it is known.
    chosen: Mapping[str, Run]  #: The trial that was chosen, of arms where that is known.
    lost: tuple[str, ...] = ()  #: Arms that will have no choice: all their trials broke down, or those of one before.


@dataclass(frozen=True)
class Course:
    """A plan at a preset: what is run, and in which order.

    What it is given as `accuracy` is a function of a run on validation images: the share of right answers, None if the
    run is not done, and minus infinity if it broke down.
    """

    plan: Plan
    preset: str
    shared: Table  #: Flat settings of every run.
    trial: Table  #: And of the trials alone.
    arms: Mapping[str, Arm]
    seeds: int
    tries: int | None
    amp: bool

    def check(self, first: str) -> None:
        """Raise ValueError if an arm cannot be run, whatever will be chosen, or a claim could never be told."""
        if first not in self.arms:
            raise ValueError(f"only must name the first arm, '{first}', which all prices refer to")
        if self.arms[first].tried:
            raise ValueError(f"the first arm, '{first}', must try nothing, since all prices refer to it")
        if self._rates and (own := [t for t in (self.shared, self.trial, self.arms[first].settings) if "lr" in t]):
            raise ValueError(f"lr = {own[0]['lr']} has no effect, since [choice] has rates")
        if objective := [name for name in ("weights", "settings") if name in self.trial]:
            raise ValueError(f"trial: {objective[0]} would be those of the final runs too; give them to the arms")
        costly = [arm.name for arm in self.arms.values() if arm.tried and arm.rule == RULES[0]]
        if costly and "price" not in self.plan.choice:
            raise ValueError(f"[choice] needs a price, for the strongest value of arm '{costly[0]}'")
        if self._seed < max(map(self.seeds_of, self.arms.values())):
            raise ValueError(f"the seed of [choice], {self._seed}, is one of the final runs too")
        before: dict[str, Arm] = {}
        for arm in self.arms.values():
            with within(f"arm '{arm.name}'"):
                if arm.takes:
                    OneOf(list(before)).check("earlier arm", arm.takes)
                    if before[arm.takes].later and not arm.later:
                        raise ValueError(f"it cannot be done before arm '{arm.takes}', from which it takes over")
                if twice := [other.name for other in before.values() if other.label == arm.label]:
                    raise ValueError(f"its label, '{arm.label}', is that of arm '{twice[0]}'; give it another")
            before[arm.name] = arm
        for claim in self.claims:
            if without := [name for name in (claim.arm, claim.against) if not self.seeds_of(self.arms[name])]:
                raise ValueError(f"claim '{claim.name}': arm '{without[0]}' has no seeds")
        for name, runs in self.possible().items():
            with within(f"arm '{name}'"):
                for run in runs:
                    self.run(self.arms[name], run, 0)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims about arms that the preset has."""
        return tuple(c for c in self.plan.claims if c.arm in self.arms and c.against in self.arms)

    @property
    def labels(self) -> dict[str, str]:
        """Label of each arm."""
        return {name: arm.label for name, arm in self.arms.items()}

    @property
    def reference(self) -> str:
        """The first arm."""
        return next(iter(self.arms))

    @property
    def _seed(self) -> int:
        return int(self.plan.choice.get("seed", 1000))

    @cached_property
    def _rates(self) -> tuple[float, ...]:
        return self._some(self.plan.choice.get("rates", ()))

    def _some(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """So many values around the middle."""
        start = max(0, (len(values) - (self.tries or len(values))) // 2)
        return values[start : start + (self.tries or len(values))]

    def _tried(self, arm: Arm) -> list[Table]:
        """What the trials of an arm differ in; nothing for an arm that has none."""
        if arm.name == self.reference:
            return [{"lr": rate} for rate in self._rates] or [{}]
        return [arm.at(value) for value in self._some(arm.values)]

    def _rate(self, run: Run | None) -> Table:
        """The learning rate that a run was tried with, if rates are tried at all; without a run, one of them."""
        return {"lr": run.schedule.lr if run else self._rates[0]} if self._rates else {}

    def _run(self, arm: Arm, taken: Run | None, below: Table, above: Table) -> Run:
        """A run of an arm, with what it takes over from another; `below` gives way to its own settings."""
        objective = {}
        if taken is not None:
            both = fitting(arm.method, dict(taken.weights), taken.objective.difference()[1])
            objective = dict(zip(("weights", "settings"), both, strict=True))
        run = Run.of(**{**_merged(self.shared, below, objective, arm.settings, above), "method": arm.method})
        return run if arm.length == 1 else run.but(epochs=max(1, round(arm.length * run.schedule.epochs)))

    def _trials(self, arm: Arm, taken: Run | None, rate: Table) -> tuple[Run, ...]:
        """The trials of an arm; of one that tries nothing, what would be its trial."""
        fixed = {"seed": self._seed, "evaluate_on": "val"}
        each = self._tried(arm) or [{}]
        return tuple(self._run(arm, taken, {**self.trial, **rate}, {**over, **fixed}) for over in each)

    def run(self, arm: Arm, chosen: Run, seed: int) -> Run:
        """The final run of an arm."""
        return self._run(arm, chosen, self._rate(chosen), {"seed": seed, "evaluate_on": "test"})

    def possible(self) -> dict[str, list[Run]]:
        """The trials of every arm, whatever will be chosen in the arms that it takes over from."""
        out: dict[str, list[Run]] = {}
        for arm in self.arms.values():
            taken = out[arm.takes] if arm.takes else [None]
            with within(f"arm '{arm.name}'"):
                out[arm.name] = [run for one in taken for run in self._trials(arm, one, self._rate(None))]
        return out

    def state(self, accuracy: Callable[[Run], float | None]) -> State:
        """What is to be tried, and what was chosen, as far as the trials that are done tell."""
        trials: dict[str, tuple[Run, ...]] = {}
        best: dict[str, Trial] = {}
        lost: list[str] = []
        for arm in self.arms.values():
            needs = {self.reference, arm.takes or self.reference} - {arm.name}
            if not needs <= best.keys():
                lost += [arm.name] if needs.intersection(lost) else []
                continue
            first, taken = best.get(self.reference), best.get(arm.takes)
            runs = self._trials(arm, taken and taken.run, self._rate(first and first.run))
            if not self._tried(arm):
                best[arm.name] = Trial(runs[0], math.nan)
                continue
            trials[arm.name] = runs
            done = [Trial(run, found) for run in runs if (found := accuracy(run)) is not None]
            if len(done) == len(runs):
                if all(trial.accuracy == -math.inf for trial in done):
                    lost.append(arm.name)
                else:
                    best[arm.name] = self._best(arm, done, first)
        return State(trials, {name: trial.run for name, trial in best.items()}, tuple(lost))

    def _best(self, arm: Arm, done: list[Trial], first: Trial | None) -> Trial:
        """The trial that is chosen; `first` is the choice of the first arm."""
        if first is None:
            return choice.smallest_rate(done, self.plan.choice["images"]) if self._rates else done[0]
        if arm.rule == RULES[0]:
            return choice.strongest(done, arm.strength, first.accuracy - self.plan.choice["price"])
        return choice.most_accurate(done)

    def final(self, state: State) -> Iterator[tuple[Arm, Run]]:
        """The runs for the test images, of arms with a choice, in order of value: the first seed of every arm first."""
        for later in (False, True):
            arms = [arm for arm in self.arms.values() if arm.later == later and arm.name in state.chosen]
            for seed in range(max(map(self.seeds_of, arms), default=0)):
                for arm in arms:
                    if seed < self.seeds_of(arm):
                        yield arm, self.run(arm, state.chosen[arm.name], seed)

    def seeds_of(self, arm: Arm) -> int:
        """How many seeds an arm has."""
        return self.seeds if arm.seeds is None else arm.seeds

    def count(self, state: State | None = None) -> int:
        """How many trials and final runs there are at most, or are not known yet at a state; equal ones count twice."""
        known = state or State({}, {})
        arms = [arm for arm in self.arms.values() if arm.name not in known.lost]
        trials = sum(len(self._tried(arm)) for arm in arms if arm.name not in known.trials)
        return trials + sum(self.seeds_of(arm) for arm in arms if arm.name not in known.chosen)
