"""Several processes with a part of every batch each, against one with the whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sharing
import torch
import torch.nn.functional as F
from PIL import Image
from stores import files, result
from test_cli_plan import TEXT
from torch import Tensor, distributed, nn
from torch.autograd import gradcheck, gradgradcheck

from sdecor import experiment, planned, processes
from sdecor.config import Objective, Run, Schedule
from sdecor.data import load
from sdecor.experiment import execute
from sdecor.models import build
from sdecor.plan import Plan
from sdecor.store import Record, Store
from sdecor.training import fit, way

TWO = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


# --- one process ----------------------------------------------------------------------------------------------------


def test_one_process_begins_nothing_and_gives_back_what_it_is_given() -> None:
    x = torch.randn(6, 3)
    with processes.joined("cuda:7") as device, processes.together():
        assert device == "cuda:7" and not processes.launched() and not distributed.is_initialized()
        assert (processes.rank(), processes.number(), processes.parts()) == (0, 1, 1)
        assert processes.mean(x) is x and processes.total(x) is x and processes.least(x) is x and processes.mine(x) is x
        processes.average([x])
        processes.same(epochs=3)
        assert processes.told("all") == "all"
    draws = [draw(generator=torch.Generator().manual_seed(1)) for draw in (lambda **how: torch.rand((4, 2), **how),)]
    draws.append(processes.drawn(torch.rand, (4, 2), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*draws)


def test_torchrun_with_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TWO, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with processes.joined("cpu") as device:
        assert device == "cpu" and not distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "gpus", "problem"),
    [
        ("cuda:1", 8, "device='cuda:1' cannot be that of 2 processes; use cuda, which gives each a GPU of its own"),
        ("mps", 8, "device='mps' cannot be that of 2 processes"),
        ("cuda", 1, "2 processes need as many GPUs, torch .* finds 1; use --nproc-per-node 1"),
        ("cuda", 0, "2 processes need as many GPUs, torch .* finds 0; use device='cpu'"),
    ],
)
def test_a_device_that_processes_cannot_share(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, problem: str
) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=problem), processes.joined(device):
        pass


def test_a_way_says_how_many_processes_there_were() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert way(cpu) == "cpu" and way(cuda, True, True) == "cuda, bfloat16, compiled"
    assert way(cuda, amp=True, number=8) == "cuda, bfloat16, 8 processes"


@pytest.mark.parametrize(
    ("batch_size", "compiled", "problem"),
    [
        (10, False, "batch_size must be a multiple of the number of processes, 4; got 10"),
        (64, False, "the number of images, which is that of the only batch, must be a multiple .* 4; got 30"),
        (8, True, "a model cannot be compiled in several processes; start without torchrun, or do not compile"),
    ],
)
def test_what_several_processes_cannot_do(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, compiled: bool, problem: str
) -> None:
    monkeypatch.setattr(processes, "number", lambda: 4)
    data = load("digits", limit=30)
    with pytest.raises(ValueError, match=problem):
        fit(build("lenet", 1, 10, 28), data, Objective(), Schedule(batch_size=batch_size), compiled=compiled)


def test_workers_within_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (experiment, planned):
        monkeypatch.setattr(module, "number", lambda: 4)
    course = Plan.read(Path(__file__).parent.parent / "book/experiments/mnist.toml").at("quick")
    for work in (lambda **how: experiment.grid([], **how), lambda **how: planned.run_plan(course, **how)):
        with pytest.raises(ValueError, match="workers=2 cannot be started by each of 4 processes; use workers=1"):
            work(store=Store(tmp_path), workers=2)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of layers that stand for the whole batch, where it has one part."""
    return processes.OfTheWhole()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_that_of_torch(whole: Any, shape: tuple[int, ...], affine: bool) -> None:
    x = (100 + torch.randn(shape, dtype=torch.float64)).requires_grad_()
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    ours, theirs = (kind(4, affine=affine, momentum=0.3).double() for _ in range(2))
    if affine:
        for norm in (ours, theirs):
            norm.load_state_dict({**norm.state_dict(), "weight": torch.arange(4.0), "bias": torch.arange(4.0) - 2})
    weight = torch.randn(shape, dtype=torch.float64)
    expected = theirs(x)
    with whole:
        found = ours(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0, msg=name)
    of = [x, *ours.parameters()], [x, *theirs.parameters()]
    slopes = [torch.autograd.grad((y * weight).sum(), p) for y, p in zip((found, expected), of, strict=True)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_batch_norm_can_be_differentiated_twice(whole: Any) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2, 3), (2,), (2,)))

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with whole:
            return F.batch_norm(x, None, None, w, b, training=True)

    assert gradcheck(norm, (x, w, b)) and gradgradcheck(norm, (x, w, b))


def test_batch_norm_of_half_precision_and_of_constants(whole: Any) -> None:
    x = torch.cat([torch.full((8, 1, 4, 4), 3.0), torch.randn(8, 2, 4, 4)], 1).bfloat16()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = nn.BatchNorm2d(3)
    with whole:
        y = norm(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, nn.BatchNorm2d(3)(x.detach()), rtol=1e-2, atol=1e-4)
    assert not y[:, 0].any() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("function", [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d])
def test_dropout_is_that_of_torch(whole: Any, function: Callable[..., Tensor]) -> None:
    x = torch.randn(4, 6, *[5] * {F.dropout: 2, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}[function])
    for layout in (torch.contiguous_format, torch.channels_last) if x.ndim == 4 else (torch.contiguous_format,):
        x = x.contiguous(memory_format=layout)
        torch.manual_seed(2)
        expected = function(x, 0.3)
        torch.manual_seed(2)
        with whole:
            assert torch.equal(function(x, 0.3), expected)
            assert torch.equal(function(x, 0.3, training=False), x)


# --- two ------------------------------------------------------------------------------------------------------------


def torchrun(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.Popen([*command, *map(str, arguments)], env=known, **how)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes made of every case of `sharing`."""
    folder = tmp_path_factory.mktemp("shared")
    for i, image in enumerate(torch.randint(256, (50, 16, 16, 3), dtype=torch.uint8).numpy()):
        where = folder / "images" / "train" / str(i % 4)
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(where / f"{i}.png")
    process = torchrun(sharing.__file__, folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


def made(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [safetensors.torch.load_file(folder / f"{name} {rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sharing.cases())
def test_two_processes_give_the_gradient_of_one(shared: Path, name: str) -> None:
    """And its terms, and the averages of its norms. The largest values are about 1; the rest is rounding."""
    first, second = made(shared, name)
    expected = sharing.cases()[name]()
    assert first.keys() == second.keys() == expected.keys()
    for part, value in expected.items():
        assert torch.equal(first[part], second[part])
        precise = value.dtype != torch.float32
        torch.testing.assert_close(first[part], value, rtol=1e-10 if precise else 1e-4, atol=1e-12 if precise else 1e-5)


@pytest.mark.parametrize("name", ["standard float64", "penalty correlation, groups of 4", "layer zca"])
def test_the_mean_of_the_halves_would_not_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would find, if statistics were those of a part."""
    whole = sharing.cases()[name]()
    halves = []
    for half in range(2):
        monkeypatch.setattr(sharing, "mine", lambda batch, half=half: batch.chunk(2)[half])
        halves.append(sharing.cases()[name]())
    differ = [(halves[0][n] + halves[1][n]) / 2 - value for n, value in whole.items() if n.startswith("0 conv2.w")]
    differ += [(halves[0][n] + halves[1][n]) / 2 - value for n, value in whole.items() if n.startswith("0 2.w")]
    assert max(d.abs().max() for d in differ) > 1e-4


@pytest.mark.slow
def test_two_processes_have_the_two_halves_of_every_batch(shared: Path) -> None:
    """Bit for bit, with the order and the augmentation of one process."""
    first, second = made(shared, "batches")
    expected = sharing.batches(shared)
    assert len(expected) == 2 * 2 * 4
    for name, value in expected.items():
        assert torch.equal(torch.cat([first[name], second[name]]), value)


@pytest.mark.slow
def test_two_processes_train_as_one_does(shared: Path) -> None:
    """With an order, clipping and validation that are those of one; each decodes its part alone."""
    first, second = made(shared, "training")
    expected = sharing.training(shared)
    decoded = [part.pop("decoded").tolist() for part in (first, second, expected)]
    looks = 2 + 1  # images that tell the layout and the layers
    assert [len(part) for part in decoded] == [looks + 2 * 20 + 3 * 3, looks + 2 * 20 + 3 * 2, looks + 2 * 40 + 3 * 5]
    for part, value in expected.items():
        assert torch.equal(first[part], second[part])
        torch.testing.assert_close(first[part], value, rtol=1e-5, atol=1e-8, msg=part)
    assert torch.equal(first["accuracy"], expected["accuracy"])


# --- the command line -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"data": "digits", "evaluate_on": "val", "limit": 480, "epochs": 6, "batch_size": 48}
OPTIONS |= {"method": "saliencydecor-absolute"}
RUN = Run.of(**OPTIONS)


def sdecor(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command in two processes."""
    given = (part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value))
    return torchrun("-m", "sdecor", *arguments, *given)


def said(process: subprocess.Popen[str], code: int = 0) -> list[str]:
    """What it prints until it ends, without what torchrun says of failures; none may hang."""
    text, _ = process.communicate(timeout=180)
    assert (process.returncode != 0) == (code != 0), text
    return [line for line in text.split("torch/distributed/elastic")[0].splitlines()[: None if code == 0 else -1]]


def record_of(store: Store, run: Run = RUN) -> Record:
    record = store.record(run)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which two processes did `RUN`."""
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    first = said(sdecor("train", store=store.root, **OPTIONS))
    assert first[0] == f"saliencydecor-absolute on digits, seed 0: {RUN.key} in {store.root}"
    assert sum(line.startswith("  accuracy ") for line in first) == 1  # process 0 alone prints
    return store


@pytest.mark.slow
def test_a_record_of_two_processes(undisturbed: Store, tmp_path: Path) -> None:
    record, one = record_of(undisturbed), execute(RUN, Store(tmp_path))
    assert one is not None
    assert (record.ways, one.ways) == (["cpu, 2 processes"], ["cpu"])
    assert [name.split("/")[0] for name in files(undisturbed)] == ["results", "weights"]
    assert record.environment["images"] == one.environment["images"]
    for name in ("loss_total", "loss_classification", "loss_decorrelation"):
        assert record.curves[name][0] == pytest.approx(one.curves[name][0], rel=1e-3)
    assert record.metrics["accuracy"] == pytest.approx(one.metrics["accuracy"], abs=0.1)
    before = files(undisturbed), result(record)
    again = said(sdecor("train", store=undisturbed.root, **OPTIONS))  # both find it there
    assert len(again) == 1 + len(record.metrics)
    assert (files(undisturbed), result(record_of(undisturbed))) == before


def killed(store: Store, which: int) -> None:
    """Begin `RUN`, and kill -9 one of the two processes after an epoch; torchrun then ends the other."""
    process = sdecor("train", store=store.root, **OPTIONS)
    end = time.time() + 120
    while not store.checkpoint(RUN).exists():
        assert time.time() < end and process.poll() is None
        time.sleep(0.02)
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [pid] = [pid for pid in started if f"RANK={which}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(int(pid), signal.SIGKILL)
    said(process, code=1)
    assert store.record(RUN) is None and store.checkpoint(RUN).exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_run_goes_on_with_the_same_bits(undisturbed: Store, tmp_path: Path, which: int) -> None:
    store = Store(tmp_path)
    killed(store, which)
    said(sdecor("train", store=store.root, **OPTIONS))
    assert result(record_of(store)) == result(record_of(undisturbed))
    assert files(store) == files(undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_killed_run_goes_on_in_one_process(
    undisturbed: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    killed(store, 1)
    record = execute(RUN, store)
    assert record is not None and record.ways == ["cpu, 2 processes", "cpu"]
    assert "epochs were computed on cpu, 2 processes, those to come are on cpu" in caplog.text
    expected = record_of(undisturbed)
    assert record.curves["loss_total"] == pytest.approx(expected.curves["loss_total"], rel=0.05)
    assert record.curves["loss_total"][0] == expected.curves["loss_total"][0]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_both(tmp_path: Path) -> None:
    lines = said(sdecor("train", store=tmp_path, **{**OPTIONS, "lr": 1e20, "clip": "none"}), code=1)
    assert any(line.startswith("error: loss term 'classification' became nan at step ") for line in lines), lines


BREAKING = """
import os
from sdecor.masking import fill

@fill
def broken(x):
    if os.environ["RANK"] == "1":
        raise {}("it breaks")
    return x
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ValueError", "MemoryError"], ids=["foreseen", "unforeseen"])
def test_an_error_of_one_process_ends_both(tmp_path: Path, error: str) -> None:
    (tmp_path / "breaking.py").write_text(BREAKING.format(error))
    options = {**OPTIONS, "method": "noise", "settings": "fill=broken", "store": tmp_path / "store"}
    lines = said(sdecor("--use", tmp_path / "breaking.py", "train", **options), code=1)
    expected = "error in process 1: it breaks" if error == "ValueError" else "[rank1]: MemoryError: it breaks"
    assert expected in lines, lines


@pytest.mark.slow
def test_a_grid_and_a_plan(tmp_path: Path) -> None:
    options = {"data": "digits", "limit": 96, "epochs": 1, "batch_size": 48, "evaluate_on": "val"}
    lines = said(sdecor("grid", methods="standard,noise", seeds="0", store=tmp_path / "grid", **options))
    assert lines == [f"2 runs in {tmp_path}/grid: {done}" for done in ("0 done, 2 left", "2 done, 0 left")]
    (tmp_path / "tiny.toml").write_text(TEXT.partition("[arms.saliencydecor")[0] + "[presets.quick]\nseeds = 1\n")
    given = {"preset": "quick", "store": tmp_path / "plan", "pack": tmp_path / "out"}
    [line] = said(sdecor("run", tmp_path / "tiny.toml", **given))
    assert line.startswith("5 runs done, 0 to do, after ") and line.endswith(f"; records in {tmp_path}/plan")
    ways = [record.ways for record in Store(tmp_path / "plan").records()]
    assert ways == [["cpu, 2 processes"]] * 5 and (tmp_path / "out" / "tiny-quick.tar").exists()
    [line] = said(sdecor("run", tmp_path / "tiny.toml", **given, seeds=3, budget=1))
    assert line.startswith("5 runs done, 4 to do, after ")


def test_the_plan_of_the_recipe_can_be_read_and_tried(tmp_path: Path) -> None:
    plan = Plan.read(Path(__file__).parent.parent / "book/back/imagenet1k.toml")
    assert plan.presets.keys() == {"quick", "gpu"}
    course = plan.at("quick")
    planned.check(course, Store(tmp_path))
    assert {claim.name for claim in course.claims} == {claim.name for claim in plan.claims}
    assert [run.schedule.batch_size % 8 for run in plan.at("gpu").possible()["standard"]] == [0]
