"""What a chapter needs around its science: checked parameters, numbers bound to the text, how it was run."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML, display

from sdecor.data import data_root
from sdecor.experiment import Record, Run, Store, grid
from sdecor.measures.statistics import paired_difference, summary

_SHELL = {"In", "Out", "get_ipython", "exit", "quit", "open"}


def parameters(namespace: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> SimpleNamespace:
    """Check a chapter's parameters and fill in its preset.

    Call it right after the cell tagged ``parameters``: papermill itself accepts any name and any type.

    Args:
        namespace: ``globals()`` of the notebook. Its annotations are the known parameters and their types, ``preset``
            among them. A value that is empty (``""`` or ``0``) takes the preset's.
        presets: Settings of each preset by name.

    Returns:
        The settings of the preset, overridden by the parameters that were given.

    Raises:
        ValueError: If a parameter or preset is unknown, or a number is negative or not finite.
        TypeError: If a parameter is of the wrong type.

    Example:
        >>> given = {"__annotations__": {"preset": str, "epochs": int}, "preset": "quick", "epochs": 0}
        >>> parameters(given, {"quick": {"epochs": 3}}).epochs
        3
    """
    types: dict[str, Any] = dict(namespace["__annotations__"])
    for name, value in namespace.items():
        if name.startswith("_") or name in _SHELL or callable(value) or type(value).__name__ == "module":
            continue
        if name not in types:
            raise ValueError(f"unknown parameter '{name}'; known: {', '.join(types)}")
    for name, wanted in types.items():
        value = namespace[name]
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            got = f"{value!r} ({type(value).__name__})"
            raise TypeError(f"parameter '{name}' must be of type {wanted.__name__}, got {got}")
        if wanted in (int, float) and not 0 <= value < float("inf"):
            raise ValueError(f"parameter '{name}' must be finite and not negative, got {value!r}")
    preset = namespace["preset"]
    if preset not in presets:
        raise ValueError(f"unknown preset '{preset}'; known: {', '.join(presets)}")
    given = {name: namespace[name] for name in types if namespace[name] or name not in presets[preset]}
    return SimpleNamespace(**{**presets[preset], **given})


def glue(name: str, value: float | str) -> None:
    """Bind `value` to `name`, so that the text can quote it as ``{glue:text}`name:.2f```.

    Writes the output that myst-nb looks for without needing myst-nb, so that a chapter also runs where it is not
    installed.
    """
    display(
        {"application/papermill.record/text/plain": repr(value if isinstance(value, str | int) else float(value))},
        raw=True,
        metadata={"scrapbook": {"name": name, "mime_prefix": "application/papermill.record/"}},
    )


def holds(left: Any, right: Any, tolerance: float) -> bool:
    """Say whether two sides of a statement agree, and by how much they differ.

    Args:
        left: Numbers of any shape: a float, an array or a tensor.
        right: Numbers that broadcast against `left`.
        tolerance: Largest absolute difference that still counts as equal.

    Returns:
        Whether the largest absolute difference is at most `tolerance`; False if it is NaN.

    Example:
        >>> holds([0.1 + 0.2, 1.0], [0.3, 1.0], 1e-12)
        holds: largest difference 5.6e-17, tolerance 1e-12
        True
    """
    gap = float(np.abs(np.asarray(left, dtype=float) - np.asarray(right, dtype=float)).max())
    ok = gap <= tolerance
    print(f"{'holds' if ok else 'does not hold'}: largest difference {gap:.1e}, tolerance {tolerance:.0e}")
    return ok


def store(path: str = "", *, temporary: bool = False, retrain: bool = False) -> Store:
    """The store that a chapter works on.

    Args:
        path: A folder; empty takes a temporary one, the user's own below the data root, or the book's, by the flags.
        temporary: Forget the runs afterwards.
        retrain: Train into the user's own store, so that the published records stay as they are.
    """
    if path:
        return Store(path)
    if temporary:
        return Store(tempfile.mkdtemp(prefix="sdecor-"))
    return Store(data_root() / "runs" if retrain else Path(__file__).parents[1] / "data")


def records(runs: Iterable[Run], shelf: Store, *, retrain: bool, **settings: Any) -> list[Record]:
    """Records of `runs`, read or, if `retrain` allows it, trained where they are missing.

    Args:
        runs: What is wanted.
        shelf: Where it is looked for.
        retrain: Whether to train.
        settings: Handed to `sdecor.experiment.grid`.

    Raises:
        FileNotFoundError: If a record is missing and `retrain` is off.
    """
    wanted = list(runs)
    found = [shelf.record(run) for run in wanted]
    if retrain and None in found:
        workers = min(settings.get("workers", 1), found.count(None))
        return grid(wanted, shelf, **{**settings, "workers": workers, "threads": 1, "progress": False})
    for run, record in zip(wanted, found, strict=True):
        if record is None:
            raise FileNotFoundError(
                f"{shelf.root} holds no record of {run.method} on {run.data}, seed {run.seed} (key {run.key}); "
                "pass retrain=True to train it"
            )
    return [record for record in found if record is not None]


def provenance(records: Iterable[Record], *, preset: str, note: str = "") -> None:
    """Show the box that opens an experiment page: data, seeds, device, versions, commit, date, wall time."""
    rs = list(records)

    def every(name: str) -> str:
        return ", ".join(sorted({str(r.environment[name]) for r in rs}))

    seconds = sum(r.environment["training_seconds"] for r in rs)
    time = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    methods = len({r.run.method for r in rs})
    seeds = ", ".join(map(str, sorted({r.run.seed for r in rs})))
    rows = {
        "Preset": preset,
        "Data": ", ".join(sorted({r.run.data for r in rs})),
        "Runs": f"{len(rs)}: {methods} method{'s' * (methods > 1)}, seeds {seeds}",
        "Epochs": ", ".join(sorted({str(r.run.epochs) for r in rs})),
        "Device": f"{every('device')}, {every('threads')} thread(s) a run",
        "Training time": f"{time}, summed over these runs",
        "Versions": f"Python {every('python')}, torch {every('torch')}, sdecor {every('sdecor')}",
        "Commit": every("commit"),
        "Date": every("date"),
        **({"Note": note} if note else {}),
    }
    body = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items())
    title = '<p class="admonition-title">How this page was run</p>'
    box = HTML(f'<div class="admonition note provenance">{title}<dl>{body}</dl></div>')
    display(box)


def metric_table(records: Iterable[Record], columns: Mapping[str, tuple[str, float, int]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, a row a method.

    Args:
        records: Of several methods and seeds.
        columns: Metric name to heading, factor and decimals.

    Returns:
        Table of strings ``mean ± sd``; a dash where a metric is undefined.
    """
    values = by_method(records)
    table = {
        method: {heading: _spread(v.get(name), factor, digits) for name, (heading, factor, digits) in columns.items()}
        for method, v in values.items()
    }
    return pd.DataFrame.from_dict(table, orient="index")


def _spread(values: list[float] | None, factor: float, digits: int) -> str:
    if values is None:
        return "–"
    mean, sd = summary([factor * v for v in values])
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def difference_table(
    records: Iterable[Record], columns: Mapping[str, tuple[str, float, int]], *, reference: str = "standard"
) -> pd.DataFrame:
    """Paired difference of each method to `reference` over seeds, with its 95 % t interval.

    Args:
        records: As in `metric_table`; every method needs the seeds of `reference`.
        columns: As in `metric_table`.
        reference: Method that the others are compared with.

    Returns:
        Table of strings ``mean [low, high]``.
    """
    values = by_method(records)

    def cell(method: str, name: str, factor: float, digits: int) -> str:
        if name not in values[method]:
            return "–"
        d = paired_difference(values[method][name], values[reference][name])
        mean, low, high = (f"{factor * v:+.{digits}f}" for v in d)
        return f"{mean} [{low}, {high}]"

    table = {
        method: {heading: cell(method, name, factor, digits) for name, (heading, factor, digits) in columns.items()}
        for method in values
        if method != reference
    }
    return pd.DataFrame.from_dict(table, orient="index")


def by_method(records: Iterable[Record]) -> dict[str, dict[str, list[float]]]:
    """Method to metric to values, in order of seed."""
    out: dict[str, dict[str, list[float]]] = {}
    for record in sorted(records, key=lambda r: r.run.seed):
        metrics = out.setdefault(record.run.method, {})
        for name, value in record.metrics.items():
            metrics.setdefault(name, []).append(value)
    return out
