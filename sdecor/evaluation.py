"""Measures of runs that are done: every attribution by every measure, and records measured anew."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from sdecor._files import locked, replace_atomically
from sdecor.data import ImageStream, load
from sdecor.experiment import environment
from sdecor.measures import registry, robustness, sanity
from sdecor.measures.suite import measure, object_masks
from sdecor.runs import Record, Run, Store
from sdecor.saliency import ATTRIBUTIONS, attribute, logits_and_gradient
from sdecor.training import device_of

SAMPLES = 3
CONTROLS = ("constant", "edges", "image", "noise", "ground truth")


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

    What was computed is kept in the store, attribution by attribution: a killed call goes on where it was. The class
    explained is the predicted one. Measures that need noise draw it `SAMPLES` times.

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
        ValueError: If an attribution is unknown or the images are streamed.
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
            done = pd.concat([done, registry.table({name: case})], ignore_index=True)
            text = done.to_csv(index=False, float_format="%.6g").encode()
            replace_atomically(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
        done = _read(path, images)  # as the file has it, so that a value does not depend on when it was computed
    return done[done["attribution"].isin([*names, *CONTROLS])].reset_index(drop=True)


def _read(path: Path, images: int) -> pd.DataFrame:
    """The table in a file, empty if there is none or it is of another number of images."""
    empty = registry.table({})
    table = pd.read_csv(path) if path.exists() else empty
    return table if list(table.columns) == list(empty.columns) and (table["images"] == images).all() else empty


def _cases(
    run: Run, store: Store, names: list[str], images: int, root: str | os.PathLike[str] | None, device: str
) -> Iterator[tuple[str, registry.Case]]:
    """Each of the attributions and controls with its case; the object's mask is left out where there is none."""
    if not set(names) - {CONTROLS[-1]}:  # the last that is written, so that it is there if it can be
        return
    where = device_of(device)
    data = load(run.data, root, run.evaluate_on, **dict(run.data_options))
    if isinstance(data, ImageStream):
        raise ValueError("a table needs images in memory, and these are streamed; raise memory_limit")
    data = data.subset(images).to(where)
    model = store.model(run, data.channels, data.num_classes, data.image_size).to(where)
    x, mask = data.normalized(), object_masks(data)
    target = logits_and_gradient(model, x)[0].argmax(1)
    adversarial = robustness.attack(model, x, target, epsilon=registry.Case.radius)
    fixed = sanity.controls(x, mask)
    for name in names:
        explain: registry.Explanation | None
        if name in ATTRIBUTIONS:
            explain = partial(_attribution, name)
        elif name in fixed:
            explain = None if name == CONTROLS[-1] else partial(_control, name)
        else:
            continue
        maps = fixed[name] if explain is None else explain(model, x, target)
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


def measure_again(
    run: Run, store: Store, *, root: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> Record:
    """Measure a finished run with the measures of today and put them into its record.

    The description, the weights and the course of training stay; the record then says when, where and with which version
    it was measured.

    Raises:
        FileNotFoundError: If the run has no record or no weights here.
    """
    data = load(run.data, root, run.evaluate_on, **dict(run.data_options))
    model = store.model(run, data.channels, data.num_classes, data.image_size)
    record, where = store.record(run), device_of(device)
    assert record is not None  # else there would have been no model
    metrics, curves = measure(model, data, layers=run.layers, device=where, thorough=run.evaluate_on == "test")
    losses = {name: values for name, values in record.curves.items() if name.startswith("loss_")}
    known = {**record.environment, "measured": environment(where)}
    record = replace(record, metrics=metrics, curves={**losses, **curves}, environment=known)
    store.write(record)
    return record
