"""Working through a plan: within a budget, after a kill, in several processes, and when something goes wrong."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import SHAPE, TINY, course, write
from stores import files, result

from sdecor import experiment, planned
from sdecor.config import Run
from sdecor.plan import Course
from sdecor.planned import MARGIN, accuracy, results, run_plan, seconds_left, work
from sdecor.rehearsal import Prices
from sdecor.store import Record, Store
from sdecor.training import evaluate


def quick() -> dict[str, Any]:
    """In place of measures of final runs, which take seconds."""

    def measure(model: Any, data: Any, **_: Any) -> Any:
        return {"accuracy": evaluate(model, data.subset(64))["accuracy"]}, {}

    return {"measure": measure, "exhibit": lambda *_, **__: None}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in quick().items():
        monkeypatch.setattr(experiment, name, function)


def begin_and_end(one: Course, store: Store, budget: float = math.inf) -> None:
    """One worker, in this process."""
    planned._work(one, store, root=None, compiled=False, deadline=time.time() + budget)


def all_done(one: Course, store: Store) -> list[Any]:
    """The results of all runs, once nothing is left to do."""
    listed = list(work(one, store))
    assert all(done for _, done in listed) and one.count(one.state(accuracy(store))) == 0
    assert not [name for name in files(store) if name.startswith("unfinished") or name.endswith(".partial")]
    return [result(store.record(todo.run)) for todo, _ in listed]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of `course` without any disturbance."""
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, function in quick().items():
            patch.setattr(experiment, name, function)
        begin_and_end(course(), store)
    return all_done(course(), store)


# --- what is done and what is next ----------------------------------------------------------------------------------


def test_what_records_say_of_a_trial(tmp_path: Path) -> None:
    store, run = Store(tmp_path), Run.of(data="digits", evaluate_on="val")
    of = accuracy(store)
    assert of(run) is None
    store.fail(run, "loss became nan")
    assert of(run) == accuracy(store)(run) == -math.inf
    write(store, run, 0.75)
    assert accuracy(store)(run) == 0.75  # it did better after all
    assert of(run) == -math.inf  # within a session, what is known stays
    (tmp_path / f"results/digits/{run.key}.json").write_text("{")
    assert accuracy(Store(tmp_path / "none"))(run) is None


def test_runs_come_in_order_of_value_and_equal_ones_once(tmp_path: Path) -> None:
    one, store = course(), Store(tmp_path)
    assert [(todo.arm, todo.stage, done) for todo, done in work(one, store)] == [("standard", "trial", False)]
    write(store, next(work(one, store))[0].run)
    listed = [todo for todo, done in work(one, store) if not done]
    assert [(t.arm, t.stage, t.run.seed) for t in listed] == [
        *[("decorrelation", "trial", 1000)] * 2,
        *[("standard", "final", 0), ("decorrelation 0", "final", 0), ("decorrelation 1", "final", 0)],
        *[("standard", "final", 1), ("later", "final", 0), ("later", "final", 1)],
    ]
    store.fail(listed[0].run, "it broke")
    write(store, listed[1].run)
    listed = [todo for todo, done in work(one, store) if not done]
    assert [(t.arm, t.stage, t.run.seed) for t in listed] == [
        *[("standard", "final", 0), ("decorrelation", "final", 0), ("decorrelation 0", "final", 0)],
        *[("standard", "final", 1), ("decorrelation", "final", 1), ("later", "final", 0), ("later", "final", 1)],
    ]  # both rules chose the same, and so did a dose
    keys = [todo.run.key for todo, _ in work(one, store)]
    assert len(keys) == len(set(keys))
    for todo in listed:
        write(store, todo.run)
    found = results(one, store)
    assert found.missing == {} and found.chosen.keys() == one.arms.keys()
    assert {name: [t.accuracy for t in trials] for name, trials in found.trials.items()} == {
        **{"standard": [0.9], "decorrelation": [-math.inf, 0.9], "accurate": [-math.inf, 0.9]}
    }
    assert len(found.all()) == len(listed), "arms that came out as the same runs count once"
    some = found.all(["later", "accurate", "decorrelation", "of another plan"])
    assert [(r.run.method, r.run.seed) for r in some] == [
        *[("noise", 0), ("noise", 1), ("decorrelation", 0), ("decorrelation", 1)]
    ]


def test_later_trials_come_after_the_final_runs_of_the_others(tmp_path: Path) -> None:
    arms = {
        "standard": {},
        "later": {"method": "noise", "try": {"masked_classification": [1]}, "later": True, "label": "later"},
        "noise": {},
    }
    one, store = course(arms=arms, doses={}), Store(tmp_path)
    write(store, next(work(one, store))[0].run)
    listed = [(todo.arm, todo.stage) for todo, _ in work(one, store)]
    finals = [("standard", "final"), ("noise", "final")] * 2
    assert listed == [("standard", "trial"), *finals, ("later", "trial")]


# --- a budget, with a clock of its own ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.floats(0.1, 50), min_size=5, max_size=5),
    budgets=st.lists(st.floats(0, 60), min_size=1, max_size=3),
)
def test_nothing_is_begun_that_will_not_finish(costs: list[float], budgets: list[float]) -> None:
    """A run costs what is expected of it or 15 % more; sessions of some length, then one without end."""
    one, done, now = course(), dict[str, Run](), [0.0]

    def cost(run: Run) -> float:
        return costs[int(run.key, 16) % len(costs)]

    def execute(run: Run, *_: Any, **__: Any) -> Any:
        assert run.key not in done
        assert now[0] + MARGIN * cost(run) < deadline
        now[0] += (1.0, MARGIN)[int(run.key, 16) % 2] * cost(run)
        done[run.key] = run
        return SimpleNamespace()

    store = SimpleNamespace(record=lambda run: done.get(run.key), failure=lambda run: "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "execute", execute)
        patch.setattr(planned, "time", SimpleNamespace(time=lambda: now[0], sleep=None))
        patch.setattr(planned, "accuracy", lambda _: lambda run: 0.9 if run.key in done else None)
        patch.setattr(planned, "Prices", lambda *_: SimpleNamespace(update=lambda: None, seconds=cost))
        for budget in [*budgets, math.inf]:
            deadline = now[0] + budget
            planned._work(one, store, deadline=deadline)  # type: ignore[arg-type]
            assert now[0] <= deadline
            left = [todo for todo, ready in work(one, store) if not ready]  # type: ignore[arg-type]
            assert all(now[0] + MARGIN * cost(todo.run) >= deadline for todo in left)
        assert not left and one.count(one.state(planned.accuracy(None))) == 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_end_of_the_budget_comes_at_the_end_of_an_epoch(
    fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = course(arms={"standard": {}}, doses={}, shared={**TINY["shared"], "epochs": 20})
    monkeypatch.setattr(Prices, "seconds", lambda *_: 0.0)  # whoever believes that begins it
    begin_and_end(one, Store(tmp_path / "whole"))
    store, sessions = Store(tmp_path / "parts"), 0
    while not all(done for _, done in work(one, store)) or one.count(one.state(accuracy(store))):
        sessions += 1
        started = time.time()
        begin_and_end(one, store, budget=0.2)
        assert time.time() - started < 0.2 + 3  # an epoch takes some hundredths
        [*unfinished] = [name for name in files(store) if name.startswith("unfinished")]
        assert all(name.endswith(".pt") for name in unfinished)
    assert sessions > 1
    assert all_done(one, store) == all_done(one, Store(tmp_path / "whole"))


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_run_that_breaks_down_is_noted_and_left_out(
    fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arms = {"standard": {}, "wild": {"method": "noise", "lr": 1e30, "label": "wild"}, "noise": {}}
    arms |= {"decorrelation": {"try": {"decorrelation": [1, 1e38]}}}
    one, store = course(arms=arms, doses={}, shared={**TINY["shared"], "epochs": 5}), Store(tmp_path)
    begin_and_end(one, store, budget=600)  # with a budget runs are tried on noise first
    listed = list(work(one, store))
    assert all(done for _, done in listed)
    broken = {(t.arm, t.stage, t.run.seed): store.failure(t.run) for t, _ in listed if store.record(t.run) is None}
    assert broken.keys() == {("wild", "final", 0), ("wild", "final", 1), ("decorrelation", "trial", 1000)}
    assert all(why.startswith("loss term '") and "became" in why for why in broken.values())
    assert any(message.startswith("final of arm 'wild' broke down: loss term ") for message in caplog.messages)
    found = results(one, store)
    assert dict(found.chosen["decorrelation"].weights)["decorrelation"] == 1.0
    assert found.records.keys() == {"standard", "noise", "decorrelation"}
    assert found.broken == {"wild": 2} and found.missing == {} and set(found.seeds().values()) == {2}
    assert not [name for name in files(store) if name.startswith("unfinished")]
    monkeypatch.setattr(planned, "execute", None)
    begin_and_end(one, store)  # nothing is tried again


def test_of_a_run_that_breaks_down_late_no_checkpoint_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(run: Run, store: Store, **_: Any) -> None:
        store.checkpoint(run).parent.mkdir()
        store.checkpoint(run).touch()
        raise FloatingPointError("loss became nan")

    monkeypatch.setattr(planned, "execute", execute)
    one, store = course(), Store(tmp_path)
    begin_and_end(one, store)
    [trial] = one.state(accuracy(store)).trials["standard"]
    assert files(store) == [f"failed/digits/{trial.key}.txt"] and store.failure(trial) == "loss became nan"


def test_a_run_that_fails_is_left_and_the_others_are_done(
    fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails for another reason is for another time."""
    arms = {"standard": {}, "noise": {}, "decorrelation": {}}
    one, store, fit = course(arms=arms, doses={}), Store(tmp_path), experiment.fit

    def greedy(model: Any, train: Any, objective: Any, *rest: Any, **how: Any) -> Any:
        if "masked_classification" in objective.weights:
            raise torch.OutOfMemoryError("it is too large")
        return fit(model, train, objective, *rest, **how)

    monkeypatch.setattr(experiment, "fit", greedy)
    failed = planned._work(one, store, deadline=math.inf)
    assert failed == ["final of arm 'noise', OutOfMemoryError: it is too large"] * 2
    assert {todo.arm for todo, done in work(one, store) if not done} == {"noise"}
    assert results(one, store).missing == {"noise": 2} and not (tmp_path / "failed").exists()
    monkeypatch.setattr(planned, "FAILURES", 1)
    assert len(planned._work(one, store, deadline=math.inf)) == 1  # then nothing works, it seems
    monkeypatch.undo()
    monkeypatch.setattr(planned, "execute", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        planned._work(one, store, deadline=math.inf)


def test_a_record_without_accuracy_is_no_choice(tmp_path: Path) -> None:
    one, store = course(), Store(tmp_path)
    store.write(Record(next(work(one, store))[0].run, {"gini": 0.5}, {}, SHAPE, {}, ""))
    with pytest.raises(ValueError, match="has no accuracy to choose by; remove it"):
        list(work(one, store))


def test_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does may make more known; if it dies, its run is taken over."""
    one, store = course(arms={"standard": {}}, doses={}), Store(tmp_path)
    looks: list[Run] = []

    def execute(run: Run, *_: Any, **__: Any) -> Any:
        looks.append(run)
        if len(looks) in (2, 4, 5, 6):
            write(store, run)
            return store.record(run)
        return None

    monkeypatch.setattr(planned, "execute", execute)
    monkeypatch.setattr(planned, "PAUSE", 0.0)
    begin_and_end(one, store)
    assert [(run.evaluate_on, run.seed) for run in looks] == [
        *[("val", 1000)] * 2,
        *[("test", 0), ("test", 1), ("test", 0)],  # the second is done, then the first
    ]


def test_what_a_worker_says_of_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    for error, code, words, trace in (
        (FileNotFoundError("no images"), 1, ["FileNotFoundError: no images"], False),
        (RuntimeError("out of memory"), 1, ["trial of arm 'standard', RuntimeError: out of memory"], True),
        (KeyboardInterrupt(), 130, [], False),
    ):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(planned, "execute", fail)
        said.clear(), caplog.clear()
        with pytest.raises(SystemExit) as end:
            planned._worker(SimpleNamespace(send=said.append), course(), Store(tmp_path), deadline=math.inf)
        assert (end.value.code, said, "Traceback" in caplog.text) == (code, words, trace)


def test_how_long_the_rest_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, store = course(), Store(tmp_path)
    prices = Prices(store, "cpu")
    monkeypatch.setattr(Prices, "seconds", lambda _, run: 1.0 if run.evaluate_on == "val" else 100.0)
    assert seconds_left(one, store, prices) == (1.0, one.count() - 1)
    write(store, next(work(one, store))[0].run)
    assert seconds_left(one, store, prices) == (2 + 600.0, 4)  # at most: two rules may choose alike
    for _ in range(2):
        for todo, _ in list(work(one, store)):
            write(store, todo.run)
    assert seconds_left(one, store, prices) == (0.0, 0)


# --- processes ------------------------------------------------------------------------------------------------------


def whole(one: Course, store: Store, said: Path, how: dict[str, Any], patches: dict[str, Any]) -> None:
    """In a group of its own, work through a plan with quick measures, and write down how that ended.

    Workers are forked, so that they have the patches too. Patches: ``fails`` is the name of a file which the first
    worker that trains makes before it kills itself, ``slow`` the seconds that a measure takes, ``unchecked`` leaves
    `check` out, ``grace`` is in place of `GRACE`, ``builds`` is where `dying.counted` leaves its lines: the server that
    forks this process may be older than a change of the test's own environment.
    """
    os.setsid()
    os.environ["SDECOR_TEST_BUILDS"] = str(patches.get("builds"))
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda _: fork  # type: ignore[assignment]
    measures, fit = quick(), experiment.fit
    planned.GRACE = patches.get("grace", planned.GRACE)
    if patches.get("unchecked"):
        planned.check = lambda *_, **__: None

    def measure(*args: Any, **kwargs: Any) -> Any:
        time.sleep(patches.get("slow", 0.0))
        return measures["measure"](*args, **kwargs)

    def mortal(*args: Any, **kwargs: Any) -> Any:
        try:
            Path(patches["fails"]).touch(exist_ok=False)
        except FileExistsError:
            return fit(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    experiment.measure, experiment.exhibit = measure, measures["exhibit"]
    if "fails" in patches:
        experiment.fit = mortal
    started = time.time()
    try:
        run_plan(one, store, **how)
        end = "done"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    said.write_text(json.dumps([end, time.time() - started]))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., tuple[BaseProcess, Path]]]:
    """Start `whole` in a process; it is killed if it is still there at the end, with all its children."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sdecor.planned", "sklearn.datasets"])
    begun: list[BaseProcess] = []

    def start(one: Course, store: Store, patches: Any = (), **how: Any) -> tuple[BaseProcess, Path]:
        said = tmp_path / f"said {len(begun)}"
        process = context.Process(target=whole, args=(one, store, said, how, dict(patches)))
        process.start()
        begun.append(process)
        return process, said

    yield start
    for process in begun:
        if process.pid is not None and alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def alive(group: int) -> bool:
    """Whether a process of that group is there that is no zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == group and state != "Z":
            return True
    return False


def ended(begun: tuple[BaseProcess, Path]) -> tuple[str, float]:
    begun[0].join()
    end, seconds = json.loads(begun[1].read_text())
    return end, seconds


@pytest.mark.slow
def test_two_commands_at_once_do_every_run_once(begin: Any, undisturbed: Any, tmp_path: Path) -> None:
    one = course(shared={**TINY["shared"], "model": "dying:counted"})
    store, builds = Store(tmp_path / "store"), tmp_path / "builds"
    both = [begin(one, store, {"unchecked": True, "builds": builds}, threads=1) for _ in range(2)]
    assert [ended(each)[0] for each in both] == ["done", "done"]
    found = all_done(one, store)
    assert len(builds.read_text().split()) == len(found) == len(undisturbed)
    assert [each[1:] for each in found] == [each[1:] for each in undisturbed]


@pytest.mark.parametrize("after", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6))])
def test_kill_of_the_whole_group(begin: Any, undisturbed: Any, tmp_path: Path, after: int) -> None:
    """After so many records, at whatever is done then."""
    one, store = course(), Store(tmp_path / "store")
    process, said = begin(one, store, workers=2)
    until = time.time() + 100
    while len(list(store.root.glob("results/*/*.json"))) < after or not store.root.exists():
        assert time.time() < until
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not said.exists()
    before = {record.run.key: result(record) for record in store.records()}
    assert len(before) >= after
    assert {path.stem for path in store.root.glob("results/*/*.json")} == before.keys()  # all can be read
    assert ended(begin(one, store, workers=2))[0] == "done"
    assert all_done(one, store) == undisturbed
    assert {key: result(record) for key in before for record in store.records() if record.run.key == key} == before


def test_what_a_kill_leaves_of_a_run_that_is_done_is_removed(tmp_path: Path, fast: None) -> None:
    one, store = course(arms={"standard": {}}, doses={}), Store(tmp_path)
    begin_and_end(one, store)
    whole = files(store)
    keys = [todo.run.key for todo, _ in work(one, store)]
    for name in (f"{keys[0]}.pt", f"{keys[0]}.lock", f"{keys[1]}.lock", f"{keys[2]}.pt.partial", "0123.pt"):
        (tmp_path / "unfinished" / name).touch()
    run_plan(one, store)
    assert files(store) == sorted([*whole, "unfinished/0123.pt"])  # which is no run of this plan


def test_a_worker_that_dies_is_reported_and_the_others_go_on(begin: Any, undisturbed: Any, tmp_path: Path) -> None:
    one, store = course(), Store(tmp_path / "store")
    patches = {"fails": str(tmp_path / "failed"), "unchecked": True}
    end, _ = ended(begin(one, store, patches, workers=2))
    assert end == "ChildProcessError: 1 of 2 workers failed: exit code -9"
    assert all_done(one, store) == undisturbed


def test_the_budget_is_kept_and_the_rest_is_the_same(begin: Any, undisturbed: Any, tmp_path: Path) -> None:
    one, store = course(), Store(tmp_path / "store")
    end, seconds = ended(begin(one, store, {"grace": 1.0, "slow": 60.0}, budget=4.0))
    assert end == "done" and seconds < 4 + 1 + 3
    assert not list(store.root.glob("results/*/*.json"))  # the measure would have taken a minute
    assert ended(begin(one, store))[0] == "done"
    assert all_done(one, store) == undisturbed


def test_workers_do_not_outlive_the_command(begin: Any, tmp_path: Path) -> None:
    one, store = course(shared={**TINY["shared"], "epochs": 100_000}), Store(tmp_path / "store")
    process, _ = begin(one, store, {"unchecked": True})
    until = time.time() + 60
    while not list(store.root.glob("unfinished/*.pt")):
        assert time.time() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while alive(process.pid):
        assert time.time() < until
        time.sleep(0.05)


def test_errors_of_workers_and_of_the_check_reach_the_caller(begin: Any, tmp_path: Path) -> None:
    missing = course(shared={**TINY["shared"], "data": "imagenet10"})
    end, _ = ended(begin(missing, Store(tmp_path / "a"), root=tmp_path, workers=2))
    assert end.startswith(f"FileNotFoundError: ImageNet, 10 classes not found under {tmp_path}")
    end, _ = ended(begin(missing, Store(tmp_path / "b"), {"unchecked": True}, root=tmp_path, workers=2))
    assert end.startswith("ChildProcessError: 2 of 2 workers failed: FileNotFoundError: ImageNet, 10 classes not found")
    assert end.count("not found") == 1


def test_nothing_to_do_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, store = course(), Store(tmp_path)
    for _ in range(3):
        for todo, _ in list(work(one, store)):
            write(store, todo.run)
    calls: list[int] = []
    monkeypatch.setattr(multiprocessing, "get_context", None)
    run_plan(one, store, after=lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        run_plan(one, store, device="gpu")
    with pytest.raises(OSError, match="nowhere to pack"):  # before anything is begun
        run_plan(one, Store(tmp_path / "empty"), after=lambda: (_ for _ in ()).throw(OSError("nowhere to pack")))


def test_what_is_to_be_done_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now, calls = [0.0], list[float]()

    class Process:
        def is_alive(self) -> bool:
            return now[0] < 100

        def join(self, seconds: float) -> None:
            now[0] += seconds

    monkeypatch.setattr(planned, "time", SimpleNamespace(time=lambda: now[0]))
    planned._watch([Process()], 61.0, lambda: calls.append(now[0]))  # type: ignore[list-item]
    assert calls == [20.5, 41.0] and now[0] == 61.0

    def full() -> None:
        calls.append(now[0])
        raise OSError("the disk is full")

    now[0] = 0.0
    planned._watch([Process()], 61.0, full)  # type: ignore[list-item]  # no reason to end the work
    assert calls[2:] == [20.5, 41.0] and caplog.messages == ["the disk is full"] * 2
    planned._watch([Process()], math.inf, lambda: None)  # type: ignore[list-item]
    assert now[0] == 100
