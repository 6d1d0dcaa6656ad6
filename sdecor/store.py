"""What runs leave: records, weights, tables and exhibits in a folder, found by the key of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import sdecor
from sdecor._files import replace_atomically, set_aside
from sdecor.config import Run
from sdecor.models import build
from sdecor.registers import METHODS
from sdecor.training import way

log = logging.getLogger("sdecor")
SHAPE = ("channels", "num_classes", "image_size")
_LEAST, _MOST = (float(end) for end in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def _commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        return subprocess.check_output(describe, cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, commit and date of work done now; ``SDECOR_COMMIT`` says which, of a copy."""
    commit = os.environ.get("SDECOR_COMMIT") or _commit()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdecor": sdecor.__version__,
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@dataclass(frozen=True)
class Record:
    """What a run left: its description, measures, curves, and the circumstances."""

    run: Run  #: The description.
    metrics: dict[str, float]  #: Name to number.
    curves: dict[str, list[float]]  #: Terms an epoch; masked accuracy a share; histogram of gradients.
    shape: dict[str, int]  #: ``channels``, ``num_classes`` and ``image_size`` that the network was built for.
    environment: dict[str, Any]  #: Device, ways, threads, versions, commit, date (UTC), seconds, what the data were.
    weights_sha256: str  #: Of the weights file.

    def __post_init__(self) -> None:
        """Keep of each number what float32 knows, so that a record is equal to itself read from its file."""
        for name in ("metrics", "curves", "environment"):
            object.__setattr__(self, name, _short(getattr(self, name)))

    @property
    def ways(self) -> list[str]:
        """How its epochs were computed, as `sdecor.training.way` says it, each way once; empty if that is not known."""
        about = self.environment
        if "ways" in about or "amp" not in about:
            return list(about.get("ways", ()))
        kind = "cpu" if str(about["device"]).startswith("CPU") else "cuda"
        return [way(torch.device(kind), about["amp"], about["compiled"])]

    def to_json(self) -> str:
        """Text of the record's file, a list on one line."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        text = json.dumps({**parts, "run": self.run.to_dict()}, indent=1, sort_keys=True)
        return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"

    @classmethod
    def of_json(cls, text: str) -> Record:
        """Inverse of `to_json`; ValueError if the text is truncated, or no record."""
        try:
            values = json.loads(text)
            record = cls(**{**values, "run": Run.from_dict(values["run"])})
            for part in (record.metrics, record.curves, record.environment):
                part.items()
            if not all(type(record.shape[name]) is int for name in SHAPE):
                raise ValueError(f"its shape is {record.shape}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return record


def _short(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        number = float(value)
        return float(str(np.float32(number))) if number == 0 or _LEAST <= abs(number) <= _MOST else number
    if isinstance(value, Mapping):
        return {name: _short(part) for name, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list | tuple) else value


def network(run: Run, shape: Mapping[str, int]) -> nn.Module:
    """The fresh network of a run, for images and classes of this `SHAPE`, with what its method changes of it.

    If the code of one's own is not that of the description, or finds more files now that it is loaded, it is a
    ValueError.
    """
    channels, classes, side = (shape[name] for name in SHAPE)
    model = build(run.model.name, channels, classes, side, **dict(run.model.options))
    check_code(run)  # now that it is loaded
    change = METHODS[run.method].network
    return change(model, torch.zeros(1, channels, side, side)) if change else model


def check_code(run: Run) -> None:
    """Raise ValueError unless the user's own code is that which the run was described for."""
    if run.code != (now := run.code_now()):
        problem = f"run {run.key} was described for other files of your own than those of now ({run.code}, {now})"
        path = "files that are found only after a change of sys.path belong on PYTHONPATH"
        raise ValueError(f"{problem}; put them back, or describe the run anew; {path}")


class Store:
    """A folder of what runs left, made when first written to.

    ``results/DATA/KEY.json``, ``weights/DATA/KEY.safetensors``, ``exhibits/DATA/KEY.safetensors`` (small maps for
    figures), ``tables/DATA/KEY.csv`` (see `sdecor.evaluation`), ``failed/DATA/KEY.txt``, and ``unfinished/`` while runs
    are under way.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, kind: str, run: Run, suffix: str) -> Path:
        """File of one kind (``results``, ``weights``, ``exhibits``, ``tables``) that belongs to `run`."""
        name = "folder" if run.data.path is not None else run.data.name
        folder = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
        return self.root / kind / folder / f"{run.key}{suffix}"

    def checkpoint(self, run: Run) -> Path:
        """Where an unfinished run keeps its state."""
        return self.root / "unfinished" / f"{run.key}.pt"

    def fail(self, run: Run, why: str) -> None:
        """Note that training of `run` broke down, so that it is not tried again."""
        replace_atomically(self.path("failed", run, ".txt"), methodcaller("write", f"{why}\n".encode()))

    def failure(self, run: Run) -> str:
        """Why training of `run` broke down; empty if it did not."""
        path = self.path("failed", run, ".txt")
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def record(self, run: Run) -> Record | None:
        """The record of `run`, or None; an unreadable one is set aside and said so, and the run counts as not done."""
        path = self.path("results", run, ".json")
        try:
            return _read(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("record %s is not readable (%s); set aside as %s", path, error, set_aside(path).name)
            return None

    def write(self, record: Record, weights: bytes | None = None, exhibit: Mapping[str, Tensor] | None = None) -> None:
        """Put `record` in place of what its run has here, and before it the weights (safetensors) and the exhibit.

        Where the weights stay, so do maps of the exhibit by other names, which a page has made of them.
        """
        if exhibit is not None and weights is None:
            with suppress(FileNotFoundError):
                exhibit = {**self.exhibit(record.run), **exhibit}
        content = None if exhibit is None else safetensors.torch.save(dict(exhibit))
        files = {("weights", ".safetensors"): weights, ("exhibits", ".safetensors"): content}
        for (kind, suffix), part in {**files, ("results", ".json"): record.to_json().encode()}.items():
            if part is not None:
                replace_atomically(self.path(kind, record.run, suffix), methodcaller("write", part))

    def records(self) -> Iterator[Record]:
        """All readable records, in order of file name; the others are named in a warning and left where they are."""
        for path in sorted(self.root.glob("results/*/*.json")):
            try:
                yield _read(path)
            except ValueError as error:
                log.warning("record %s is not readable (%s); left out", path, error)

    def model(self, run: Run) -> nn.Module:
        """The trained model of a finished run, in evaluation mode; FileNotFoundError if it has no weights here."""
        record, path = self.record(run), self.path("weights", run, ".safetensors")
        if record is None or not path.exists():
            raise FileNotFoundError(f"no weights of {run.method}, seed {run.seed}: {path} or its record is absent")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.weights_sha256:
            raise ValueError(f"{path} is not the file that its record describes; delete both to train again")
        model = network(run, record.shape)
        model.load_state_dict(safetensors.torch.load(content))
        return model.eval()

    def exhibit(self, run: Run) -> dict[str, Tensor]:
        """Small maps of a few held-out images, for figures: see `sdecor.evaluation.exhibit`."""
        path = self.path("exhibits", run, ".safetensors")
        if not path.exists():
            raise FileNotFoundError(f"no exhibit of {run.method}, seed {run.seed}: {path} is absent")
        return safetensors.torch.load(path.read_bytes())


def _read(path: Path) -> Record:
    """The record in a file, which is named by the key of its run."""
    record = Record.of_json(path.read_text(encoding="utf-8"))
    if record.run.key != path.stem:
        raise ValueError("it describes another run")
    return record
