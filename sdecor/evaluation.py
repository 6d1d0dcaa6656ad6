"""Measures of trained models: what the experiment chapters report of one, every attribution by every measure, maps."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from sdecor._files import locked, replace_atomically, set_aside
from sdecor.attribution import attribute
from sdecor.config import Run
from sdecor.images import ImageData, ImageStream
from sdecor.masking import replacement
from sdecor.measures import representation, robustness, sanity
from sdecor.measures.case import RECOMMENDED, Case, Explanation, available, evaluate, needs, table
from sdecor.measures.faithfulness import masked_accuracy
from sdecor.measures.localization import chance_level
from sdecor.models import default_layers
from sdecor.objective import capture
from sdecor.prepare import data_of
from sdecor.registers import ATTRIBUTIONS, MEASURES
from sdecor.saliency import logits_and_gradient, pixel_score
from sdecor.store import Record, Store, environment
from sdecor.training import device_of

log = logging.getLogger("sdecor")
FRACTIONS = tuple(i / 10 for i in range(10))
FILLS = ("uniform", "constant")
BINS = 101
MOST = 1000
BYTES = 150_000
SAMPLES = 3
CONTROLS = ("ground truth", "constant", "edges", "image", "noise")
_FEATURES = {
    "correlation": representation.mean_abs_correlation,
    "effective_rank": representation.effective_rank,
    "participation_ratio": representation.participation_ratio,
    "condition_number": representation.condition_number,
}


def gradient_histogram(gradient: Tensor, bins: int = BINS) -> Tensor:
    """Histogram of gradient values, each image's divided by its own largest magnitude.

    Args:
        gradient: ``(B, C, H, W)``.
        bins: Equal bins on [-1, 1].

    Returns:
        Counts ``(bins,)``; images with an all-zero gradient are left out.
    """
    flat = gradient.flatten(1)
    peak = flat.abs().amax(1, keepdim=True)
    scaled = (flat / peak)[peak.squeeze(1) > 0]
    return torch.histc(scaled.float().cpu(), bins=bins, min=-1, max=1)


def measure(
    model: nn.Module,
    data: ImageData | ImageStream,
    *,
    layers: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
    batch_size: int = 500,
    seed: int = 0,
    thorough: bool = True,
    metrics: Iterable[str] = RECOMMENDED,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Accuracy, and what the measures say of the gradient of the predicted class and of the features.

    Args:
        model: Trained classifier; its mode and flags are restored.
        data: Held-out images.
        layers: Layers whose features are described; empty takes `sdecor.models.default_layers`.
        device: Where to compute.
        batch_size: Images at a time; measures do not depend on it, the accuracy curves do by the noise of their fill.
        seed: Of all draws.
        thorough: Compute `metrics` that need the model, and the accuracy curves: nearly all of the time goes there.
        metrics: Names of measures, on at most `MOST` of the images; those that need the map alone, or the map and a
            mask, are always added, on all of them.

    Returns:
        ``metrics``, means over images (a measure that is undefined on these images is absent), and ``curves``: accuracy
        at each of `FRACTIONS` masked, by fill and order, and the histogram of gradient values.

    Raises:
        ValueError: If a measure is unknown, or the model's gradient has NaN or infinity.
    """
    of_map = [name for name in MEASURES if set(needs(name)) <= {"mask"}]
    rest = [name for name in (MEASURES[name].name for name in metrics) if thorough and name not in of_map]
    names, data = layers or default_layers(model), data.to(device)
    model.to(device)
    per_image: dict[str, list[Tensor]] = defaultdict(list)
    curves: dict[str, list[Tensor]] = defaultdict(list)
    statistics = {name: representation.Covariance() for name in names}
    histogram = torch.zeros(BINS, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(seed)
    black = torch.tensor([-m / s for m, s in zip(data.mean, data.std, strict=True)], device=device)
    with capture(model, names) as features:
        for case, y, right in _explained(model, data, batch_size, seed):
            for name, z in features.items():
                statistics[name].update(z.detach())
            per_image["accuracy"].append(right)
            for name, values in evaluate(case, [n for n in available(case) if n in of_map]).items():
                per_image[name].append(values)
            if case.mask is not None:
                per_image["object_area"].append(chance_level(case.mask))
            histogram += gradient_histogram(case.attribution)
            x, score = case["images"], case["saliency"]
            for fill in FILLS if thorough else ():
                new = black.view(1, -1, 1, 1) if fill == "constant" else replacement(x, fill, generator=generator)
                for order in ("most", "random"):
                    kept = masked_accuracy(model, x, y, score, FRACTIONS, new, order=order, generator=generator)
                    curves[f"masked_{fill}_{order}"].append(kept)
    for case, _, _ in _explained(model, data.subset(MOST), batch_size, seed) if rest else ():
        for name, values in evaluate(case, rest).items():
            per_image[name].append(values)
    joined = {name: torch.cat(values).double() for name, values in per_image.items()}
    means = {name: float(v.nanmean()) for name, v in joined.items() if not bool(v.isnan().all())}
    for name, s in statistics.items():
        described = {f"{kind}_{name}": float(function(s)) for kind, function in _FEATURES.items()}
        means |= {key: value for key, value in described.items() if math.isfinite(value)}
    out = {name: torch.cat(parts, 1).double().mean(1).tolist() for name, parts in curves.items()}
    out["gradient_histogram"] = (histogram / histogram.sum().clamp_min(1)).tolist()
    return means, out


def _explained(
    model: nn.Module, data: ImageData | ImageStream, batch_size: int, seed: int
) -> Iterator[tuple[Case, Tensor, Tensor]]:
    """The gradient maps of the predicted class, batch by batch, with the labels and where the prediction is right."""
    masks, start = data.object_masks, 0
    for x, y in data.batches(batch_size):
        logits, gradient = logits_and_gradient(model, x)
        case = Case(
            attribution=gradient,
            mask=None if masks is None else masks[start : start + len(x)],
            model=model,
            images=x,
            target=logits.argmax(1),
            explain=lambda net, images, target: logits_and_gradient(net, images, target)[1],
            batch_size=batch_size,
            seed=seed,
        )
        yield case, y, (logits.argmax(1) == y).double()
        start += len(x)


def exhibit(
    model: nn.Module, data: ImageData | ImageStream, *, images: int = 10, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Maps of a few images, small enough to keep, for figures.

    Args:
        model: Trained classifier; its mode and flags are restored.
        data: Held-out images.
        images: At most so many, the first of each of the first classes; fewer where the maps would exceed `BYTES`.
        device: Where to compute.

    Returns:
        ``index`` of these images in `data`, int64 ``(n,)``, in the order of their classes; ``saliency``, the magnitude
        of the gradient of the predicted class, each map divided by its maximum, float16 ``(n, H, W)``; and
        ``predicted`` classes, int64 ``(n,)``.
    """
    count, labels = min(images, max(1, BYTES // (2 * data.image_size**2))), data.labels.cpu()
    index = torch.tensor([int((labels == c).nonzero()[0]) for c in labels.unique()[:count]])
    x, _ = next(data.subset(index).to(device).batches(len(index)))
    logits, gradient = logits_and_gradient(model.to(device), x)
    score = pixel_score(gradient)
    peak = score.amax((1, 2), keepdim=True)
    maps = (score / peak.where(peak > 0, 1)).half().cpu()
    return {"index": index, "saliency": maps, "predicted": logits.argmax(1).cpu()}


def tabulate(
    run: Run,
    store: Store,
    attributions: Iterable[str] | None = None,
    *,
    images: int = 128,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Every attribution, and the controls that it should not lose against, by every measure.

    What was computed is kept in the store, attribution by attribution: a killed call goes on where it was, and one for
    another number of images starts over. The class explained is the predicted one. Measures that need noise draw it
    `SAMPLES` times.

    Args:
        run: A finished run.
        store: Where its record, weights and table lie.
        attributions: Names of attributions; None takes all.
        images: How many held-out images, the same ones for all runs on the same data.
        root: Data root (see `sdecor.data.load`).
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        As `sdecor.measures.case.table`, rows of `attributions` and of `sdecor.measures.sanity.controls`.

    Raises:
        ValueError: If an attribution is unknown or wrong for the model, or there are too few images or streamed ones.
        FileNotFoundError: If something is to be computed and the run has no weights here.
    """
    names = [ATTRIBUTIONS[name].name for name in (ATTRIBUTIONS if attributions is None else attributions)]
    path = store.path("tables", run, ".csv")
    with locked(path.with_suffix(".lock")):
        done = _read(path, images)
        todo = [name for name in (*CONTROLS, *names) if name not in set(done["attribution"])]
        for name, case in _cases(run, store, todo, images, root, device):
            new = table({name: case})
            done = pd.concat([done, new], ignore_index=True) if len(done) else new
            text = done.to_csv(index=False, float_format="%.6g").encode()
            replace_atomically(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
        done = _read(path, images)  # as the file has it, so that a value does not depend on when it was computed
    return done[done["attribution"].isin([*names, *CONTROLS])].reset_index(drop=True)


def _read(path: Path, images: int) -> pd.DataFrame:
    """The table in a file, empty if there is none or it is of other images; an unreadable one is set aside."""
    empty = table({})
    try:
        found = pd.read_csv(path)
        if list(found.columns) != list(empty.columns):
            raise ValueError(f"its columns are {', '.join(map(str, found.columns))}")
        found = found.astype({"value": float, "undefined": int, "images": int})
    except FileNotFoundError:
        return empty
    except ValueError as error:
        log.warning("table %s is not readable (%s); set aside as %s", path, error, set_aside(path).name)
        return empty
    return found if (found["images"] == images).all() else empty


def _cases(
    run: Run, store: Store, names: list[str], images: int, root: str | os.PathLike[str] | None, device: str
) -> Iterator[tuple[str, Case]]:
    """Each of the attributions and controls with its case; the object's mask is left out where there is none."""
    if not set(names) - {CONTROLS[0]}:  # it comes first: if others are there and it is not, there is no mask
        return
    data = data_of(run, store, run.evaluate_on, root=root, device=device)
    if isinstance(data, ImageStream):
        raise ValueError("a table needs images in memory, and these are streamed; raise memory_limit")
    if images > len(data):
        raise ValueError(f"images must be at most {len(data)}, the held-out ones of {run.data.name}, got {images}")
    data = data.subset(images).to(device_of(device))
    model, x, mask = store.model(run).to(data.device), data.normalized(), data.object_masks
    target = logits_and_gradient(model, x)[0].argmax(1)
    adversarial = robustness.attack(model, x, target, epsilon=Case.radius)
    for name in names:
        explain: Explanation | None = None
        if name != CONTROLS[0]:
            explain = partial(_attribution if name in ATTRIBUTIONS else _control, name)
        elif mask is None:
            continue
        case = Case(
            attribution=sanity.controls(x, mask)[name] if explain is None else explain(model, x, target),
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
    """Measure a finished run with the measures of today and put them into its record, and its exhibit beside it.

    The description, the weights and the course of training stay; the record then says when, where and with which
    version it was measured.

    Raises:
        FileNotFoundError: If the run has no record or no weights here.
        ValueError: If the weights are not those of the record.
    """
    with locked(store.checkpoint(run).with_suffix(".lock")):
        data = data_of(run, store, run.evaluate_on, root=root, device=device)
        model, record, where = store.model(run), store.record(run), device_of(device)
        assert record is not None  # else there would have been no model
        layers = run.objective.settings.get("layers", ())
        metrics, curves = measure(model, data, layers=layers, device=where, thorough=run.thorough)
        losses = {name: values for name, values in record.curves.items() if name.startswith("loss_")}
        known = {**record.environment, "measured": environment(where)}
        record = replace(record, metrics=metrics, curves={**losses, **curves}, environment=known)
        store.write(record, exhibit=exhibit(model, data, device=where) if run.thorough else None)
    return record
