"""How fast a run will go here, found on a few batches: reading images, the step, both together, and their memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from sdecor.config import Run, Schedule, checked_data
from sdecor.data import load
from sdecor.images import ImageData, ImageStream
from sdecor.rehearsal import BATCH, seconds_of_step
from sdecor.store import SHAPE, network
from sdecor.training import device_of, fit

_READ = 64  # images of a batch when these are only read
_STEPS = 6  # that the time should do for
_GIGABYTE = 1e9


@dataclass(frozen=True)
class Pace:
    """What was found out of a run; speeds are images a second."""

    run: Run
    images: int  #: In an epoch; what a last smaller batch would hold is left out.
    source: str  #: Where they come from, in words.
    reading: float  #: Batches as training takes them: decoded, put on the device, augmented and normalized.
    step: float  #: Steps of training on images that are ready on the device.
    together: float  #: The loop of training.
    batch: int  #: Images of a step of this loop, fewer than those of the run if there was no time for so many.
    memory: int  #: Bytes of this process and of those that decode, at most; 0 if that cannot be told here.
    gpu: int  #: Bytes of the GPU that torch held, at most.

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.images / self.together

    def __str__(self) -> str:
        """One line for each number, the slower of the two, and how long training takes."""
        run, epochs = self.run, self.run.schedule.epochs
        whole = min(run.schedule.batch_size, self.images)
        fewer = f", in batches of {self.batch} in place of {whole}"
        lines = [
            f"reading   {self.reading:10,.0f} images a second, {self.source}",
            f"step      {self.step:10,.0f} images a second, {run.method} with {run.model.name}, on images at hand",
            f"together  {self.together:10,.0f} images a second{fewer if self.batch < whole else ''}",
        ]
        if self.memory:
            lines.append(f"memory    {self.memory / _GIGABYTE:10.2f} GB at most, of this process and those that decode")
        if self.gpu:
            lines.append(f"GPU       {self.gpu / _GIGABYTE:10.2f} GB at most, held by torch")
        slow, fast = ("reading", "the step") if self.reading < self.step else ("the step", "reading")
        ratio = max(self.reading, self.step) / min(self.reading, self.step)
        lines.append(f"{slow} is the slower of the two: {fast} alone is {ratio:.1f} times as fast")
        training = f"{epochs} epochs {_said(epochs * self.epoch)}, without what is measured afterwards"
        lines.append(f"an epoch of {self.images:,} images takes about {_said(self.epoch)}, {training}")
        if run.data.removed:
            lines.append("left out: finding the pixels to remove")
        return "\n".join(lines)


def _said(seconds: float) -> str:
    return f"{seconds:.1f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes ({seconds / 3600:.2f} hours)"


def described(**flat: Any) -> Run:
    """As `Run.of`, but a folder is not read for its fingerprint, which a record would need."""
    _, folder, _ = checked_data(flat.get("data", Run().data.name), None, {})
    return Run.of(**{**flat, **({"fingerprint": "not read"} if folder else {})})


def measured(
    run: Run,
    *,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    amp: bool = False,
    compiled: bool = False,
    seconds: float = 20.0,
) -> Pace:
    """Find out the pace of `run` in about so many `seconds`, without those that loading its data takes.

    The rest is as for `sdecor.experiment.execute`. Nothing is kept. What the step takes by itself is measured on noise;
    the rest on training images, in the order of an epoch, as `sdecor.training.fit` takes them.

    Raises:
        ValueError: If the run cannot be trained.
        FileNotFoundError: If the data are absent.
    """
    began, where, d = time.perf_counter(), device_of(device), run.data
    data = load(d.name, root, "train", **d.part, **dict(d.options))
    batch, loading = min(run.schedule.batch_size, len(data)), time.perf_counter() - began
    how: dict[str, Any] = {"device": device, "amp": amp, "compiled": compiled}
    shape = {name: getattr(data, name) for name in SHAPE}
    try:
        with torch.random.fork_rng(devices=[]):
            step = batch / seconds_of_step(run, shape, batch, **how)
        left = max(seconds - (time.perf_counter() - began - loading), seconds / 2) / 2
        with Peak(where) as peak, torch.random.fork_rng(devices=[]):
            reading = _reading(data.to(where), run.schedule, min(batch, _READ), left)
            few = int(left / _STEPS / (1 / reading + 1 / step))
            tried = min(batch, max(few, BATCH))
            together = _training(run, shape, data, tried, left, how)
    except RuntimeError as error:
        raise ValueError(f"it cannot be trained: {error}") from error
    source = "from memory"
    if isinstance(data, ImageStream):
        source = f"decoded {f'by {data.workers} processes' if data.workers else 'here'} to {data.image_size} pixels"
    return Pace(run, len(data) // batch * batch, source, reading, step, together, tried, peak.memory, peak.gpu)


def _reading(data: ImageData | ImageStream, plan: Schedule, batch: int, seconds: float) -> float:
    draw = torch.Generator(data.device).manual_seed(1)  # not the images that training begins with
    how: dict[str, Any] = {"shuffle": True, "augment": plan.augment, "drop_last": True, "layout": torch.channels_last}
    clock = _Clock(data.device, seconds)
    for _ in chain.from_iterable(data.batches(batch, generator=draw, **how) for _ in count()):
        if clock.over():
            break
    return batch * clock.speed


def _training(
    run: Run, shape: dict[str, int], data: ImageData | ImageStream, batch: int, seconds: float, how: dict[str, Any]
) -> float:
    clock = _Clock(device_of(how["device"]), seconds)
    plan = _Watched(**{**asdict(run.schedule), "batch_size": batch, "epochs": 10**9, "lr": 1e-9}, over=clock.over)
    try:
        fit(network(run, shape), data, run.objective, plan, seed=run.seed, progress=False, **how)
    except _Over:
        pass
    return batch * clock.speed


class _Over(Exception):
    """There is no time for another step."""


@dataclass(frozen=True)
class _Watched(Schedule):
    """A schedule that goes nowhere, and ends training when it is time."""

    over: Callable[[], bool] = field(default=lambda: False)

    def rate(self, step: int, steps: int) -> float:
        """The same for all, or `_Over`."""
        if self.over():
            raise _Over
        return self.lr


class _Clock:
    """Steps a second, without those in which what is needed once is made: processes, buffers, a graph."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self.calls, self.speed = device, seconds, 0, 0.0
        self.first = 6 if device.type == "cuda" else 3

    def over(self) -> bool:
        """Whether the time is over, before the next step."""
        self.calls += 1
        if self.calls < self.first:
            return False
        if self.calls == self.first:
            self.began = self._now()
        elif time.perf_counter() - self.began > self.seconds:
            self.speed = (self.calls - self.first) / (self._now() - self.began)
        return self.speed > 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Peak:
    """The most `memory` that this process and those that it started had, in bytes, while a block ran, and of the `gpu`.

    Pages that processes share count once; what is on its way from one to the other does not count. Only Linux says so
    much; elsewhere `memory` is 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.memory, self.gpu = device, 0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        if self.device.type == "cuda":
            self.gpu = torch.cuda.max_memory_reserved(self.device)

    def _watch(self) -> None:
        while True:
            self.memory = max(self.memory, sum(map(_memory, _family(os.getpid()))))
            if self._end.wait(0.2):
                return


def _family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for of in found:
        for path in Path(f"/proc/{of}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                pass  # it has ended
    return found


def _memory(process: int) -> int:
    """Bytes of a process that are in memory, of shared ones its share; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


__all__ = ["Pace", "Peak", "described", "measured"]
