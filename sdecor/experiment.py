"""Runs and their records: a run is described once, done once, found again by the hash of its description."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import sdecor
from sdecor._files import locked, replace_atomically, set_aside
from sdecor.data import load
from sdecor.measures.suite import measure
from sdecor.models import build
from sdecor.objective import METHODS, Objective
from sdecor.training import Schedule, device_of, fit

log = logging.getLogger("sdecor")
_OBJECTIVE = tuple(f.name for f in fields(Objective) if f.name != "score")
_SCHEDULE = tuple(f.name for f in fields(Schedule))


@dataclass(frozen=True)
class Run:
    """Description of one training run; equal descriptions have equal keys.

    Args:
        data: Name of a data set, as `sdecor.data.load` takes it.
        model: Name of a model, as `sdecor.models.build` takes it.
        method: Name in `sdecor.objective.METHODS`; settings of terms that it lacks are dropped from the description.
        seed: Of initialization, order and masks.
        evaluate_on: ``test`` for final numbers, ``val`` for choices.
        limit: Use only so many training images.
        data_options: Pairs handed to `sdecor.data.load`.
        epochs, batch_size, lr, weight_decay, shape, clip, augment: See `sdecor.training.Schedule`.
        lambda_c, lambda_d, fraction, fill, fill_value, direction, penalty, group_size, layers: See
            `sdecor.objective.Objective`.

    Raises:
        ValueError: If a setting is unknown or impossible.
    """

    data: str = "shapes"
    model: str = "lenet"
    method: str = "standard"
    seed: int = 0
    evaluate_on: str = "test"
    limit: int | None = None
    data_options: tuple[tuple[str, Any], ...] = ()
    epochs: int = 8
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    shape: str = "cosine"
    clip: float | None = 5.0
    augment: bool = False
    lambda_c: float = 1.0
    lambda_d: float = 1.0
    fraction: float = 0.5
    fill: str = "uniform"
    fill_value: float = 0.0
    direction: str = "clean_to_masked"
    penalty: str = "correlation"
    group_size: int | None = 16
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check, and reset what the method does not use, so that one run has one description."""
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "data_options", tuple(sorted((k, v) for k, v in self.data_options)))
        if self.evaluate_on not in ("val", "test"):
            raise ValueError(f"unknown evaluate_on '{self.evaluate_on}'; known: val, test")
        for f in fields(Run):
            if isinstance(f.default, float) and getattr(self, f.name) is not None:  # 1 and 1.0 are one description
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        objective, _ = self.objective, self.schedule
        unused = [] if objective.fill == "constant" else ["fill_value"]
        if objective.lambda_c == 0:
            unused += ["lambda_c", "fraction", "fill", "fill_value", "direction"]
        if objective.lambda_d == 0:
            unused += ["lambda_d", "penalty", "group_size", "layers"]
        for f in fields(Run):
            if f.name in unused:
                object.__setattr__(self, f.name, 0.0 if f.name.startswith("lambda") else f.default)

    @property
    def objective(self) -> Objective:
        """The terms and weights of this run."""
        return Objective.of(self.method, **{name: getattr(self, name) for name in _OBJECTIVE})

    @property
    def schedule(self) -> Schedule:
        """Length and rate of this run."""
        return Schedule(**{name: getattr(self, name) for name in _SCHEDULE})

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits made of the whole description."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Inverse of ``dataclasses.asdict`` after a journey through JSON.

        Raises:
            ValueError: If a name is unknown.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"unknown setting '{unknown[0]}'; known: {', '.join(sorted(names))}")
        pairs = {"data_options": tuple(tuple(p) for p in values.get("data_options", ()))}
        return cls(**{**values, **pairs})


@dataclass(frozen=True)
class Record:
    """What a run left: its description, measures, curves, and the circumstances.

    Args:
        run: The description.
        metrics: Name to number.
        curves: Name to list of numbers (loss terms an epoch; masked accuracy a share; histogram of gradients).
        environment: Device, threads, versions, commit, date (UTC), seconds of training and measuring.
        weights_sha256: Of the weights file.
    """

    run: Run
    metrics: dict[str, float]
    curves: dict[str, list[float]]
    environment: dict[str, Any]
    weights_sha256: str


def _read(path: Path) -> Record:
    """The record in a file, which is named by the key of its run.

    Raises:
        ValueError: If it is truncated, not a record, or of another run.
    """
    try:
        values = json.loads(path.read_text())
        record = Record(**{**values, "run": Run.from_dict(values["run"])})
        for part in (record.metrics, record.curves, record.environment):
            part.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if record.run.key != path.stem:
        raise ValueError("it describes another run")
    return record


class Store:
    """A folder of records and weights.

    ``results/DATA/KEY.json``, ``weights/DATA/KEY.safetensors``, and ``unfinished/`` while runs are under way.

    Args:
        root: The folder; made when first written to.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def _path(self, kind: str, run: Run, suffix: str) -> Path:
        folder = "".join(c if c.isalnum() or c in "-_" else "-" for c in run.data)
        return self.root / kind / folder / f"{run.key}{suffix}"

    def checkpoint(self, run: Run) -> Path:
        """Where an unfinished run keeps its state."""
        return self.root / "unfinished" / f"{run.key}.pt"

    def record(self, run: Run) -> Record | None:
        """The record of `run`, or None; an unreadable one is set aside and said so, and the run counts as not done."""
        path = self._path("results", run, ".json")
        try:
            return _read(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("record %s is not readable (%s); set aside as %s", path, error, set_aside(path).name)
            return None

    def records(self) -> Iterator[Record]:
        """All readable records, in order of file name; the others are named in a warning and left where they are."""
        for path in sorted(self.root.glob("results/*/*.json")):
            try:
                yield _read(path)
            except ValueError as error:
                log.warning("record %s is not readable (%s); left out", path, error)

    def model(self, run: Run, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
        """The trained model of a finished run, in evaluation mode.

        Raises:
            FileNotFoundError: If the run has no record or no weights here.
            ValueError: If the weights are not those of the record.
        """
        record, path = self.record(run), self._path("weights", run, ".safetensors")
        if record is None or not path.exists():
            raise FileNotFoundError(f"no weights of {run.method}, seed {run.seed}: {path} or its record is absent")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.weights_sha256:
            raise ValueError(f"{path} is not the file that its record describes; delete both to train again")
        model = build(run.model, in_channels, num_classes, image_size)
        model.load_state_dict(safetensors.torch.load(content))
        return model.eval()


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
        options = dict(run.data_options)
        train = load(run.data, root, "train", limit=run.limit, **options)
        held_out = load(run.data, root, run.evaluate_on, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = build(run.model, train.channels, train.num_classes, train.image_size)
        how: dict[str, Any] = {"device": device, "amp": amp, "compiled": compiled, "progress": progress}
        history = fit(model, train, run.objective, run.schedule, seed=run.seed, checkpoint=checkpoint, **how)
        final = run.evaluate_on == "test"  # choices need no curves
        metrics, curves = measure(model, held_out, layers=run.layers, device=where, masking=final)
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
        replace_atomically(store._path("weights", run, ".safetensors"), lambda f: f.write(content))
        text = json.dumps(asdict(record), indent=1, sort_keys=True).encode() + b"\n"
        replace_atomically(store._path("results", run, ".json"), lambda f: f.write(text))
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
