"""What a page shows beside tables and figures: numbers that its text quotes, and how it was run."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from sdecor.measures.statistics import summary
from sdecor.report.frames import Columns, factor_of, wide
from sdecor.report.tables import ENDS, names_of
from sdecor.store import Record


def glue(name: str, value: float | str) -> None:
    """Bind `value` to `name`, so that the text can quote it as ``{glue:text}`name:.2f```, without needing myst-nb."""
    from IPython.display import display

    prefix, text = "application/papermill.record/", repr(value if isinstance(value, str | int) else float(value))
    display({f"{prefix}text/plain": text}, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}})


def glue_values(frame: pd.DataFrame, columns: Columns = ()) -> None:
    """Bind mean and standard deviation over seeds of every measure: ``NAME_MEASURE_value`` and ``_sd``.

    NAME is the method's, or the arm's with dashes for spaces where several share a method. `columns` give the factors;
    what is undefined is left unbound, such as the spread of a single seed.
    """
    names = names_of(frame)
    for measure in frame["measure"].unique():
        factor = factor_of(measure, columns)
        for arm, column in wide(frame, measure).items():
            values = column.dropna().tolist()
            for part, number in zip(("value", "sd"), summary(values) if values else (), strict=False):
                if not math.isnan(number):
                    glue(f"{names[str(arm)]}_{measure}_{part}", factor * number)


def glue_differences(differences: pd.DataFrame, columns: Columns = ()) -> None:
    """Bind differences, intervals and adjusted p-values: ``NAME_MEASURE_mean``, ``_low``, ``_high`` and ``_p``."""
    for row in differences.to_dict("records"):
        factor = factor_of(row["measure"], columns)
        for part, number in {**{end: factor * row[end] for end in ENDS}, "p": row["p_holm"]}.items():
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
