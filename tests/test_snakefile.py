"""The Snakefile: its jobs, what is left of a failed one, and that it goes on after a kill -9."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import SHAPES

pytestmark = pytest.mark.slow
PLAN = f"""{SHAPES}
[arms.decorrelation]
try = {{ decorrelation = [0.3, 1.0] }}

[presets.quick]
seeds = 1
tries = 1
[presets.cpu]
seeds = 2
"""
PRESETS = ("cpu", "gpu")
Snakemake = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Snakemake, which is no part of the project's environment: installed here if it is nowhere else."""
    if found := shutil.which("snakemake"):
        return found
    folder = tmp_path_factory.mktemp("snakemake")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "snakemake>=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip(f"pip cannot install snakemake here: {done.stderr[-300:]}")
    return str(folder / "bin" / "snakemake")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`python` is this one, in the shells of jobs as well."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """A book with one plan."""
    (tmp_path / "book" / "experiments").mkdir(parents=True)
    shutil.copy(root / "Snakefile", tmp_path)
    (tmp_path / "book" / "experiments" / "tiny.toml").write_text(PLAN, encoding="utf-8")
    return tmp_path


@pytest.fixture
def snakemake(program: str, environment: None, folder: Path) -> Snakemake:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [program, "--cores", "2", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    return call


def test_a_job_for_every_plan_and_worker_and_a_page_for_its_chapter(folder: Path, snakemake: Snakemake) -> None:
    (folder / "book" / "experiments" / "planned.md").touch()
    (folder / "book" / "experiments" / "planned.toml").write_text(f"{PLAN}\n[presets.gpu]\nseeds = 3\n")
    more = ["preset=quick", "store=a store", "workers=3"]
    done = snakemake("--dry-run", "--printshellcmds", "--config", *more)
    assert done.returncode == 0, done.stderr
    commands = sorted(re.findall(r"^ *(?:Shell command: )?(python .*)$", done.stdout + done.stderr, re.MULTILINE))
    how = "--preset quick --store 'a store' --device cpu --threads 1"
    run = "python -m sdecor run book/experiments/{0}.toml {1} > 'a store/{0}.{2}.log' 2>&1"
    page = "python -m sdecor_book experiments/{0} -p preset quick -p store 'a store' --out 'a store/{0}.page.ipynb'"
    assert commands == sorted(
        [run.format(name, how, worker) for name in ("tiny", "planned") for worker in range(3)]
        + [f"{page.format('planned')} && cp 'a store/planned.page.ipynb' 'a store/planned.ipynb'"]
    )
    done = snakemake("--dry-run", "--printshellcmds", "--config", "preset=gpu", "device=cuda")
    sizes = [(done.stdout + done.stderr).count(f" --preset {size} --store runs --device cuda ") for size in PRESETS]
    assert sizes == [2, 2]  # tiny has no such size


def test_what_it_does_not_know(snakemake: Snakemake) -> None:
    done = snakemake("--dry-run", "--config", "preset=gpuu")
    assert "no plan has the preset 'gpuu'; known: quick, cpu" in done.stdout + done.stderr and done.returncode
    done = snakemake("--dry-run", "--config", "devise=cuda")
    assert "unknown --config 'devise'; known: store, workers, preset, device" in done.stdout + done.stderr


def test_it_goes_on_after_a_kill(folder: Path, snakemake: Snakemake, program: str) -> None:
    how = ["--config", "preset=quick"]
    killed = subprocess.Popen(
        [program, "--cores", "2", *how],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = folder / "runs" / "results"
    try:
        for _ in range(600):
            if list(results.glob("*/*.json")):
                break
            assert killed.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    before = {path: path.read_bytes() for path in results.glob("*/*.json")}
    assert 0 < len(before) < 4 and not list((folder / "runs").glob("*.done"))

    assert "--unlock" in (said := snakemake(*how)).stdout + said.stderr and said.returncode
    assert snakemake("--unlock", *how).returncode == 0
    done = snakemake("--rerun-incomplete", *how)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(results.glob("*/*.json"))) == 4  # two trials, two final runs
    for worker in (0, 1):
        assert (folder / "runs" / f"tiny.{worker}.done").exists()
        log = (folder / "runs" / f"tiny.{worker}.log").read_text(encoding="utf-8")
        assert "runs done, 0 to do" in log and "depend" not in log
    assert "Nothing to be done" in (said := snakemake(*how)).stdout + said.stderr


def test_the_notebook_of_a_failed_page_is_kept(root: Path, folder: Path, snakemake: Snakemake) -> None:
    pytest.importorskip("papermill", reason="needs the packages of the extra 'book'")
    for suffix in ("toml", "md", "ipynb"):
        shutil.copy(root / "book" / "experiments" / f"mnist.{suffix}", folder / "book" / "experiments")
    (folder / "runs").mkdir()
    for worker in (0, 1):
        (folder / "runs" / f"mnist.{worker}.done").touch()  # though the store is empty
    done = snakemake("runs/mnist.ipynb", "--config", "preset=cpu")
    assert done.returncode != 0
    assert "FileNotFoundError in cell" in done.stdout + done.stderr
    assert not (folder / "runs" / "mnist.ipynb").exists()
    assert "FileNotFoundError" in (folder / "runs" / "mnist.page.ipynb").read_text(encoding="utf-8")
