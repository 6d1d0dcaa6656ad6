"""Before the runs of a plan: whether its arms can be trained and its claims told at all, and how long runs take."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sdecor.config import Run
from sdecor.data import load
from sdecor.evaluation import CELLS, plays
from sdecor.images import ImageData
from sdecor.measures.case import needs
from sdecor.models import default_layers
from sdecor.plan import OF_DELETION, OF_LAYERS, OF_OBJECTS, Course, within
from sdecor.prepare import data_of, without_removal
from sdecor.registers import MEASURES, OneOf
from sdecor.store import SHAPE, Record, Store, network
from sdecor.training import device_of, epochs_done, fit

Root = str | os.PathLike[str] | None
FEW, SHORT = 16, 0.5  # images of a first trial step, and seconds below which a whole one is tried
BATCH = 4  # images of a step that is only to show whether it can be taken


def _shape(run: Run, store: Store, root: Root) -> dict[str, int]:
    """What a network is built for, the number of training images, and whether there are masks of objects."""
    data = data_of(without_removal(run), store, "train", root=root)
    about = {"images": len(data), "masks": data.has_masks}
    return {**{name: getattr(data, name) for name in SHAPE}, **about}


def _step(run: Run, shape: Mapping[str, int], batch: int, steps: int = 1, epochs: int = 1, **how: Any) -> float:
    """Seconds of a step, in the quickest of some epochs: on noise, and without getting anywhere."""
    noise = torch.randint(256, (steps * batch, shape["channels"], *[shape["image_size"]] * 2), dtype=torch.uint8)
    data = ImageData.from_tensors(noise, torch.arange(len(noise)) % shape["num_classes"])
    short = run.but(epochs=epochs, batch_size=batch, lr=1e-9).schedule
    return min(fit(network(run, shape), data, run.objective, short, progress=False, **how).seconds) / steps


def seconds_of_step(run: Run, shape: Mapping[str, int], batch: int, device: str = "cpu", **how: Any) -> float:
    """Seconds of a step of so many images, which are ready on the device; on a slow one by a part of them.

    `shape` has what a network is built for, and `how` goes to `sdecor.training.fit`. FloatingPointError and
    RuntimeError if the step cannot be taken.
    """
    few, gpu = min(batch, FEW), device_of(device).type == "cuda"
    took = _step(run, shape, few, epochs=2, device=device, **how) * batch / few
    if took < SHORT or gpu:  # else the time grows with the images, and need not be spent
        took = _step(run, shape, batch, steps=2, epochs=5 if gpu else 3, device=device, **how)
    return took


def check(course: Course, store: Store, root: Root = None, until: float = math.inf) -> None:
    """Take a step of every arm, on noise, so that what the data or a network make impossible is named at once.

    At the time `until`, in seconds since the epoch, the rest is left for another time.

    Raises:
        ValueError: If an arm cannot be trained, or a claim is about what its records will not hold: features that its
            networks do not have, masks that the data do not, or a game that the networks do not play.
        FileNotFoundError: If the data are absent, or one of the splits that trials and final runs are measured on.
    """
    shapes: dict[Any, dict[str, int]] = {}
    tested: set[Any] = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a step is slower with more, and others may be working
    try:
        for name, run in ((name, run) for name, trials in course.possible().items() for run in trials):
            if time.time() > until:
                return
            if run.data not in shapes:
                shapes[run.data] = _shape(run, store, root)
                for split in ("val", "test"):
                    load(run.data.name, root, split, limit=1, **dict(run.data.options))
            kind = run.data, run.model, run.method, *run.objective.terms, *run.objective.settings.items()
            with within(f"arm '{name}'"):
                if kind not in tested:
                    tested.add(kind)
                    _check_step(run, shapes[run.data])
                _check_claims(course, name, run, shapes[run.data])
    finally:
        torch.set_num_threads(threads)


def _check_step(run: Run, shape: Mapping[str, int]) -> None:
    try:
        _step(run, shape, BATCH)
    except FloatingPointError:
        pass  # on noise; what becomes of images, training will tell
    except RuntimeError as error:
        raise ValueError(f"it cannot be trained: {error}") from error


def _check_claims(course: Course, arm: str, run: Run, shape: Mapping[str, int]) -> None:
    if not (claims := [claim for claim in course.claims if arm in (claim.arm, claim.against)]):
        return
    model = network(run, shape)
    image = torch.zeros(1, shape["channels"], *[shape["image_size"]] * 2)
    layers = run.objective.settings.get("layers") or default_layers(model, image)
    known = [f"{measure}_{layer}" for measure in OF_LAYERS for layer in layers]
    for claim in claims:
        what = f"measure of claim '{claim.name}'"
        if claim.measure.startswith(OF_LAYERS):
            OneOf(known).check(what, claim.measure)
        elif claim.measure == "grid_pointing_game" and not plays(model, image, shape["num_classes"]):
            need = f"average over positions and {CELLS} classes or more"
            raise ValueError(f"{what}: grid_pointing_game needs networks with an {need}, not '{run.model.name}'")
        elif claim.measure in OF_DELETION and not run.tuning_epochs:
            raise ValueError(f"{what}: {claim.measure} needs tuning_epochs, and there are none")
        if _of_masks(claim.measure) and not shape["masks"]:
            raise ValueError(f"{what}: {claim.measure} needs masks of objects, and '{run.data.name}' has none")


def _of_masks(measure: str) -> bool:
    of = measure.removeprefix("tuned_")
    return measure in OF_OBJECTS or (of in MEASURES and "mask" in needs(of))


class Prices:
    """Seconds that runs take here: the median of those before, else by a trial of a few steps."""

    def __init__(self, store: Store, device: str, amp: bool = False, root: Root = None) -> None:
        self.store, self.device, self.amp, self.root = store, device, amp, root
        where = device_of(device)
        self._name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
        self._read: set[str] = set()
        self._times: dict[Any, list[float]] = {}
        self._guesses: dict[Any, float] = {}
        self._begun: dict[tuple[Path, int], int] = {}
        self._shapes: dict[Any, dict[str, int]] = {}

    def update(self) -> None:
        """Read what was measured since."""
        for path in self.store.root.glob("results/*/*.json"):
            if path.stem not in self._read:
                self._read.add(path.stem)
                with suppress(ValueError, FileNotFoundError):  # whoever asks for it will say so
                    self._learn(Record.of_json(path.read_text(encoding="utf-8")))

    def _learn(self, record: Record) -> None:
        about, run = record.environment, record.run
        trained, total = about.get("training_seconds"), about.get("session_seconds", 0.0)
        if trained is None or not about["device"].startswith(self._name) or bool(about.get("amp")) != self.amp:
            return
        self._times.setdefault((run.method, *self._size(run)), []).append(trained / run.schedule.epochs)
        if total >= trained:  # else it was begun in another session
            self._times.setdefault(self._kind(run), []).append(total - trained)

    @staticmethod
    def _size(run: Run) -> tuple[Any, ...]:
        return run.data, run.model, run.schedule.batch_size

    def _kind(self, run: Run) -> tuple[Any, ...]:
        """What the time beside training depends on."""
        return run.thorough, run.tuning_epochs, run.curve_images, *self._size(run)

    def seconds(self, run: Run) -> float:
        """How long a run takes, without the epochs that are behind it."""
        method, kind = (run.method, *self._size(run)), self._kind(run)
        epoch = statistics.median(self._times[method]) if method in self._times else self._guess(run)
        guess = 6 + run.tuning_epochs if run.thorough else 1
        rest = statistics.median(self._times[kind]) if kind in self._times else guess * epoch
        return (run.schedule.epochs - self._done(self.store.checkpoint(run))) * epoch + rest

    def _done(self, checkpoint: Path) -> int:
        """Epochs that an unfinished run has behind it."""
        with suppress(FileNotFoundError):  # it may be finished any moment
            state = checkpoint, checkpoint.stat().st_mtime_ns
            if state not in self._begun:
                self._begun[state] = epochs_done(checkpoint)
            return self._begun[state]
        return 0

    def _guess(self, run: Run) -> float:
        """Seconds of an epoch, by those of a few steps."""
        key = run.method, *self._size(run)
        if key not in self._guesses:
            if run.data not in self._shapes:
                self._shapes[run.data] = _shape(run, self.store, self.root)
            shape = self._shapes[run.data]
            batch = min(run.schedule.batch_size, shape["images"])
            with suppress(FloatingPointError, RuntimeError):  # it costs nothing to see what becomes of images
                took = seconds_of_step(run, shape, batch, self.device, amp=self.amp)
                self._guesses[key] = took * (shape["images"] // batch)
        return self._guesses.setdefault(key, 0.0)
