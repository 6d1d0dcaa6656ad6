"""A small run, and what to look at in the store that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdecor.config import Run
from sdecor.store import Record, Store

TINY: dict[str, Any] = {"data": "digits", "evaluate_on": "val", "limit": 96, "epochs": 2, "batch_size": 48}
#: A plan of one arm on pictures that are made, in TOML: what follows goes on from its arms.
SHAPES = """
[shared]
data = "shapes"
data_options = { samples = 40 }
model = "lenet"
epochs = 1
batch_size = 20

[choice]
price = 0.01

[arms.standard]
"""
ONE = Run.of(method="saliencydecor-absolute", **TINY)


def files(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())


def expected_files(*runs: Run) -> list[str]:
    return sorted(
        f"{kind}/digits/{run.key}{suffix}"
        for run in runs
        for kind, suffix in (("results", ".json"), ("weights", ".safetensors"))
    )


def result(record: Record | None) -> tuple[object, ...]:
    """All that must not depend on when, where or how often it was run."""
    assert record is not None
    return record.run, record.metrics, record.curves, record.weights_sha256


def copied(store: Store, tmp_path: Path) -> Store:
    for name in files(store):
        target = tmp_path / "store" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((store.root / name).read_bytes())
    return Store(tmp_path / "store")
