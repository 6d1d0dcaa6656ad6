"""Choosing settings on validation data: rules that look at accuracy, and never at a map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from sdecor.registers import METHODS, TERMS
from sdecor.store import Record


def accuracy(record: Record) -> float:
    """Share of right answers."""
    return record.metrics["accuracy"]


def standard_error(record: Record, images: int) -> float:
    """Standard error of a record's accuracy, measured on so many images."""
    share = accuracy(record)
    return float((share * (1 - share) / images) ** 0.5)


def smallest_rate(records: Sequence[Record], images: int) -> Record:
    """The smallest learning rate whose accuracy lies within one standard error of the best (Breiman et al. 1984)."""
    best = max(records, key=accuracy)
    floor = accuracy(best) - standard_error(best, images)
    return min((r for r in records if accuracy(r) >= floor), key=lambda r: r.run.schedule.lr)


def strongest(records: Sequence[Record], term: str, floor: float) -> Record:
    """The largest weight of a term with at least this accuracy; the most accurate record if there is none."""
    affordable = [r for r in records if accuracy(r) >= floor]
    return max(affordable, key=lambda r: dict(r.run.weights)[term]) if affordable else max(records, key=accuracy)


def table(trials: Mapping[str, Iterable[Record]], chosen: Mapping[str, Record]) -> pd.DataFrame:
    """What was tried for each method, how accurate it was, and which was chosen: a row a trial."""
    rows = [
        {
            "": METHODS[method].title,
            "learning rate": f"{r.run.schedule.lr:g}",
            **{f"weight of {t}": f"{w:g}" for t, w in r.run.weights if t != "classification"},
            "validation accuracy, %": f"{100 * accuracy(r):.2f}",
            "chosen": "◀" if r is chosen[method] else "",
        }
        for method, records in trials.items()
        for r in records
    ]
    frame = pd.DataFrame(rows).set_index("").rename_axis(None).fillna("–")
    weights = [c for term in TERMS if (c := f"weight of {term}") in frame]
    return frame[["learning rate", *weights, "validation accuracy, %", "chosen"]]
