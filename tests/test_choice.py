"""Rules of choice: what they take from made-up validation results, and that they never look at a map."""

from __future__ import annotations

import pytest

from sdecor import choice
from sdecor.config import Run
from sdecor.store import Record

SHAPE = {"channels": 1, "num_classes": 10, "image_size": 28}


def record(accuracy: float, **flat: object) -> Record:
    metrics = {"accuracy": accuracy, "gini": 1 - accuracy}
    return Record(Run.of(data="digits", evaluate_on="val", **flat), metrics, {}, SHAPE, {}, "")


def test_the_smallest_rate_within_one_standard_error() -> None:
    records = [record(a, lr=lr) for lr, a in ((1e-3, 0.90), (2e-3, 0.94), (4e-3, 0.95), (8e-3, 0.945))]
    error = choice.standard_error(records[2], 100)
    assert error == pytest.approx((0.95 * 0.05 / 100) ** 0.5)  # 0.0218: 0.94 is within it, 0.90 is not
    assert choice.smallest_rate(records, 100) is records[1]
    assert choice.smallest_rate(records, 10**6) is records[2]


def test_the_strongest_weight_that_can_be_afforded() -> None:
    records = [
        record(a, method="decorrelation", weights={"decorrelation": w}) for w, a in ((0.3, 0.95), (1, 0.93), (3, 0.9))
    ]
    assert choice.strongest(records, "decorrelation", 0.93) is records[1]
    assert choice.strongest(records, "decorrelation", 0.5) is records[2]
    assert choice.strongest(records, "decorrelation", 0.99) is records[0]  # none can: the most accurate


def test_the_table_shows_what_was_tried_and_chosen() -> None:
    plain = [record(0.9, lr=1e-3), record(0.95, lr=2e-3)]
    weighted = [record(0.94, method="decorrelation", weights={"decorrelation": w}) for w in (0.3, 3)]
    trials = {"standard": plain, "decorrelation": weighted}
    table = choice.table(trials, {"standard": plain[1], "decorrelation": weighted[1]})
    assert list(table.index) == ["standard", "standard", "decorrelation only", "decorrelation only"]
    assert list(table) == ["learning rate", "weight of decorrelation", "validation accuracy, %", "chosen"]
    assert list(table["weight of decorrelation"]) == ["–", "–", "0.3", "3"]
    assert list(table["chosen"]) == ["", "◀", "", "◀"]
