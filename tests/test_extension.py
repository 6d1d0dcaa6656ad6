"""The house is open: one file outside it, ten lines or fewer a piece, adds one of everything; nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import check, check_register

from sdecor import plotting, report
from sdecor.attribution import attribute
from sdecor.config import Run
from sdecor.evaluation import tabulate
from sdecor.measures import Case, evaluate, table
from sdecor.models import build
from sdecor.registers import METHODS, REGISTERS, use
from sdecor.store import Store

#: Kind to the name that is added, and the lines that do it.
ADDED: dict[str, tuple[str, str]] = {
    "penalties": (
        "dependence",
        '''
from sdecor.decorrelation import correlation_matrix, penalty
from sdecor.whitening import covariance

@penalty(label="absolute correlation", source="this file, 1")
def dependence(x):
    """Mean magnitude of the off-diagonal correlations."""
    c = correlation_matrix(covariance(x)[1]).triu(1).abs()
    return 2 * c.mean()
''',
    ),
    "terms": (
        "slope",
        '''
from typing import Annotated
from sdecor.objective import term
from sdecor.registers import Between

@term(label="gradient penalty", source="doi:10.1109/72.165600")
def slope(step, *, power: Annotated[float, Between(1, 4)] = 2.0):
    """Norm of the input gradient to a `power`: double backpropagation."""
    return step.gradient.flatten(1).norm(dim=1).pow(power).mean()
''',
    ),
    "methods": (
        "smooth",
        """
from sdecor.registers import METHODS, Method

METHODS["smooth"] = Method({"classification": 1, "slope": 0.1}, label="double backpropagation")
""",
    ),
    "attributions": (
        "powered",
        '''
from typing import Annotated
from sdecor.attribution import attribution
from sdecor.registers import Between
from sdecor.saliency import logits_and_gradient

@attribution(label="Powered gradient", source="this file, 4", predicts=True)
def powered(model, x, y, rows, *, power: Annotated[float, Between(1)] = 2.0):
    """Magnitude of the gradient to a `power`."""
    return logits_and_gradient(model, x, y)[1].abs() ** power
''',
    ),
    "measures": (
        "peak",
        '''
from sdecor.measures import measure

@measure("share of the brightest pixel", better="higher", low=0, high=1, source="this file, 5")
def peak(saliency):
    """Share of the most salient pixel; NaN where all is 0."""
    flat = saliency.flatten(1).double()
    return flat.amax(1) / flat.sum(1)
''',
    ),
    "datasets": (
        "stripes",
        '''
import torch
from typing import Annotated
from sdecor.data import SPLITS, dataset
from sdecor.registers import Between

@dataset(label="Stripes", classes=("across", "down"), size=12, source="this file, 6", licence="MIT", cite="none")
def stripes(request, *, contrast: Annotated[float, Between(0, 0.75)] = 0.5):
    """Noise with stripes across or down, of some `contrast`."""
    draw = torch.Generator().manual_seed(3 * request.seed + SPLITS.index(request.split))
    down, wave = torch.rand(60, 1, 1, 1, generator=draw) < 0.5, torch.arange(12.0).sin() * contrast / 2 + 0.5
    return torch.where(down, wave, wave[:, None]) + torch.rand(60, 1, 12, 12, generator=draw) / 8, down.long().flatten()
''',
    ),
    "models": (
        "perceptron",
        '''
from typing import Annotated
from torch import nn
from sdecor.models import model
from sdecor.registers import Between

@model(label="one hidden layer", source="this file, 7")
def perceptron(channels, classes, size, *, hidden: Annotated[int, Between(1)] = 16):
    """Two linear layers with some `hidden` units between them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, hidden), nn.ReLU(), nn.Linear(hidden, classes))
''',
    ),
    "fills": (
        "flipped",
        '''
from sdecor.masking import fill

@fill(label="upside down", source="this file, 8")
def flipped(x):
    """The image upside down."""
    return x.flip(2)
''',
    ),
    "scores": (
        "largest",
        '''
from sdecor.registers import METHODS, Method
from sdecor.saliency import score

@score(label="largest magnitude", source="this file, 9")
def largest(gradient):
    """Largest magnitude over the channels."""
    return gradient.abs().amax(1)

METHODS["consistency-largest"] = Method({"classification": 1, "consistency": 1}, settings={"score": "largest"})
''',
    ),
}

KINDS = pytest.mark.parametrize("kind", ADDED)
#: What each kind says when it is given something impossible: arguments of ``train``, and the line of the error.
WRONG = {
    "penalties": ("--method decorrelation --settings penalty=dependent", "unknown penalty 'dependent'; known: "),
    "terms": ("--method smooth --settings power=9", "power must be from 1 to 4, got 9.0"),
    "methods": ("--method smooth --weights consistency=1", "method 'smooth' has no term 'consistency'; it has: "),
    "attributions": ("--removed 0.5 --removed-by power", "unknown removed_by 'power'; known: "),
    "datasets": ("--data-options contrast=2", "contrast must be from 0 to 0.75, got 2.0"),
    "models": ("--model-options hidden=0", "hidden must be at least 1, got 0"),
    "fills": ("--method noise --settings fill=flip", "unknown fill 'flip'; known: "),
    "scores": ("--method consistency-largest --settings score=signed", "score='largest' belongs to method "),
}
#: Runs by what they use beside the data set and the model.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"method": "standard"},
    "term": {"method": "smooth", "settings": {"power": 1.0}},
    "penalty and fill": {"method": "saliencydecor-signed", "settings": {"penalty": "dependence", "fill": "flipped"}},
    "score": {"method": "consistency-largest"},
}
HERE = "--epochs 1 --data stripes --data-options contrast=0.6 --model perceptron --model-options hidden=32"
SCRIPT = """
import json, sys
from click.testing import CliRunner
from sdecor.__main__ import app
said = [CliRunner().invoke(app, ["--use", sys.argv[1], *words]) for words in json.load(sys.stdin)]
print(json.dumps([(one.exit_code, one.stdout, one.stderr) for one in said]))
"""


def words(run: dict[str, Any]) -> list[str]:
    """The arguments of a run."""
    settings = [word for name, value in run.get("settings", {}).items() for word in ("--settings", f"{name}={value}")]
    return [*HERE.split(), "--method", run["method"], *settings]


def described(run: dict[str, Any]) -> Run:
    own = {"data_options": {"contrast": 0.6}, "model_options": {"hidden": 32}}
    return Run.of(data="stripes", model="perceptron", epochs=1, **own, **run)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outside") / "mine.py"
    path.write_text("\n".join(lines for _, lines in ADDED.values()))
    return path


@pytest.fixture(scope="module")
def said(file: Path) -> dict[str, tuple[int, str, str]]:
    """What commands answer, each given ``--use FILE``, in a process that knew nothing of the file."""
    quiet = ["--quiet", "--store", str(file.parent / "store")]
    commands = {"list": ["list"]}
    for kind, (name, _) in ADDED.items():
        commands |= {f"list {kind}": ["list", kind], f"list {kind} {name}": ["list", kind, name]}
    for kind, (wrong, _) in WRONG.items():
        commands[f"wrong {kind}"] = ["train", *quiet, *HERE.split(), *wrong.split()]
    commands |= {f"train {name}": ["train", *quiet, *words(run)] for name, run in RUNS.items()}
    commands["data"] = ["data", "list", "--data-root", str(file.parent)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)], input=json.dumps(list(commands.values())), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def before() -> dict[str, dict[str, Any]]:
    """Every entry's look without the file."""
    return {kind: {name: plotting.style(entry) for name, entry in r.items()} for kind, r in REGISTERS.items()}


@pytest.fixture(scope="module")
def used(file: Path, before: dict[str, dict[str, Any]]) -> Iterator[Path]:
    """The file is used in this process, too; what it entered is taken out again."""
    use(str(file))
    yield file
    for alias in [name for name in sys.modules if name.startswith("sdecor_use_mine")]:
        del sys.modules[alias]
    for kind, register in REGISTERS.items():
        for name in set(register) - set(before[kind]):
            del register[name]
        assert list(register) == list(before[kind])


def test_ten_lines_a_piece() -> None:
    assert list(ADDED) == list(REGISTERS)
    for _, lines in ADDED.values():
        assert 2 <= len([line for line in lines.splitlines() if line]) <= 10


@KINDS
def test_it_is_listed_with_docstring_options_and_source(
    kind: str, said: dict[str, tuple[int, str, str]], used: Path
) -> None:
    name, lines = ADDED[kind]
    entry = REGISTERS[kind][name]
    assert f" {name}" in next(line for line in said["list"][1].splitlines() if line.startswith(kind))
    assert any(line.startswith(f"{name} ") and len(line.split()) > 1 for line in said[f"list {kind}"][1].splitlines())
    code, out, _ = said[f"list {kind} {name}"]
    assert code == 0 and out.startswith(f"{name}: {entry.title}\n") and entry.title in lines
    assert entry.source in out and (kind == "methods" or entry.source)
    assert (entry.function.__doc__ or "0.1 slope") in out
    assert all(f"  {option}=" in out for option in entry.options)
    assert "stripes      present  Stripes" in said["data"][1]


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_impossible_is_one_line(kind: str, said: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = said[f"wrong {kind}"]
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {WRONG[kind][1]}"), err


@pytest.mark.parametrize("name", RUNS)
def test_it_is_used_in_a_run(name: str, said: dict[str, tuple[int, str, str]], used: Path) -> None:
    code, out, err = said[f"train {name}"]
    assert code == 0, err
    assert "  peak  " in out  # a measure of maps alone is always taken
    run = described(RUNS[name])
    record = Store(used.parent / "store").record(run)
    assert record is not None and record.metrics["accuracy"] >= 0 and record.shape["image_size"] == 12
    assert set(record.run.objective.terms) <= {c.removeprefix("loss_") for c in record.curves}
    assert dict(record.run.settings).items() >= RUNS[name].get("settings", {}).items()


@KINDS
def test_it_keeps_the_promises_of_its_kind(kind: str, used: Path) -> None:
    check(REGISTERS[kind][ADDED[kind][0]])


@KINDS
def test_it_has_a_label_and_a_look_of_its_own_and_takes_none_away(
    kind: str, used: Path, before: dict[str, dict[str, Any]]
) -> None:
    check_register(REGISTERS[kind])
    assert {name: plotting.style(REGISTERS[kind][name]) for name in before[kind]} == before[kind]


def test_attribution_and_measure_come_in_tables(used: Path, said: dict[str, tuple[int, str, str]]) -> None:
    model, x = build("perceptron", 1, 2, 12), torch.rand(4, 1, 12, 12)
    maps = attribute(model, x, method="powered", power=3)
    expected = maps.abs().sum(1).flatten(1).double()
    with pytest.raises(ValueError, match="^power must be finite and at least 1, got 0.0$"):
        attribute(model, x, method="powered", power=0)
    with pytest.raises(ValueError, match="^unknown measure 'peek'; known: .*, peak$"):
        evaluate(Case(attribution=maps), ["peek"])
    values = evaluate(Case(attribution=maps))["peak"]
    torch.testing.assert_close(values, expected.amax(1) / expected.sum(1))
    assert "peak" in set(table({"powered": Case(attribution=maps)})["metric"])
    found = tabulate(described(RUNS["term"]), Store(used.parent / "store"), ["powered"], images=6)
    row = found[(found["attribution"] == "powered") & (found["metric"] == "peak")]
    assert len(row) == 1 and 0 < row["value"].item() < 1 and row["images"].item() == 6
    assert set(found["attribution"]) > {"powered", "noise"}


def test_method_and_measure_are_drawn(used: Path, said: dict[str, tuple[int, str, str]]) -> None:
    frame = report.frame(Store(used.parent / "store").records())
    cells = report.table(frame, ["accuracy", "peak"])
    assert list(cells.columns) == ["accuracy, % ↑", "share of the brightest pixel ↑"]
    assert {"double backpropagation", "consistency-largest"} <= set(cells.index)
    differences = report.differences(frame, "standard", ["peak"])
    figure = report.forest(differences, ["peak"])
    ax = figure.axes[0]
    assert ax.get_title().replace("\n", " ") == "share of the brightest pixel ↑"
    labels = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    place = labels.index("double backpropagation")
    dots = {line.get_ydata()[0]: line.get_markeredgecolor() for line in ax.lines if line.get_marker() == "o"}
    assert dots[place] == plotting.style(METHODS["smooth"])["color"]
    assert len(set(dots.values())) == len(labels) == 3
    figure, ax = plotting.plt.subplots()
    plotting.bands(ax, [0, 1], {name: [[0.0, 1.0]] for name in METHODS})
    looks = {(line.get_color(), repr(line.get_linestyle())) for line in ax.lines}
    assert len(looks) == len(METHODS) == len({line.get_label() for line in ax.lines})
    plotting.plt.close("all")


@pytest.mark.slow
def test_workers_find_it_too(file: Path) -> None:
    store = file.parent / "grid"
    command = ["--use", str(file), "grid", "--quiet", "--store", str(store), "--workers", "2", "--seeds", "0"]
    command += ["--methods", "smooth,consistency-largest", *HERE.split()]
    done = subprocess.run([sys.executable, "-m", "sdecor", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"2 runs in {store}: 2 done, 0 left"
