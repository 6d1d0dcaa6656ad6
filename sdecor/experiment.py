"""Runs are done once: executed unless their record is there, alone or many at a time."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sdecor import registers
from sdecor._code import foreign
from sdecor._files import locked
from sdecor.config import Data, Run
from sdecor.evaluation import exhibit, held_out_of, measure, own_measures
from sdecor.images import ImageData, ImageStream
from sdecor.prepare import data_of, without_removal
from sdecor.processes import alone, number, rank, told
from sdecor.store import SHAPE, Record, Store, environment, network
from sdecor.training import History, device_of, fit, way

log = logging.getLogger("sdecor")
_TRAIN = "train"  # what process 0 tells the others to do
SAID = {"amp": "bfloat16", "compiled": "compiled"}  # in a way of computing


def execute(
    run: Run,
    store: Store,
    *,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    amp: bool = False,
    compiled: bool = False,
    progress: bool | None = None,
    after_epoch: Callable[[int, History], None] | None = None,
    wait: bool = True,
    say: bool = True,
) -> Record | None:
    """Do `run` unless its record is in `store`; continue it if it was interrupted.

    `root` is the data root (see `sdecor.data.load`); `device`, `amp`, `compiled`, `progress` and `after_epoch` are
    those of `sdecor.training.fit`. The result is None only if another process is at it and `wait` is off. How a record
    was computed is no part of the description: one that was computed in another way counts, and `say` has a warning say
    so.

    Within `sdecor.processes.joined`, all processes have to call it and train together; process 0 finds out what is to
    be done, holds the lock, measures and writes, and all get its result.
    """
    how: dict[str, Any] = {"device": device, "amp": amp, "compiled": compiled, "progress": progress}
    how |= {"after_epoch": after_epoch}
    if rank():
        while (said := told()) == _TRAIN:
            _done(run, store, root, how)
        return Record.of_json(said) if said else None
    record = _executed(run, store, root, how, wait, say)
    if number() > 1:
        told(record.to_json() if record else "")
    return record


def _executed(
    run: Run, store: Store, root: str | os.PathLike[str] | None, how: dict[str, Any], wait: bool, say: bool
) -> Record | None:
    checkpoint, device = store.checkpoint(run), how["device"]
    if (record := store.record(run)) is not None and say:
        otherwise([record], store, device, how["amp"], how["compiled"])
    if record is not None and not any(checkpoint.parent.glob(f"{run.key}.*")):
        if foreign(registers.DATASETS[run.data.entry].function):  # whose files nobody knows
            for split in ("train", run.evaluate_on):
                held_out_of(run, store, root, device, split)
        return record
    with locked(checkpoint.with_suffix(".lock"), wait=wait) as mine:
        if not mine:
            return record
        if (record := store.record(run)) is None:  # else finished by others while we waited, or killed when tidying up
            told(_TRAIN)
            record = _done(run, store, root, how)
        checkpoint.unlink(missing_ok=True)
        return record


def otherwise(
    records: Iterable[Record], store: Store, device: str = "cpu", amp: bool = False, compiled: bool = False
) -> None:
    """Warn of records that were computed in another way than is asked for now, a line for each way."""
    records = list(records)
    wanted = way(torch.device("cuda") if device.startswith("cuda") else device_of(device), amp, compiled, number())
    found = Counter(" and ".join(r.ways) for r in records if r.ways and r.ways != [wanted])
    for had, count in found.items():
        what = f"{count} records in {store.root} were" if count > 1 else f"the record in {store.root} was"
        log.warning("%s computed on %s, not on %s as is asked for now; delete to compute anew", what, had, wanted)
    now = own_measures()
    if stale := [r.run.key for r in records if now and r.environment.get("own_measures", "") != now]:
        what = f"{len(stale)} records, such as {stale[0]}, were"
        log.warning("%s measured without your own measures as they are now; `sdecor measure` does it again", what)


def mixed(records: Iterable[Record]) -> None:
    """Warn of records on one data set that were computed in several ways, or on other images at the same seed."""
    ways: dict[str, Counter[str]] = defaultdict(Counter)
    images: dict[tuple[Data, int, str], set[str]] = defaultdict(set)
    for record in records:
        run = record.run
        if record.ways:
            ways[run.data.name][" and ".join(record.ways)] += 1
        for split, digest in record.environment.get("images", {}).items():
            images[run.data, run.seed, split].add(digest)
    for data, found in ways.items():
        if len(found) > 1:
            each = "; ".join(f"{count} on {had}" for had, count in found.items())
            log.warning("the records of %s were not all computed in one way: %s", data, each)
    for (of, seed, split), digests in images.items():
        if len(digests) > 1:
            log.warning("the %s images of %s at seed %d are not the same in all records", split, of.name, seed)


def _done(run: Run, store: Store, root: str | os.PathLike[str] | None, how: dict[str, Any]) -> Record | None:
    """Train, measure, and write what is left; of several processes, process 0 does all but train."""
    where, started = device_of(how["device"]), time.perf_counter()
    if run.data.removed and run.data.removed_by != "random":
        execute(without_removal(run), store, root=root, **how)
    splits = ("train", run.evaluate_on)
    train, held_out = (data_of(run, store, split, root=root, device=how["device"]) for split in splits)
    shape: dict[str, int] = {name: getattr(train, name) for name in SHAPE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = network(run, shape)
    spare = 5.0 if where.type == "cuda" else 0.0
    kept: dict[str, Any] = {"checkpoint": store.checkpoint(run), "spare": spare}
    history = fit(model, train, run.objective, run.schedule, seed=run.seed, **kept, **how)
    if rank():
        return None
    with alone():
        return _measured(run, store, model, (train, held_out), shape, history, where, started)


def _measured(
    run: Run,
    store: Store,
    model: nn.Module,
    data: tuple[ImageData | ImageStream, ImageData | ImageStream],
    shape: dict[str, int],
    history: History,
    where: torch.device,
    started: float,
) -> Record:
    """Measure what was trained, and write what is left."""
    train, held_out = data
    layers = run.objective.settings.get("layers", ())
    wanted: dict[str, Any] = {"thorough": run.thorough, "curve_images": run.curve_images, "tuning": run.tuning}
    metrics, curves = measure(model, held_out, layers=layers, device=where, train=train, **wanted)
    shown = exhibit(model, held_out, device=where) if run.thorough else None
    ways = list(dict.fromkeys(history.computed))
    images = {} if run.data.removed else {"train": train.digest, run.evaluate_on: held_out.digest}
    circumstances = {**environment(where), "data": train.name, "images": images, "ways": ways}
    circumstances |= {"own_measures": own} if (own := own_measures()) else {}
    circumstances |= {name: any(said in one for one in ways) for name, said in SAID.items()}
    took = {"training_seconds": sum(history.seconds), "session_seconds": time.perf_counter() - started}
    seconds = {name: round(value, 1) for name, value in took.items()}
    state = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    content = safetensors.torch.save(state)
    record = Record(
        run=run,
        metrics=metrics,
        curves={**{f"loss_{name}": values for name, values in history.terms.items()}, **curves},
        shape=shape,
        environment={**circumstances, **seconds},
        weights_sha256=hashlib.sha256(content).hexdigest(),
    )
    store.write(record, content, shown)
    return record


def grid(
    runs: Iterable[Run], store: Store, *, workers: int = 1, threads: int | None = None, **settings: Any
) -> list[Record]:
    """Do all `runs`, those already recorded excepted, and return the records in the same order.

    Processes share the work by the locks of the store alone, so a second `grid` on the same store, from another shell
    or another machine with the same disk, simply helps. Where there are several GPUs, workers take them in turn. Each
    has so many CPU `threads`; None keeps torch's number for one worker and takes 1 for several. The same number gives
    the same bits. `settings` go to `execute`. If a worker fails, ChildProcessError says so.
    """
    todo = list(runs)
    if workers > 1 and number() > 1:
        raise ValueError(f"workers={workers} cannot be started by each of {number()} processes; use workers=1")
    if settings.get("say", True):
        asked: Any = {name: settings[name] for name in ("device", "amp", "compiled") if name in settings}
        otherwise([record for run in todo if (record := store.record(run)) is not None], store, **asked)
    settings["say"] = False
    if workers > 1:
        for run in (run for run in todo if run.model.name.startswith("__main__:")):
            raise ValueError(f"model '{run.model.name}' is not to be found by other processes; put it into a file")
        context = multiprocessing.get_context("spawn")
        how = {**settings, "threads": threads or 1}
        places = devices(how.get("device", "cpu"), min(workers, len(todo)))
        how_at = [{**how, "device": place} for place in places]
        processes = [context.Process(target=grid, args=(todo, store), kwargs=each) for each in how_at]
        for p in processes:
            p.start()
        for p in processes:
            p.join()
        if failed := [p.exitcode for p in processes if p.exitcode]:
            raise ChildProcessError(f"{len(failed)} of {len(processes)} workers failed; their output says why")
    elif threads is not None:
        torch.set_num_threads(threads)
    for run in todo:
        execute(run, store, **{**settings, "wait": False})
    return [record for run in todo if (record := execute(run, store, **settings)) is not None]


def devices(name: str, workers: int) -> list[str]:
    """A device for each worker: the GPUs that are there, one after the other, if `name` leaves open which."""
    count = torch.cuda.device_count() if name in ("cuda", "auto") else 0
    return [f"cuda:{i % count}" if count else name for i in range(workers)]
