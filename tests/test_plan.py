"""Plans: what is unknown or impossible is named when they are read; the plans of the book are as they were."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CLAIM

from sdecor.plan import Arm, Claim, Plan
from sdecor.planned import accuracy, work
from sdecor.registers import METHODS, UnknownName
from sdecor.store import Store

#: Everything that a plan can say.
WHOLE: dict[str, Any] = {
    "title": "Whole",
    "shared": {"data": "digits", "limit": 96, "settings": {}, "batch_size": 48},
    "choice": {"seed": 1000, "price": 0.02, "rates": [0.001, 0.002, 0.004], "images": 100},
    "arms": {
        "standard": {"length": 1.5},
        "decorrelation": {"try": {"decorrelation": [0.3, 1, 3]}, "settings": {"penalty": "zca"}},
        "consistency-absolute": {"try": {"consistency": [0.1, 0.3]}, "seeds": 0, "rule": "most accurate"},
        "mine": {
            "method": "saliencydecor-absolute",
            "label": "Mine",
            "from": "consistency-absolute",
            "try": {"decorrelation": [0.3, 1.0]},
            "later": True,
        },
    },
    "doses": {"decorrelation": {"try": {"decorrelation": [0.5, 2]}, "seeds": 1, "later": True}},
    "presets": {
        "small": {"seeds": 2, "trial": {"epochs": 2}, "tries": 2, "amp": True, "arms": {"standard": {"length": 2}}},
        "large": {"epochs": 4, "only": ["standard", "decorrelation", "consistency-absolute", "mine"]},
    },
    "claims": [CLAIM],
}


def changed(path: str, to: Any = None) -> dict[str, Any]:
    """The whole plan with a value put in place of another, named like ``arms/standard``; None takes the key away."""
    out = copy.deepcopy(WHOLE)
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("/"))
    at: Any = out
    for step in steps:
        at = at.setdefault(step, {}) if isinstance(at, dict) else at[step]
    if to is None:
        del at[last]
    elif isinstance(at, list) and last == len(at):
        at.append(to)
    else:
        at[last] = to
    return out


def refused(plan: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        Plan.of("whole", plan)
    return str(error.value)


def leaves(at: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything in the plan that is no table."""
    for key, value in at.items() if isinstance(at, dict) else enumerate(at):
        if isinstance(value, dict) or (value and isinstance(value, list) and isinstance(value[0], dict)):
            yield from leaves(value, f"{above}{key}/")
        else:
            yield f"{above}{key}", value


LEAVES = dict(leaves(WHOLE))
#: Path of every key, but for the names of presets, which are free.
KEYS = sorted({"/".join(path.split("/")[: i + 1]) for path in [*LEAVES, "shared/settings"] for i in range(4)})
KEYS = [path for path in KEYS if not path.endswith("/0") and path not in ("presets/small", "presets/large")]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_whole_plan_is_a_plan() -> None:
    plan = Plan.of("whole", WHOLE)
    assert (plan.name, plan.title, [c.name for c in plan.claims]) == ("whole", "Whole", ["sharper"])
    small, large = plan.at("small"), plan.at("large")
    doses = ["decorrelation 0.5", "decorrelation 2"]
    assert list(small.arms) == ["standard", "decorrelation", "consistency-absolute", "mine", *doses]
    assert list(large.arms) == ["standard", "decorrelation", "consistency-absolute", "mine"]
    assert (small.seeds, large.seeds, small.tries, large.tries, small.amp, large.amp) == (2, 5, 2, None, True, False)
    assert small.arms["standard"].length == 2 and large.arms["standard"].length == 1.5
    assert small.labels == {
        "standard": "standard, 2 times as long",
        "decorrelation": "decorrelation only",
        "consistency-absolute": "consistency, absolute mask, most accurate",
        "mine": "Mine",
        "decorrelation 0.5": "decorrelation only, decorrelation 0.5",
        "decorrelation 2": "decorrelation only, decorrelation 2",
    }


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(KEYS), place=st.integers(0, 30), letter=st.sampled_from(["", *"axyz"]))
def test_a_key_that_is_not_spelt_right_is_refused(path: str, place: int, letter: str) -> None:
    """A letter is put in, or without one taken away, somewhere in a key."""
    *steps, key = path.split("/")
    place = place % (len(key) + 1 if letter else len(key))
    other = key[:place] + letter + key[place + (letter == "") :]
    plan = copy.deepcopy(WHOLE)
    at: Any = plan
    for step in steps:
        at = at[int(step) if step.isdigit() else step]
    at[other] = at.pop(key)
    said = refused(plan)
    if steps != ["arms"]:  # the name of an arm is free, and others than the arm may miss it
        assert f"'{other}'" in said or f"[{key}.NAME]" in said


@pytest.mark.parametrize("path", LEAVES)
def test_a_value_of_another_type_is_refused(path: str) -> None:
    for other in [{"a": 1}, [[]], 3 if isinstance(LEAVES[path], str | bool) else "x"]:
        refused(changed(path, other))


_METHODS = ", ".join(METHODS)
_ARMS = "standard, decorrelation, consistency-absolute, mine"
_DOSES = f"{_ARMS}, decorrelation 0.5, decorrelation 2"
_LATER = {"mine": {"later": False}, "consistency-absolute": {"later": True}}
IMPOSSIBLE: list[tuple[str, Any, str]] = [  # S and L are the presets
    ("more", 1, "a plan: unknown key 'more'; known: title, shared, choice, arms, doses, presets, claims"),
    ("arms", {}, "a plan needs [arms.NAME]"),
    ("presets", None, "a plan needs [presets.NAME]"),
    ("title", 3, "title must be of type str, got 3 (int)"),
    ("choice/prize", 1, "[choice]: unknown key 'prize'; known: seed, price, rates, images"),
    ("choice/price", 1.5, "[choice]: price must be from 0 to 1, got 1.5"),
    ("choice/price", None, "S: [choice] needs a price, for the strongest value of arm 'decorrelation'"),
    ("choice/rates", None, "[choice]: it needs both rates and images, the number of validation images, or neither"),
    ("choice/rates", [], "[choice]: rates must be a list that is not empty, got []"),
    ("choice/rates", [-1], "S: arm 'standard': lr must be finite and greater than 0, got -1.0"),
    ("choice/images", True, "[choice]: images must be of type int, got True (bool)"),
    ("choice/seed", 1, "S: the seed of [choice], 1, is one of the final runs too"),
    ("shared", 3, "[shared] must be a table, got 3"),
    ("shared/lr", 0.1, "S: lr = 0.1 has no effect, since [choice] has rates"),
    ("shared/seed", 1, "[shared]: unknown key 'seed'; known: data, limit, "),
    ("shared/limit", 0, "[shared]: limit must be at least 1, got 0"),
    ("shared/data", "cats", "S: arm 'standard': unknown data set 'cats'; known: mnist, "),
    ("shared/weights", "a", "[shared]: weights must be names with values, such as {'a': 1}, got 'a'"),
    ("arms/standard", 3, "S: arm 'standard' must be a table, got 3"),
    ("arms/standard/try", {"classification": [1]}, "S: the first arm, 'standard', must try nothing, since all prices"),
    ("arms/standard/rule", "strongest", "S: arm 'standard': rule has no effect, since it tries nothing"),
    ("arms/standard/from", "mine", "S: arm 'standard': unknown earlier arm 'mine'; known: "),
    ("arms/noize", {}, f"S: arm 'noize': unknown method 'noize'; known: {_METHODS}"),
    ("arms/decorrelation/try", {}, "S: arm 'decorrelation': try must name one weight or option, got {}"),
    (
        "arms/decorrelation/try",
        {"decorelation": [1]},
        "S: arm 'decorrelation': unknown weight or option 'decorelation' to try; "
        "known: classification, decorrelation, penalty, group_size, layers, place",
    ),
    (
        "arms/decorrelation/try/decorrelation",
        [],
        "S: arm 'decorrelation': try of decorrelation must be a list that is not empty, got []",
    ),
    (
        "arms/decorrelation/try/decorrelation",
        [1, 1.0],
        "S: arm 'decorrelation': try of decorrelation has a value twice: [1, 1.0]",
    ),
    (
        "arms/decorrelation/try/decorrelation",
        [1, -1],
        "S: arm 'decorrelation': weight of 'decorrelation' must be finite and at least 0, got -1.0",
    ),
    (
        "arms/decorrelation/try",
        {"group_size": [0.5]},
        "S: arm 'decorrelation': group_size must be of type int, got 0.5",
    ),
    (
        "arms/decorrelation/settings/penalty",
        "a",
        "S: arm 'decorrelation': unknown penalty 'a'; known: correlation, zca",
    ),
    (
        "arms/decorrelation/settings/fraction",
        0.1,
        "S: arm 'decorrelation': method 'decorrelation' has no setting 'fraction'; it has: ",
    ),
    (
        "arms/decorrelation/weights",
        {"decorrelation": 1},
        "S: arm 'decorrelation': decorrelation is tried, so a value of its own has no effect",
    ),
    ("arms/decorrelation/rule", "best", "S: arm 'decorrelation': unknown rule 'best'; known: strongest, most accurate"),
    ("arms/decorrelation/seeds", -1, "S: arm 'decorrelation': seeds must be at least 0, got -1"),
    ("arms/decorrelation/length", 0, "S: arm 'decorrelation': length must be finite and greater than 0, got 0"),
    (
        "arms/mine/from",
        "none",
        "S: arm 'mine': unknown earlier arm 'none'; known: standard, decorrelation, consistency-absolute",
    ),
    (
        "arms/mine/from",
        "mine",
        "S: arm 'mine': unknown earlier arm 'mine'; known: standard, decorrelation, consistency-absolute",
    ),
    (
        "presets/small/arms",
        _LATER,
        "S: arm 'mine': it cannot be done before arm 'consistency-absolute', from which it takes over",
    ),
    (
        "arms/mine/label",
        "standard, 2 times as long",
        "S: arm 'mine': its label, 'standard, 2 times as long', is that of arm 'standard'; give it another",
    ),
    ("arms/mine/settings", {"fill_value": 0.5}, "S: arm 'mine': fill_value has no effect with fill='uniform'"),
    ("doses/decorrelation/try", None, "S: doses 'decorrelation': they need a try list"),
    ("doses/decorrelation/arm", "none", f"S: doses 'decorrelation': unknown arm 'none'; known: {_ARMS}"),
    ("arms/decorrelation 2", {"method": "noise"}, "S: doses 'decorrelation': there is another arm 'decorrelation 2'"),
    ("presets/small/seeds", 0, "S: seeds must be at least 1, got 0"),
    ("presets/small/tries", 0, "S: tries must be at least 1, got 0"),
    ("presets/small/trial", {"epochs": 0}, "S: trial: epochs must be at least 1, got 0"),
    ("presets/small/trial", {"weights": {"classification": 2}}, "S: trial: weights would be those of the final runs"),
    ("presets/small/trial", {"settings": {"fraction": 0.3}}, "S: trial: settings would be those of the final runs"),
    ("presets/small/trial", {"seeds": 1}, "S: trial: unknown key 'seeds'; known: data, "),
    ("presets/small/arms", {"none": {}}, f"S: arms: unknown key 'none'; known: {_ARMS}"),
    ("presets/small/arms", {"mine": {"seed": 1}}, "S: arm 'mine': unknown key 'seed'; known: method, "),
    ("presets/large/only", ["standard", "none"], f"L: unknown arm in only 'none'; known: {_DOSES}"),
    ("presets/large/only", "standard", "L: only must be a list that is not empty, got 'standard'"),
    ("presets/large/only", ["decorrelation"], "L: only must name the first arm, 'standard', which all prices refer to"),
    (
        "presets/large/only",
        ["standard", "mine"],
        "L: arm 'mine': unknown earlier arm 'consistency-absolute'; known: standard",
    ),
    ("presets/large/model", "lenot", "L: arm 'standard': unknown model 'lenot'; known: "),
    (
        "presets/large/model_options",
        {"width": 3},
        "L: arm 'standard': model 'lenet' has no option 'width'; it has: none",
    ),
    ("claims/0/arm", "none", f"S: claim 'sharper': unknown arm 'none'; known: {_DOSES}"),
    ("claims/0/against", "mine", "claim 'sharper': it sets arm 'mine' against itself"),
    ("claims/0/against", "consistency-absolute", "S: claim 'sharper': arm 'consistency-absolute' has no seeds"),
    ("claims/0/text", None, "claim 'sharper': it lacks 'text'"),
    ("claims/0/measure", "ginny", "claim 'sharper': unknown measure 'ginny'; records hold: accuracy, "),
    ("claims/0/measure", "correlationx", "claim 'sharper': unknown measure 'correlationx'; records hold: accuracy, "),
    ("claims/0/direction", "up", "claim 'sharper': unknown direction 'up'; known: higher, lower, equal"),
    ("claims/0/smallest", 0, "claim 'sharper': smallest must be finite and greater than 0, got 0.0"),
    ("claims/1", CLAIM, "two claims have the name 'sharper'"),
    ("claims", CLAIM, "claims must be tables with the heading [[claims]], got {"),
    ("claims/0", 3, "a claim must be a table, got 3"),
]


@pytest.mark.parametrize(("path", "value", "message"), IMPOSSIBLE, ids=[f"{p} {v}"[:60] for p, v, _ in IMPOSSIBLE])
def test_what_is_impossible_is_named(path: str, value: Any, message: str) -> None:
    presets = {"S": "preset 'small'", "L": "preset 'large'"}
    place, _, rest = message.partition(":")
    said = refused(changed(path, value))
    assert said.startswith(f"{presets.get(place, place)}:{rest}" if rest else message), said


def test_what_only_some_choices_make_impossible_is_named_too() -> None:
    """The arm that is chosen from may bring along an option that the other cannot have."""
    arms = {
        "standard": {},
        "a": {"method": "consistency-absolute", "settings": {"fill": "constant", "fill_value": 0.5}},
    }
    arms["b"] = {"method": "saliencydecor-absolute", "from": "a", "settings": {"fill": "mean"}}
    message = "preset 'one': arm 'b': fill_value has no effect with fill='mean'"
    assert refused({"arms": arms, "presets": {"one": {}}}) == message


def test_an_error_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, said in (
        ("title = 'a'\n[arms.x\n", r"Expected '\]' at the end of a table declaration \(at line 2, column 8\)"),
        ("[arms.x]\n[arms.x]\n", r"Cannot declare \('arms', 'x'\) twice \(at line 2, column 8\)"),
        ("[arms.x]\nlr = 1\nlr = 2\n", r"Cannot overwrite a value \(at line 3, column 7\)"),
        ("[arms.x]\n", r"a plan needs \[presets.NAME\]"),
        ("[arms.x]\n[presets.one]\n", f"preset 'one': arm 'x': unknown method 'x'; known: {_METHODS}"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path}: {said}$"):
            Plan.read(path)
    path.write_bytes(b"title = '\xff'")
    with pytest.raises(ValueError, match=f"^{path}: 'utf-8' codec can't decode"):
        Plan.read(path)
    with pytest.raises(FileNotFoundError, match="none.toml"):
        Plan.read(tmp_path / "none.toml")
    path.write_text("[arms.standard]\n[presets.one]\n")
    plan = Plan.read(path)
    assert (plan.name, plan.title, plan.claims) == ("mine", "mine", ())
    with pytest.raises(UnknownName, match="^unknown preset 'two'; known: one$"):
        plan.at("two")
    for over, said in (
        ({"epoch": 3}, "unknown key 'epoch'; known: "),
        ({"seeds": -1}, "seeds must be at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^preset 'one': {said}"):
            plan.at("one", **over)


def test_arms_and_claims_check_themselves() -> None:
    with pytest.raises(ValueError, match="^seeds must be at least 0, got -1$"):
        Arm("a", "standard", seeds=-1)
    with pytest.raises(UnknownName, match="^unknown measure ''; records hold: "):
        Claim(**{**CLAIM, "measure": ""})
    assert Claim(**{**CLAIM, "measure": "correlation_conv1", "smallest": 1}).smallest == 1.0


# --- the plans of the book ------------------------------------------------------------------------------------------

PLANS = sorted((Path(__file__).parent.parent / "book" / "experiments").glob("*.toml"))
_DOSED = ("decorrelation", "decorrelation-zca", "decorrelation-after")
#: Arms of cifar10.toml of which there were records when this was written, and a hash of their runs.
ARMS = [f"{arm} {dose}" for arm in _DOSED for dose in (0.1, 0.3, 1, 3, 10)]
ARMS += """standard standard-long decorrelation decorrelation-zca decorrelation-after zca-in-training whitening-layer
consistency-absolute consistency-signed consistency-random noise saliencydecor-absolute saliencydecor-signed
saliencydecor-zca gradient-penalty adversarial consistency-absolute-accurate consistency-signed-accurate
saliencydecor-absolute-accurate saliencydecor-signed-accurate saliencydecor-zca-accurate gradient-penalty-accurate
adversarial-accurate""".split()
RUNS = {"cpu": "702e637573b96632", "gpu": "5fb4c071aaec0e7f"}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_of_the_book_can_be_read(path: Path) -> None:
    assert {"quick", "cpu"} <= Plan.read(path).presets.keys()


@pytest.mark.parametrize("preset", RUNS)
def test_the_runs_of_cifar10_stay_what_they_are(root: Path, preset: str) -> None:
    """Records are found by them."""
    one = Plan.read(root / "book/experiments/cifar10.toml").at(preset)
    state = one.state(lambda run: 0.5)
    trials = [f"{arm} {run.key}" for arm, runs in state.trials.items() for run in runs]
    finals = [f"{arm.name} {run.key}" for arm, run in one.final(state)]
    own = sorted(line for line in (*trials, *finals) if line.rpartition(" ")[0] in ARMS)
    assert hashlib.sha256("\n".join(own).encode()).hexdigest()[:16] == RUNS[preset]


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_every_record_of_the_book_is_one_that_its_plan_asks_for(root: Path, name: str) -> None:
    store, plan = Store(root / "data"), Plan.read(root / f"book/experiments/{name}.toml")
    asked = {todo.run.key for preset in plan.presets for todo, done in work(plan.at(preset), store) if done}
    folder = root / "data" / "results" / plan.shared["data"]
    assert asked and asked == {path.stem for path in folder.glob("*.json")}
    best = [preset for preset in plan.presets if plan.at(preset).state(accuracy(store)).chosen]
    assert best
