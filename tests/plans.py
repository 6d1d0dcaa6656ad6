"""A tiny plan, and records of its runs that nobody trained."""

from __future__ import annotations

from typing import Any

from sdecor.config import Run
from sdecor.plan import Course, Plan
from sdecor.store import Record, Store

CLAIM = {"name": "sharper", "text": "It is sharper.", "measure": "gini", "arm": "mine", "against": "standard"}
CLAIM |= {"direction": "higher", "smallest": 0.01}
SHAPE = {"channels": 1, "num_classes": 10, "image_size": 28}
TINY: dict[str, Any] = {
    "shared": {"data": "digits", "limit": 96, "epochs": 2, "batch_size": 48},
    "choice": {"price": 0.5},
    "arms": {
        "standard": {},
        "decorrelation": {"try": {"decorrelation": [0.3, 1]}},
        "accurate": {"method": "decorrelation", "try": {"decorrelation": [0.3, 1]}, "rule": "most accurate"},
        "later": {"method": "noise", "later": True},
    },
    "doses": {"decorrelation": {"try": {"decorrelation": [0, 1]}, "seeds": 1}},
    "presets": {"one": {"seeds": 2}},
}


def course(**tables: Any) -> Course:
    return Plan.of("tiny", {**TINY, **tables}).at("one")


def write(store: Store, run: Run, accuracy: float = 0.9, **environment: Any) -> None:
    store.write(Record(run, {"accuracy": accuracy}, {}, SHAPE, environment, ""))
