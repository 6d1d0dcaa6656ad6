"""Measures of runs that are done: every attribution by every measure, and records measured anew."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from sdecor._files import locked, replace_atomically, set_aside
from sdecor.data import ImageStream
from sdecor.experiment import data_of, environment
from sdecor.measures import registry, robustness, sanity
from sdecor.measures.suite import measure, object_masks
from sdecor.runs import Record, Run, Store
from sdecor.saliency import ATTRIBUTIONS, attribute, logits_and_gradient
from sdecor.training import device_of

log = logging.getLogger("sdecor")
SAMPLES = 3
CONTROLS = ("ground truth", "constant", "edges", "image", "noise")


def tabulate(
    run: Run,
    store: Store,
    attributions: Iterable[str] = tuple(ATTRIBUTIONS),
    *,
    images: int = 128,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Every attribution, and the controls that it should not lose against, by every measure of the registry.

    What was computed is kept in the store, attribution by attribution: a killed call goes on where it was, and one for
    another number of images starts over. The class explained is the predicted one. Measures that need noise draw it
    `SAMPLES` times.

    Args:
        run: A finished run.
        store: Where its record, weights and table lie.
        attributions: Names in `sdecor.saliency.ATTRIBUTIONS`.
        images: How many held-out images, the same ones for all runs on the same data.
        root: Data root (see `sdecor.data.load`).
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        As `sdecor.measures.registry.table`, rows of `attributions` and of `sdecor.measures.sanity.controls`.

    Raises:
        ValueError: If an attribution is unknown or wrong for the model, or there are too few images or streamed ones.
        FileNotFoundError: If something is to be computed and the run has no weights here.
    """
    names = list(attributions)
    if unknown := [name for name in names if name not in ATTRIBUTIONS]:
        raise ValueError(f"unknown attribution '{unknown[0]}'; known: {', '.join(ATTRIBUTIONS)}")
    path = store.path("tables", run, ".csv")
    with locked(path.with_suffix(".lock")):
        done = _read(path, images)
        todo = [name for name in (*CONTROLS, *names) if name not in set(done["attribution"])]
        for name, case in _cases(run, store, todo, images, root, device):
            new = registry.table({name: case})
            done = pd.concat([done, new], ignore_index=True) if len(done) else new
            text = done.to_csv(index=False, float_format="%.6g").encode()
            replace_atomically(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
        done = _read(path, images)  # as the file has it, so that a value does not depend on when it was computed
    return done[done["attribution"].isin([*names, *CONTROLS])].reset_index(drop=True)


def _read(path: Path, images: int) -> pd.DataFrame:
    """The table in a file, empty if there is none or it is of other images; an unreadable one is set aside."""
    empty = registry.table({})
    try:
        table = pd.read_csv(path)
        if list(table.columns) != list(empty.columns):
            raise ValueError(f"its columns are {', '.join(map(str, table.columns))}")
        table = table.astype({"value": float, "undefined": int, "images": int})
    except FileNotFoundError:
        return empty
    except ValueError as error:
        log.warning("table %s is not readable (%s); set aside as %s", path, error, set_aside(path).name)
        return empty
    return table if (table["images"] == images).all() else empty


def _cases(
    run: Run, store: Store, names: list[str], images: int, root: str | os.PathLike[str] | None, device: str
) -> Iterator[tuple[str, registry.Case]]:
    """Each of the attributions and controls with its case; the object's mask is left out where there is none."""
    if not set(names) - {CONTROLS[0]}:  # it comes first: if others are there and it is not, there is no mask
        return
    where = device_of(device)
    data = data_of(run, store, run.evaluate_on, root=root, device=device)
    if isinstance(data, ImageStream):
        raise ValueError("a table needs images in memory, and these are streamed; raise memory_limit")
    if images > len(data):
        raise ValueError(f"images must be at most {len(data)}, the held-out ones of {run.data}, got {images}")
    data = data.subset(images).to(where)
    model = store.model(run, data.channels, data.num_classes, data.image_size).to(where)
    x, mask = data.normalized(), object_masks(data)
    target = logits_and_gradient(model, x)[0].argmax(1)
    adversarial = robustness.attack(model, x, target, epsilon=registry.Case.radius)
    for name in names:
        explain: registry.Explanation | None = None
        if name != CONTROLS[0]:
            explain = partial(_attribution if name in ATTRIBUTIONS else _control, name)
        elif mask is None:
            continue
        maps = sanity.controls(x, mask)[name] if explain is None else explain(model, x, target)
        case = registry.Case(
            attribution=maps,
            mask=mask,
            model=model,
            images=x,
            target=target,
            explain=explain,
            adversarial=adversarial,
            samples=SAMPLES,
        )
        yield name, case


def _attribution(name: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return attribute(model, images, target, name, batch_size=256, progress=False)


def _control(name: str, _model: nn.Module, images: Tensor, _target: Tensor) -> Tensor:
    return sanity.controls(images)[name]


def measure_again(run: Run, store: Store, *, root: str | os.PathLike[str] | None = None, device: str = "cpu") -> Record:
    """Measure a finished run with the measures of today and put them into its record.

    The description, the weights and the course of training stay; the record then says when, where and with which
    version it was measured.

    Raises:
        FileNotFoundError: If the run has no record or no weights here.
        ValueError: If the weights are not those of the record.
    """
    with locked(store.checkpoint(run).with_suffix(".lock")):
        data = data_of(run, store, run.evaluate_on, root=root, device=device)
        model = store.model(run, data.channels, data.num_classes, data.image_size)
        record, where = store.record(run), device_of(device)
        assert record is not None  # else there would have been no model
        metrics, curves = measure(model, data, layers=run.layers, device=where, thorough=run.thorough)
        losses = {name: values for name, values in record.curves.items() if name.startswith("loss_")}
        known = {**record.environment, "measured": environment(where)}
        record = replace(record, metrics=metrics, curves={**losses, **curves}, environment=known)
        store.write(record)
    return record
