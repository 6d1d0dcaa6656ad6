from __future__ import annotations

import os
import random
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # workers share the cores, and sums come out in one order


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A data root with MNIST, CIFAR-10 and Caltech-101; tests that ask for it are skipped where there is none."""
    given = os.environ.get("SDECOR_DATA")
    if given:
        return Path(given)
    unpack = ROOT.parent / "shared" / "data" / "unpack"
    if not unpack.exists():
        pytest.skip("no real data: set SDECOR_DATA to a folder that holds it")
    folder = Path(tempfile.gettempdir()) / f"sdecor-real-data-{os.getuid()}"
    with FileLock(f"{folder}.lock"):
        subprocess.run([unpack, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A store in which `stores.ONE` is done; not to be changed."""
    from stores import ONE

    from sdecor.experiment import execute
    from sdecor.store import Store

    store = Store(tmp_path_factory.mktemp("done"))
    execute(ONE, store)
    return store
