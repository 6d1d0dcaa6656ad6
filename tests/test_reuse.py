"""What decides a result is in the description, so that no record is handed out for another one; the rest is said."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from sdecor.config import Run
from sdecor.data import load
from sdecor.evaluation import CONTROLS, measure_again, tabulate
from sdecor.experiment import execute, grid, mixed
from sdecor.measures.case import MEASURES, measure, table
from sdecor.registers import ATTRIBUTIONS, METHODS, PENALTIES, use
from sdecor.store import Store
from sdecor.training import History, Objective, Schedule, fit

SMALL: dict[str, Any] = {"data": "digits", "evaluate_on": "val", "limit": 96, "epochs": 2, "batch_size": 48}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of pictures, all of one size in bytes and of one time."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = tmp_path / "pets" / split / name / f"{i}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
                os.utime(path, (1e9, 1e9))
    return tmp_path / "pets"


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def edit(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(path)
    os.utime(path, (1e9, 1e9))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "classes swapped": lambda p: swap(p / "train/cat", p / "train/dog"),
    "two pictures swapped": lambda p: swap(p / "train/cat/0.bmp", p / "train/dog/0.bmp"),
    "a pixel": lambda p: edit(p / "train/cat/0.bmp"),
    "a held-out pixel": lambda p: edit(p / "test/cat/0.bmp"),
    "one less": lambda p: (p / "train/cat/5.bmp").unlink(),
    "one more": lambda p: shutil.copy(p / "train/cat/5.bmp", p / "train/cat/6.bmp"),
    "a name": lambda p: (p / "train/cat/5.bmp").rename(p / "train/cat/7.bmp"),
    "a class": lambda p: (p / "train/cat").rename(p / "train/emu"),
    "a split": lambda p: shutil.copytree(p / "test", p / "val"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_folder_is_another_run_also_in_one_process(pictures: Path, tmp_path: Path, change: str) -> None:
    before = Run.of(data=str(pictures))
    CHANGES[change](pictures)
    now = Run.of(data=str(pictures))
    assert now.key != before.key and now.data.fingerprint != before.data.fingerprint
    assert before.but(seed=1).data.fingerprint == before.data.fingerprint  # a description stays what it was
    with pytest.raises(ValueError, match=rf"^{pictures} has changed: its fingerprint is {now.data.fingerprint}, "):
        execute(before.but(seed=1), Store(tmp_path / "store"), progress=False)


def sdecor(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sdecor", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(cwd), os.environ.get("PYTHONPATH", "")]))}
    return subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, check=False)


def key(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.split(": ")[1].split()[0]


QUICK = ("--epochs", 1, "--batch-size", 4, "--model", "cnn_bn", "--quiet")


@pytest.mark.slow  # some commands, each a process of its own
def test_on_the_command_line(pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "pets"
    shutil.copytree(pictures, other)
    edit(other / "train/cat/0.bmp")
    common = ("train", "--store", tmp_path / "store", *QUICK)
    first = key(sdecor(*common, "--data", "folder:./pets", cwd=pictures.parent))
    assert key(sdecor(*common, "--data", f"folder:{pictures}/", cwd=tmp_path)) == first
    assert key(sdecor(*common, "--data", "folder:./pets", cwd=other.parent)) != first
    measured = sdecor("measure", "--store", tmp_path / "store", cwd=other.parent)
    assert measured.returncode == 1 and "has changed: its fingerprint is" in measured.stderr
    swap(pictures / "train/cat", pictures / "train/dog")
    assert key(sdecor(*common, "--data", "folder:./pets", cwd=pictures.parent)) != first


def test_a_changed_folder_before_a_resume_a_measurement_and_a_table(pictures: Path, tmp_path: Path) -> None:
    run, store = Run.of(data=str(pictures), model="cnn_bn", epochs=2, batch_size=4), Store(tmp_path / "store")

    def kill(epoch: int, _: History) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run.but(seed=1), store, after_epoch=kill, progress=False)
    execute(run, store, progress=False)
    edit(pictures / "train/cat/0.bmp")
    for work in (
        lambda: execute(run.but(seed=1), store, progress=False),
        lambda: measure_again(run, store),
        lambda: tabulate(run, store, ["gradient"], images=2),
    ):
        with pytest.raises(ValueError, match="has changed: its fingerprint is"):
            work()
    assert store.checkpoint(run.but(seed=1)).exists()  # nothing is lost
    now = Run.of(data=str(pictures), model="cnn_bn", epochs=2, batch_size=4)
    with pytest.raises(FileNotFoundError, match="^no weights of standard, seed 0: "):
        tabulate(now, store, ["gradient"], images=2)


# --- code of one's own ----------------------------------------------------------------------------------------------

FACTORY = """
from torch import nn
{extra}
def make(in_channels, num_classes, image_size, *, hidden=8):
    first = nn.Linear(in_channels * image_size**2, hidden)
    return nn.Sequential(nn.Flatten(), first, nn.{act}(), nn.Linear(hidden, num_classes))
"""
NET = FACTORY.format(extra="", act="ReLU")


@pytest.mark.slow  # some commands, each a process of its own
def test_an_edited_factory_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NET)
    common = ("train", "--store", tmp_path / "store", "--model", "mine:make", "--quiet", "--method", "standard")
    common += tuple(part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value))
    first = key(sdecor(*common, cwd=tmp_path))
    assert key(sdecor(*common, cwd=tmp_path)) == first
    (tmp_path / "mine.py").write_text(FACTORY.format(extra="", act="Tanh"))
    assert key(sdecor(*common, cwd=tmp_path)) != first
    told = sdecor("measure", "--store", tmp_path / "store", cwd=tmp_path)
    assert told.returncode == 1 and "was described for other files of your own than those of now" in told.stderr
    assert "1 runs measured, 1 could not be, " in told.stdout  # the other one was
    (tmp_path / "mine.py").write_bytes(NET.replace("\n", "\r\n").encode())  # as git may leave it on another system
    assert key(sdecor(*common, cwd=tmp_path)) == first


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages whose parts import each other in the four usual ways."""
    texts = {
        "outer/net.py": FACTORY.format(extra="from . import parts\nfrom .deep.far import x\nimport torch", act="ReLU"),
        "outer/parts.py": "import beside\n",
        "outer/deep/far.py": "from ..more import y as x\n",
        "outer/more.py": "y = 1\n",
        "beside.py": "z = 1\n",
    }
    empty = ("outer/__init__.py", "outer/deep/__init__.py", "outer/unused.py", "unused.py")
    for name, text in {**texts, **dict.fromkeys(empty, "")}.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path / "code"
    for name in [n for n in sys.modules if n.partition(".")[0] in ("outer", "beside")]:
        del sys.modules[name]


def test_what_a_factory_imports_of_its_neighbours_counts_and_nothing_else(package: Path) -> None:
    first = Run.of(model="outer.net:make")
    assert len(first.code) == 16 and Run.of(model="lenet").code == ""
    for name in ("outer/net.py", "outer/parts.py", "outer/deep/far.py", "outer/more.py", "beside.py"):
        text = (package / name).read_text()
        (package / name).write_text(text + "# another line\n")
        assert Run.of(model="outer.net:make").key != first.key, name
        assert first.but(seed=1).code == first.code and first.but(lr=0.1).code == first.code  # described before
        assert first.but(model="outer.net:make").code != first.code
        (package / name).write_text(text)
    for name in ("unused.py", "outer/unused.py"):
        (package / name).write_text("# another line\n")
    assert Run.of(model="outer.net:make") == first == Run.from_dict(first.to_dict())
    assert first.but(model="lenet").code == ""


WRITTEN = {
    "decorated": "@SCORES.register\n@torch.no_grad()\ndef own(gradient):\n    return gradient.sum(1) * FACTOR\n",
    "cached": "@SCORES.register\n@functools.lru_cache\ndef own(gradient):\n    return gradient.sum(1) * FACTOR\n",
    "object": "class Own:\n    def __call__(self, gradient):\n        return gradient.sum(1) * FACTOR\n"
    "SCORES.register('own')(Own())\n",
    "partial": "def f(gradient, by):\n    return gradient.sum(1) * by\n"
    "SCORES.register('own')(functools.partial(f, by=FACTOR))\n",
}
METHOD = """
from sdecor.registers import METHODS, Method

METHODS['mine'] = Method({'classification': 1, 'consistency': 1}, settings={'score': 'own'})
"""


@pytest.mark.slow
@pytest.mark.parametrize("written", WRITTEN)
def test_however_a_function_is_written_its_file_counts(tmp_path: Path, written: str) -> None:
    keys, path = set(), tmp_path / "score.py"
    (tmp_path / "mine.py").write_text(METHOD)
    for factor in (1, 2, 1):
        head = f"import functools\nimport torch\nfrom sdecor.registers import SCORES\nFACTOR = {factor}\n"
        path.write_text(head + WRITTEN[written])
        ask = "from sdecor.config import Run; print(Run.of(method='mine').key)"
        env = {**os.environ, "SDECOR_USE": os.pathsep.join([str(path), str(tmp_path / "mine.py")])}
        done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        keys.add(done.stdout)
    assert len(keys) == 2


def test_packages_without_init_and_roots_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a/space/sub/net.py": "from space.lib.blocks import b\nfrom ..lib.more import m\nimport beyond\n"}
    texts |= {"a/space/lib/blocks.py": "b = 1\n", "a/space/lib/more.py": "m = 1\n", "b/beyond.py": "x = 1\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for root in ("a", "b"):
        monkeypatch.syspath_prepend(tmp_path / root)
    first = Run.of(model="space.sub.net:make")
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "# another line\n")
        assert Run.of(model="space.sub.net:make").key != first.key, name
        (tmp_path / name).write_text(text)
    assert Run.of(model="space.sub.net:make") == first
    for name in [n for n in sys.modules if n.partition(".")[0] == "space"]:
        del sys.modules[name]


def test_a_factory_of_a_notebook_counts_by_its_instructions() -> None:
    """As a cell that is run again, of which there is no file; and the same in every process."""
    ask = """
from sdecor.config import Run
for width in (4, 64, 4):
    exec(f"def make(c, k, s): return (lambda w: w * c)({width})")
    print(Run.of(model="__main__:make").key)
"""
    command = [sys.executable, "-c", ask]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert said[0] == said[1] and said[0][0] == said[0][2] != said[0][1]


#: Cells that define a factory, with 4 for the width or with 64, a text that the first line of each loop replaces.
CELLS = {
    "a class that a function calls": """
class Net(torch.nn.Linear):
    def __init__(self): super().__init__(4, WIDTH)
def make(c, k, s): return Net()
""",
    "a class": """
class make(torch.nn.Linear):
    def __init__(self, c, k, s): super().__init__(c, WIDTH)
""",
    "a base, and a method of a kind": """
class Base:
    @staticmethod
    def width(): return WIDTH
class make(Base, torch.nn.Module):
    def __init__(self, c, k, s): super().__init__()
""",
    "a global": """
HIDDEN = WIDTH
def make(c, k, s): return torch.nn.Linear(c, HIDDEN)
""",
    "a global in a function inside": """
HIDDEN = {"of": [WIDTH]}
def make(c, k, s): return (lambda: HIDDEN["of"])()
""",
    "an argument given before": """
from functools import partial
def wide(c, k, s, hidden): return torch.nn.Linear(c, hidden)
make = partial(wide, hidden=WIDTH)
""",
    "a variable of the function around": """
def around(hidden):
    def make(c, k, s): return torch.nn.Linear(c, hidden)
    return make
make = around(WIDTH)
""",
    "a default": """
def make(c, k, s, *, hidden=WIDTH): return torch.nn.Linear(c, hidden)
""",
    "an object": """
class Maker:
    def __init__(self, hidden): self.hidden = hidden
    def __call__(self, c, k, s): return torch.nn.Linear(c, self.hidden)
make = Maker(WIDTH)
""",
    "a function of a function": """
def inner(c): return torch.nn.Linear(c, WIDTH)
def make(c, k, s): return inner(c)
""",
    "a cache": """
import functools
@functools.cache
def make(c, k, s): return torch.nn.Linear(c, WIDTH)
""",
    "a set of constants": """
def make(c, k, s): return torch.nn.Linear(c, WIDTH if "a" in {"a", "b", "c", "d"} else 2)
""",
    "a decorator": """
import functools
def scaled(width):
    def around(function):
        @functools.wraps(function)
        def call(*args): return function(*args, width)
        return call
    return around
@scaled(WIDTH)
def make(c, k, s, width): return torch.nn.Linear(c, width)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_whatever_a_factory_of_a_notebook_reaches_counts(name: str) -> None:
    ask = f"""
import torch
from sdecor.config import Run
for width in ("4", "64", "4"):
    exec(compile({CELLS[name]!r}.replace("WIDTH", width), "<cell>", "exec"))
    print(Run.of(model="__main__:make").key)
"""
    said = [subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.split() for _ in "ab"]
    assert said[0] == said[1] and said[0][0] == said[0][2] != said[0][1]


@pytest.mark.slow
def test_files_that_a_notebook_imports_count(tmp_path: Path) -> None:
    ask = f"""
import sys
from sdecor.config import Run
sys.path.insert(0, {str(tmp_path)!r})
import torch, mynet
def make(c, k, s): return mynet.build(c)
def late(c, k, s):
    import mynet
    return mynet.build(c)
for name in ("make", "late"):
    print(Run.of(model=f"__main__:{{name}}").key)
if len(sys.argv) > 1:
    open({str(tmp_path / "mynet.py")!r}, "a").write("# more")
    try:
        Run.of(model="__main__:make")
    except ValueError as error:
        print("start Python anew" in str(error))
"""
    keys = []
    for width, more in ((4, []), (64, []), (4, ["edit"])):
        (tmp_path / "mynet.py").write_text(f"import torch\ndef build(c): return torch.nn.Linear(c, {width})\n")
        done = subprocess.run([sys.executable, "-c", ask, *more], capture_output=True, text=True, check=True)
        keys.append(done.stdout.split())
    assert keys[2] == [*keys[0], "True"] and not set(keys[0]) & set(keys[1])


@pytest.mark.slow
def test_what_a_factory_finds_by_changing_the_path_is_refused_before_training(tmp_path: Path) -> None:
    for folder in ("lib", "exp"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib" / "blocks.py").write_text("def width(): return 4\n")
    (tmp_path / "exp" / "mine.py").write_text(
        "import sys, torch\nsys.path.insert(0, '../lib')\nfrom blocks import width\n"
        "def make(c, k, s):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(c, width(), 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),"
        " torch.nn.Flatten(), torch.nn.Linear(width(), k))\n"
    )
    words = "train --data digits --limit 60 --epochs 1 --evaluate-on val --quiet --method standard --model mine:make"
    how: dict[str, Any] = {"cwd": tmp_path / "exp", "capture_output": True, "text": True}
    command = [sys.executable, "-m", "sdecor", *words.split(), "--store", str(tmp_path / "store")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, **how)
    assert done.returncode == 2 and done.stderr.endswith("only after a change of sys.path belong on PYTHONPATH\n")
    assert done.stderr.count("\n") == 1 and not [*(tmp_path / "store").glob("results/*/*")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": f".{os.pathsep}../lib"}, **how)
    assert done.returncode == 0, done.stderr


OWN_DATA = """
import torch
from pathlib import Path
from sdecor.data import dataset

@dataset(classes=("low", "high"), size=8)
def pixels(request):
    draw = torch.Generator().manual_seed(int((request.root / "seed").read_text()))
    return torch.rand(20, 1, 8, 8, generator=draw), torch.arange(20) % 2
"""
OWN_MEASURE = """
from sdecor.measures.case import measure

@measure("mine", better="higher", family="sharpness")
def mine(saliency):
    return saliency.double().mean((1, 2)) * 0 + {value}
"""


@pytest.mark.slow  # some commands, each a process of its own
def test_files_that_own_data_read_and_measures_of_ones_own(tmp_path: Path) -> None:
    for root in ("a", "b"):
        (tmp_path / root).mkdir()
        (tmp_path / root / "seed").write_text(str(ord(root)))
    (tmp_path / "own.py").write_text(OWN_DATA)
    (tmp_path / "measures.py").write_text(OWN_MEASURE.format(value=1))
    own, small = ("--use", "own.py", "--use", "measures.py"), ("--model", "cnn_bn", "--epochs", 1, "--batch-size", 5)
    common = (*own, "train", "--data", "pixels", *small, "--quiet", "--store", tmp_path / "store", "--data-root")
    first = sdecor(*common, "a", cwd=tmp_path)
    assert "mine                     1.0000" in first.stdout and first.stderr == ""
    assert sdecor(*common, "a", cwd=tmp_path).stderr == ""
    assert sdecor(*common, "b", "--method", "noise", cwd=tmp_path).returncode == 0
    shown = sdecor(*own, "show", "--store", tmp_path / "store", cwd=tmp_path)
    assert shown.returncode == 0 and sorted(shown.stderr.splitlines()) == [
        f"the {split} images of pixels at seed 0 are not the same in all records" for split in ("test", "train")
    ]
    other = sdecor(*common, "b", cwd=tmp_path)
    assert other.returncode == 2 and "the train images of pixels are others than those of run" in other.stderr
    (tmp_path / "measures.py").write_text(OWN_MEASURE.format(value=2))
    again = sdecor(*common, "a", cwd=tmp_path)
    assert "mine                     1.0000" in again.stdout
    assert "were measured without your own measures as they are now; `sdecor measure` does it again" in again.stderr


def test_a_checkpoint_knows_its_network(tmp_path: Path) -> None:
    data, path = load("digits", limit=64), tmp_path / "c.pt"

    def net(act: nn.Module, width: int = 8) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, width), act, nn.Linear(width, 10))

    def go(model: nn.Module) -> None:
        fit(model, data, Objective("standard"), Schedule(epochs=1), checkpoint=path, progress=False)

    go(net(nn.ReLU()))
    go(net(nn.ReLU()))
    for other in (net(nn.Tanh()), net(nn.ReLU(), 9)):
        with pytest.raises(ValueError, match=f"^checkpoint {path} is of other networks; put those back, or delete it$"):
            go(other)


OWN = """
from sdecor.decorrelation import correlation_matrix, penalty
from sdecor.whitening import covariance
from sdecor.registers import METHODS, Method
from sdecor.measures.case import measure
from sdecor.attribution import attribution

@penalty(name="mine")
def mine(x):
    return correlation_matrix(covariance(x)[1]).square().mean() * {factor}

@attribution("flat")
def flat(model, x, y, rows):
    return x * 0 + {flat}

METHODS["own"] = Method({{"classification": 1, "decorrelation": {weight}}}, settings={{"penalty": "mine"}})
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., str]:
    """Enters what `OWN` makes of some numbers, as a file that was edited does in another process."""
    files: list[Path] = []

    def enter(**numbers: float) -> str:
        for register, name in ((PENALTIES, "mine"), (ATTRIBUTIONS, "flat"), (METHODS, "own")):
            if name in register:
                del register[name]
        for alias in [n for n in sys.modules if n.startswith("sdecor_use_own")]:
            del sys.modules[alias]
        path = tmp_path / "own.py"
        path.write_text(OWN.format(**{"factor": 1, "flat": 1, "weight": 0.1, **numbers}))
        use(str(path))
        files.append(path)
        return str(path)

    yield enter
    for register, name in ((PENALTIES, "mine"), (ATTRIBUTIONS, "flat"), (METHODS, "own")):
        del register[name]


@pytest.mark.parametrize("numbers", [{"factor": 2}, {"weight": 0.2}])
def test_an_edited_penalty_or_method_is_another_run(
    own: Callable[..., str], tmp_path: Path, numbers: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    own()
    store, first = Store(tmp_path / "store"), Run.of(method="own", settings={"group_size": 8}, **SMALL)
    assert execute(first, store, progress=False) is not None
    own(**numbers)
    second = Run.of(method="own", settings={"group_size": 8}, **SMALL)
    assert second.key != first.key and store.record(second) is None
    assert (store.root / "results/digits" / f"{first.key}.json").exists()  # and nobody put it aside


def test_a_table_does_not_keep_rows_of_other_code_weights_or_draws(
    own: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own()
    run, store = Run.of(data="shapes", data_options={"samples": 12}, epochs=1, batch_size=4), Store(tmp_path / "store")
    execute(run, store, progress=False)
    made: list[str] = []

    def noted(cases: Any, names: Any = None) -> Any:
        made.extend(cases)
        return table(cases, ["gini", "auroc"] if cases else None)

    monkeypatch.setattr("sdecor.evaluation.table", noted)
    both, controls = ["gradient", "flat"], len(CONTROLS)

    def again() -> list[str]:
        made.clear()
        tabulate(run, store, both, images=3)
        return made[:]

    assert len(again()) == controls + 2 and again() == []
    own(flat=2)
    assert again() == ["flat"]
    monkeypatch.setattr("sdecor.evaluation.SAMPLES", 2)
    assert len(again()) == controls + 2 and again() == []

    @measure("half", better="higher")
    def half(saliency: Any) -> Any:
        return saliency.flatten(1).mean(1) / 2

    try:
        assert len(again()) == controls + 2 and again() == []
    finally:
        del MEASURES["half"]
    assert len(again()) == controls + 2
    record = store.record(run)
    assert record is not None
    other = execute(run.but(seed=1), store, progress=False)
    assert other is not None
    content = store.path("weights", run.but(seed=1), ".safetensors").read_bytes()
    store.write(type(record)(**{**vars(record), "weights_sha256": other.weights_sha256}), content)
    assert len(again()) == controls + 2 and again() == []


# --- how it was computed --------------------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    out = [record.getMessage() for record in caplog.records if record.name == "sdecor"]
    caplog.clear()
    return out


def test_a_record_that_was_computed_in_another_way_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs, store = [Run.of(method="standard", seed=s, **SMALL) for s in (0, 1)], Store(tmp_path / "store")
    with caplog.at_level(logging.WARNING, "sdecor"):
        first = execute(runs[0], store, amp=True, progress=False)
        assert first is not None and first.environment["amp"] is True and said(caplog) == []
        assert execute(runs[0], store, amp=True, progress=False) == first and said(caplog) == []
        root, tail = store.root, "as is asked for now; delete to compute anew"
        assert execute(runs[0], store, progress=False) == first
        assert said(caplog) == [f"the record in {root} was computed on cpu, bfloat16, not on cpu {tail}"]
        for how, name in (({"device": "cuda"}, "cuda"), ({"compiled": True}, "cpu, compiled")):
            execute(runs[0], store, progress=False, **how)
            assert said(caplog) == [f"the record in {root} was computed on cpu, bfloat16, not on {name} {tail}"]
        execute(runs[1], store, amp=True, progress=False)
        mixed(store.records())
        assert said(caplog) == []
        grid(runs, store, progress=False)  # one line for all
        assert said(caplog) == [f"2 records in {root} were computed on cpu, bfloat16, not on cpu {tail}"]
        execute(runs[0].but(method="noise"), store, progress=False)
        mixed(store.records())
        said_of_ways = "the records of digits were not all computed in one way: "
        (line,) = said(caplog)
        assert line.startswith(said_of_ways) and {*line.removeprefix(said_of_ways).split("; ")} == {
            "2 on cpu, bfloat16",
            "1 on cpu",
        }


def test_a_run_that_goes_on_in_another_way_says_so_and_records_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, store = Run.of(method="standard", **SMALL), Store(tmp_path / "store")

    def kill(epoch: int, _: History) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run, store, amp=True, after_epoch=kill, progress=False)
    with caplog.at_level(logging.WARNING, "sdecor"):
        record = execute(run, store, progress=False)
    assert record is not None
    assert said(caplog) == ["1 epochs were computed on cpu, bfloat16, those to come are on cpu"]
    assert record.environment["amp"] is True and record.ways == ["cpu, bfloat16", "cpu"]


def test_own_functions_of_a_notebook_are_not_for_other_processes(tmp_path: Path) -> None:
    runs = [Run.of(method="standard", model="__main__:make", seed=s, **SMALL) for s in (0, 1)]
    with pytest.raises(ValueError, match="^model '__main__:make' is not to be found by other processes; put it into a"):
        grid(runs, Store(tmp_path / "store"), workers=2)
    assert not (tmp_path / "store").exists() and len(load("digits")) == 1000
