"""What is run of a plan follows from its arms, and from made-up accuracies of their trials."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CLAIM

from sdecor.config import Run
from sdecor.plan import Course, Plan, State

BROKEN = -math.inf


def course(preset: str = "one", plan: dict[str, Any] | None = None, **over: Any) -> Course:
    """A course of the plan below, some of whose tables may be replaced."""
    given = {
        "shared": {"data": "digits", "epochs": 4},
        "choice": {"price": 0.02},
        "arms": {
            "standard": {},
            "longer": {"method": "standard", "length": 2.5},
            "decorrelation": {"try": {"decorrelation": [0.3, 1, 3]}, "settings": {"penalty": "zca"}},
            "consistency": {"method": "consistency-absolute", "try": {"consistency": [0.1, 0.3]}, "seeds": 0},
            "both": {"method": "saliencydecor-absolute", "from": "consistency", "try": {"decorrelation": [0.3, 1]}},
        },
        "presets": {"one": {"seeds": 2}},
    }
    return Plan.of("made-up", {**given, **(plan or {})}).at(preset, **over)


def of_method(values: dict[str, Any]) -> Callable[[Run], float | None]:
    """Accuracies by method, and then by the weight or rate that is tried."""

    def found(run: Run) -> float | None:
        value = values.get(run.method)
        if not isinstance(value, dict):
            return value
        tried = {"standard": run.schedule.lr, "consistency-absolute": dict(run.weights).get("consistency")}
        return value.get(tried.get(run.method, dict(run.weights).get("decorrelation")))

    return found


def weights(run: Run) -> dict[str, float]:
    return {name: weight for name, weight in run.weights if name != "classification"}


def test_trials_become_known_step_by_step() -> None:
    one, known = course(), dict[str, Any]()
    state = one.state(of_method(known))
    assert list(state.trials) == ["standard"] and state.chosen == {} and state.lost == ()
    [trial] = state.trials["standard"]
    assert (trial.seed, trial.evaluate_on, trial.schedule.epochs) == (1000, "val", 4)
    known["standard"] = 0.9
    state = one.state(of_method(known))
    assert {arm: len(runs) for arm, runs in state.trials.items()} == {
        "standard": 1,
        "decorrelation": 3,
        "consistency": 2,
    }
    assert list(state.chosen) == ["standard", "longer"]  # which tries nothing
    known["decorrelation"] = {0.3: 0.95, 1.0: 0.89}  # the third is not done
    assert "decorrelation" not in one.state(of_method(known)).chosen
    known["decorrelation"][3.0] = 0.87
    state = one.state(of_method(known))
    assert weights(state.chosen["decorrelation"]) == {"decorrelation": 1.0}  # costs 0.01; 3 would cost 0.03
    assert dict(state.chosen["decorrelation"].settings)["penalty"] == "zca"
    known["consistency-absolute"] = {0.1: 0.9, 0.3: 0.5}
    state = one.state(of_method(known))
    assert [weights(run) for run in state.trials["both"]] == [
        {"consistency": 0.1, "decorrelation": 0.3},
        {"consistency": 0.1, "decorrelation": 1.0},
    ]
    known["saliencydecor-absolute"] = {0.3: 0.2, 1.0: 0.3}
    state = one.state(of_method(known))
    assert weights(state.chosen["both"]) == {"consistency": 0.1, "decorrelation": 1.0}  # none affordable: most accurate
    assert one.count(state) == 0 and one.count() == (1 + 3 + 2 + 2) + 4 * 2


def test_final_runs_have_what_was_chosen_and_come_in_order_of_value() -> None:
    arms = {
        "standard": {},
        "decorrelation": {"try": {"decorrelation": [0.3, 1, 3]}, "later": True},
        "noise": {"seeds": 3},
        "both": {"method": "saliencydecor-absolute", "from": "decorrelation", "later": True, "seeds": 1},
    }
    doses = {"decorrelation": {"try": {"decorrelation": [0.5]}, "seeds": 1}}
    one = course(plan={"arms": arms, "doses": doses})
    state = one.state(lambda run: 0.9)
    final = list(one.final(state))
    assert [(arm.name, run.seed) for arm, run in final] == [
        *[("standard", 0), ("noise", 0), ("decorrelation 0.5", 0), ("standard", 1), ("noise", 1), ("noise", 2)],
        *[("decorrelation", 0), ("both", 0), ("decorrelation", 1)],
    ]
    assert {run.evaluate_on for _, run in final} == {"test"}
    runs = {arm.name: run for arm, run in final}
    assert weights(runs["decorrelation"]) == {"decorrelation": 3.0}
    assert weights(runs["both"]) == {"consistency": 1.0, "decorrelation": 3.0}
    assert weights(runs["decorrelation 0.5"]) == {"decorrelation": 0.5}
    assert list(one.final(one.state(lambda run: None))) == []
    assert one.run(one.arms["noise"], state.chosen["noise"], 7).seed == 7


def test_the_most_accurate_and_the_price() -> None:
    arms = {
        "standard": {},
        "decorrelation": {"try": {"decorrelation": [0.3, 1, 3]}, "rule": "most accurate"},
        "other": {"method": "decorrelation", "try": {"decorrelation": [0.3, 1, 3]}, "label": "other"},
    }
    found = of_method({"standard": 0.9, "decorrelation": {0.3: 0.89, 1.0: 0.91, 3.0: 0.88}})
    for price, strongest in ((0.0, 1.0), (0.0199, 1.0), (0.02, 3.0), (1.0, 3.0)):
        state = course(plan={"arms": arms, "choice": {"price": price}}).state(found)
        assert weights(state.chosen["decorrelation"]) == {"decorrelation": 1.0}
        assert weights(state.chosen["other"]) == {"decorrelation": strongest}
    one = course(plan={"arms": {n: arms[n] for n in ("standard", "decorrelation")}, "choice": {"seed": 77}})
    assert {run.seed for runs in one.state(found).trials.values() for run in runs} == {77}  # and no price is needed


def test_trials_that_broke_down_are_left_out() -> None:
    one, known = course(), {"standard": 0.9, "decorrelation": {0.3: BROKEN, 1.0: 0.89, 3.0: BROKEN}}
    state = one.state(of_method(known))
    assert weights(state.chosen["decorrelation"]) == {"decorrelation": 1.0}
    known["consistency-absolute"] = BROKEN
    state = one.state(of_method(known))
    assert state.lost == ("consistency", "both") and "both" not in state.trials
    assert {arm.name for arm, _ in one.final(state)} == {"standard", "longer", "decorrelation"}
    assert one.count(state) == 0
    state = one.state(lambda run: BROKEN)
    assert state == State({"standard": state.trials["standard"]}, {}, tuple(one.arms))
    assert one.count(state) == 0


def test_the_rate_is_the_smallest_within_one_standard_error() -> None:
    rules = {"price": 0.02, "rates": [0.001, 0.002, 0.004, 0.008], "images": 100}
    arms = {"standard": {}, "decorrelation": {"try": {"decorrelation": [1]}}, "noise": {"lr": 0.5, "length": 0.5}}
    found = of_method({"standard": {0.001: 0.90, 0.002: 0.94, 0.004: 0.95, 0.008: BROKEN}, "decorrelation": 0.925})
    one = course(plan={"choice": rules, "arms": arms})
    state = one.state(found)
    assert [run.schedule.lr for run in state.trials["standard"]] == rules["rates"]
    assert state.chosen["standard"].schedule.lr == 0.002
    assert state.trials["decorrelation"][0].schedule.lr == 0.002
    final = {arm.name: run for arm, run in one.final(state)}
    assert {name: run.schedule.lr for name, run in final.items()} == {
        "standard": 0.002,
        "decorrelation": 0.002,
        "noise": 0.5,
    }
    assert final["noise"].schedule.epochs == 2
    assert one.count() == 4 + 1 + 3 * 2
    one = course(plan={"choice": {**rules, "images": 10**6}, "arms": arms})
    assert one.state(found).chosen["standard"].schedule.lr == 0.004
    one = course(plan={"choice": rules, "arms": arms}, tries=2)
    assert [run.schedule.lr for run in one.state(found).trials["standard"]] == [0.002, 0.004]


def test_weights_and_options_meet_one_by_one_in_a_preset_too() -> None:
    arms = {
        "standard": {},
        "saliencydecor-absolute": {"weights": {"decorrelation": 7}, "settings": {"fill": "mean"}},
    }
    change = {"weights": {"consistency": 5}, "settings": {"fraction": 0.25}}
    one = course(plan={"arms": arms, "presets": {"one": {"arms": {"saliencydecor-absolute": change}}}})
    _, final = [run for _, run in one.final(one.state(lambda run: 0.9))][:2]
    assert weights(final) == {"consistency": 5.0, "decorrelation": 7.0}
    assert {n: dict(final.settings)[n] for n in ("fill", "fraction")} == {"fill": "mean", "fraction": 0.25}


def test_doses_of_an_arm_that_tries_something_else() -> None:
    """What was chosen for the arm holds for its doses."""
    arms = {"standard": {}, "saliencydecor-absolute": {"try": {"consistency": [7]}}}
    doses = {"saliencydecor-absolute": {"try": {"decorrelation": [0.5, 2]}, "seeds": 1}}
    one = course(plan={"arms": arms, "doses": doses})
    final = {arm.name: weights(run) for arm, run in one.final(one.state(lambda run: 0.9))}
    assert final["saliencydecor-absolute 2"] == {"consistency": 7.0, "decorrelation": 2.0}
    assert final["saliencydecor-absolute 0.5"] == {"consistency": 7.0, "decorrelation": 0.5}
    assert "saliencydecor-absolute 2" not in one.state(lambda run: None).chosen


def test_options_go_with_what_they_are_options_of() -> None:
    shared = {"data": "shapes", "data_options": {"samples": 80}, "model": "resnet18"}
    plan = {"shared": shared, "arms": {"standard": {}}, "presets": {"one": {"model_options": {"width": 8}}}}
    whole = Plan.of("p", {**plan, "choice": {"price": 0.1}})

    def given(**over: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        run = whole.at("one", **over).state(lambda run: None).trials["standard"][0]
        return dict(run.data.options), dict(run.model.options)

    both = ({"samples": 80}, {"width": 8})
    assert given() == given(data="shapes", model="resnet18") == both
    assert given(data="digits", model="lenet") == ({}, {})
    assert given(data="digits") == ({}, both[1])


@pytest.mark.parametrize(
    ("tries", "tried"), [(1, [1]), (2, [1, 3]), (3, [0.3, 1, 3]), (4, [0.3, 1, 3, 10]), (9, [0.3, 1, 3, 10])]
)
def test_so_many_values_around_the_middle(tries: int, tried: list[float]) -> None:
    arms = {"standard": {}, "decorrelation": {"try": {"decorrelation": [0.3, 1, 3, 10]}}}
    one = course(plan={"arms": arms}, tries=tries)
    runs = one.state(lambda run: 0.9).trials["decorrelation"]
    assert [dict(run.weights)["decorrelation"] for run in runs] == tried


def test_whose_settings_count() -> None:
    plan = {
        "shared": {"data": "digits", "lr": 0.1, "epochs": 4, "batch_size": 10, "clip": 1.0, "weight_decay": 0.5},
        "arms": {
            "standard": {"clip": 3.0},
            "a": {"method": "saliencydecor-absolute", "weights": {"consistency": 0.2}, "settings": {"fill": "mean"}},
            "b": {"method": "saliencydecor-absolute", "from": "a", "settings": {"fill": "blur", "penalty": "zca"}},
        },
        "doses": {"a": {"try": {"decorrelation": [5]}}},
        "presets": {
            "one": {
                "batch_size": 20,
                "clip": 2.0,
                "trial": {"epochs": 1, "clip": 9.0, "lr": 0.3},
                "arms": {"a": {"try": {"decorrelation": [7]}, "label": "A", "weight_decay": 0.25}},
            }
        },
    }
    one = course(plan=plan)
    state = one.state(lambda run: 0.9)
    trial, final = state.trials["a"][0], {arm.name: run for arm, run in one.final(state)}
    assert (trial.schedule.epochs, trial.schedule.clip, trial.schedule.lr) == (1, 9.0, 0.3)
    for run in final.values():
        assert (run.schedule.batch_size, run.schedule.epochs, run.schedule.lr) == (20, 4, 0.1)
    assert [final[name].schedule.clip for name in ("standard", "a")] == [3.0, 2.0]
    assert [run.schedule.weight_decay for run in final.values()] == [0.5, 0.25, 0.5, 0.25]
    assert weights(trial) == weights(final["a"]) == {"consistency": 0.2, "decorrelation": 7.0}
    assert weights(final["b"]) == weights(final["a"])
    assert weights(final["a 5"]) == {"consistency": 0.2, "decorrelation": 5.0}
    fills = {name: dict(run.settings).get("fill") for name, run in final.items()}
    assert fills == {"standard": None, "a": "mean", "b": "blur", "a 5": "mean"}
    assert dict(final["b"].settings)["penalty"] == "zca" and one.labels["a 5"] == "A, decorrelation 5"
    assert one.run(one.arms["a"], state.chosen["a"], 0) == final["a"].but(seed=0)


def test_an_option_can_be_tried() -> None:
    arms = {"standard": {}, "decorrelation": {"try": {"group_size": [4, 8]}, "weights": {"decorrelation": 3}}}
    one = course(plan={"arms": arms})
    state = one.state(lambda run: 0.9)
    assert [dict(run.settings)["group_size"] for run in state.trials["decorrelation"]] == [4, 8]
    [chosen] = {run.but(seed=0) for arm, run in one.final(state) if arm.name == "decorrelation"}
    assert dict(chosen.settings)["group_size"] == 8 and weights(chosen) == {"decorrelation": 3.0}


def test_claims_of_arms_that_a_preset_lacks_wait_for_another() -> None:
    plan = {"claims": [{**CLAIM, "arm": "both"}, {**CLAIM, "name": "longer", "arm": "longer"}]}
    plan["presets"] = {"one": {}, "two": {"only": ["standard", "longer"]}}
    assert [claim.name for claim in course("one", plan).claims] == ["sharper", "longer"]
    assert [claim.name for claim in course("two", plan).claims] == ["longer"]


def test_what_is_possible_holds_what_is_run() -> None:
    one = course()
    possible = one.possible()
    assert {name: len(runs) for name, runs in possible.items()} == {
        **{"standard": 1, "longer": 1, "decorrelation": 3, "consistency": 2, "both": 4}
    }
    for found in (lambda run: 0.9, lambda run: 0.0 if run.method == "standard" else 1 - sum(weights(run).values())):
        for name, runs in one.state(found).trials.items():
            assert {*runs} <= {*possible[name]}


def share(run: Run, what: str) -> float:
    return int(hashlib.sha256(f"{what}{run.key}".encode()).hexdigest()[:8], 16) / 16**8


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), parts=st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)), broken=st.floats(0, 0.7))
def test_knowing_more_changes_nothing_that_was_known(seed: int, parts: tuple[float, float], broken: float) -> None:
    """The runs that are done in the first of two states are also done in the second; some broke down."""
    one = ONE

    def found(part: float) -> Callable[[Run], float | None]:
        def of(run: Run) -> float | None:
            value = BROKEN if share(run, f"broken{seed}") < broken else share(run, f"accuracy{seed}")
            return value if share(run, f"order{seed}") < part else None

        return of

    less, more = (one.state(found(part)) for part in sorted(parts))
    assert less.trials.items() <= more.trials.items()
    assert less.chosen.items() <= more.chosen.items()
    assert {*less.lost} <= {*more.lost} and not {*more.lost} & {*more.chosen}
    before, after = ([run.key for _, run in one.final(state)] for state in (less, more))
    assert [key for key in after if key in set(before)] == before
    assert (
        one.count(less)
        >= one.count(more)
        == one.count()
        - sum([*map(len, more.trials.values()), *(one.seeds_of(one.arms[name]) for name in more.chosen)])
        - lost(one, more)
    )


def lost(one: Course, state: State) -> int:
    """Runs that will never be known."""
    arms = [one.arms[name] for name in state.lost]
    return sum(map(one.seeds_of, arms)) + sum(len(arm.values) for arm in arms if arm.name not in state.trials)


ONE = course()
