"""Pictures of differences, of verdicts, and of how maps answer to a setting."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from sdecor.registers import METHODS
from sdecor.report.frames import Columns, directed, headings, wide
from sdecor.report.tables import ENDS, arm_of, labels_of
from sdecor.report.verdicts import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^v"
_COLOURS = {"holds": "#007e5c", "does not hold": "#b34a00", "cannot tell": "0.35"}
_wrapped = partial(textwrap.fill, break_on_hyphens=False)


def forest(differences: pd.DataFrame, panels: Columns, *, per_row: int = 2) -> Figure:
    """Dots and 95 % intervals of paired differences: a panel a measure, a row an arm, in its method's colour.

    A dot is filled where the adjusted p-value is below 0.05, and hollow where it is not, or there is none. Below a
    panel stands what has no value there, or fewer pairs of seeds than there are. Two panels side by side can be read
    on a phone.
    """
    import matplotlib.pyplot as plt

    columns, differences = headings(panels), differences.reset_index(drop=True)  # tables may have been put together
    labels = labels_of(differences)
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
        ax.set_title(_wrapped(directed(measure, heading), 26), fontsize=11)
    axes[0, 0].set_yticks(range(len(names)), lines, fontsize=10)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
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
        mean, low, high = (factor * row[end] for end in ENDS)
        if row["n"] > 1:
            ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        face = colour if row["p_holm"] < LEVEL else "white"
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


def response_figure(
    frame: pd.DataFrame,
    setting: str,
    panels: Columns,
    *,
    reference: str = "standard",
    smallest: Mapping[str, float] | None = None,
    per_row: int = 2,
) -> Figure:
    """How measures answer to a numeric setting, such as ``weight decorrelation``: a panel a measure, a line a method.

    Drawn are differences to the `reference` (an arm, or a method that has one) of the same seed, which itself stands at
    0: a small dot a seed, moved a little sideways, and lines that join the means. The scale is linear up to the
    smallest value, and logarithmic beyond. A grey band is where differences do not matter, if that is known: `smallest`
    gives the smallest that matters, by measure. ValueError if the frame lacks the setting, or arms of a method differ
    in more than that.
    """
    import matplotlib.pyplot as plt

    from sdecor.plotting import style

    against, columns = arm_of(frame, reference), headings(panels)
    if setting not in frame or not len(doses := frame.dropna(subset=[setting]).drop_duplicates("arm")):
        raise ValueError(f"no arm has the setting '{setting}'; there are: {', '.join(map(str, frame))}")
    if len(twice := doses[doses.duplicated(["method", setting])]):
        raise ValueError(f"arms of '{twice['method'].iloc[0]}' differ in more than '{setting}'")
    doses = doses.sort_values(setting, kind="stable")
    ticks = sorted({0, *doses[setting]})
    across = min(per_row, len(columns))
    down = math.ceil(len(columns) / across)
    size = (3.05 * across, 0.5 + 2.3 * down)
    figure, axes = plt.subplots(down, across, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for ax in axes.flat[len(columns) :]:
        ax.set_visible(False)
    for ax, (measure, (heading, factor, _)) in zip(axes.flat, columns.items(), strict=False):
        values = wide(frame, measure)
        gaps = factor * values.sub(values[against], axis=0)
        if (matters := (smallest or {}).get(measure)) is not None:
            ax.axhspan(-factor * matters, factor * matters, color="0.93", zorder=0)
        ax.axhline(0, color="0.35", linewidth=1)
        for place, (method, rows) in enumerate(doses.groupby("method", sort=False)):
            look = style(METHODS[str(method)]) | {"marker": _MARKS[place % len(_MARKS)]}
            for dose, arm in zip(rows[setting], rows["arm"], strict=True):
                at = [dose * 1.25 ** (place - 1)] * len(gaps)
                ax.plot(at, gaps[arm], ".", color=look["color"], markersize=5, alpha=0.7)
            ax.plot([0, *rows[setting]], [0, *gaps[rows["arm"]].mean()], linewidth=1.8, markersize=6, **look)
        ax.set_xscale("symlog", linthresh=ticks[1])
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.tick_params(labelsize=10)
        ax.set_title(_wrapped(directed(measure, heading), 30), fontsize=11)
    for ax in axes[-1]:
        ax.set_xlabel(setting, fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
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
