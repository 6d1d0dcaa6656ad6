"""What the README shows is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdecor.__main__ import app


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_its_examples_run(blocks: list[str]) -> None:
    space: dict[str, object] = {}
    shown = [block for block in blocks if not block.startswith("# mine.py")]
    assert len(shown) == 2
    for block in shown:
        exec(compile(block, "README.md", "exec"), space)
    (last,) = re.findall(r"^evaluate\(.*\)", shown[-1], re.MULTILINE)
    assert {name: len(values) for name, values in eval(last, space).items()} == dict.fromkeys(
        ["gini", "auroc", "area_between"], 8
    )


@pytest.mark.slow
def test_what_one_adds_is_known_to_all_commands(text: str, blocks: list[str], tmp_path: Path) -> None:
    (own,) = [block for block in blocks if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text(own, encoding="utf-8")
    commands = re.findall(r"^sdecor (--use mine\.py .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    environment = {**os.environ, "SDECOR_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = [
        subprocess.run(
            [sys.executable, "-m", "sdecor", *command.split()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    ]
    assert "logit-slope" in said[0]
    assert re.search(r"^  largest +0\.0", said[1], re.MULTILINE)
    assert list(tmp_path.glob("runs/results/digits/*.json"))


def test_its_table_has_every_command(text: str) -> None:
    assert set(re.findall(r"^\| `sdecor (\w+)` \|", text, re.MULTILINE)) == app.commands.keys()
