"""Measures of trained models: what the experiment chapters report of one, every attribution by every measure, maps.

`model` is a trained classifier, whose mode and flags are restored, `data` are held-out images, `device` is where to
compute: ``cpu``, ``cuda`` or ``auto``; `root` is the data root (see `sdecor.data.load`). The class explained is the
predicted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sdecor._code import code, foreign
from sdecor._files import locked, replace_atomically, set_aside
from sdecor.attribution import attribute
from sdecor.config import Run, Schedule
from sdecor.deletion import deletion_scores
from sdecor.ground_truth import object_scores
from sdecor.images import ImageData, ImageStream, checked_set
from sdecor.masking import replacement
from sdecor.measures import faithfulness, localization, representation, robustness, sanity
from sdecor.measures.case import RECOMMENDED, Case, available, evaluate, needs, table
from sdecor.models import channels_first, default_layers, layer, uncompiled
from sdecor.objective import capture
from sdecor.prepare import data_of
from sdecor.registers import ATTRIBUTIONS, MEASURES
from sdecor.saliency import frozen_eval, logits_and_gradient, logits_of, pixel_score
from sdecor.store import Record, Store, environment
from sdecor.training import device_of

log = logging.getLogger("sdecor")
FRACTIONS = tuple(i / 10 for i in range(10))
FILLS = ("uniform", "constant")
BINS = 101
MOST = 1000
BYTES = 150_000
SAMPLES = 3
CELLS = 4  # of a mosaic
CONTROLS = ("ground truth", "constant", "edges", "image", "noise", "centre spot", "centre box")
_FEATURES = {
    "correlation": representation.mean_abs_correlation,
    "effective_rank": representation.effective_rank,
    "participation_ratio": representation.participation_ratio,
    "condition_number": representation.condition_number,
}


def gradient_histogram(gradient: Tensor, bins: int = BINS) -> Tensor:
    """Counts ``(bins,)`` of gradient values, each image's divided by its own largest magnitude, in bins on [-1, 1].

    The gradient is ``(B, C, H, W)``; images where it is zero everywhere are left out.
    """
    flat = gradient.flatten(1)
    peak = flat.abs().amax(1, keepdim=True)
    return torch.histc((flat / peak)[peak[:, 0] > 0].float().cpu(), bins=bins, min=-1, max=1)


def measure(
    model: nn.Module,
    data: ImageData | ImageStream,
    *,
    layers: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    seed: int = 0,
    thorough: bool = True,
    metrics: Iterable[str] = RECOMMENDED,
    curve_images: int | None = None,
    train: ImageData | ImageStream | None = None,
    tuning: Schedule | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Accuracy, and what the measures say of the gradient of the predicted class and of the features.

    Features are those of `layers`, or of `sdecor.models.default_layers`. Measures that need the map alone, or the map
    and a mask, are always taken, on all images. If it is to be `thorough`, `metrics` that need the model are added, on
    at most `MOST` images of up to 32 px, and fewer of larger ones (a quarter of 64 px, a hundred at least), and the
    accuracy curves, on so many `curve_images` or all: nearly all of the time goes there.
    `batch_size`, by default the data's `pass_size`, matters to these curves alone, by the noise of their fill.

    Given are means over images by measure, without those that are undefined on all; and by name, accuracy at each of
    `FRACTIONS` masked, by fill and order, and the histogram of gradient values. Networks that average over positions,
    and so take images of any size, play the `grid_pointing_game` too. With images `train`, there are also the
    `sdecor.ground_truth.object_scores`, where masks are known, and, if there is a schedule of `tuning`, the
    `sdecor.deletion.deletion_scores`; both look at `MOST` images at most, and training for the latter takes all.
    """
    of_map = [name for name in MEASURES if set(needs(name)) <= {"mask"}]
    rest = [name for name in (MEASURES[name].name for name in metrics) if thorough and name not in of_map]
    model, data = uncompiled(model).to(device), checked_set("data", data).to(device)
    names = layers or default_layers(model, next(data.subset(1).batches(1))[0])
    batch_size = batch_size or data.pass_size
    per_image: dict[str, list[Tensor]] = defaultdict(list)
    curves: dict[str, list[Tensor]] = defaultdict(list)
    kept: dict[str, list[float]] = {}
    statistics = {name: representation.Covariance() for name in names}
    histogram = torch.zeros(BINS, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(seed)
    black = torch.tensor([-m / s for m, s in zip(data.mean, data.std, strict=True)], device=device).view(1, -1, 1, 1)
    add = partial(_add_curves, curves, model, black=black, generator=generator)
    with capture(model, names) as features:
        for case, y in _explained(model, data, batch_size, seed):
            for name, z in features.items():
                statistics[name].update(channels_first(z, layer(model, name), case["images"]))
            values = {"accuracy": case["target"] == y}
            values |= evaluate(case, [name for name in available(case) if name in of_map])
            if case.mask is not None:
                values["object_area"] = localization.chance_level(case.mask)
            for name, value in values.items():
                per_image[name].append(value)
            histogram += gradient_histogram(case.attribution)
            if thorough and curve_images is None:
                add(case, y)
    if thorough and curve_images is not None:
        for case, y in _explained(model, data.subset(curve_images), batch_size, seed):
            add(case, y)
    looked = min(MOST, max(100, MOST * 32**2 // data.image_size**2))
    for case, _ in _explained(model, data.subset(looked), batch_size, seed) if rest else ():
        for name, value in evaluate(case, rest).items():
            per_image[name].append(value)
    if thorough and plays(model, next(data.subset(1).batches(1))[0], data.num_classes):
        per_image["grid_pointing_game"].append(grid_pointing_game(model, data.subset(MOST), seed=seed))
    means = {name: float(torch.cat(parts).double().nanmean()) for name, parts in per_image.items()}
    if thorough and train is not None:
        scores, drawn = _trained_scores(model, data.subset(MOST), train.to(device), tuning, seed, str(device))
        means |= scores
        kept |= drawn
    of = {f"{k}_{name}": float(function(s)) for name, s in statistics.items() for k, function in _FEATURES.items()}
    out = {**kept, **{name: torch.cat(parts).mean(0).tolist() for name, parts in curves.items()}}
    out["gradient_histogram"] = (histogram / histogram.sum().clamp_min(1)).tolist()
    defined = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    return defined | {name: value for name, value in of.items() if math.isfinite(value)}, out


def _trained_scores(
    model: nn.Module,
    data: ImageData | ImageStream,
    train: ImageData | ImageStream,
    tuning: Schedule | None,
    seed: int,
    device: str,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What takes training images too: boxes, object and background where masks are known, and deletion that is fair."""
    scores = object_scores(model, data, train.with_objects.subset(MOST)) if data.has_masks else {}
    if tuning is None:
        return scores, {}
    of_deletion, drawn = deletion_scores(model, train, data, tuning, seed=seed, device=device)
    return scores | of_deletion, drawn


def _add_curves(
    curves: dict[str, list[Tensor]],
    model: nn.Module,
    case: Case,
    y: Tensor,
    *,
    black: Tensor,
    generator: torch.Generator,
) -> None:
    """Add the curves of a batch: which images are still right as a growing share is replaced."""
    x = case["images"]
    how: dict[str, Any] = {"fractions": FRACTIONS, "output": "correct", "own_order": True, "generator": generator}
    for fill in FILLS:
        new = black if fill == "constant" else replacement(x, fill, generator=generator)
        for order in ("most", "random"):
            kept = faithfulness.perturbation_curve(model, x, y, case["saliency"], fill=new, order=order, **how)
            curves[f"masked_{fill}_{order}"].append(kept)


def plays(model: nn.Module, image: Tensor, classes: int) -> bool:
    """Whether a model can play the grid pointing game: it averages over positions, and takes images of twice the side.

    There must be enough classes, too; `image` is (1, C, H, W).
    """
    if classes < CELLS or not any(isinstance(m, nn.AdaptiveAvgPool2d) for m in model.modules()):
        return False
    try:
        with torch.no_grad(), frozen_eval(model):
            logits_of(model, image.repeat(1, 1, 2, 2), finite=False)
    except RuntimeError:
        return False
    return True


def grid_pointing_game(
    model: nn.Module, data: ImageData | ImageStream, *, seed: int = 0, batch_size: int | None = None
) -> Tensor:
    """Share of the gradient's magnitude that lies on the image of the class explained, in mosaics of four, float64.

    The mosaics are those of `sdecor.measures.localization.mosaic` of all the images, ``(M,)``; chance is 1/4. The model
    must take images of twice the side.
    """
    x, y = next(data.batches(len(data)))
    whole, target, mask = localization.mosaic(x, y, generator=torch.Generator().manual_seed(seed))
    parts = zip(*(part.split(batch_size or -(-data.pass_size // 5)) for part in (whole, target, mask)), strict=True)
    of = localization.relevance_mass
    return torch.cat([of(pixel_score(_gradient(model, images, classes)), cell) for images, classes, cell in parts])


def _explained(
    model: nn.Module, data: ImageData | ImageStream, batch_size: int, seed: int
) -> Iterator[tuple[Case, Tensor]]:
    """The gradient maps of the predicted class, batch by batch, with the labels."""
    for x, y, mask in data.batches_with_masks(batch_size):
        logits, gradient = logits_and_gradient(model, x)
        known: dict[str, Any] = {"model": model, "images": x, "target": logits.argmax(1), "explain": _gradient}
        yield Case(attribution=gradient, mask=mask, batch_size=batch_size, seed=seed, **known), y


def _gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return logits_and_gradient(model, images, target)[1]


def exhibit(
    model: nn.Module, data: ImageData | ImageStream, *, images: int = 10, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Maps of a few images, small enough to keep, for figures: the first image of each of the first classes.

    There are at most so many `images`, fewer where the maps would exceed `BYTES`. Given are their ``index`` in `data`
    ``(n,)``; ``saliency``, the magnitude of the gradient of the predicted class, each map divided by its maximum,
    float16 ``(n, H, W)``; and ``predicted`` classes ``(n,)``.
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
    """Every attribution of a finished run, and the controls that it should not lose against, by every measure.

    It is a `sdecor.measures.case.table` of `attributions`, or of all, and of `sdecor.measures.sanity.controls`, on so
    many held-out `images`, the same ones for all runs on the same data. What was computed is kept in the store,
    attribution by attribution: a killed call goes on where it was. What was made of another number of images, of other
    weights, or with other measures or code of one's own is made anew. Measures that need noise draw it `SAMPLES` times.
    Too few images raise ValueError, and missing weights FileNotFoundError.
    """
    names = [ATTRIBUTIONS[name].name for name in (ATTRIBUTIONS if attributions is None else attributions)]
    if not isinstance(images, int) or images < 1:
        raise ValueError(f"images must be a whole number, 1 or more, got {images}")
    path, record = store.path("tables", run, ".csv"), store.record(run)
    with locked(path.with_suffix(".lock")):
        read = partial(_read, path, images, {n: stamp(n, record) for n in (*CONTROLS, *ATTRIBUTIONS)})
        done = read()
        todo = [name for name in (*CONTROLS, *names) if name not in set(done["attribution"])]
        for name, case in _cases(run, store, todo, images, root, device):
            new = table({name: case})
            done = pd.concat([done, new], ignore_index=True) if len(done) else new
            replace_atomically(path, partial(_write, done, {n: stamp(n, record) for n in done["attribution"].unique()}))
        done = read()  # as the file has it, so that a value does not depend on when it was computed
    return done[done["attribution"].isin([*names, *CONTROLS])].reset_index(drop=True)


def own_measures() -> str:
    """Hash of the code of the measures of one's own, empty if there are none."""
    return code(entry.function for entry in MEASURES.values() if foreign(entry.function))


def stamp(attribution: str, record: Record | None) -> str:
    """Eight digits of what decides the rows of an attribution in a table: weights, draws, measures, code of one's own.

    The code of this package is not among it: `tabulate` again into an empty folder after a change of that.
    """
    function = ATTRIBUTIONS[attribution].function if attribution in ATTRIBUTIONS else stamp
    own = own_measures(), code(filter(foreign, [function]))
    decides = record and record.weights_sha256, SAMPLES, sorted(MEASURES), own
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:8]


def _write(rows: pd.DataFrame, stamps: dict[str, str], file: BinaryIO) -> None:
    file.write(f"# {json.dumps(stamps)}\n".encode())
    rows.to_csv(file, index=False, float_format="%.6g", mode="wb")


def _read(path: Path, images: int, stamps: dict[str, str]) -> pd.DataFrame:
    """The rows of a file with these stamps, if they are of so many images; an unreadable file is set aside."""
    empty = table({})
    try:
        found = pd.read_csv(path, comment="#")
        if list(found.columns) != list(empty.columns):
            raise ValueError(f"its columns are {', '.join(map(str, found.columns))}")
        found = found.astype({"value": float, "undefined": int, "images": int})
    except FileNotFoundError:
        return empty
    except ValueError as error:
        log.warning("table %s is not readable (%s); set aside as %s", path, error, set_aside(path).name)
        return empty
    head = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    made = json.loads(head) if head.startswith("{") else {}
    same = [made.get(name) == stamps.get(name, made.get(name)) for name in found["attribution"]]
    return found[(found["images"] == images) & np.array(same, bool)].reset_index(drop=True)


def _cases(
    run: Run, store: Store, names: list[str], images: int, root: str | os.PathLike[str] | None, device: str
) -> Iterator[tuple[str, Case]]:
    """Each of the attributions and controls with its case; the object's mask is left out where there is none."""
    if not set(names) - {CONTROLS[0]}:  # it comes first: if others are there and it is not, there is no mask
        return
    data = held_out_of(run, store, root, device)
    if images > len(data):
        raise ValueError(f"images must be at most {len(data)}, the held-out ones of {run.data.name}, got {images}")
    data = data.subset(images).to(device_of(device))
    model, (x, _, mask) = store.model(run).to(data.device), next(data.batches_with_masks(images))
    target = logits_and_gradient(model, x)[0].argmax(1)
    known: dict[str, Any] = {"mask": mask, "model": model, "images": x, "target": target, "samples": SAMPLES}
    known["adversarial"] = robustness.attack(model, x, target, epsilon=Case.radius)
    for name in names:
        if name != CONTROLS[0]:
            explain = partial(_maps, name)
            yield name, Case(attribution=explain(model, x, target), explain=explain, **known)
        elif mask is not None:
            yield name, Case(attribution=sanity.controls(x, mask)[name], **known)


def _maps(name: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    if name in ATTRIBUTIONS:
        return attribute(model, images, target, name, batch_size=256, progress=False)
    return sanity.controls(images)[name]


def held_out_of(
    run: Run, store: Store, root: str | os.PathLike[str] | None = None, device: str = "cpu", split: str = ""
) -> ImageData | ImageStream:
    """The held-out images of a run, or another split; ValueError if they are not those that its record was made of."""
    split = split or run.evaluate_on
    data, record = data_of(run, store, split, root=root, device=device), store.record(run)
    known = {} if record is None else record.environment.get("images", {})
    if known.get(split, data.digest) != data.digest:
        raise ValueError(
            f"the {split} images of {run.data.name} are others than those of run {run.key} in {store.root}; "
            "put those back, or remove its record"
        )
    return data


def measure_again(run: Run, store: Store, *, root: str | os.PathLike[str] | None = None, device: str = "cpu") -> Record:
    """Measure a finished run with the measures of today and put them into its record, and its exhibit beside it.

    The description, the weights and the course of training stay; the record then says when, where and with which
    version it was measured. Missing weights raise FileNotFoundError, and those of another record ValueError.
    """
    with locked(store.checkpoint(run).with_suffix(".lock")):
        data = held_out_of(run, store, root, device)
        model, record, where = store.model(run), store.record(run), device_of(device)
        assert record is not None  # else there would have been no model
        layers = run.objective.settings.get("layers", ())
        train = held_out_of(run, store, root, device, "train") if run.thorough else None
        how: dict[str, Any] = {"thorough": run.thorough, "curve_images": run.curve_images, "tuning": run.tuning}
        metrics, curves = measure(model, data, layers=layers, device=where, train=train, **how)
        losses = {name: values for name, values in record.curves.items() if name.startswith("loss_")}
        known = {**record.environment, "measured": environment(where)}
        known |= {"own_measures": own} if (own := own_measures()) else {}
        record = replace(record, metrics=metrics, curves={**losses, **curves}, environment=known)
        store.write(record, exhibit=exhibit(model, data, device=where) if run.thorough else None)
    return record
