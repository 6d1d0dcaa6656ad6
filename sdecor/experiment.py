"""Runs are done once: executed unless their record is there, alone or many at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import sdecor
from sdecor._files import locked
from sdecor.data import load
from sdecor.images import ImageData, ImageStream, permutation
from sdecor.measures.suite import measure, remove_salient
from sdecor.models import build
from sdecor.objective import METHODS
from sdecor.runs import Record, Run, Store
from sdecor.training import device_of, fit

__all__ = ["Record", "Run", "Store", "data_of", "environment", "execute", "grid", "method_grid"]


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, commit and date of work done now."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        commit = subprocess.check_output(describe, cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        commit = "unknown"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdecor": sdecor.__version__,
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def data_of(
    run: Run, store: Store, split: str, *, root: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> ImageData | ImageStream:
    """The images and labels of a split as `run` has them: fewer, with other labels, or without their salient pixels.

    Args:
        run: Any run.
        store: Where, if pixels are removed, the network lies that says which.
        split: ``train``, ``val`` or ``test``.
        root: Data root (see `sdecor.data.load`).
        device: Where to compute which pixels go: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        FileNotFoundError: If the data or that network are absent.
        ValueError: If pixels are to be removed from images that are streamed.
    """
    limit = run.limit if split == "train" else None
    data = load(run.data, root, split, limit=limit, **dict(run.data_options))
    if run.permuted_labels and split == "train":
        data = replace(data, labels=data.labels[permutation(len(data), run.seed)])
    if not run.removed:
        return data
    model = None
    if run.removed_by != "random":
        base = replace(run, removed=0.0)
        model = store.model(base, data.channels, data.num_classes, data.image_size).to(device_of(device))
    return remove_salient(data, model, run.removed_by, run.removed)


def execute(
    run: Run,
    store: Store,
    *,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    amp: bool = False,
    compiled: bool = False,
    progress: bool | None = None,
    wait: bool = True,
) -> Record | None:
    """Do `run` unless its record is there; continue it if it was interrupted.

    Args:
        run: What to do.
        store: Where records and weights go.
        root: Data root (see `sdecor.data.load`).
        device: ``cpu``, ``cuda`` or ``auto``.
        amp: bfloat16 autocast.
        compiled: Run the model through ``torch.compile``.
        progress: Show a bar; None shows it on a terminal only.
        wait: Wait for another process that is at the same run.

    Returns:
        The record; None only if another process is at it and `wait` is off.
    """
    checkpoint = store.checkpoint(run)
    record = store.record(run)
    if record is not None and not any(checkpoint.parent.glob(f"{run.key}.*")):
        return record
    with locked(checkpoint.with_suffix(".lock"), wait=wait) as mine:
        if not mine:
            return record
        if (record := store.record(run)) is not None:  # finished by others while we waited, or killed when tidying up
            checkpoint.unlink(missing_ok=True)
            return record
        where, started = device_of(device), time.perf_counter()
        how: dict[str, Any] = {"device": device, "amp": amp, "compiled": compiled, "progress": progress}
        if run.removed and run.removed_by != "random":
            execute(replace(run, removed=0.0), store, root=root, **how)
        train, held_out = (data_of(run, store, s, root=root, device=device) for s in ("train", run.evaluate_on))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = build(run.model, train.channels, train.num_classes, train.image_size)
        history = fit(model, train, run.objective, run.schedule, seed=run.seed, checkpoint=checkpoint, **how)
        metrics, curves = measure(model, held_out, layers=run.layers, device=where, thorough=run.thorough)
        weights = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
        content = safetensors.torch.save(weights)
        took = {"training_seconds": sum(history.seconds), "session_seconds": time.perf_counter() - started}
        seconds = {name: round(value, 1) for name, value in took.items()}
        record = Record(
            run=run,
            metrics=metrics,
            curves={**{f"loss_{k}": v for k, v in history.terms.items()}, **curves},
            environment={**environment(where), "amp": amp, "compiled": compiled, **seconds},
            weights_sha256=hashlib.sha256(content).hexdigest(),
        )
        store.write(record, content)
        checkpoint.unlink(missing_ok=True)
        return record


def grid(
    runs: Iterable[Run], store: Store, *, workers: int = 1, threads: int | None = None, **settings: Any
) -> list[Record]:
    """Do all `runs`, those already recorded excepted, and return the records in the same order.

    Processes share the work by the locks of the store alone, so a second `grid` on the same store, from another shell
    or another machine with the same disk, simply helps.

    Args:
        runs: What to do.
        store: Where records and weights go.
        workers: Processes.
        threads: CPU threads of each; None keeps torch's number for one worker and takes 1 for several. The same number
            gives the same bits.
        settings: Handed to `execute`.

    Raises:
        ChildProcessError: If a worker failed.
    """
    todo = list(runs)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        how = {**settings, "threads": threads or 1}
        processes = [context.Process(target=grid, args=(todo, store), kwargs=how) for _ in todo[:workers]]
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


def method_grid(seeds: Iterable[int], methods: Iterable[str] = tuple(METHODS), **settings: Any) -> list[Run]:
    """Runs of every method with every seed, all else equal."""
    return [Run(method=m, seed=s, **settings) for s, m in product(seeds, methods)]
