"""Working through a plan within a budget of time, and how long the rest takes.

Any number of processes, on one machine or several with the same disk, share the work by the locks of the store. Each
takes the first run, in the plan's order of value, that nobody is at and that will be done in time; so whenever the work
ends, what is there is a complete smaller table. What was begun goes on from its last epoch.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess, parent_process
from typing import Any

import torch

from sdecor.choice import Trial
from sdecor.config import Run
from sdecor.experiment import devices, execute, otherwise
from sdecor.plan import Course, State
from sdecor.processes import alone, number, rank, told
from sdecor.rehearsal import Prices, Root, check
from sdecor.store import Record, Store
from sdecor.training import History, device_of

log = logging.getLogger("sdecor")
MARGIN = 1.15  # how much longer than last time a run may take
GRACE = 5.0  # seconds after the budget in which a worker may come to the end of an epoch
PAUSE = 0.5
EVERY = 20.0  # seconds between calls of what is to be done now and then
FAILURES = 3  # of runs, after which a worker takes it that nothing works


class OutOfTime(Exception):
    """The budget is spent; the run goes on from its checkpoint next time."""


def accuracy(store: Store) -> Callable[[Run], float | None]:
    """What the records of a store say of trials, as `sdecor.plan.Course` asks for it."""
    known: dict[str, float | None] = {}

    def of(run: Run) -> float | None:
        if known.get(run.key) is None:
            record = store.record(run)
            broke = -math.inf if record is None and store.failure(run) else None
            known[run.key] = broke if record is None else record.metrics.get("accuracy", math.nan)
            if known[run.key] != known[run.key]:
                raise ValueError(f"the record of run {run.key} in {store.root} has no accuracy to choose by; remove it")
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
    listed = [Todo(arm, run, "trial") for arm, runs in state.trials.items() for run in runs]
    listed += [Todo(arm.name, run, "final") for arm, run in course.final(state)]
    listed.sort(key=lambda todo: course.arms[todo.arm].later)
    seen: set[str] = set()
    for todo in listed:
        if todo.run.key not in seen:
            seen.add(todo.run.key)
            yield todo, store.record(todo.run) is not None or bool(store.failure(todo.run))


@dataclass(frozen=True)
class Results:
    """What a store has of a plan: what a page is made of."""

    course: Course
    trials: dict[str, list[Trial]]  #: Those that are done, by arm.
    chosen: dict[str, Run]  #: Arm to the trial that was chosen.
    records: dict[str, list[Record]]  #: Arm to the records of its seeds, as far as they are done.
    missing: dict[str, int]  #: Arm to the number of seeds that are not, where there are some.
    broken: dict[str, int]  #: Arm to the number of seeds that broke down, where there are some.

    def all(self, arms: Iterable[str] | None = None) -> list[Record]:
        """The records of these arms, as far as they have some, or of all arms: in their order, and each once."""
        named = self.records if arms is None else arms
        return list({r.run.key: r for name in named for r in self.records.get(name, ())}.values())

    def seeds(self) -> dict[str, int]:
        """Arm to the number of seeds that the plan asks for."""
        return {name: self.course.seeds_of(arm) for name, arm in self.course.arms.items()}

    def keys(self) -> dict[str, str]:
        """Arm to the key of its run with seed 0, of arms with records: see `sdecor.report.verdicts.verdict`."""
        return {name: rs[0].run.but(seed=0).key for name, rs in self.records.items()}

    def names(self) -> dict[str, str]:
        """The same keys to the labels of the arms; of arms that came out as the same runs, the first one's."""
        return {key: self.course.labels[name] for name, key in reversed(self.keys().items())}


def results(course: Course, store: Store) -> Results:
    """Read what a store has of a plan."""
    of = accuracy(store)
    state = course.state(of)
    tried = {arm: [Trial(run, a) for run in runs if (a := of(run)) is not None] for arm, runs in state.trials.items()}
    records: dict[str, list[Record]] = {}
    broken: Counter[str] = Counter()
    for arm, run in course.final(state):
        if (record := store.record(run)) is not None:
            records.setdefault(arm.name, []).append(record)
        elif store.failure(run):
            broken[arm.name] += 1
    for name in state.lost:
        broken[name] = course.seeds_of(course.arms[name])
    out = Results(course, {n: t for n, t in tried.items() if t}, dict(state.chosen), records, {}, dict(broken))
    left = {name: n - len(records.get(name, ())) - broken[name] for name, n in out.seeds().items()}
    return replace(out, missing={name: n for name, n in left.items() if n})


def say_otherwise(course: Course, store: Store, device: str, compiled: bool = False) -> None:
    """Warn of records of a plan that were computed in another way than is asked for now."""
    known = [record for todo, ready in work(course, store) if ready and (record := store.record(todo.run)) is not None]
    otherwise(known, store, device, course.amp, compiled)


def run_plan(
    course: Course,
    store: Store,
    *,
    root: Root = None,
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    budget: float = math.inf,
    compiled: bool = False,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Work through a plan with so many processes, for at most `budget` seconds and `GRACE` more.

    Several workers share one GPU, or take several in turn, and have one CPU thread each unless `threads` says
    otherwise. `after` is called in this process, first, now and then, and at the end; an OSError of it ends the work
    only if it comes first or last. What `check` raises ends everything at once. A run that fails is left for another
    time, and after some of them the worker gives up; the others go on, and ChildProcessError says why at the end.

    Within `sdecor.processes.joined`, all processes call it with one worker, and are at each run together. Then the
    budget ends the work after an epoch, not within one; `after` is called first and last; a run that fails ends all.
    """
    deadline, where = time.time() + budget, device_of(device)
    count = threads or (1 if workers > 1 or where.type == "cuda" else None)
    if number() > 1:
        if workers > 1:
            raise ValueError(f"workers={workers} cannot be started by each of {number()} processes; use workers=1")
        _jointly(course, store, deadline, after, root=root, device=device, threads=count, compiled=compiled)
        return
    _tidy(course, store)
    after()
    listed = list(work(course, store))
    say_otherwise(course, store, device, compiled)
    if all(ready for _, ready in listed):
        return
    context = multiprocessing.get_context("spawn")
    how: dict[str, Any] = {"root": root, "compiled": compiled, "threads": count, "deadline": deadline}
    processes, ears = [], []
    for place in devices(device, workers):
        ear, mouth = context.Pipe(duplex=False)
        p = context.Process(target=_worker, args=(mouth, course, store), kwargs={**how, "device": place})
        with _uninterrupted():
            p.start()
        mouth.close()
        processes.append(p)
        ears.append(ear)
    try:
        check(course, store, root, until=deadline)
        _watch(processes, deadline + GRACE, after)
    finally:
        late = [p for p in processes if p.is_alive()]
        _end(late)  # they lose an epoch, on a GPU those of five seconds
        for p in processes:
            p.join()
        after()
    pairs = zip(processes, ears, strict=True)
    if failed := [_last_words(p, ear) for p, ear in pairs if p.exitcode and p not in late]:
        said = "; ".join(dict.fromkeys(failed))
        raise ChildProcessError(f"{len(failed)} of {len(processes)} workers failed: {said}")


def _jointly(course: Course, store: Store, deadline: float, after: Callable[[], None], **how: Any) -> None:
    """Work through a plan together with other processes: process 0 says which run is next, and when to stop."""
    if rank():
        threads = how.pop("threads")
        if threads is not None:
            torch.set_num_threads(threads)
        while said := told():
            with suppress(OutOfTime, FloatingPointError):  # of which process 0 takes care
                run = Run.from_dict(json.loads(said))
                execute(run, store, after_epoch=_stop(lambda: False), amp=course.amp, progress=False, **how)
        return
    _tidy(course, store)
    after()
    say_otherwise(course, store, how["device"], how["compiled"])
    with alone():
        check(course, store, how["root"], until=deadline)
    try:
        _work(course, store, deadline=deadline, **how)
        told("")
    finally:
        after()


def _stop(over: Callable[[], bool]) -> Callable[[int, History], None]:
    """What ends a run after an epoch when the time is over, which of several processes the first one says."""

    def stop(epochs: int, history: History) -> None:
        if told("over" if over() else ""):
            raise OutOfTime

    return stop


def _last_words(process: BaseProcess, ear: Connection) -> str:
    try:
        return str(ear.recv())
    except EOFError:
        return f"exit code {process.exitcode}"


def _tidy(course: Course, store: Store) -> None:
    """Remove what a kill left of runs that are done, so that nobody needs even the lock."""
    done = {todo.run.key for todo, ready in work(course, store) if ready}
    for path in store.root.glob("unfinished/*"):
        if path.name.partition(".")[0] in done:
            path.unlink(missing_ok=True)


def _watch(processes: Sequence[BaseProcess], end: float, after: Callable[[], None]) -> None:
    """Wait until all processes are done, or for the end."""
    last = time.time()
    while (alive := [p for p in processes if p.is_alive()]) and time.time() < end:
        alive[0].join(PAUSE)
        if time.time() - last > EVERY:
            try:
                after()
            except OSError as error:  # such as a full disk: no reason to lose what is under way
                log.warning("%s", error)
            last = time.time()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a process that is started here leave interrupts from the keyboard to this one, from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _end(processes: Sequence[BaseProcess]) -> None:
    """End processes, within a second or so: those that tidy up first leave no warnings behind."""
    end = time.time() + 1
    for p in processes:
        p.terminate()
    for p in processes:
        p.join(max(0.0, end - time.time()))
        p.kill()


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def _worker(mouth: Connection, course: Course, store: Store, **how: Any) -> None:
    """A process that works, and sends to the one that started it what error it ended with."""
    try:
        if parent_process() is not None:
            signal.signal(signal.SIGTERM, _interrupt)
        failed = _work(course, store, **how)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        failed = [_said(error)]
    if failed:
        mouth.send("; ".join(failed)[:2000])
        sys.exit(1)


def _said(error: Exception) -> str:
    if not isinstance(error, ValueError | OSError):
        log.error("not foreseen", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _work(
    course: Course, store: Store, *, device: str = "cpu", threads: int | None = None, deadline: float, **how: Any
) -> list[str]:
    """Do what is next, again and again, until nothing is left that will be done in time; which runs failed, and why."""
    if threads is not None:
        torch.set_num_threads(threads)
    prices, known, parent = Prices(store, device, course.amp, how.get("root")), accuracy(store), parent_process()
    done: set[str] = set()
    failed: list[str] = []
    how |= {"device": device, "amp": course.amp, "progress": False}

    def over() -> bool:
        """Whether the time is, or the process that started this one was killed."""
        return time.time() >= deadline or (parent is not None and not parent.is_alive())

    def fits(run: Run) -> bool:
        with alone():
            return deadline == math.inf or time.time() + MARGIN * prices.seconds(run) < deadline

    def do(todo: Todo) -> bool:
        """Whether it is done now; if not, another process is at it."""
        told(json.dumps(todo.run.to_dict()))
        try:
            return execute(todo.run, store, after_epoch=_stop(over), wait=False, **how) is not None
        except FloatingPointError as error:
            log.warning("%s of arm '%s' broke down: %s", todo.stage, todo.arm, error)
            store.checkpoint(todo.run).unlink(missing_ok=True)
            store.fail(todo.run, str(error))
            return True
        except (OutOfTime, OSError):
            raise
        except Exception as error:  # such as too little memory: others may do better
            if number() > 1:  # and wait for this one
                raise
            failed.append(f"{todo.stage} of arm '{todo.arm}', {_said(error)}")
            return True

    with suppress(OutOfTime):
        while not over() and len(failed) < FAILURES:
            prices.update()
            waiting = False
            for todo in [t for t, ready in work(course, store, course.state(known)) if not ready]:
                if todo.run.key not in done and fits(todo.run):
                    waiting = True
                    if do(todo):
                        done.add(todo.run.key)
                        break
            else:
                if not waiting:
                    break
                time.sleep(PAUSE)  # what others are at may make more known
    return failed


def seconds_left(course: Course, store: Store, prices: Prices) -> tuple[float, int]:
    """How long the runs that are known and not done take, one after another, and how many more there may be."""
    prices.update()
    state = course.state(accuracy(store))
    left = [todo.run for todo, ready in work(course, store, state) if not ready]
    return sum(map(prices.seconds, left)), course.count(state)
