"""What a run is and what it leaves: a description, its record, and the store where its hash finds both."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from sdecor._files import replace_atomically, set_aside
from sdecor.models import build
from sdecor.objective import Objective
from sdecor.saliency import ATTRIBUTIONS
from sdecor.training import Schedule

log = logging.getLogger("sdecor")
_OBJECTIVE = tuple(f.name for f in fields(Objective) if f.name != "score")
_SCHEDULE = tuple(f.name for f in fields(Schedule))
_LATER = ("permuted_labels", "removed", "removed_by")


@dataclass(frozen=True)
class Run:
    """Description of one training run; equal descriptions have equal keys.

    Args:
        data: Name of a data set, as `sdecor.data.load` takes it.
        model: Name of a model, as `sdecor.models.build` takes it.
        method: Name in `sdecor.objective.METHODS`; settings of terms that it lacks are dropped from the description.
        seed: Of initialization, order and masks.
        evaluate_on: ``test`` for final numbers, ``val`` for choices.
        limit: Use only so many training images.
        data_options: Pairs handed to `sdecor.data.load`.
        epochs, batch_size, lr, weight_decay, shape, clip, augment: See `sdecor.training.Schedule`.
        lambda_c, lambda_d, fraction, fill, fill_value, direction, penalty, group_size, layers: See
            `sdecor.objective.Objective`.
        permuted_labels: Train on labels in random order: the randomized network of the sanity check by labels.
        removed: Remove and retrain (ROAR, arXiv:1806.10758): share of pixels of every image, training and held-out,
            that has the mean colour before training starts.
        removed_by: How they are chosen: a name in `sdecor.saliency.ATTRIBUTIONS`, the most salient ones for the class
            that the same run without removal predicts; or ``random``.

    Raises:
        ValueError: If a setting is unknown or impossible.
    """

    data: str = "shapes"
    model: str = "lenet"
    method: str = "standard"
    seed: int = 0
    evaluate_on: str = "test"
    limit: int | None = None
    data_options: tuple[tuple[str, Any], ...] = ()
    epochs: int = 8
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    shape: str = "cosine"
    clip: float | None = 5.0
    augment: bool = False
    lambda_c: float = 1.0
    lambda_d: float = 1.0
    fraction: float = 0.5
    fill: str = "uniform"
    fill_value: float = 0.0
    direction: str = "clean_to_masked"
    penalty: str = "correlation"
    group_size: int | None = 16
    layers: tuple[str, ...] = ()
    permuted_labels: bool = False
    removed: float = 0.0
    removed_by: str = "gradient"

    def __post_init__(self) -> None:
        """Check, and reset what the method does not use, so that one run has one description."""
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "data_options", tuple(sorted((k, v) for k, v in self.data_options)))
        if self.evaluate_on not in ("val", "test"):
            raise ValueError(f"unknown evaluate_on '{self.evaluate_on}'; known: val, test")
        for f in fields(Run):
            if isinstance(f.default, float) and getattr(self, f.name) is not None:  # 1 and 1.0 are one description
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        objective, _ = self.objective, self.schedule
        if not 0 <= self.removed < 1:
            raise ValueError(f"removed must lie in [0, 1), got {self.removed}")
        if self.removed_by not in (*ATTRIBUTIONS, "random"):
            raise ValueError(f"unknown removed_by '{self.removed_by}'; known: {', '.join(ATTRIBUTIONS)}, random")
        unused = [] if objective.fill == "constant" else ["fill_value"]
        unused += [] if self.removed else ["removed_by"]
        if objective.lambda_c == 0:
            unused += ["lambda_c", "fraction", "fill", "fill_value", "direction"]
        if objective.lambda_d == 0:
            unused += ["lambda_d", "penalty", "group_size", "layers"]
        for f in fields(Run):
            if f.name in unused:
                object.__setattr__(self, f.name, 0.0 if f.name.startswith("lambda") else f.default)

    @property
    def objective(self) -> Objective:
        """The terms and weights of this run."""
        return Objective.of(self.method, **{name: getattr(self, name) for name in _OBJECTIVE})

    @property
    def schedule(self) -> Schedule:
        """Length and rate of this run."""
        return Schedule(**{name: getattr(self, name) for name in _SCHEDULE})

    @property
    def thorough(self) -> bool:
        """Whether it is measured in full: choices, and what a network learns from spoilt data, go by accuracy."""
        return self.evaluate_on == "test" and not self.permuted_labels and not self.removed

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits made of the whole description."""
        values = asdict(self)
        for name in _LATER:  # these came after the first records, whose keys must stay
            if values[name] == getattr(Run, name):
                del values[name]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Inverse of ``dataclasses.asdict`` after a journey through JSON.

        Raises:
            ValueError: If a name is unknown.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"unknown setting '{unknown[0]}'; known: {', '.join(sorted(names))}")
        pairs = {"data_options": tuple(tuple(p) for p in values.get("data_options", ()))}
        return cls(**{**values, **pairs})


@dataclass(frozen=True)
class Record:
    """What a run left: its description, measures, curves, and the circumstances.

    Args:
        run: The description.
        metrics: Name to number.
        curves: Name to list of numbers (loss terms an epoch; masked accuracy a share; histogram of gradients).
        environment: Device, threads, versions, commit, date (UTC), seconds of training and measuring.
        weights_sha256: Of the weights file.
    """

    run: Run
    metrics: dict[str, float]
    curves: dict[str, list[float]]
    environment: dict[str, Any]
    weights_sha256: str


def _read(path: Path) -> Record:
    """The record in a file, which is named by the key of its run.

    Raises:
        ValueError: If it is truncated, not a record, or of another run.
    """
    try:
        values = json.loads(path.read_text())
        record = Record(**{**values, "run": Run.from_dict(values["run"])})
        for part in (record.metrics, record.curves, record.environment):
            part.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if record.run.key != path.stem:
        raise ValueError("it describes another run")
    return record


class Store:
    """A folder of records and weights.

    ``results/DATA/KEY.json``, ``weights/DATA/KEY.safetensors``, ``tables/DATA/KEY.csv`` (see `sdecor.evaluation`), and
    ``unfinished/`` while runs are under way.

    Args:
        root: The folder; made when first written to.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, kind: str, run: Run, suffix: str) -> Path:
        """File of one kind (``results``, ``weights``, ``tables``) that belongs to `run`."""
        folder = "".join(c if c.isalnum() or c in "-_" else "-" for c in run.data)
        return self.root / kind / folder / f"{run.key}{suffix}"

    def checkpoint(self, run: Run) -> Path:
        """Where an unfinished run keeps its state."""
        return self.root / "unfinished" / f"{run.key}.pt"

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

    def write(self, record: Record, weights: bytes | None = None) -> None:
        """Put `record`, and the content of a safetensors file before it, in place of what its run has here."""
        if weights is not None:
            replace_atomically(self.path("weights", record.run, ".safetensors"), lambda f: f.write(weights))
        text = json.dumps(asdict(record), indent=1, sort_keys=True).encode() + b"\n"
        replace_atomically(self.path("results", record.run, ".json"), lambda f: f.write(text))

    def records(self) -> Iterator[Record]:
        """All readable records, in order of file name; the others are named in a warning and left where they are."""
        for path in sorted(self.root.glob("results/*/*.json")):
            try:
                yield _read(path)
            except ValueError as error:
                log.warning("record %s is not readable (%s); left out", path, error)

    def model(self, run: Run, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
        """The trained model of a finished run, in evaluation mode.

        Raises:
            FileNotFoundError: If the run has no record or no weights here.
            ValueError: If the weights are not those of the record.
        """
        record, path = self.record(run), self.path("weights", run, ".safetensors")
        if record is None or not path.exists():
            raise FileNotFoundError(f"no weights of {run.method}, seed {run.seed}: {path} or its record is absent")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.weights_sha256:
            raise ValueError(f"{path} is not the file that its record describes; delete both to train again")
        model = build(run.model, in_channels, num_classes, image_size)
        model.load_state_dict(safetensors.torch.load(content))
        return model.eval()
