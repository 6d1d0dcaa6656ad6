"""Tables of values and of differences to another arm."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sdecor.measures.statistics import Values, holm, paired_difference, paired_test, summary
from sdecor.report.frames import Columns, differing, frame, headings, wide
from sdecor.store import Record

Pairs = Mapping[str, tuple[str, str]]
DASH = "–"
ENDS = ("mean", "low", "high")


def _counted(out: dict[Any, dict[str, str]], seeds: Mapping[Any, int]) -> pd.DataFrame:
    """The table of these rows, with how many seeds each has where not all have as many."""
    if len({seeds[label] for label in out}) > 1:
        out = {label: {"seeds": str(seeds[label]), **row} for label, row in out.items()}
    return pd.DataFrame.from_dict(out, orient="index")


def _of(n: int, seeds: int) -> str:
    return "" if n == seeds else f" ({n} of {seeds})"


def table(frame: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Strings ``mean ± sd`` over seeds, a row an arm; a single seed has no ± and nothing defined a dash.

    Where arms have more seeds or fewer, a first column says how many.
    """
    out: dict[Any, dict[str, str]] = {arm: {} for arm in frame["arm"].unique()}
    seeds = frame.groupby("arm")["seed"].nunique().to_dict()
    for measure, (heading, factor, digits) in headings(columns).items():
        for arm, column in wide(frame, measure).items():
            out[arm][heading] = DASH
            if values := (factor * column.dropna()).tolist():
                mean, sd = summary(values)
                spread = f" ± {sd:.{digits}f}" if len(values) > 1 else ""
                out[arm][heading] = f"{mean:.{digits}f}{spread}{_of(len(values), seeds[arm])}"
    return _counted(out, seeds)


def score_table(scores: Mapping[str, Mapping[str, Values]], columns: Columns) -> pd.DataFrame:
    """Strings ``mean [low, high]``, with the 95 % t interval of the mean of values, NaN left out: a row a name.

    The values may be of images, for a map that no network made, or of seeds. A single one has no interval, and none a
    dash.
    """
    out: dict[str, dict[str, str]] = {name: {} for name in scores}
    for measure, (heading, factor, digits) in headings(columns).items():
        for name, given in scores.items():
            values = given.get(measure, ())
            values = torch.as_tensor(values if isinstance(values, Tensor) else np.array(values), dtype=torch.float64)
            out[name][heading] = DASH
            if len(values := factor * values[~values.isnan()]):
                mean, low, high = paired_difference(values, torch.zeros_like(values))
                interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if len(values) > 1 else ""
                out[name][heading] = f"{mean:.{digits}f}{interval}"
    return pd.DataFrame.from_dict(out, orient="index")


def overview(records: Iterable[Record]) -> pd.DataFrame:
    """Strings, a row an arm: data, model and method, what else tells the arms apart, the seeds, and all measures."""
    whole = frame(records)
    first = whole.drop_duplicates("arm").set_index("arm")
    named = ["data", "model", "method"]
    named += [c for c in differing(first.drop(columns=["key", "seed", "measure", "value"])) if c not in named]
    seeds = whole.groupby("arm")["seed"].agg(lambda s: ",".join(map(str, sorted(set(s)))))
    measures = {str(name): (str(name), 1.0, 4) for name in sorted(whole["measure"].unique())}
    shown = table(whole, measures).drop(columns="seeds", errors="ignore")
    out = first[named].assign(seeds=seeds).join(shown)
    return out.where(out.notna(), DASH).sort_values(named, key=lambda column: column.map(str)).reset_index(drop=True)


def arm_of(frame: pd.DataFrame, name: str) -> str:
    """The arm of that name or key, or the only arm of that method."""
    known = list(frame["arm"].unique())
    called = (frame["method"] == name) | (frame["key"] == name)
    found = [name] if name in known else list(frame.loc[called, "arm"].unique())
    if len(found) != 1:
        problem = "several arms have method" if found else "unknown arm"
        raise ValueError(f"{problem} '{name}'; known: {'; '.join(known)}")
    return str(found[0])


def names_of(frame: pd.DataFrame) -> dict[str, str]:
    """Arm to a name for glue: that of its method, or where several share one, the arm's without spaces."""
    methods = frame.drop_duplicates("arm").set_index("arm")["method"]
    shared = Counter(methods)
    return {str(arm): m if shared[m] == 1 else re.sub(r"[^\w.-]+", "-", str(arm)) for arm, m in methods.items()}


def pairs(frame: pd.DataFrame, reference: str = "standard") -> dict[str, tuple[str, str]]:
    """Every other arm with the reference (an arm, or a method that has one), named as in `glue_values`."""
    against = arm_of(frame, reference)
    return {name: (arm, against) for arm, name in names_of(frame).items() if arm != against}


def differences(
    frame: pd.DataFrame, against: str | Pairs, measures: Iterable[str], *, family: str = ""
) -> pd.DataFrame:
    """Mean differences of arms, paired by seed, with their 95 % t interval and the p-value of the paired t test.

    `against` is the reference of all other arms, or name to (arm, reference), as `pairs` gives it. `family` names the
    column, such as ``arm``, that tells the families of Holm's correction apart; by default all rows are one. A row for
    every pair and measure has ``name`` (of the pair), ``arm``, ``reference``, ``method``, ``measure``, ``n`` (pairs of
    seeds where both are defined), ``seeds`` (that both arms have), ``mean``, ``low``, ``high``, ``p`` and ``p_holm``,
    NaN where seeds are too few.
    """
    asked = pairs(frame, against) if isinstance(against, str) else against
    known = {name: (arm_of(frame, arm), arm_of(frame, reference)) for name, (arm, reference) in asked.items()}
    methods, seeds = frame.groupby("arm")["method"].first(), frame.groupby("arm")["seed"].agg(set)
    rows = []
    for measure in measures:
        values = wide(frame, measure)
        for name, (arm, reference) in known.items():
            both = values[[arm, reference]].dropna()
            row = {"name": name, "arm": arm, "reference": reference, "method": methods[arm], "measure": measure}
            rows.append({**row, "n": len(both), "seeds": len(seeds[arm] & seeds[reference]), **_compared(both)})
    if not rows:
        raise ValueError(f"nothing to compare: the only arm is '{frame['arm'].iloc[0]}', or no measure is named")
    out = pd.DataFrame(rows)
    families = out.groupby(family or (lambda _: 0), sort=False)["p"]
    return out.assign(p_holm=families.transform(lambda p: holm(p.tolist()).numpy()))


def _compared(both: pd.DataFrame) -> dict[str, float]:
    """Difference of the first column to the second."""
    if both.empty:
        return dict.fromkeys((*ENDS, "p"), math.nan)
    a, b = both.to_numpy().T.tolist()
    return {**paired_difference(a, b)._asdict(), "p": paired_test(a, b)}


def labels_of(differences: pd.DataFrame) -> pd.Series:
    """What to call each row: the arm, and what it is compared with where that is not the same for all."""
    if differences["reference"].nunique() == 1:
        return differences["arm"]
    return differences["arm"] + " − " + differences["reference"]


def difference_table(differences: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Strings ``mean [low, high]``, a row an arm; a single pair has no interval and nothing defined a dash.

    Where arms share more seeds with their reference or fewer, a first column says how many.
    """
    labels = labels_of(differences)
    out: dict[str, dict[str, str]] = {label: {} for label in labels}
    for measure, (heading, factor, digits) in headings(columns).items():
        for label in out:
            out[label][heading] = DASH
            rows = differences[(labels == label) & (differences["measure"] == measure)]
            for row in rows[:1].query("n > 0").to_dict("records"):
                mean, low, high = (f"{factor * row[end]:+.{digits}f}" for end in ENDS)
                interval = f" [{low}, {high}]" if row["n"] > 1 else ""
                out[label][heading] = mean + interval + _of(row["n"], row["seeds"])
    return _counted(out, dict(zip(labels, differences["seeds"], strict=True)))
