"""Working through a plan within a budget of time, and how long the rest takes.

Any number of processes, on one machine or several with the same disk, share the work by the locks of the store. Each
takes the first run, in the plan's order of value, that nobody is at and that will be done in time; so whenever the work
ends, what is there is a complete smaller table. What was begun goes on from its last epoch.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sdecor.config import Run
from sdecor.experiment import devices, execute
from sdecor.images import ImageData
from sdecor.plan import Course, State
from sdecor.prepare import data_of
from sdecor.store import Record, Store, network
from sdecor.training import History, device_of, fit

log = logging.getLogger("sdecor")
MARGIN = 1.15  # how much longer than last time a run may take
GRACE = 5.0  # seconds after the budget in which a worker may come to the end of an epoch
PAUSE = 0.5


class OutOfTime(Exception):
    """The budget is spent; the run goes on from its checkpoint next time."""


def accuracy(store: Store) -> Callable[[Run], float | None]:
    """What the records of a store say of trials, as `sdecor.plan.Course` asks for it."""
    known: dict[str, float | None] = {}

    def of(run: Run) -> float | None:
        if known.get(run.key) is None:
            record = store.record(run)
            broke = -math.inf if record is None and store.failure(run) else None
            known[run.key] = broke if record is None else record.metrics["accuracy"]
        return known[run.key]

    return of


@dataclass(frozen=True)
class Todo:
    """A run of a plan that is not done."""

    arm: str
    run: Run
    stage: str  #: ``trial`` or ``final``.


def work(course: Course, store: Store, state: State | None = None) -> Iterator[tuple[Todo, bool]]:
    """Every run of a plan that is known by now, in order of value, and whether it is done."""
    state = state or course.state(accuracy(store))
    listed: list[Todo] = []
    for later in (False, True):
        trials = {arm: runs for arm, runs in state.trials.items() if course.arms[arm].later == later}
        listed += [Todo(arm, run, "trial") for arm, runs in trials.items() for run in runs]
        listed += [Todo(arm.name, run, "final") for arm, run in course.final(state) if arm.later == later]
    seen: set[str] = set()
    for todo in listed:
        if todo.run.key not in seen:
            seen.add(todo.run.key)
            yield todo, store.record(todo.run) is not None or bool(store.failure(todo.run))


def records(course: Course, store: Store) -> dict[str, list[Record]]:
    """The records of the final runs that are done, by arm."""
    found: dict[str, list[Record]] = {}
    for arm, run in course.final(course.state(accuracy(store))):
        if (record := store.record(run)) is not None:
            found.setdefault(arm.name, []).append(record)
    return found


@dataclass
class Prices:
    """Seconds that runs take here: as runs before them took, else by a trial of a few steps."""

    store: Store
    device: str
    amp: bool = False
    root: str | os.PathLike[str] | None = None
    known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._where = device_of(self.device)
        on = self._where
        self._name = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
        self._read: set[str] = set()

    def update(self) -> None:
        """Read what was measured since."""
        for path in self.store.root.glob("results/*/*.json"):
            if path.stem not in self._read:
                self._read.add(path.stem)
                try:
                    self._learn(Record.of_json(path.read_text(encoding="utf-8")))
                except ValueError:
                    continue  # whoever asks for it will say so

    def _learn(self, record: Record) -> None:
        about = record.environment
        if about.get("device", "").startswith(self._name) and bool(about.get("amp")) == self.amp:
            trained, total = about["training_seconds"], about["session_seconds"]
            self.known["epoch", self._size(record.run), record.run.method] = trained / record.run.schedule.epochs
            if total >= trained:  # else it was begun in another session
                self.known["rest", self._size(record.run), record.run.thorough] = total - trained

    @staticmethod
    def _size(run: Run) -> Any:
        return run.data, run.model, run.schedule.batch_size

    def seconds(self, run: Run) -> float:
        """How long all of a run takes."""
        size = self._size(run)
        if ("epoch", size, run.method) not in self.known:
            self.known["epoch", size, run.method] = self._trial(run)
        epoch = self.known["epoch", size, run.method]
        rest = self.known.get(("rest", size, run.thorough), (6 if run.thorough else 1) * epoch)
        return run.schedule.epochs * epoch + rest

    def _trial(self, run: Run) -> float:
        """Seconds an epoch takes, by the quickest of a few epochs of two steps on noise."""
        train = self._shape(run)
        batch = min(run.schedule.batch_size, train["images"])
        noise = torch.randint(256, (2 * batch, train["channels"], *[train["image_size"]] * 2), dtype=torch.uint8)
        data = ImageData.from_tensors(noise, torch.arange(2 * batch) % train["num_classes"])
        short = run.but(epochs=5 if self._where.type == "cuda" else 3)
        how: dict[str, Any] = {"device": self.device, "amp": self.amp, "progress": False}
        history = fit(network(run, train), data, run.objective, short.schedule, **how)
        return min(history.seconds) / 2 * max(train["images"] // batch, 1)

    def _shape(self, run: Run) -> dict[str, int]:
        key = ("shape", run.data)
        if key not in self.known:
            data = data_of(run, self.store, "train", root=self.root)
            names = ("channels", "num_classes", "image_size")
            self.known[key] = {**{n: getattr(data, n) for n in names}, "images": len(data)}
        return dict(self.known[key])

def run_plan(
    course: Course,
    store: Store,
    *,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    budget: float = math.inf,
    compiled: bool = False,
    after: Callable[[], None] | None = None,
) -> None:
    """Work through a plan with so many processes, for at most `budget` seconds and `GRACE` more.

    Several workers share one GPU, or take several in turn, and have one CPU thread each unless `threads` says
    otherwise. `after` is called now and then in this process, and at the end. If a worker dies, the others go on, and
    ChildProcessError is raised at the end.
    """
    deadline = time.time() + budget
    context = multiprocessing.get_context("spawn")
    count = threads or (1 if workers > 1 or device_of(device).type == "cuda" else None)
    how: dict[str, Any] = {"root": root, "compiled": compiled, "threads": count, "deadline": deadline}
    places = devices(device, workers)
    processes = [context.Process(target=_work, args=(course, store), kwargs={**how, "device": p}) for p in places]
    for p in processes:
        p.start()
    try:
        last = time.time()
        while any(p.is_alive() for p in processes) and time.time() < deadline + GRACE:
            next(p for p in processes if p.is_alive()).join(PAUSE)
            if after is not None and time.time() - last > 20:
                after()
                last = time.time()
    finally:
        late = [p for p in processes if p.is_alive()]
        for p in late:
            p.kill()  # it loses at most an epoch
        for p in processes:
            p.join()
        if after is not None:
            after()
    if failed := [p.exitcode for p in processes if p.exitcode and p not in late]:
        raise ChildProcessError(f"{len(failed)} of {len(processes)} workers failed; their output says why")


def _work(
    course: Course,
    store: Store,
    *,
    root: str | os.PathLike[str] | None,
    device: str,
    compiled: bool,
    threads: int | None,
    deadline: float,
) -> None:
    """One worker."""
    if threads is not None:
        torch.set_num_threads(threads)
    prices, done, known = Prices(store, device, course.amp, root=root), set[str](), accuracy(store)

    def stop(epochs: int, history: History) -> None:
        if time.time() > deadline:
            raise OutOfTime

    how: dict[str, Any] = {"root": root, "device": device, "amp": course.amp, "compiled": compiled, "progress": False}
    while time.time() < deadline:
        prices.update()
        waiting, began = False, False
        for todo, ready in work(course, store, course.state(known)):
            if ready or todo.run.key in done:
                continue
            if deadline < math.inf and time.time() + MARGIN * prices.seconds(todo.run) > deadline:
                continue
            try:
                record = execute(todo.run, store, **how, after_epoch=stop, wait=False)
            except FloatingPointError as error:
                log.warning("%s of arm '%s' broke down: %s", todo.stage, todo.arm, error)
                store.fail(todo.run, str(error))
                record = None
            except OutOfTime:
                return
            if record is None and not store.failure(todo.run):
                waiting = True  # another process is at it; what it finds may make new runs known
                continue
            done.add(todo.run.key)
            began = True
            break
        if not began and not waiting:
            return
        if not began:
            time.sleep(PAUSE)


def seconds_left(course: Course, store: Store, prices: Prices) -> tuple[float, int]:
    """How long the runs that are known and not done take, one after another, and how many are not known yet."""
    prices.update()
    listed = list(work(course, store))
    unknown = course.count() - len(listed)
    return sum(prices.seconds(todo.run) for todo, ready in listed if not ready), max(unknown, 0)


__all__ = ["OutOfTime", "Prices", "Todo", "accuracy", "records", "run_plan", "seconds_left", "work"]
