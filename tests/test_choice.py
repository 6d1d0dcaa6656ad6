"""Rules of choice, on made-up accuracies: what they take, and how the table shows it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdecor import choice
from sdecor.choice import Trial
from sdecor.config import Run

BROKEN = -math.inf


def trial(accuracy: float, **flat: Any) -> Trial:
    return Trial(Run.of(data="digits", evaluate_on="val", **flat), accuracy)


def weighted(*accuracies: float) -> list[Trial]:
    """Trials of decorrelation with the weights 0.3, 1, 3."""
    weights = (0.3, 1.0, 3.0)
    return [
        trial(a, method="decorrelation", weights={"decorrelation": w}) for w, a in zip(weights, accuracies, strict=True)
    ]


def weight(run: Run) -> float:
    return dict(run.weights)["decorrelation"]


def test_the_smallest_rate_within_one_standard_error() -> None:
    assert choice.standard_error(0.95, 100) == pytest.approx((0.95 * 0.05 / 100) ** 0.5)  # 0.0218
    trials = [trial(a, lr=lr) for lr, a in ((1e-3, 0.90), (2e-3, 0.94), (4e-3, 0.95), (8e-3, 0.945))]
    assert choice.smallest_rate(trials, 100) is trials[1]  # 0.94 is within it, 0.90 is not
    assert choice.smallest_rate(trials, 10**6) is trials[2]
    assert choice.smallest_rate(trials[::-1], 100) is trials[1]  # in whatever order
    broken = [trial(BROKEN, lr=5e-4), *trials, trial(BROKEN, lr=1.0)]
    assert choice.smallest_rate(broken, 100) is trials[1]
    assert choice.smallest_rate([trial(1.0, lr=2e-3), trial(1.0, lr=1e-3)], 9).run.schedule.lr == 1e-3


def test_the_most_accurate() -> None:
    trials = weighted(0.9, 0.95, 0.95)
    assert choice.most_accurate(trials) is trials[1]  # of equal ones the first
    trials = weighted(BROKEN, BROKEN, 0.0)
    assert choice.most_accurate(trials) is trials[2]
    with pytest.raises(ValueError) as error:
        choice.most_accurate(weighted(BROKEN, BROKEN, BROKEN))
    assert str(error.value) == "all 3 trials of method 'decorrelation' broke down; try smaller values"


@pytest.mark.parametrize(
    ("accuracies", "floor", "taken"),
    [
        ((0.95, 0.93, 0.90), 0.93, 1),
        ((0.95, 0.93, 0.90), 0.5, 2),
        ((0.95, 0.93, 0.90), 0.99, 0),  # none can be afforded: the most accurate
        ((0.90, 0.80, 0.91), 0.9, 2),  # a gap between does not matter
        ((0.90, 0.95, BROKEN), 0.9, 1),
        ((BROKEN, 0.5, BROKEN), 0.9, 1),
        ((0.4, 0.4976, 0.3), 0.5006 - 0.003, 1),  # which is a little more than 0.4976
        ((0.4, 0.7133333, 0.3), 0.72333336 - 0.01, 1),  # 217 and 214 of 300 images, as records have it
        ((0.75, 0.713333, 0.3), 0.72333336 - 0.01 + 4e-6, 0),
    ],
)
def test_the_strongest_that_can_be_afforded(accuracies: tuple[float, ...], floor: float, taken: int) -> None:
    trials = weighted(*accuracies)
    assert choice.strongest(trials, weight, floor) is trials[taken]
    assert choice.strongest(trials[::-1], weight, floor) is trials[taken]


def test_nothing_affordable_and_all_broken() -> None:
    with pytest.raises(ValueError, match="all 3 trials of method 'decorrelation' broke down"):
        choice.strongest(weighted(BROKEN, BROKEN, BROKEN), weight, 0.5)


def test_the_table_shows_what_was_tried_and_chosen() -> None:
    plain, tried = [trial(0.9, lr=1e-3), trial(0.95, lr=2e-3)], weighted(0.94, 0.93, BROKEN)
    trials, chosen = {"standard": plain, "mine": tried}, {"standard": plain[1].run, "mine": tried[1].run}
    table = choice.table(trials, chosen)
    assert list(table.index) == ["standard"] * 2 + ["mine"] * 3
    assert list(table) == ["learning rate", "weight of decorrelation", "validation accuracy, %", "chosen"]
    assert list(table["learning rate"]) == ["0.001", "0.002", "0.001", "0.001", "0.001"]
    assert list(table["weight of decorrelation"]) == ["–", "–", "0.3", "1", "3"]
    assert list(table["validation accuracy, %"]) == ["90.00", "95.00", "94.00", "93.00", "broke down"]
    assert list(table["chosen"]) == ["", "◀", "", "◀", ""]
    assert list(choice.table(trials, {}, {"mine": "My own"}).index) == ["standard"] * 2 + ["My own"] * 3
    assert set(choice.table(trials, {})["chosen"]) == {""}
    with pytest.raises(ValueError, match="^trials is empty; a table needs one at least$"):
        choice.table({}, {})


def test_an_option_that_was_tried_is_shown_at_its_default_too() -> None:
    default = Run.of(method="consistency-absolute").objective.settings["fraction"]
    values = (0.1, default)
    tried = [trial(0.9, method="consistency-absolute", settings={"fraction": value}) for value in values]
    table = choice.table({"a": tried}, {})
    assert list(table["fraction"]) == [f"{value}" for value in values]
    assert "fill" not in table
    zca = choice.table({"a": [trial(0.9, method="decorrelation-zca")]}, {})
    assert "penalty" not in zca  # the method's own
