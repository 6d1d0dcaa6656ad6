"""The tidy frame of records, its arms, and how its measures are headed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sdecor.registers import MEASURES, METHODS
from sdecor.store import Record

Columns = Mapping[str, tuple[str, float, int]] | Iterable[str]
_NO_SETTING = ("arm", "key", "seed", "measure", "value")
PLAIN = {
    "grid_pointing_game": ("grid pointing game ↑", 1.0, 3),
    "accuracy": ("accuracy, % ↑", 100.0, 2),
    "box_accuracy": ("boxes that fit, % ↑", 100.0, 1),
    "max_box_accuracy": ("at the best threshold, % ↑", 100.0, 1),
    "object_only_accuracy": ("object accuracy, % ↑", 100.0, 1),
    "background_only_accuracy": ("background accuracy, % ↓", 100.0, 1),
    "object_only_relevance_mass": ("mass, object alone ↑", 1.0, 3),
    "background_only_relevance_mass": ("mass, background alone ↓", 1.0, 3),
    "deletion_area": ("deletion area ↑", 1.0, 3),
    "fair_deletion_area": ("fair deletion area ↑", 1.0, 3),
    "cross_entropy": ("cross-entropy in training, at the end", 1.0, 4),
}
_OF_LAYER = {"correlation_": ("mean |r|", 3), "effective_rank_": ("effective rank", 1)}


def frame(
    records: Iterable[Record],
    extra: Mapping[str, Callable[[Record], float]] | None = None,
    names: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """A row for every record and measure, also `extra` ones, functions of a record; a run that comes twice counts once.

    A plan gives arms `names`, by the key of the run with seed 0 (`sdecor.planned.Results.names`); the others are named
    by `arms`. Columns are ``arm``, every setting that one of the runs has (NaN where another lacks it), ``key`` of the
    run with seed 0, ``seed``, ``measure`` and ``value``.
    """
    rows = []
    for record in {r.run: r for r in records}.values():
        flat = record.run.flat().items()
        settings = {f"{k} (setting)" if k in _NO_SETTING else k: v for k, v in flat if k != "seed"}
        metrics = {**record.metrics, **{name: make(record) for name, make in (extra or {}).items()}}
        own = {**settings, "key": record.run.but(seed=0).key, "seed": record.run.seed}
        rows += [{**own, "measure": m, "value": v} for m, v in metrics.items()]
    if not rows:
        raise ValueError("records is empty; a frame needs one at least")
    out = pd.DataFrame(rows, dtype=object).astype({"seed": int, "measure": str, "value": float})
    out = arms(out[[c for c in out if c not in _NO_SETTING] + ["key", "seed", "measure", "value"]])
    return out.assign(arm=[(names or {}).get(key, arm) for key, arm in zip(out["key"], out["arm"], strict=True)])


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its arms named anew, as is due when frames were put together or rows left out.

    An arm has the label of its method. Where several share a method, what differs between them follows: "decorrelation
    only, weight decorrelation=0.3".
    """
    frame = frame.reset_index(drop=True)
    settings = [c for c in frame if c not in _NO_SETTING]
    number = frame.groupby("key", sort=False).ngroup()
    first = frame.loc[~number.duplicated(), settings]
    titles = Counter(METHODS[method].title for method in first["method"].unique())
    names: dict[int, str] = {}
    for method, rows in first.groupby("method", sort=False):
        title = METHODS[str(method)].title
        title = title if titles[title] == 1 else f"{title} ({method})"
        differ = differing(rows)
        for place, row in zip(number[rows.index], rows[differ].to_dict("records"), strict=True):
            said = [f"{name}={_text(value)}" for name, value in row.items() if value == value]  # NaN: it lacks that
            names[place] = ", ".join([title, *said])
    shared, keys = Counter(names.values()), frame["key"].groupby(number).first()
    names = {n: name if shared[name] == 1 else f"{name} [{keys[n]}]" for n, name in names.items()}
    return frame.assign(arm=number.map(names))[["arm", *settings, "key", "seed", "measure", "value"]]


def differing(rows: pd.DataFrame) -> list[str]:
    """The columns that tell rows apart; one that some rows merely lack is among them only if it is needed."""

    def told(names: list[str]) -> int:
        return rows.groupby(names, dropna=False, sort=False).ngroups if names else 1

    full = [str(c) for c in rows if rows[c].nunique(dropna=False) > 1]
    found = [c for c in full if rows[c].dropna().nunique() > 1]
    for name in full:
        if name not in found and told([*found, name]) > told(found):
            found.append(name)
    return found


def _text(value: Any) -> str:
    """A setting, short but exact."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "none" if value is None else "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def curves(records: Iterable[Record], name: str, factor: float = 1.0) -> dict[str, list[list[float]]]:
    """Method to its curves of that name, one a seed, for `sdecor.plotting.bands`; methods without are left out."""
    out: dict[str, dict[Any, list[float]]] = {}
    for r in (rs := list(records)):
        if name in r.curves:
            out.setdefault(r.run.method, {})[r.run] = [factor * v for v in r.curves[name]]
    if not out:
        known = ", ".join(dict.fromkeys(c for r in rs for c in r.curves))
        raise ValueError(f"no record has a curve '{name}'; there are: {known}")
    for method, found in out.items():
        if len({run.but(seed=0) for run in found}) > 1:
            raise ValueError(f"runs of '{method}' differ in more than the seed; give those of one arm a method")
    return {method: list(found.values()) for method, found in out.items()}


def headings(columns: Columns) -> dict[str, tuple[str, float, int]]:
    """Heading, factor and decimals of each measure, those given only by name as the registers know them."""
    if isinstance(columns, Mapping):
        return dict(columns)
    out = {m: (MEASURES[m].heading if m in MEASURES else m.replace("_", " "), 1.0, 3) for m in columns}
    for prefix, (title, decimals) in _OF_LAYER.items():
        out |= {m: (f"{title}, {m.removeprefix(prefix)}", 1.0, decimals) for m in out if m.startswith(prefix)}
    return out | {m: PLAIN[m] for m in out if m in PLAIN}


def factor_of(measure: str, columns: Columns) -> float:
    """What a measure is multiplied with, to be shown."""
    return {**PLAIN, **headings(columns)}.get(measure, ("", 1.0, 0))[1]


def directed(measure: str, heading: str) -> str:
    """The heading with an arrow to the better direction, if that is known."""
    if "↑" in heading or "↓" in heading:
        return heading
    better = MEASURES[measure].heading[-1] if measure in MEASURES else "↑" if measure in PLAIN else ""
    return f"{heading} {better}".rstrip()


def wide(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Values of a measure, NaN where it is undefined: a row a seed, a column an arm."""
    part = frame[frame["measure"] == measure]
    if len(twice := part[part.duplicated(["arm", "seed"])]):
        row = twice.iloc[0]
        problem = f"arm '{row['arm']}' has two values of '{measure}' for seed {row['seed']}"
        raise ValueError(f"{problem}; name the arms of frames that were put together with `arms`")
    out = part.pivot(index="seed", columns="arm", values="value").reindex(columns=frame["arm"].unique())
    return out.where(np.isfinite(out))
