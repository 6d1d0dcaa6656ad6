"""The first cell of a chapter, on a runtime that has neither the book nor its packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
nbformat = pytest.importorskip("nbformat", reason="needs the packages of the extra 'book'")
yaml = pytest.importorskip("yaml", reason="needs the packages of the extra 'test'")

CHAPTER = "build/whitening"  # any would do; this one is short
PROBE = "import sys\n\nimport sdecor\n\nprint(sdecor.__file__)\nprint(sys.executable)"


def environment(root: Path, folder: Path) -> dict[str, str]:
    """Git takes the address of the book to be this checkout, pip takes the versions that the project has pinned."""
    ours = ("PYTHON", "GIT_", "VIRTUAL_ENV", "JUPYTER")  # what tests and hooks set, and a fresh runtime does not know
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    url = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    settings = folder / "gitconfig"  # the checkout may belong to somebody else
    settings.write_text(f'[url "{root.as_uri()}"]\n\tinsteadOf = {url}\n[safe]\n\tdirectory = *\n', encoding="utf-8")
    return kept | {
        "GIT_CONFIG_GLOBAL": str(settings),
        "PIP_CONSTRAINT": str(root / "constraints.txt"),
        "PIP_NO_COMPILE": "1",
        "PYTHONNOUSERSITE": "1",
    }


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    """Where an environment of a gigabyte may lie for a while."""
    yield tmp_path / "venv"
    shutil.rmtree(tmp_path / "venv", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_chapter_runs_where_there_is_nothing(root: Path, tmp_path: Path, fresh: Path) -> None:
    """A clone holds what is committed, so a change to the module shows here once it is committed."""
    if not (root / ".git").exists():
        pytest.skip("not a checkout of git, so there is nothing to clone")
    folder, settings = tmp_path / "empty", environment(root, tmp_path)
    folder.mkdir()

    def call(*command: Any, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(c) for c in command], env=settings, text=True, capture_output=True, check=False, timeout=900, **more
        )

    python = fresh / "bin" / "python"
    call(sys.executable, "-m", "venv", fresh)
    done = call(python, "-m", "pip", "install", "--quiet", "ipykernel", "papermill")
    if done.returncode:
        pytest.skip(f"pip cannot install here: {done.stderr[-300:]}")
    call(python, "-m", "ipykernel", "install", "--prefix", fresh, "--name", "python3")
    assert call(python, "-c", "import torch").returncode, "the fresh environment is not fresh"

    notebook = jupytext.read(root / "book" / f"{CHAPTER}.md")
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    nbformat.write(notebook, folder / "chapter.ipynb")
    command = "-m papermill chapter.ipynb out.ipynb -k python3 -p preset quick --no-progress-bar".split()
    done = call(python, *command, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = nbformat.read(folder / "out.ipynb", as_version=4).cells[-1].outputs[0].text.split()
    assert [Path(p).resolve() for p in printed[:1]] == [(folder / "sdecor-book/sdecor/__init__.py").resolve()]
    assert Path(printed[1]).is_relative_to(fresh)
