"""The benchmarks run; what they find is not judged here, since other work on the machine would disturb it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdecor.registers import METHODS

SHORT = {
    "run.py": ("--rounds=1", "--repeat=1", "--batch-size=32"),
    "attributions.py": ("--rounds=1", "--images=2", "--samples=300", "--size=16"),
    "measures.py": ("--rounds=1", "--images=8", "--maps=10", "--table=20"),
    "gpu.py": ("--device=cpu", "--batch-size=8"),
    "streams.py": ("--images=60", "--side=32", "--batch-size=8", "--workers=1", "--models=lenet", "--seconds=1"),
}
EXPECTED = {
    "run.py": [*METHODS, "SaliencyDecor / plain", "public code / SaliencyDecor", "all that a run reports"],
    "gpu.py": ["images_per_second", "SaliencyDecor takes"],
    "attributions.py": ["rise", "smoothgrad", "integrated_gradients", "kernel_shap", "shapley_sampling"],
    "streams.py": ["all images would take", "is the slower of the two", "an epoch of 56 images"],
    "measures.py": ["pixels", "patches", "relevance_mass", "auroc", "measures of 20 gradient maps of digits"],
}


def test_every_benchmark_is_tried(root: Path) -> None:
    assert {path.name for path in (root / "tests" / "benchmarks").glob("*.py")} == set(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_benchmark_runs(name: str, root: Path, tmp_path: Path) -> None:
    if name == "measures.py":
        pytest.importorskip("quantus", reason="Quantus does not import here", exc_type=ImportError)
    command = [sys.executable, root / "tests" / "benchmarks" / name, *SHORT[name]]
    environment = {**os.environ, "SDECOR_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not [what for what in EXPECTED[name] if what not in done.stdout]
