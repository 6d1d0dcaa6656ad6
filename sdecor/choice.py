"""Choosing settings on validation data: rules that look at accuracy, and never at a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from sdecor.config import Run
from sdecor.measures.statistics import ROUNDING
from sdecor.registers import METHODS, TERMS


class Trial(NamedTuple):
    """A run on validation images, and the share of right answers; minus infinity if it broke down."""

    run: Run
    accuracy: float


def standard_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy, measured on so many images."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def smallest_rate(trials: Sequence[Trial], images: int) -> Trial:
    """The smallest learning rate whose accuracy lies within one standard error of the best (Breiman et al. 1984)."""
    best = most_accurate(trials)
    floor = best.accuracy - standard_error(best.accuracy, images)
    return min((t for t in trials if t.accuracy >= floor), key=lambda t: t.run.schedule.lr)


def most_accurate(trials: Sequence[Trial]) -> Trial:
    """The trial with the most right answers; of equal ones the first. All having broken down is a ValueError."""
    best = max(trials, key=lambda t: t.accuracy)
    if best.accuracy == -math.inf:
        raise ValueError(f"all {len(trials)} trials of method '{best.run.method}' broke down; try smaller values")
    return best


def strongest(trials: Sequence[Trial], strength: Callable[[Run], float], floor: float) -> Trial:
    """The strongest trial with at least this accuracy, up to rounding; the most accurate one if there is none."""
    affordable = [t for t in trials if t.accuracy >= floor - ROUNDING]
    return max(affordable, key=lambda t: strength(t.run)) if affordable else most_accurate(trials)


def table(
    trials: Mapping[str, Sequence[Trial]], chosen: Mapping[str, Run], labels: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """What was tried for each arm, how accurate it was, and which was chosen: strings, a row a trial.

    Options of terms are shown if they are not the default in one of an arm's trials.
    """
    rows = []
    for arm, tried in trials.items():
        special = {name for run, _ in tried for name in run.objective.difference()[1]}
        for run, accuracy in tried:
            weights = {f"weight of {t}": f"{w:g}" for t, w in run.weights if t != "classification"}
            own, settings = METHODS[run.method].settings, run.objective.settings
            settings = {n: str(v) for n, v in settings.items() if n in special and n not in own}
            shown = f"{100 * accuracy:.2f}" if accuracy > -math.inf else "broke down"
            row = {"": (labels or {}).get(arm, arm), "learning rate": f"{run.schedule.lr:g}", **weights, **settings}
            rows.append({**row, "validation accuracy, %": shown, "chosen": "◀" if run == chosen.get(arm) else ""})
    if not rows:
        raise ValueError("trials is empty; a table needs one at least")
    frame = pd.DataFrame(rows).set_index("").rename_axis(None).fillna("–")
    first = ["learning rate", *(c for term in TERMS if (c := f"weight of {term}") in frame)]
    last = ["validation accuracy, %", "chosen"]
    return frame[first + [c for c in frame if c not in (*first, *last)] + last]
