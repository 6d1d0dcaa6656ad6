"""Plans: an experiment before it is run, read from a TOML file that is committed before its results.

A plan says what all runs share, which arms there are, which weights are tried and how one of them is chosen on
validation data, how many seeds, and what is claimed. A *preset* is a size of it: how much data, how long. What a plan
does not know is an error that names it. Tables of the file:

- ``title``; ``[shared]``: flat settings of every run (`sdecor.config.flat_fields`).
- ``[choice]``: ``seed`` of the trials, ``price`` (accuracy that the strongest weight may cost), ``rates`` (learning
  rates, tried with the first arm), ``images`` (how many validation images there are, for its standard error).
- ``[arms.NAME]``: ``method`` (by default NAME), ``label``, flat settings; ``try = {weight or option = [...]}``, with the
  ``rule`` ``strongest`` or ``most accurate``; ``from`` (an earlier arm whose weights and options are taken over);
  ``length`` (its epochs, as a multiple); ``seeds`` (0 for a choice that others take over), and ``later`` (after all
  seeds of the other arms).
- ``[doses.NAME]``: an ``arm``, its ``try`` list, each value of which is an arm of its own, and ``seeds``.
- ``[presets.NAME]``: ``seeds``, ``trial`` (settings of the trials alone), ``tries`` (so many values of each list, from
  its middle), ``only`` (these arms), ``amp``, ``arms`` (changes of arms), flat settings.
- ``[[claims]]``: see `Claim`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from sdecor import choice
from sdecor.choice import Trial
from sdecor.config import Run, fitting, flat_fields
from sdecor.registers import MEASURES, METHODS, Between, OneOf, Option, UnknownName

RULES = ("strongest", "most accurate")
DIRECTIONS = ("higher", "lower", "equal")
_OF_RECORD = ("accuracy", "grid_pointing_game", "correlation", "effective_rank", "participation_ratio", "condition_number")


def _only(given: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    names = list(known)
    if unknown := [name for name in given if name not in names]:
        raise UnknownName(f"unknown {what} '{unknown[0]}'; known: {', '.join(names)}")


def _as(kind: Any, name: str, value: Any) -> Any:
    return Option(name, None, kind).checked(value)


@dataclass(frozen=True)
class Claim:
    """What is claimed of two arms, and what decides it: see `sdecor.report.verdict`."""

    name: str  #: Short, for tables.
    text: str  #: In words.
    measure: str  #: Of a record.
    arm: str  #: Of the plan.
    against: str  #: Another one.
    direction: str  #: ``higher`` or ``lower`` in `arm`, or ``equal``.
    smallest: float  #: Smallest difference that matters, in units of the measure.

    def __post_init__(self) -> None:
        OneOf(DIRECTIONS).check("direction", self.direction)
        _as(Annotated[float, Between(0, ends=False)], "smallest", self.smallest)
        if self.measure not in MEASURES and not self.measure.startswith(_OF_RECORD):
            known = ", ".join((*MEASURES, *_OF_RECORD))
            raise UnknownName(f"unknown measure '{self.measure}'; known: {known}")


@dataclass(frozen=True)
class Arm:
    """One way to train in a plan."""

    name: str
    method: str  #: Of the register.
    label: str  #: For tables and figures.
    settings: Mapping[str, Any] = field(default_factory=dict)  #: Flat settings over the shared ones.
    tried: str = ""  #: Name of the weight or option that is tried.
    values: tuple[float, ...] = ()  #: The values tried.
    rule: str = "strongest"  #: Which chooses among them.
    takes: str = ""  #: Arm whose weights and options are taken over.
    length: float = 1.0  #: Epochs, as a multiple of the preset's.
    seeds: int | None = None  #: In place of the preset's.
    later: bool = False  #: After all seeds of the arms that are not.

    def at(self, value: float) -> dict[str, dict[str, float]]:
        """The weight or the option tried, at a value."""
        kind = "weights" if self.tried in METHODS[self.method].terms else "settings"
        return {kind: {self.tried: value}}

    def strength(self, run: Run) -> float:
        """The value that a trial tried."""
        return float({**run.objective.settings, **dict(run.weights)}[self.tried])


def _arm(name: str, given: Mapping[str, Any], flat: Iterable[str]) -> Arm:
    own = ("method", "label", "try", "rule", "from", "length", "seeds", "later")
    _only(given, (*own, *flat), f"key of arm '{name}'")
    method = given.get("method", name)
    entry = METHODS[method]
    tries: Mapping[str, Any] = given.get("try", {})
    if len(tries) > 1:
        raise ValueError(f"arm '{name}' tries {', '.join(tries)}; one weight or option at a time")
    (tried, values), *_ = [*tries.items(), ("", ())]
    probe = Arm(name, method, "", tried=tried)
    for value in _as(tuple[float, ...], f"try of arm '{name}'", list(values)):
        Run.of(method=method, **probe.at(value))  # an unknown or impossible one is named here
    rule = given.get("rule", RULES[0])
    OneOf(RULES).check("rule", rule)
    if "rule" in given and not tried:
        raise ValueError(f"rule has no effect in arm '{name}', which tries nothing")
    title = entry.title if rule == RULES[0] else f"{entry.title}, {rule}"
    return Arm(
        name=name,
        method=method,
        label=_as(str, "label", given.get("label", title)),
        settings={key: value for key, value in given.items() if key not in own},
        tried=tried,
        values=tuple(map(float, values)),
        rule=rule,
        takes=_as(str, "from", given.get("from", "")),
        length=_as(Annotated[float, Between(0, ends=False)], "length", given.get("length", 1.0)),
        seeds=_as(Annotated[int | None, Between(0)], "seeds", given.get("seeds")),
        later=_as(bool, "later", given.get("later", False)),
    )


def _doses(name: str, given: Mapping[str, Any], arms: Mapping[str, Arm]) -> Iterator[Arm]:
    """An arm for every value of a list."""
    _only(given, ("arm", "try", "seeds", "later"), f"key of doses '{name}'")
    base = given.get("arm", name)
    OneOf(arms).check("arm", base)
    of = arms[base]
    listed = _arm(name, {"method": of.method, **{key: value for key, value in given.items() if key != "arm"}}, ())
    for value in listed.values:
        yield replace(
            of,
            name=f"{name} {value:g}",
            label=f"{of.label}, {listed.tried} {value:g}",
            settings={**of.settings, **listed.at(value)},
            **{"tried": "", "values": (), "seeds": listed.seeds, "later": listed.later},
        )


@dataclass(frozen=True)
class Plan:
    """An experiment, as a file describes it; `at` gives it in one of its sizes."""

    name: str
    title: str
    shared: Mapping[str, Any]
    choice: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    doses: Mapping[str, Mapping[str, Any]]
    presets: Mapping[str, Mapping[str, Any]]
    claims: tuple[Claim, ...]

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a file; what is unknown or impossible, in any preset, is a ValueError that names the file."""
        path = Path(path)
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        try:
            plan = cls.of(path.stem, given)
        except ValueError as error:
            raise type(error)(f"{path}: {error}") from error
        return plan

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any]) -> Plan:
        """The plan that a dictionary describes, as `read` finds it in a file."""
        parts = [f.name for f in fields(cls) if f.name != "name"]
        _only(given, parts, "table")
        if missing := [part for part in ("shared", "choice", "arms", "presets") if not given.get(part)]:
            raise ValueError(f"a plan needs [{missing[0]}]")
        _only(given["choice"], ("seed", "price", "rates", "images"), "key of choice")
        claims = []
        for one in given.get("claims", ()):
            _only(one, (f.name for f in fields(Claim)), "key of a claim")
            if missing := [f.name for f in fields(Claim) if f.name not in one]:
                raise ValueError(f"claim '{one.get('name', '?')}' lacks '{missing[0]}'")
            claims.append(Claim(**one))
        others = {part: given.get(part, {}) for part in ("shared", "choice", "arms", "doses", "presets")}
        plan = cls(name, given.get("title", name), **others, claims=tuple(claims))
        for preset in plan.presets:
            plan.at(preset)
        return plan

    def at(self, preset: str, **over: Any) -> Course:
        """The plan at a preset; `over` are flat settings, or ``seeds``, in place of its own."""
        OneOf(self.presets).check("preset", preset)
        flat = [name for name in flat_fields() if name not in ("method", "seed", "evaluate_on", "fingerprint")]
        given = {**self.presets[preset], **over}
        own = ("seeds", "trial", "tries", "only", "amp", "arms")
        _only(given, (*own, *flat), f"key of preset '{preset}'")
        _only(self.shared, flat, "key of shared")
        _only(given.get("trial", {}), flat, f"key of trial in preset '{preset}'")
        _only(given.get("arms", {}), self.arms, f"arm in preset '{preset}'")
        arms = {n: _arm(n, {**a, **given.get("arms", {}).get(n, {})}, flat) for n, a in self.arms.items()}
        for n, dose in self.doses.items():
            for arm in _doses(n, dose, arms):
                if arm.name in arms:
                    raise ValueError(f"arm '{arm.name}' is there already")
                arms[arm.name] = arm
        wanted = given.get("only", list(arms))
        _only(dict.fromkeys(wanted), arms, f"arm in preset '{preset}'")
        course = Course(
            plan=self,
            preset=preset,
            shared={**self.shared, **{n: v for n, v in given.items() if n not in own}},
            trial=given.get("trial", {}),
            arms={n: arm for n, arm in arms.items() if n in wanted},
            seeds=_as(Annotated[int, Between(1)], "seeds", given.get("seeds", 5)),
            tries=_as(Annotated[int | None, Between(1)], "tries", given.get("tries")),
            amp=_as(bool, "amp", given.get("amp", False)),
        )
        course.check()
        return course


@dataclass(frozen=True)
class State:
    """How far the choices of a plan have come."""

    trials: Mapping[str, tuple[Run, ...]]  #: What is to be tried, by arm, as far as it is known.
    chosen: Mapping[str, Run]  #: The trial that was chosen, of arms where that is known.


@dataclass(frozen=True)
class Course:
    """A plan at a preset: what is run, and in which order.

    What it is given as `accuracy` is a function of a run on validation images: the share of right answers, None if the
    run is not done, and minus infinity if it broke down.
    """

    plan: Plan
    preset: str
    shared: Mapping[str, Any]  #: Flat settings of every run.
    trial: Mapping[str, Any]  #: And of the trials alone.
    arms: Mapping[str, Arm]
    seeds: int
    tries: int | None
    amp: bool

    def check(self) -> None:
        """Raise ValueError if an arm is impossible, takes over from none before it, or a claim is about none."""
        before: list[str] = []
        for arm in self.arms.values():
            if arm.takes:
                OneOf(before).check(f"arm that '{arm.name}' takes its choice from", arm.takes)
            self._of(arm, {})
            before.append(arm.name)
        if self.arms[self.reference].tried:
            raise ValueError(f"the first arm is the reference for all prices; '{self.reference}' must try nothing")
        if self._rates and not isinstance(self.plan.choice.get("images"), int):
            raise ValueError("[choice] needs images, the number of validation images, to choose among rates")
        for claim in self.plan.claims:
            for name in (claim.arm, claim.against):
                if name not in (*self.arms, *self.plan.arms):
                    raise UnknownName(f"claim '{claim.name}' is about the unknown arm '{name}'")

    @property
    def reference(self) -> str:
        """The first arm."""
        return next(iter(self.arms))

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims about arms that the preset has."""
        return tuple(c for c in self.plan.claims if c.arm in self.arms and c.against in self.arms)

    @cached_property
    def _rates(self) -> tuple[float, ...]:
        return self._some(tuple(self.plan.choice.get("rates", ())))

    def _some(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """So many values around the middle."""
        if self.tries is None or self.tries >= len(values):
            return values
        start = (len(values) - self.tries) // 2
        return values[start : start + self.tries]

    def _of(self, arm: Arm, over: Mapping[str, Any], taken: Run | None = None, trial: bool = False) -> Run:
        flat = {**self.shared, **(self.trial if trial else {}), **arm.settings, **over}
        own = [dict(pairs) for pairs in (flat.pop("weights", {}), flat.pop("settings", {}))]
        weights, settings = own
        if taken is not None:
            from_weights, from_settings = fitting(arm.method, dict(taken.weights), taken.objective.difference()[1])
            weights, settings = {**from_weights, **weights}, {**from_settings, **settings}
        weights, settings = fitting(arm.method, weights, settings) if taken is not None else (weights, settings)
        epochs = max(1, round(arm.length * Run.of(**flat).schedule.epochs))
        return Run.of(**{**flat, "method": arm.method, "epochs": epochs, "weights": weights, "settings": settings})

    def state(self, accuracy: Callable[[Run], float | None]) -> State:
        """What is to be tried, and what was chosen, as far as the trials that are done tell."""
        trials: dict[str, tuple[Run, ...]] = {}
        chosen: dict[str, Run] = {}
        fixed: dict[str, Any] = {"seed": self.plan.choice.get("seed", 1000), "evaluate_on": "val"}

        def known(runs: Iterable[Run]) -> list[Trial] | None:
            found = [(run, accuracy(run)) for run in runs]
            return None if any(a is None for _, a in found) else [Trial(run, float(a or 0)) for run, a in found]

        first = self.arms[self.reference]
        rates: list[dict[str, Any]] = [{"lr": rate} for rate in self._rates] or [{}]
        trials[first.name] = tuple(self._of(first, {**fixed, **rate}, trial=True) for rate in rates)
        if (tried := known(trials[first.name])) is None:
            return State(trials, chosen)
        best = choice.smallest_rate(tried, self.plan.choice["images"]) if self._rates else choice.most_accurate(tried)
        chosen[first.name] = best.run
        fixed["lr"], floor = best.run.schedule.lr, best.accuracy - self.plan.choice.get("price", 0.0)
        for arm in self.arms.values():
            if arm.name == first.name or (arm.takes and arm.takes not in chosen):
                continue
            taken = chosen[arm.takes] if arm.takes else None
            if not arm.tried:
                chosen[arm.name] = self._of(arm, fixed, taken, trial=True)
                continue
            each = [{**fixed, **arm.at(value)} for value in self._some(arm.values)]
            trials[arm.name] = tuple(self._of(arm, over, taken, trial=True) for over in each)
            if (tried := known(trials[arm.name])) is not None:
                strongest = arm.rule == RULES[0]
                found = choice.strongest(tried, arm.strength, floor) if strongest else choice.most_accurate(tried)
                chosen[arm.name] = found.run
        return State(trials, chosen)

    def final(self, state: State) -> Iterator[tuple[Arm, Run]]:
        """The runs for the test images, of arms that are chosen, in order of value: the first seed of every arm first."""
        for later in (False, True):
            arms = [arm for arm in self.arms.values() if arm.later == later]
            for seed in range(max(map(self.seeds_of, arms), default=0)):
                for arm in arms:
                    if seed < self.seeds_of(arm) and arm.name in state.chosen:
                        yield arm, self.run(arm, state.chosen[arm.name], seed)

    def seeds_of(self, arm: Arm) -> int:
        """How many seeds an arm has."""
        return self.seeds if arm.seeds is None else arm.seeds

    def run(self, arm: Arm, chosen: Run, seed: int) -> Run:
        """The final run of an arm."""
        return self._of(arm, {"seed": seed, "evaluate_on": "test", "lr": chosen.schedule.lr}, taken=chosen)

    def count(self) -> int:
        """How many trials and final runs there are at most; equal ones count twice."""
        tries = sum(len(self._some(arm.values)) for arm in self.arms.values()) + max(len(self._rates), 1)
        return tries + sum(map(self.seeds_of, self.arms.values()))
