"""From records to what a page shows: a tidy frame, of it tables, differences, verdicts, a forest plot, glued numbers.

The frame has a row for every record and measure, and all settings as columns. Runs that differ in anything but the seed
are different **arms**; nothing here pools them. A measure is undefined where a record lacks it or holds no finite
number: tables then show a dash, or, if other seeds have it, how many these are, such as ``(4 of 5)``.

`columns` and `panels` name the measures that are wanted: names alone, or a mapping of names to heading, factor and
decimals, such as ``{"accuracy": ("accuracy, %", 100, 2)}``.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sdecor.measures.statistics import below, equivalence, holm, paired_difference, paired_test, summary
from sdecor.registers import MEASURES, METHODS
from sdecor.store import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sdecor.plan import Claim

Columns = Mapping[str, tuple[str, float, int]] | Iterable[str]
Pairs = Mapping[str, tuple[str, str]]
DASH = "–"
_NO_SETTING = ("arm", "key", "seed", "measure", "value")
_PLAIN = {
    "grid_pointing_game": ("grid pointing game ↑", 1.0, 3),
    "accuracy": ("accuracy, % ↑", 100.0, 2),
    "cross_entropy": ("cross-entropy in training, at the end", 1.0, 4),
}
_OF_LAYER = {"correlation_": ("mean |r|", 3), "effective_rank_": ("effective rank", 1)}
_ENDS = ("mean", "low", "high")
_LEVEL = 0.05
_CLAIMED = ["name", "text", "measure", "direction", "arm", "reference", "method", "n", "seeds", *_ENDS]
_CLAIMED += ["planned", "p", "p_holm", "p_equivalent", "smallest"]
_MARKS = "osD^v"
_COLOURS = {"holds": "#007e5c", "does not hold": "#b34a00", "cannot tell": "0.35"}
_SIGNS = {"higher": "+", "lower": "-", "equal": "±"}


_wrapped = partial(textwrap.fill, break_on_hyphens=False)


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
        differ = _differing(rows)
        for place, row in zip(number[rows.index], rows[differ].to_dict("records"), strict=True):
            said = [f"{name}={_text(value)}" for name, value in row.items() if value == value]  # NaN: it lacks that
            names[place] = ", ".join([title, *said])
    shared, keys = Counter(names.values()), frame["key"].groupby(number).first()
    names = {n: name if shared[name] == 1 else f"{name} [{keys[n]}]" for n, name in names.items()}
    return frame.assign(arm=number.map(names))[["arm", *settings, "key", "seed", "measure", "value"]]


def _differing(rows: pd.DataFrame) -> list[str]:
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


def _columns(columns: Columns) -> dict[str, tuple[str, float, int]]:
    """Heading, factor and decimals of each measure, those given only by name as the registers know them."""
    if isinstance(columns, Mapping):
        return dict(columns)
    out = {m: (MEASURES[m].heading if m in MEASURES else m.replace("_", " "), 1.0, 3) for m in columns}
    for prefix, (title, decimals) in _OF_LAYER.items():
        out |= {m: (f"{title}, {m.removeprefix(prefix)}", 1.0, decimals) for m in out if m.startswith(prefix)}
    return out | {m: _PLAIN[m] for m in out if m in _PLAIN}


def _wide(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Values of a measure, NaN where it is undefined: a row a seed, a column an arm."""
    part = frame[frame["measure"] == measure]
    if len(twice := part[part.duplicated(["arm", "seed"])]):
        row = twice.iloc[0]
        problem = f"arm '{row['arm']}' has two values of '{measure}' for seed {row['seed']}"
        raise ValueError(f"{problem}; name the arms of frames that were put together with `arms`")
    wide = part.pivot(index="seed", columns="arm", values="value").reindex(columns=frame["arm"].unique())
    return wide.where(np.isfinite(wide))


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
    for measure, (heading, factor, digits) in _columns(columns).items():
        for arm, column in _wide(frame, measure).items():
            out[arm][heading] = DASH
            if values := (factor * column.dropna()).tolist():
                mean, sd = summary(values)
                spread = f" ± {sd:.{digits}f}" if len(values) > 1 else ""
                out[arm][heading] = f"{mean:.{digits}f}{spread}{_of(len(values), seeds[arm])}"
    return _counted(out, seeds)


def overview(records: Iterable[Record]) -> pd.DataFrame:
    """Strings, a row an arm: data, model and method, what else tells the arms apart, the seeds, and all measures."""
    whole = frame(records)
    first = whole.drop_duplicates("arm").set_index("arm")
    named = ["data", "model", "method"]
    named += [c for c in _differing(first.drop(columns=["key", "seed", "measure", "value"])) if c not in named]
    seeds = whole.groupby("arm")["seed"].agg(lambda s: ",".join(map(str, sorted(set(s)))))
    measures = {str(name): (str(name), 1.0, 4) for name in sorted(whole["measure"].unique())}
    shown = table(whole, measures).drop(columns="seeds", errors="ignore")
    out = first[named].assign(seeds=seeds).join(shown)
    return out.where(out.notna(), DASH).sort_values(named, key=lambda column: column.map(str)).reset_index(drop=True)


def _arm(frame: pd.DataFrame, name: str) -> str:
    """The arm of that name or key, or the only arm of that method."""
    known = list(frame["arm"].unique())
    called = (frame["method"] == name) | (frame["key"] == name)
    found = [name] if name in known else list(frame.loc[called, "arm"].unique())
    if len(found) != 1:
        problem = "several arms have method" if found else "unknown arm"
        raise ValueError(f"{problem} '{name}'; known: {'; '.join(known)}")
    return str(found[0])


def _names(frame: pd.DataFrame) -> dict[str, str]:
    """Arm to a name for glue: that of its method, or where several share one, the arm's without spaces."""
    methods = frame.drop_duplicates("arm").set_index("arm")["method"]
    shared = Counter(methods)
    return {str(arm): m if shared[m] == 1 else re.sub(r"[^\w.-]+", "-", str(arm)) for arm, m in methods.items()}


def pairs(frame: pd.DataFrame, reference: str = "standard") -> dict[str, tuple[str, str]]:
    """Every other arm with the reference (an arm, or a method that has one), named as in `glue_values`."""
    against = _arm(frame, reference)
    return {name: (arm, against) for arm, name in _names(frame).items() if arm != against}


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
    known = {name: (_arm(frame, arm), _arm(frame, reference)) for name, (arm, reference) in asked.items()}
    methods, seeds = frame.groupby("arm")["method"].first(), frame.groupby("arm")["seed"].agg(set)
    rows = []
    for measure in measures:
        wide = _wide(frame, measure)
        for name, (arm, reference) in known.items():
            both = wide[[arm, reference]].dropna()
            row = {"name": name, "arm": arm, "reference": reference, "method": methods[arm], "measure": measure}
            rows.append({**row, "n": len(both), "seeds": len(seeds[arm] & seeds[reference]), **_compared(both)})
    out = pd.DataFrame(rows)
    families = out.groupby(family or (lambda _: 0), sort=False)["p"]
    return out.assign(p_holm=families.transform(lambda p: holm(p.tolist()).numpy()))


def _compared(both: pd.DataFrame) -> dict[str, float]:
    """Difference of the first column to the second."""
    if both.empty:
        return dict.fromkeys((*_ENDS, "p"), math.nan)
    a, b = both.to_numpy().T.tolist()
    return {**paired_difference(a, b)._asdict(), "p": paired_test(a, b)}


def _labels(differences: pd.DataFrame) -> pd.Series:
    """What to call each row: the arm, and what it is compared with where that is not the same for all."""
    if differences["reference"].nunique() == 1:
        return differences["arm"]
    return differences["arm"] + " − " + differences["reference"]


def difference_table(differences: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Strings ``mean [low, high]``, a row an arm; a single pair has no interval and nothing defined a dash.

    Where arms share more seeds with their reference or fewer, a first column says how many.
    """
    labels = _labels(differences)
    out: dict[str, dict[str, str]] = {label: {} for label in labels}
    for measure, (heading, factor, digits) in _columns(columns).items():
        for label in out:
            out[label][heading] = DASH
            rows = differences[(labels == label) & (differences["measure"] == measure)]
            for row in rows[:1].query("n > 0").to_dict("records"):
                mean, low, high = (f"{factor * row[end]:+.{digits}f}" for end in _ENDS)
                interval = f" [{low}, {high}]" if row["n"] > 1 else ""
                out[label][heading] = mean + interval + _of(row["n"], row["seeds"])
    return _counted(out, dict(zip(labels, differences["seeds"], strict=True)))


def verdict(
    frame: pd.DataFrame,
    claims: Iterable[Claim],
    arms: Mapping[str, str] | None = None,
    planned: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    r"""What became of the claims of a plan: 'holds', 'does not hold', or in all other cases 'cannot tell'.

    Of the paired differences of a claim's `arm` to the one it is `against`, with `smallest` the smallest that matters:

    =======  =======================================  =============================================================
    claimed  holds                                    does not hold
    =======  =======================================  =============================================================
    higher   ``p_holm`` < 0.05 and mean >= smallest   ``p_equivalent`` < 0.05, or ``p_holm`` < 0.05 and mean < 0
    lower    ``p_holm`` < 0.05 and mean <= -smallest  ``p_equivalent`` < 0.05, or ``p_holm`` < 0.05 and mean > 0
    equal    ``p_equivalent`` < 0.05                  ``p_holm`` < 0.05 and \|mean\| > smallest
    =======  =======================================  =============================================================

    ``p_holm`` is that of the paired t test for any difference, ``p_equivalent`` that for one too small to matter: for
    less than `smallest` in the claimed direction (`below`), or, if `equal` is claimed, in either (`equivalence`). An
    effect that is certain, but not certain to matter, is thus left open, and more seeds of the same mean and spread
    take back no claim that holds. All claims of the plan are one family in each of the two columns, whatever they claim
    and also if undefined, so that a plan has even one false alarm in a column in at most 5 % of cases, and no claim
    gains by another's lack of data. This is so for one look, when all seeds are there that were `planned`, by arm; who
    looks after every seed has more false alarms. Intervals are not corrected.

    Fewer than two pairs, or differences that are all the same, leave no test and NaN; only where all are 0 there is
    exactly no change, and the p-values are 1 and 0. Without `arms`, claims name arms as `pairs` does, or keys; with it,
    they name what `arms` maps to those, and a name that it lacks has no runs yet, so no pairs. A row for every claim
    has the columns of `differences`, for `difference_table`, `forest` and `glue_differences`, and ``text``,
    ``direction``, ``smallest``, ``planned`` (seeds, 0 if unknown), ``p_equivalent`` and ``verdict``. ValueError for
    claims that share a name, unknown arms, and arms of which several have the method.
    """
    rows = [_of_claim(frame, claim, arms, planned or {}) for claim in claims]
    if twice := [name for name, times in Counter(row["name"] for row in rows).items() if times > 1]:
        raise ValueError(f"several claims have the name '{twice[0]}'")
    out = pd.DataFrame(rows, columns=_CLAIMED)
    out = out.assign(p_holm=_over_all(out["p"]), p_equivalent=_over_all(out["p_equivalent"]))
    return out.assign(verdict=[_decided(row) for row in out.to_dict("records")])


def _of_claim(
    frame: pd.DataFrame, claim: Claim, arms: Mapping[str, str] | None, planned: Mapping[str, int]
) -> dict[Any, Any]:
    """The row of a claim, its p-values not yet corrected."""
    row: dict[Any, Any] = {name: getattr(claim, name) for name in ("name", "text", "measure", "direction", "smallest")}
    row |= {"arm": claim.arm, "reference": claim.against, "method": "", "n": 0, "seeds": 0}
    row["planned"] = min(planned.get(name, 0) for name in (claim.arm, claim.against))
    row |= dict.fromkeys((*_ENDS, "p", "p_equivalent"), math.nan)
    if arms is not None and not {claim.arm, claim.against} <= {*arms}:
        return row
    arm, against = (name if arms is None else arms[name] for name in (claim.arm, claim.against))
    row |= differences(frame, {claim.name: (arm, against)}, [claim.measure]).to_dict("records")[0]
    if row["n"] > 1 and row["low"] == row["high"] == 0:
        return row | {"p": 1.0, "p_equivalent": 0.0}
    both = _wide(frame, claim.measure)[[row["arm"], row["reference"]]].dropna()
    return row | {"p_equivalent": _too_small(claim, *both.to_numpy().T.tolist())} if row["n"] else row


def _too_small(claim: Claim, a: list[float], b: list[float]) -> float:
    """P-value of the test that `a` differs from `b` by less than matters."""
    if claim.direction == "equal":
        return equivalence(a, b, claim.smallest)
    return below(a, b, claim.smallest) if claim.direction == "higher" else below(b, a, claim.smallest)


def _over_all(p: pd.Series) -> pd.Series:
    """Corrected p-values; one that is undefined stays so, but counts as a test that was planned."""
    return pd.Series(holm(p.fillna(1.0).tolist()).numpy(), p.index).where(p.notna())


def _decided(row: Mapping[Any, Any]) -> str:
    """The verdict on a claim; comparisons with NaN are false."""
    differs, small = row["p_holm"] < _LEVEL, row["p_equivalent"] < _LEVEL
    effect = -row["mean"] if row["direction"] == "lower" else row["mean"]
    if row["direction"] == "equal":
        yes, no = small, differs and abs(effect) > row["smallest"]
    else:
        yes, no = differs and effect >= row["smallest"], small or (differs and effect < 0)
    return "holds" if yes else "does not hold" if no else "cannot tell"


def verdict_table(verdicts: pd.DataFrame, columns: Columns = ()) -> pd.DataFrame:
    """Strings, a row a claim, of what `verdict` gives: the effect with its interval, what matters, and what decides.

    The p-values are the corrected ones: ``p`` of any effect, ``p, too small`` of one too small to matter.
    """
    of = {**_columns(list(verdicts["measure"].unique())), **_columns(columns)}
    out: dict[str, dict[str, str]] = {}
    for name, row in verdicts.set_index("name", drop=False).to_dict("index").items():
        heading, factor, _ = column = of[row["measure"]]
        out[str(name)] = {
            "measure": heading,
            "effect": str(difference_table(pd.DataFrame([row]), {row["measure"]: column}).iloc[0, 0]),
            "smallest effect": f"{_SIGNS[row['direction']]}{factor * row['smallest']:g}",
            "seeds": f"{row['n']} of {row['planned']}" if row["n"] < row["planned"] else str(row["n"]),
            "p": _p_text(row["p_holm"]),
            "p, too small": _p_text(row["p_equivalent"]),
            "verdict": row["verdict"],
        }
    return pd.DataFrame.from_dict(out, orient="index")


def _p_text(p: float) -> str:
    return DASH if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def forest(differences: pd.DataFrame, panels: Columns, *, per_row: int = 2) -> Figure:
    """Dots and 95 % intervals of paired differences: a panel a measure, a row an arm, in its method's colour.

    A dot is filled where the adjusted p-value is below 0.05, and hollow where it is not, or there is none. Below a
    panel stands what has no value there, or fewer pairs of seeds than there are. Two panels side by side can be read
    on a phone.
    """
    import matplotlib.pyplot as plt

    columns, differences = _columns(panels), differences.reset_index(drop=True)  # tables may have been put together
    labels = _labels(differences)
    names = list(labels.unique())
    across = min(per_row, len(columns))
    down = math.ceil(len(columns) / across)
    lines = ["\n− ".join(_wrapped(part, 26) for part in name.split(" − ")) for name in names]
    height = 0.65 + sum(0.1 + 0.16 * (line.count("\n") + 1) for line in lines)
    figure, axes = plt.subplots(
        down, across, figsize=(2.1 + 2 * across, down * height), sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(columns) :]:
        ax.set_visible(False)
    for ax, (measure, (heading, factor, _)) in zip(axes.flat, columns.items(), strict=False):
        _panel(ax, differences[differences["measure"] == measure], labels, names, factor)
        ax.set_title(_wrapped(_directed(measure, heading), 26), fontsize=11)
    axes[0, 0].set_yticks(range(len(names)), lines, fontsize=10)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def verdict_figure(verdicts: Mapping[str, pd.DataFrame]) -> Figure:
    """What `verdict` gave, as a picture: a row a claim, and in it a dot with its 95 % interval for each of the tables.

    The unit is the smallest difference that matters, and right is what is claimed: a dot beyond 1 is an effect that
    matters, the grey band is where none does. The verdict stands beside its dot, and has its colour; the dot is hollow
    while seeds are missing that were planned.
    """
    import matplotlib.pyplot as plt

    if not any(map(len, verdicts.values())):
        raise ValueError("verdicts is empty; a figure needs one claim at least")
    texts = {name: text for table in verdicts.values() for name, text in zip(table["name"], table["text"], strict=True)}
    lines = {name: _wrapped(text, 28) for name, text in texts.items()}
    tall = max(0.2 * len(verdicts), *(0.16 * (line.count("\n") + 1) for line in lines.values())) + 0.14
    figure, ax = plt.subplots(figsize=(6.1, 0.9 + tall * len(lines)), layout="constrained")
    ax.axvspan(-1, 1, color="0.93", zorder=0)
    ax.axvline(0, color="0.35", linewidth=1)
    for place, (title, table) in enumerate(verdicts.items()):
        offset = 0.2 * (place - (len(verdicts) - 1) / 2) / tall
        for row in table.to_dict("records"):
            y, colour = list(lines).index(row["name"]) + offset, _COLOURS[row["verdict"]]
            said = row["verdict"] if row["n"] else "not run"
            ax.text(1.02, y, said, color=colour, fontsize=9, va="center", transform=ax.get_yaxis_transform())
            unit = -row["smallest"] if row["direction"] == "lower" else row["smallest"]
            if row["n"] > 1:
                ax.plot([row["low"] / unit, row["high"] / unit], [y, y], color=colour, linewidth=2)
            face = "white" if row["n"] < row["planned"] else colour
            ax.plot(row["mean"] / unit, y, _MARKS[place % len(_MARKS)], color=colour, markerfacecolor=face)
        ax.plot([], [], _MARKS[place % len(_MARKS)], color="0.35", label=title)
    ax.set_yticks(range(len(lines)), lines.values(), fontsize=10)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.tick_params(labelsize=10)
    ax.set_xlabel("effect, in units of the smallest that matters", fontsize=10)
    if len(verdicts) > 1:
        figure.legend(loc="outside lower center", ncols=len(verdicts), fontsize=10, frameon=False)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, labels: pd.Series, names: list[str], factor: float) -> None:
    from matplotlib.ticker import MaxNLocator

    from sdecor.plotting import style

    ax.axvline(0, color="0.35", linewidth=1)
    notes = []
    for label, row in zip(labels[rows.index], rows.to_dict("records"), strict=True):
        if row["n"] < row["seeds"] or not row["n"]:
            notes.append(f"{label}: " + (f"{row['n']} of {row['seeds']} seeds" if row["n"] else "undefined"))
        if not row["n"]:
            continue
        y, colour = names.index(label), style(METHODS[row["method"]])["color"]
        mean, low, high = (factor * row[end] for end in _ENDS)
        if row["n"] > 1:
            ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        face = colour if row["p_holm"] < _LEVEL else "white"
        ax.plot(mean, y, "o", markersize=7, markeredgewidth=1.8, markeredgecolor=colour, markerfacecolor=face)
    if not rows["n"].any():
        notes = ["undefined here"]
        ax.set_xticks([])
    else:
        low, high = (abs(end) for end in ax.get_xlim())
        ax.xaxis.set_major_locator(MaxNLocator(4 if max(low, high) > 0.1 else 3))  # such numbers are long
    ax.grid(False, axis="y")
    ax.tick_params(labelsize=10)
    ax.set_xlabel("\n".join(_wrapped(note, 30) for note in notes), fontsize=9)


def _directed(measure: str, heading: str) -> str:
    """The heading with an arrow to the better direction, if that is known."""
    if "↑" in heading or "↓" in heading:
        return heading
    better = MEASURES[measure].heading[-1] if measure in MEASURES else "↑" if measure in _PLAIN else ""
    return f"{heading} {better}".rstrip()


def glue(name: str, value: float | str) -> None:
    """Bind `value` to `name`, so that the text can quote it as ``{glue:text}`name:.2f```, without needing myst-nb."""
    from IPython.display import display

    prefix, text = "application/papermill.record/", repr(value if isinstance(value, str | int) else float(value))
    display({f"{prefix}text/plain": text}, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}})


def _factor(measure: str, columns: Columns) -> float:
    return {**_PLAIN, **_columns(columns)}.get(measure, ("", 1.0, 0))[1]


def glue_values(frame: pd.DataFrame, columns: Columns = ()) -> None:
    """Bind mean and standard deviation over seeds of every measure: ``NAME_MEASURE_value`` and ``_sd``.

    NAME is the method's, or the arm's with dashes for spaces where several share a method. `columns` give the factors;
    what is undefined is left unbound, such as the spread of a single seed.
    """
    names = _names(frame)
    for measure in frame["measure"].unique():
        factor = _factor(measure, columns)
        for arm, column in _wide(frame, measure).items():
            values = column.dropna().tolist()
            for part, number in zip(("value", "sd"), summary(values) if values else (), strict=False):
                if not math.isnan(number):
                    glue(f"{names[str(arm)]}_{measure}_{part}", factor * number)


def glue_differences(differences: pd.DataFrame, columns: Columns = ()) -> None:
    """Bind differences, intervals and adjusted p-values: ``NAME_MEASURE_mean``, ``_low``, ``_high`` and ``_p``."""
    for row in differences.to_dict("records"):
        factor = _factor(row["measure"], columns)
        for part, number in {**{end: factor * row[end] for end in _ENDS}, "p": row["p_holm"]}.items():
            if not math.isnan(number):
                glue(f"{row['name']}_{row['measure']}_{part}", number)


def provenance(records: Iterable[Record], *, preset: str, note: str = "") -> None:
    """Show the box that opens an experiment page: data, seeds, device, versions, commit, date, wall time."""
    from IPython.display import HTML, display

    rs = list(records)

    def every(values: Iterable[Any]) -> str:
        return ", ".join(map(str, sorted(set(values))))

    def where(name: str) -> str:
        return every(str(r.environment[name]) for r in rs)

    seconds = sum(r.environment["training_seconds"] for r in rs)
    time = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    methods = len({r.run.method for r in rs})
    rows = {
        "Preset": preset,
        "Data": every(r.environment.get("data", r.run.data.name) for r in rs),
        "Runs": f"{len(rs)}: {methods} method{'s' * (methods > 1)}, seeds {every(r.run.seed for r in rs)}",
        "Epochs": every(r.run.schedule.epochs for r in rs),
        "Device": f"{where('device')}, {where('threads')} thread(s) a run",
        "Training time": f"{time}, summed over these runs",
        "Versions": f"Python {where('python')}, torch {where('torch')}, sdecor {where('sdecor')}",
        "Commit": where("commit"),
        "Date": where("date"),
        **({"Note": note} if note else {}),
    }
    body = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items())
    title = '<p class="admonition-title">How this page was run</p>'
    display(HTML(f'<div class="admonition note provenance">{title}<dl>{body}</dl></div>'))
