"""The command line: ``sdecor train | pace | grid | plan | run | merge | bundle | measure | show | list | data``.

Heavy imports wait for the command that needs them, so that ``sdecor --help`` is quick.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sdecor._files import expanded
from sdecor.config import FOLDER, PAIRED, Run, flat_fields, flat_options, method_grid
from sdecor.registers import REGISTERS, USE, literal

if TYPE_CHECKING:
    from sdecor.plan import Course
    from sdecor.store import Store

Command = Callable[..., Any]
SHARED = ("train", "grid", "run")  # commands that processes can work at together
TURN = 5.0  # seconds


class _OneLine(click.Group):
    """Commands whose foreseen errors are one line: exit code 2 if the request was wrong, 1 if the work failed."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has enough of it: click ends the process quietly
            raise
        except (ValueError, OSError, FloatingPointError) as error:
            if rank := _rank():  # what all have to say, process 0 says; torchrun then ends the others before they do
                time.sleep(TURN)
            click.echo(f"error{f' in process {rank}' if rank else ''}: {error}", err=True)
            ctx.exit(1 if isinstance(error, (FloatingPointError, ChildProcessError)) else 2)


def _several(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: reduce(lambda done, decorator: decorator(done), reversed(decorators), command)


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep the value of a setting in ``ctx.obj``, if it was given; an impossible one raises ValueError."""
    name = str(param.name)
    if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
        return
    if name in PAIRED:
        if wrong := [text for text in value if "=" not in text]:
            raise ValueError(f"{name} must look like NAME=VALUE, got '{wrong[0]}'")
        value = {key: literal(text) for key, _, text in (pair.partition("=") for pair in value)}
    ctx.ensure_object(dict)[name] = flat_options()[name].of_text(value) if isinstance(value, str) else value


def _settings(*without: str) -> Callable[[Command], Command]:
    """Give a command an option for every setting of a run; those that were given are kept as ``ctx.obj``."""
    options = []
    for name, option in flat_options().items():
        if name in (*without, "fingerprint", "code"):
            continue
        how: dict[str, Any] = {"default": None, "metavar": option.type_name.upper()}
        if name in PAIRED:
            how = {"multiple": True, "metavar": "NAME=VALUE"}
        elif option.hint is bool:
            how = {"is_flag": True, "default": None}
        default = "none" if option.default in ((), None) else option.default
        text, flag = f"{flat_fields()[name].metadata['help']} [default: {default}]", f"--{name.replace('_', '-')}"
        options.append(click.option(flag, name, help=text, expose_value=False, callback=_keep, **how))
    return _several(*options)


_root = click.option("--data-root", default="", help="Where data lie. [default: $SDECOR_DATA, or a cache folder]")
_where = _several(
    click.option("--store", default="", help="Folder of records and weights. [default: runs, below the data root]"),
    _root,
)
_device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
_named = _several(click.argument("name"), _root)
_PATH: Any = click.Path(path_type=Path)
_FROM_1: Any = {"type": click.IntRange(1), "show_default": True}
_only = click.option("--data", default="", help="Only runs on this data set.")
_way = _several(
    _device,
    click.option("--amp", is_flag=True, help="bfloat16 autocast."),
    click.option("--compile", "compiled", is_flag=True, help="Run the model through torch.compile."),
)
_work = _several(
    _where,
    _way,
    click.option("--quiet", is_flag=True, help="No progress bar."),
)


def _rank() -> int:
    """Number of this process among those that torchrun started, if it did."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@click.group(cls=_OneLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--use", multiple=True, help="Python file, or module, that registers something of your own. May be given again."
)
@click.pass_context
def app(ctx: click.Context, /, use: tuple[str, ...]) -> None:
    """SaliencyDecor: train, compare, measure."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        if ctx.invoked_subcommand not in SHARED:
            what = f"`sdecor {ctx.invoked_subcommand}` is work for one process; call it without torchrun"
            raise ValueError(f"{what}, which is for {', '.join(SHARED)}")
        if _rank():
            sys.stdout = open(os.devnull, "w")
    if absent := [name for name in use if name.endswith(".py") and not Path(name).is_file()]:
        raise FileNotFoundError(f"no file '{absent[0]}' to use")
    if use:  # in the environment, so that worker processes find it too
        os.environ[USE] = os.pathsep.join([*use, *filter(None, [os.environ.get(USE)])])


def _store(folder: str, root: str) -> Store:
    from sdecor.sources import data_root
    from sdecor.store import Store

    return Store(folder or data_root(root or None) / "runs")


@app.command()
@_settings()
@_work
@click.pass_context
def train(ctx: click.Context, /, store: str, data_root: str, quiet: bool, **how: Any) -> None:
    """Do one run, or read its record if it was done before."""
    from sdecor.experiment import execute
    from sdecor.processes import joined

    run, shelf = Run.of(**(ctx.obj or {})), _store(store, data_root)
    with joined(how["device"]) as how["device"]:
        record = execute(run, shelf, root=data_root or None, progress=False if quiet else None, **how)
    assert record is not None  # it would be None only if we had not waited for another process
    click.echo(f"{run.method} on {run.data.name}, seed {run.seed}: {run.key} in {shelf.root}")
    for name, value in sorted(record.metrics.items()):
        click.echo(f"  {name:24s} {value:.4f}")


@app.command()
@_settings()
@_root
@_way
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(1), help="To measure, about.")
@click.pass_context
def pace(ctx: click.Context, /, data_root: str, **how: Any) -> None:
    """Say how fast a run would go here, whether reading or the step is slower, and how long training would take."""
    from sdecor.pace import described, measured

    click.echo(measured(described(**(ctx.obj or {})), root=data_root or None, **how))


@app.command()
@click.option("--methods", default="all", show_default=True, help="Names with commas between, or all.")
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4, or 0,1,2.")
@click.option("--workers", default=1, **_FROM_1, help="Processes; GPUs are taken in turn.")
@click.option("--threads", default=1, **_FROM_1, help="CPU threads of each: other last bits.")
@_settings("method", "seed")
@_work
@click.pass_context
def grid(
    ctx: click.Context, /, methods: str, seeds: str, workers: int, store: str, data_root: str, quiet: bool, **how: Any
) -> None:
    """Do every method with every seed; stop it at any moment, start it again, and it goes on."""
    from sdecor import experiment
    from sdecor.processes import joined

    chosen = None if methods == "all" else methods.split(",")
    runs, shelf = method_grid(_numbers(seeds), chosen, **(ctx.obj or {})), _store(store, data_root)

    def count() -> None:
        done = sum(shelf.record(run) is not None for run in runs)
        click.echo(f"{len(runs)} runs in {shelf.root}: {done} done, {len(runs) - done} left")

    count()
    try:
        progress = False if quiet or workers > 1 else None
        with joined(how["device"]) as how["device"]:
            experiment.grid(runs, shelf, workers=workers, root=data_root or None, progress=progress, **how)
    finally:
        count()


_planned = _several(
    click.argument("name", metavar="PLAN"),
    click.option("--preset", default="cpu", show_default=True, help="Size: one of the plan's presets."),
)
_sized = _several(
    _device,
    click.option("--seeds", type=click.IntRange(1), help="How many, in place of the preset's."),
    click.option("--data", default="", help="A data set, or folder:PATH, in place of the plan's."),
)


def _plan(name: str) -> Path:
    """The file of a plan: `name` itself, or of that name in this folder or in book/experiments below it."""
    places = [Path(name)] if name.endswith(".toml") else [Path(f"{name}.toml"), Path(f"book/experiments/{name}.toml")]
    found = [place for place in places if place.is_file()]
    if not found:
        raise FileNotFoundError(f"no plan '{name}': looked for {' and '.join(map(str, places))}")
    return found[0]


def _course(name: str, preset: str, seeds: int | None = None, data: str = "") -> Course:
    """A plan at a preset."""
    from sdecor.plan import Plan

    return Plan.read(_plan(name)).at(preset, **({"seeds": seeds} if seeds else {}), **({"data": data} if data else {}))


@app.command("plan")
@_planned
@_sized
@_where
def show_plan(name: str, preset: str, seeds: int | None, data: str, device: str, store: str, data_root: str) -> None:
    """Say what a plan would run, what is done, and how long the rest takes here."""
    from sdecor import planned, rehearsal

    course, shelf = _course(name, preset, seeds, data), _store(store, data_root)
    prices = rehearsal.Prices(shelf, device, course.amp, root=data_root or None)
    click.echo(f"{course.plan.title} ({preset}), records in {shelf.root}")
    planned.say_otherwise(course, shelf, device)
    state = course.state(planned.accuracy(shelf))
    done = {todo.run.key: ready for todo, ready in planned.work(course, shelf, state)}
    for arm in course.arms.values():
        finals = [run for one, run in course.final(state) if one == arm]
        each = {"trials": state.trials.get(arm.name, ()), "final runs": finals}
        parts = [f"{sum(done[run.key] for run in runs)} of {len(runs)} {what}" for what, runs in each.items() if runs]
        if arm.name not in state.chosen:
            parts.append("no choice, since trials broke down" if arm.name in state.lost else "not chosen yet")
        click.echo(f"  {arm.name:32s} {', '.join(parts)}{', later' if arm.later else ''}")
    click.echo(_progress(course, shelf))
    if not all(done.values()):
        rehearsal.check(course, shelf, data_root or None)
        seconds, _ = planned.seconds_left(course, shelf, prices)
        click.echo(f"Those to do take about {_minutes(seconds)} one after another on {device}")


def _progress(course: Course, shelf: Store) -> str:
    """How many runs are done and to do, after a line for each that broke down."""
    from sdecor import planned

    state = course.state(planned.accuracy(shelf))
    listed = list(planned.work(course, shelf, state))
    broken = [todo for todo, ready in listed if ready and shelf.record(todo.run) is None]
    done, unknown = sum(ready for _, ready in listed), course.count(state)
    lines = [f"broke down: {todo.stage} of arm '{todo.arm}', {shelf.failure(todo.run)}" for todo in broken]
    more = f", and at most {unknown} that depend on these" if unknown else ""
    return "\n".join([*lines, f"{done - len(broken)} runs done, {len(listed) - done} to do{more}"])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


@app.command("run")
@_planned
@_sized
@_where
@click.option("--workers", default=1, **_FROM_1, help="Processes; GPUs are taken in turn.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each. [default: 1 if several, else torch's]")
@click.option("--budget", type=click.FloatRange(1), help="Seconds after which nothing goes on. [default: none]")
@click.option("--pack", "out", default="", help="Folder for a parcel of the records, which `merge` takes.")
@click.option("--compile", "compiled", is_flag=True, help="Run the models through torch.compile.")
def run_plan(
    name: str,
    preset: str,
    seeds: int | None,
    data: str,
    store: str,
    data_root: str,
    budget: float | None,
    out: str,
    **how: Any,
) -> None:
    """Work through a plan in order of value; stop it at any moment, start it again, and it goes on."""
    began = time.time()
    from sdecor import parcels, planned
    from sdecor.processes import joined

    course, shelf = _course(name, preset, seeds, data), _store(store, data_root)

    def pack() -> None:
        if out:
            done = [todo.run for todo, ready in planned.work(course, shelf) if ready]
            parcels.pack(done, shelf, Path(out), f"{course.plan.name}-{preset}")

    rest = math.inf if budget is None else budget - (time.time() - began)
    try:
        with joined(how["device"]) as how["device"]:
            planned.run_plan(course, shelf, root=data_root or None, budget=rest, after=pack, **how)
    finally:
        took = _minutes(time.time() - began)
        click.echo(f"{_progress(course, shelf)}, after {took}; records in {shelf.root}")


@app.command("merge")
@click.argument("source", type=_PATH)
@click.option("--store", required=True, help="Folder of records that takes them.")
def merge(source: Path, store: str) -> None:
    """Take the records of another store, or of a parcel, into a store; say what was taken."""
    from sdecor import parcels

    taken = parcels.merge(source, _store(store, ""))
    for record in taken.new:
        run = record.run
        click.echo(f"{run.key}: {run.method} on {run.data.name}, seed {run.seed}, {run.evaluate_on}")
    if taken.left:
        why = "belong to no store or no record, or are notes of runs that were done after all"
        click.echo(f"{len(taken.left)} files stay, since they {why}: {', '.join(taken.left[:5])}")
    if taken.busy:
        keys = ", ".join(record.run.key for record in taken.busy)
        click.echo(f"{len(taken.busy)} records were not taken, since their runs are being done there: {keys}")
    if taken.differ:
        click.echo(f"{len(taken.differ)} files are not like those there, which stay: {', '.join(taken.differ[:5])}")
    others = f"{taken.files} exhibits, tables and weights, {taken.failed} notes of broken runs"
    click.echo(f"{len(taken.new)} records taken, {taken.known} were there; {others}")


@app.command("bundle")
@_planned
@click.argument("out", type=_PATH)
@click.option("--data", multiple=True, type=_PATH, help="Tar file that unpacks into a data root, or a folder of one.")
@click.option("--wheel", "wheels", multiple=True, type=_PATH, help="Package that is missing there.")
@click.option("--limit", default=64.0, show_default=True, help="MiB that all of it may take.")
def make_bundle(name: str, preset: str, out: Path, limit: float, **parts: tuple[Path, ...]) -> None:
    """Put into the folder OUT, or the file OUT.tar, what a machine without network needs for a plan."""
    from sdecor.bundle import MIB, bundle

    made = bundle(_course(name, preset), _plan(name), out, limit=limit * MIB, **parts)
    for part, size in {**made.sizes, "all": sum(made.sizes.values())}.items():
        click.echo(f"{size / MIB:8.2f} MiB  {part}")
    if made.untracked:
        click.echo(f"not in it, since git does not track them: {', '.join(made.untracked)}")
    if made.absent:
        click.echo(f"not in it, since no --data brings them: {', '.join(made.absent)}; SDECOR_DATA must say where")
    if made.folders:
        click.echo(f"not in it, and wanted there in the same place: {', '.join(map(str, made.folders))}")
    click.echo(f"{out} has the module at {made.commit}; there: sh run.sh, with any options of `sdecor run`")


def _numbers(text: str) -> list[int]:
    """Whole numbers of ``0-4`` or ``0,1,2``."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"seeds must look like 0-4 or 0,1,2, got '{text}'")
    ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
    if sum(end[-1] - end[0] for end in ends) > 10_000:
        raise ValueError(f"there must be 10,000 seeds at most, got '{text}'")
    if wrong := [end for end in ends if end[0] > end[-1]]:
        raise ValueError(f"seeds must go upwards, such as {wrong[0][1]}-{wrong[0][0]}, got '{text}'")
    return list(dict.fromkeys(n for end in ends for n in range(end[0], end[-1] + 1)))


def _is_of(run: Run, data: str) -> bool:
    """Whether a run is on this data set, or on the folder of this path, however it is written."""
    same = run.data.path is not None and run.data.path == expanded(data.removeprefix(FOLDER)).resolve()
    return data in ("", run.data.name) or same


@app.command()
@_where
@_only
@_device
def measure(store: str, data_root: str, data: str, device: str) -> None:
    """Measure all finished runs again, with the measures of this version; needs their weights, trains nothing."""
    from sdecor.evaluation import measure_again

    shelf = _store(store, data_root)
    runs = [record.run for record in shelf.records() if _is_of(record.run, data)]
    todo = [run for run in runs if shelf.path("weights", run, ".safetensors").exists()]
    if not todo:
        raise ValueError(f"no weights{f' of {data}' if data else ''} in {shelf.root}; name another folder with --store")
    failed = 0
    for run in todo:
        try:
            measure_again(run, shelf, root=data_root or None, device=device)
        except (ValueError, OSError) as error:  # the others can be measured all the same
            click.echo(f"error: {error}", err=True)
            failed += 1
        else:
            click.echo(f"{run.method} on {run.data.name}, seed {run.seed}: {run.key}")
    rest = f"{len(runs) - len(todo)} without weights left as they were"
    click.echo(f"{len(todo) - failed} runs measured, {f'{failed} could not be, ' * bool(failed)}{rest}")
    if failed:
        raise click.exceptions.Exit(1)


@app.command()
@_where
@_only
@click.option("--run", default="", metavar="KEY", help="The whole record of one run; its first digits will do.")
def show(store: str, data_root: str, data: str, run: str) -> None:
    """Show what the records of a store say: mean ± standard deviation over seeds."""
    shelf = _store(store, data_root)
    if run:
        paths = sorted(p for p in shelf.root.glob("results/*/*.json") if p.stem.startswith(run))
        if len(paths) != 1:
            raise ValueError(f"{len(paths)} records in {shelf.root} have a key that begins with '{run}'")
        click.echo(paths[0].read_text(encoding="utf-8"), nl=False)
        return
    from sdecor.experiment import mixed
    from sdecor.report import overview

    records = [record for record in shelf.records() if _is_of(record.run, data)]
    if not records:
        raise ValueError(f"no records{f' of {data}' if data else ''} in {shelf.root}; name another folder with --store")
    mixed(records)
    click.echo(overview(records).to_string(index=False))


@app.command("list")
@click.argument("kind", default="", metavar="[KIND]")
@click.argument("name", default="", metavar="[NAME]")
def list_registers(kind: str, name: str) -> None:
    """List what can be named, all entries of a KIND, or one entry whole."""
    if kind and kind not in REGISTERS:
        raise ValueError(f"unknown kind '{kind}'; known: {', '.join(REGISTERS)}")
    if not kind:
        lines = [f"{plural:13s} {', '.join(register)}" for plural, register in REGISTERS.items()]
    elif not name:
        lines = [f"{entry.name:24s} {entry.about.splitlines()[0]}" for entry in REGISTERS[kind].values()]
    else:
        entry = REGISTERS[kind][name]
        lines = [f"{entry.name}: {entry.title}\n\n{entry.about}"]
        lines += [f"  {option.name}={option.default!r}" for option in entry.options.values()]
        lines += [f"{part}: {said}" for part in ("source", "licence", "cite") if (said := getattr(entry, part, ""))]
    click.echo("\n".join(lines))


@app.group()
def data() -> None:
    """List, fetch and check data sets."""


@data.command("list")
@_root
def list_data(data_root: str) -> None:
    """List the data sets: whether they are here, their licence, and where they come from."""
    from sdecor.sources import available

    for source in available(data_root or None):
        click.echo(f"{source.name:12s} {'present' if source.present else 'absent':8s} {source.title}")
        click.echo(f"{'':21s} {source.licence}\n{'':21s} {source.source}")


@data.command()
@_named
def fetch(name: str, data_root: str) -> None:
    """Download a data set, unless it is here."""
    from sdecor import sources

    click.echo(f"{name} is in {sources.fetch(name, data_root or None)}")


@data.command()
@_named
def check(name: str, data_root: str) -> None:
    """Compare the files of a data set with the register."""
    from sdecor import sources

    if problems := sources.check(name, data_root or None):
        click.echo("\n".join(f"error: {problem}" for problem in problems), err=True)
        raise click.exceptions.Exit(1)
    click.echo(f"{name} is as registered")


def main() -> None:
    """Run the command line."""
    app(prog_name="sdecor")


if __name__ == "__main__":
    main()
