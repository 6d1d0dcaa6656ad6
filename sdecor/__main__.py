"""The command line: ``sdecor train | grid | measure | show | chapter | data``, also as ``python -m sdecor``.

Heavy imports wait for the command that needs them, so that ``sdecor --help`` is quick.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from sdecor._options import Values, annotated, typed

if TYPE_CHECKING:
    from sdecor.experiment import Run, Store

_HERE = Path(__file__).resolve().parent
_METAVARS = {"tuple[str, ...]": "A,B,...", "tuple[tuple[str, Any], ...]": "NAME=VALUE,..."}


class _OneLine(TyperGroup):
    """Commands whose foreseen errors are one line: exit code 2 if the request was wrong, 1 if the work failed."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1 if isinstance(error, (FloatingPointError, ChildProcessError)) else 2) from error


app = typer.Typer(
    cls=_OneLine, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, fetch and check data sets.")
app.add_typer(data_app, name="data")


@app.callback()
def _about() -> None:
    """SaliencyDecor: train, compare, and run the chapters of the book."""


def _settings() -> tuple[Values, dict[str, str]]:
    """The fields of `Run` and what they mean, from the sources: importing them would import torch."""
    helps: dict[str, str] = {}
    values: Values = {}
    for file, name in (("training", "Schedule"), ("objective", "Objective"), ("runs", "Run")):
        tree = ast.parse((_HERE / f"{file}.py").read_text(encoding="utf-8"))
        node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
        values = annotated(node.body)
        for line in re.findall(r"\n {4}(\w+: .+(?:\n {8}.+)*)", ast.get_docstring(node) or ""):
            setting, text = " ".join(line.replace("`", "").split()).split(": ", 1)
            helps.setdefault(setting, text)
    return values, helps


StoreOption = Annotated[str, typer.Option(help="Folder of records and weights. [default: runs, below the data root]")]
RootOption = Annotated[str, typer.Option(help="Where data lie. [default: $SDECOR_DATA, or a folder of your cache]")]


def _store(folder: str, root: str) -> Store:
    from sdecor.experiment import Store
    from sdecor.sources import data_root

    return Store(folder or data_root(root or None) / "runs")


def _work(
    store: StoreOption = "",
    data_root: RootOption = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> tuple[Store, dict[str, Any]]:
    """Where to record, and how to execute."""
    how = {"root": data_root or None, "device": device, "amp": amp, "compiled": compile}
    return _store(store, data_root), {**how, "progress": False if quiet else None}


def _with_settings(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of `Run`, handed on as `settings`, and those of `_work`."""
    values, helps = _settings()
    for name in without:
        del values[name]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = []
        for function in (command, _work):
            hints = get_type_hints(function, localns={"Store": Any}, include_extras=True)
            own = inspect.signature(function).parameters.values()
            parameters += [p.replace(annotation=hints[p.name]) for p in own if p.default is not p.empty]
        mine = len(parameters) - len(inspect.signature(_work).parameters)
        for name, (kind, default) in values.items():
            option = typer.Option(
                help=f"{helps[name]} [default: {default if default != () else 'none'}]",
                metavar=None if kind == "bool" else _METAVARS.get(kind, kind.replace(" | None", "|none").upper()),
                show_default=False,
            )
            hint: Any = bool | None if kind == "bool" else str | None
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, option]
                )
            )

        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            texts = {name: value for name in values if (value := given.pop(name)) is not None}
            settings = {k: typed(k, values[k][0], v) if isinstance(v, str) else v for k, v in texts.items()}
            own = {p.name: given.pop(p.name) for p in parameters[:mine]}
            command(settings, *_work(**given), **own)

        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


@app.command()
@_with_settings()
def train(settings: dict[str, Any], shelf: Store, how: dict[str, Any]) -> None:
    """Do one run, or read its record if it was done before."""
    from sdecor.experiment import Run, execute

    run = Run(**settings)
    record = execute(run, shelf, **how)
    assert record is not None  # it would be None only if we had not waited for another process
    typer.echo(f"{run.method} on {run.data}, seed {run.seed}: {run.key} in {shelf.root}")
    for name, value in sorted(record.metrics.items()):
        typer.echo(f"  {name:24s} {value:.4f}")


@app.command()
@_with_settings("method", "seed")
def grid(
    settings: dict[str, Any],
    shelf: Store,
    how: dict[str, Any],
    methods: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Such as 0-4, or 0,1,2.")] = "0-4",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each; other numbers give other last bits.")] = 1,
) -> None:
    """Do every method with every seed; stop it at any moment, start it again, and it goes on."""
    from sdecor import experiment
    from sdecor.objective import METHODS

    chosen = METHODS if methods == "all" else methods.split(",")
    runs = experiment.method_grid(_numbers(seeds), chosen, **settings)

    def count() -> None:
        done = sum(shelf.record(run) is not None for run in runs)
        typer.echo(f"{len(runs)} runs in {shelf.root}: {done} done, {len(runs) - done} left")

    count()
    try:
        experiment.grid(
            runs, shelf, workers=workers, threads=threads, **{**how, **({"progress": False} if workers > 1 else {})}
        )
    finally:
        count()


def _numbers(text: str) -> list[int]:
    """Whole numbers of ``0-4`` or ``0,1,2``."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"seeds must look like 0-4 or 0,1,2, got '{text}'")
    ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
    return [n for end in ends for n in range(end[0], end[-1] + 1)]


@app.command()
def measure(
    store: StoreOption = "",
    data: Annotated[str, typer.Option(help="Only runs on this data set.")] = "",
    data_root: RootOption = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
) -> None:
    """Measure all finished runs again, with the measures of this version; needs their weights, trains nothing."""
    from sdecor.evaluation import measure_again

    shelf = _store(store, data_root)
    runs = [record.run for record in shelf.records() if data in ("", record.run.data)]
    todo = [run for run in runs if shelf.path("weights", run, ".safetensors").exists()]
    if not todo:
        raise ValueError(f"no weights{f' of {data}' if data else ''} in {shelf.root}; name another folder with --store")
    for run in todo:
        measure_again(run, shelf, root=data_root or None, device=device)
        typer.echo(f"{run.method} on {run.data}, seed {run.seed}: {run.key}")
    typer.echo(f"{len(todo)} runs measured, {len(runs) - len(todo)} without weights left as they were")


@app.command()
def show(
    store: StoreOption = "",
    data: Annotated[str, typer.Option(help="Only runs on this data set.")] = "",
    run: Annotated[
        str, typer.Option(metavar="KEY", help="The whole record of one run; its first digits will do.")
    ] = "",
    data_root: RootOption = "",
) -> None:
    """Show what the records of a store say: mean ± standard deviation over seeds."""
    shelf = _store(store, data_root)
    if run:
        paths = sorted(shelf.root.glob(f"results/*/{run}*.json"))
        if len(paths) != 1:
            raise ValueError(f"{len(paths)} records in {shelf.root} have a key that begins with '{run}'")
        typer.echo(paths[0].read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(_table(shelf, data))


def _table(shelf: Store, data: str) -> str:
    """A row for every description, seeds apart; columns for what sets the descriptions apart, then the measures."""
    from dataclasses import asdict, replace

    import pandas as pd

    from sdecor.measures.statistics import summary

    groups: dict[Run, list[Any]] = {}
    for record in shelf.records():
        if data in ("", record.run.data):
            groups.setdefault(replace(record.run, seed=0), []).append(record)
    if not groups:
        raise ValueError(f"no records{f' of {data}' if data else ''} in {shelf.root}; name another folder with --store")
    described = [asdict(run) for run in groups]
    named = ("data", "model", "method")
    differ = [name for name in described[0] if name not in named and len({str(d[name]) for d in described}) > 1]
    rows = []
    for description, records in zip(described, groups.values(), strict=True):
        row = {name: description[name] for name in (*named, *differ)}
        row["seeds"] = ",".join(str(seed) for seed in sorted(r.run.seed for r in records))
        for name in sorted({name for r in records for name in r.metrics}):
            values = [r.metrics[name] for r in records if name in r.metrics]
            mean, sd = summary(values)
            row[name] = f"{mean:.4f} ± {sd:.4f}" if len(values) > 1 else f"{mean:.4f}"
        rows.append(row)
    table = pd.DataFrame(rows).fillna("–").sort_values([*named, *differ], key=lambda column: column.map(str))
    return table.to_string(index=False)


@app.command(context_settings={"ignore_unknown_options": True})
def chapter(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="NAME [-p PARAMETER VALUE]...", show_default=False)
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE.ipynb", help="Where to write. [default: a temporary file]")] = "",
    publish: Annotated[bool, typer.Option("--publish", help="Replace the committed notebook.")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="Replace every notebook whose source has changed.")] = False,
) -> None:
    """Execute a chapter of the book, such as experiments/mnist, with checked parameters."""
    from sdecor import _chapters

    names, given, rest = [], {}, list(words or ())
    while rest:
        word = rest.pop(0)
        if word == "-p" and len(rest) > 1:
            name, text, *rest = rest
            given[name] = text
        elif word.startswith("-"):
            raise ValueError(f"unexpected '{word}'; a parameter is given as -p NAME VALUE")
        else:
            names.append(word)
    if len(names) != (0 if stale else 1):
        raise ValueError(f"give {'no' if stale else 'one'} chapter; known: {', '.join(_chapters.known())}")
    if (stale or publish) and (given or out):
        raise ValueError("a published chapter has default parameters and its own place: leave -p and --out away")
    if stale:
        names = [name for name in _chapters.known() if _chapters.is_stale(name)]
    for name in names:
        typer.echo(f"{name}: {_chapters.run(name, given, out=out, publish=publish or stale)}")
    if stale and not names:
        typer.echo("every notebook agrees with its source")


@data_app.command("list")
def list_data(data_root: RootOption = "") -> None:
    """List the data sets: whether they are here, their licence, and where they come from."""
    from sdecor.sources import available

    for source in available(data_root or None):
        typer.echo(f"{source.name:12s} {'present' if source.present else 'absent':8s} {source.title}")
        typer.echo(f"{'':21s} {source.licence}\n{'':21s} {source.source}")


@data_app.command()
def fetch(name: str, data_root: RootOption = "") -> None:
    """Download a data set, unless it is here."""
    from sdecor import sources

    typer.echo(f"{name} is in {sources.fetch(name, data_root or None)}")


@data_app.command()
def check(name: str, data_root: RootOption = "") -> None:
    """Compare the files of a data set with the registry."""
    from sdecor import sources

    if problems := sources.check(name, data_root or None):
        typer.echo("\n".join(f"error: {problem}" for problem in problems), err=True)
        raise typer.Exit(1)
    typer.echo(f"{name} is as registered")


def main() -> None:
    """Run the command line."""
    app(prog_name="sdecor")


if __name__ == "__main__":
    main()
