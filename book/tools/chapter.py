"""What a notebook needs around its science: checked parameters, numbers bound to the text, records."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from IPython.display import Markdown, display
from torch import Tensor, nn

from sdecor import choice, report
from sdecor._files import locked, replace_atomically
from sdecor.config import Run
from sdecor.experiment import grid
from sdecor.images import ImageData, ImageStream
from sdecor.measures import sharpness
from sdecor.measures.statistics import summary
from sdecor.plan import Course, Plan
from sdecor.planned import Results, results, run_plan, work
from sdecor.prepare import data_of
from sdecor.registers import DATASETS, Between, Option
from sdecor.report import glue
from sdecor.report.frames import Columns
from sdecor.report.tables import DASH
from sdecor.saliency import logits_and_gradient, pixel_score
from sdecor.sources import data_root
from sdecor.store import Record, Store

from . import BOOK, ROOT

__all__ = [
    "choices",
    "differences",
    "every_map",
    "glue",
    "holds",
    "kept",
    "of_grid",
    "parameters",
    "plan",
    "planned",
    "presets",
    "progress",
    "published",
    "records",
]
__all__ += ["shown", "sizes", "spread", "store", "verdicts"]
_SHELL = {"In", "Out", "get_ipython", "exit", "quit", "open"}
#: The cross-entropy of training at its end, as `sdecor.report.frame` takes it.
CROSS_ENTROPY = {"cross_entropy": lambda record: record.curves["loss_classification"][-1]}
#: What `of_grid` gives, as columns of a table.
GRID = {"pixels": ("Gini of pixels", 1, 3), "within": ("Gini within a kind", 1, 3), "seen": ("share on one kind", 1, 3)}
_HOW = {"retrain", "workers", "device", "data_root"}  # they decide how, and not what, is run
_READ = "no network is trained here, all are read from records"
_OTHER = (
    "> **This is not the published run**, but one with {}. Tables, figures and the numbers that the text takes from "
    "outputs are of this run. What its sentences and captions say of results was found in the published run, and need "
    "not hold here."
)


def parameters(
    namespace: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    *,
    limits: Mapping[str, tuple[int, int | None]] | None = None,
    fixed: Iterable[str] = (),
) -> SimpleNamespace:
    """Check a chapter's parameters and fill in its preset.

    Call it right after the cell tagged ``parameters``: papermill itself accepts any name and any type. A run that is
    not the published one is said to be another.

    Args:
        namespace: ``globals()`` of the notebook. Its annotations are the known parameters and their types, ``preset``
            among them. A value that is empty (``""`` or ``0``) takes the preset's.
        presets: Settings of each preset by name.
        limits: Least and greatest value of numbers that are not empty; None sets no greatest.
        fixed: Parameters that can differ from the published ones only with ``retrain``.

    Returns:
        The settings of the preset, overridden by the parameters that were given; these alone are a dictionary, `given`.

    Raises:
        ValueError: If a parameter or preset is unknown, a value of the wrong type, or a number negative or not finite
            or beyond its limits, or if a fixed one is given.

    Example:
        >>> given = {"__annotations__": {"preset": str, "epochs": int}, "preset": "published", "epochs": 0}
        >>> parameters(given, {"published": {"epochs": 3}}).epochs
        3
    """
    types: dict[str, Any] = dict(namespace["__annotations__"])
    for name, value in namespace.items():
        if name.startswith("_") or name in _SHELL or callable(value) or isinstance(value, Plan | ModuleType):
            continue
        if name not in types:
            raise ValueError(f"unknown parameter '{name}'; known: {', '.join(types)}")
    values = {}
    for name, wanted in types.items():
        hint = Annotated[wanted, Between(0)] if wanted in (int, float) else wanted
        values[name] = Option(f"parameter '{name}'", None, hint).checked(namespace[name])
    preset = values["preset"]
    if preset not in presets:
        raise ValueError(f"unknown preset '{preset}'; known: {', '.join(presets)}")
    own = presets[preset]
    given = {name: value for name, value in values.items() if value and name != "preset" and value != own.get(name)}
    settings = {**own, **{name: value for name, value in values.items() if value or name not in own}}
    for name, (low, high) in (limits or {}).items():
        if settings[name]:
            Between(low, float("inf") if high is None else high).check(f"parameter '{name}'", settings[name])
    if preset != "quick" and not values.get("retrain") and (kept := [name for name in fixed if name in given]):
        was, value = own[kept[0]], given[kept[0]]
        raise ValueError(f"parameter '{kept[0]}' is {was!r} in what was published; {value!r} needs retrain=True")
    if preset == "quick":
        _without_effect(given, ("retrain",), "this preset trains what is missing anyway")
    other = ["`preset='quick'`"] * (preset == "quick") + [f"`{n}={v!r}`" for n, v in given.items() if n not in _HOW]
    if other:
        display(Markdown(_OTHER.format(", ".join(other))))
    return SimpleNamespace(**settings, given=given)


def _without_effect(given: Mapping[str, Any], names: Iterable[str], why: str) -> None:
    """Say which of these parameters were given and do nothing."""
    if idle := [f"{name}={given[name]!r}" for name in names if name in given]:
        print(f"without effect here: {', '.join(idle)} ({why})")


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds, as a page shows them; NaN does not count, and a single seed has no ±.

    Example:
        >>> spread([1.0, 2.0]), spread([1.0]), spread([])
        ('1.50 ± 0.71', '1.00', '–')
    """
    known = [float(value) for value in values if value == value]
    if not known:
        return DASH
    zero = f"{0:.{digits}f}"
    return " ± ".join(f"{part:.{digits}f}" for part in summary(known)[: len(known)]).replace(f"-{zero}", zero)


def shown(index: Sequence[int] | Tensor, wanted: Sequence[int]) -> list[int]:
    """Which pictures of an exhibit to show: those wanted, or where it has not all of them, as many of the first.

    Example:
        >>> shown(range(10), [3, 5]), shown(range(4), [3, 5])
        ([3, 5], [0, 1])
    """
    return list(wanted) if max(wanted) < len(index) else list(range(min(len(wanted), len(index))))


def holds(left: Any, right: Any, tolerance: float) -> bool:
    """Say whether two sides of a statement agree, and by how much they differ.

    Args:
        left: Numbers of any shape: a float, an array or a tensor.
        right: Numbers that broadcast against `left`.
        tolerance: Largest absolute difference that still counts as equal.

    Returns:
        Whether the largest absolute difference is at most `tolerance`; False if it is NaN.

    Example:
        >>> holds([0.1 + 0.2, 1.0], [0.3, 1.0], 1e-12)
        holds: largest difference 5.6e-17, tolerance 1e-12
        True
    """
    gap = float(np.abs(np.asarray(left, dtype=float) - np.asarray(right, dtype=float)).max())
    ok = gap <= tolerance
    print(f"{'holds' if ok else 'does not hold'}: largest difference {gap:.1e}, tolerance {tolerance:.0e}")
    return ok


def store(path: str = "", *, temporary: bool = False, retrain: bool = False) -> Store:
    """The store that a chapter works on.

    Args:
        path: A folder; empty takes a temporary one, the user's own below the data root, or the book's, by the flags.
        temporary: Forget the runs afterwards.
        retrain: Train into the user's own store, so that the published records stay as they are.
    """
    if path:
        return Store(path)
    if temporary:
        return Store(tempfile.mkdtemp(prefix="sdecor-"))
    return Store(data_root() / "runs" if retrain else ROOT / "data")


def plan(name: str) -> Plan:
    """The plan of an experiment chapter, ``book/experiments/NAME.toml``."""
    return Plan.read(BOOK / "experiments" / f"{name}.toml")


def presets(plan: Plan) -> dict[str, dict[str, Any]]:
    """The presets of a plan as `parameters` takes them, and ``published``: the one of which there are records."""
    return {name: {} for name in ("published", *plan.presets)}


def published(plan: Plan, shelf: Store) -> list[Results]:
    """What there is of each preset but ``quick`` that has records, the one with the most records first."""
    found = [results(plan.at(preset), shelf) for preset in plan.presets if preset != "quick"]
    return sorted((f for f in found if f.records), key=lambda f: -len(f.all()))


def planned(plan: Plan, settings: SimpleNamespace, shelf: Store, *, classes: int = 2) -> Results:
    """What a store has of a plan, at the preset and with the changes that a chapter was given.

    Args:
        plan: Of the chapter.
        settings: From `parameters`. ``data``, ``limit``, ``model``, ``seeds`` and ``epochs`` take the place of the
            preset's if they are given; ``retrain``, or the preset ``quick``, trains what is missing, with so many
            ``workers`` on ``device``; ``data_root`` is where the data lie.
        shelf: The store.
        classes: Of how many classes the chapter needs test images.

    Raises:
        FileNotFoundError: If there are no records, or the data are absent.
        ValueError: If the test images are of too few classes.
    """
    known = published(plan, shelf)
    sizes = [f.course.preset for f in known] + [name for name in plan.presets if name != "quick"]
    preset = sizes[0] if settings.preset == "published" else settings.preset
    over = {n: value for n in ("data", "limit", "model", "seeds", "epochs") if (value := getattr(settings, n))}
    course, root = plan.at(preset, **over), settings.data_root or None
    if (settings.retrain or preset == "quick") and not all(ready for _, ready in work(course, shelf)):
        _check_test(course, shelf, root, classes)
        workers = min(settings.workers or 1, course.count())
        run_plan(course, shelf, root=root, workers=workers, threads=1, device=settings.device or "cpu")
    else:
        _without_effect(settings.given, ("retrain", "workers", "device"), _READ)
    entry = DATASETS[course.shared["data"]] if course.shared["data"] in DATASETS else None
    if entry is None or entry.present is None:
        _without_effect(settings.given, ("data_root",), f"{course.shared['data']} does not lie there")
    found = results(course, shelf)
    if not found.records:
        raise FileNotFoundError(f"{shelf.root} holds no records of this plan at '{preset}'; pass retrain=True to train")
    return found


def sizes(plan: Plan, settings: SimpleNamespace, shelf: Store, main: Results) -> dict[str, Results]:
    """What a page of a plan shows, by preset: `main`, and if it is the published page all that have records."""
    others = published(plan, shelf) if settings.preset == "published" else []
    return {main.course.preset: main, **{f.course.preset: f for f in others if f.course.preset != main.course.preset}}


def _check_test(course: Course, shelf: Store, root: str | None, classes: int) -> None:
    """Before anything is trained: whether there are test images, and of how many classes."""
    run = next(iter(course.possible().values()))[0]
    there = len(data_of(run, shelf, "test", root=root).labels.unique())
    if there < classes:
        some = f"{there} class{'es' * (there != 1)}"
        raise ValueError(f"the test images of {run.data.name} are of {some}, and this chapter needs {classes}")


def choices(sizes: Mapping[str, Results]) -> None:
    """Show the trials of a plan, and what was chosen, by preset."""
    for size, found in sizes.items():
        display(Markdown(f"Preset `{size}`:"))
        with pd.option_context("display.max_rows", None):
            display(choice.table(found.trials, found.chosen, found.course.labels))


def differences(sizes: Mapping[str, pd.DataFrame], columns: Columns, quoted: Collection[str]) -> None:
    """Show differences to standard training, by preset, and glue those of the `quoted` arms as ``PRESET_NAME_...``."""
    for size, found in sizes.items():
        report.glue_differences(found.assign(name=f"{size}_" + found["name"])[found["name"].isin(quoted)])
        display(Markdown(f"Preset `{size}`: difference to standard training, with its 95 % interval"))
        display(report.difference_table(found, columns))


def verdicts(sizes: Mapping[str, pd.DataFrame]) -> None:
    """Show verdicts, by preset, and glue their differences as ``PRESET-CLAIM_...``."""
    for size, found in sizes.items():
        report.glue_differences(found.assign(name=f"{size}-" + found["name"].str.replace(" ", "-")))
        display(Markdown(f"Preset `{size}`:"))
        display(report.verdict_table(found))


def progress(found: Results, shelf: Store) -> str:
    """What a store has of a plan, what is missing or broke down, and the command that continues, in Markdown."""
    course, name = found.course, found.course.plan.name
    done = f"Preset `{course.preset}`: {len(found.all())} networks of {len({*found.keys().values()})} arms"
    if found.broken:
        done += ". Training broke down: " + "; ".join(f"{n} of {course.labels[arm]}" for arm, n in found.broken.items())
    if not found.missing:
        return f"{done}. Nothing is missing." if found.broken else f"{done}, all that the plan asks for."
    begun = [course.labels[arm] for arm in found.missing if arm in found.records]
    never = [course.labels[arm] for arm in found.missing if arm not in found.records]
    some = f": {'; '.join(begun)}" if len(begun) < 5 else f" {len(begun)} arms"
    parts = [f"some seeds of{some}"] * bool(begun) + [f"{len(never)} other arms"] * bool(never)
    folder = "data" if shelf.root == ROOT / "data" else shelf.root
    command = f"sdecor run {name} --preset {course.preset} --store {folder}"
    return f"{done}. Not run yet: {', and '.join(parts)}. This goes on: `{command}`."


def records(
    runs: Iterable[Run], shelf: Store, *, retrain: bool, given: Mapping[str, Any] | None = None, **settings: Any
) -> list[Record]:
    """Records of `runs`, read or, if `retrain` allows it, trained where they are missing.

    Args:
        runs: What is wanted.
        shelf: Where it is looked for.
        retrain: Whether to train.
        given: From `parameters`; what of it does nothing here is said.
        settings: Handed to `sdecor.experiment.grid`.

    Raises:
        FileNotFoundError: If a record is missing and `retrain` is off.
    """
    wanted = list(runs)
    found = [shelf.record(run) for run in wanted]
    if retrain and None in found:
        workers = min(settings.get("workers", 1), found.count(None))
        return grid(wanted, shelf, **{**settings, "workers": workers, "threads": 1, "progress": False})
    _without_effect(given or {}, ("retrain", "workers", "device"), _READ)
    for run, record in zip(wanted, found, strict=True):
        if record is None:
            raise FileNotFoundError(
                f"{shelf.root} holds no record of {run.method} on {run.data.name}, seed {run.seed} (key {run.key}); "
                "pass retrain=True to train it, or where a chapter has no such parameter leave store empty"
            )
    return [record for record in found if record is not None]


def kept(name: str, run: Run, shelf: Store, make: Callable[[nn.Module], Mapping[str, Any]]) -> dict[str, Any]:
    """What a page derives from a trained network: read where it was kept, or made from the weights and kept.

    So a page shows the same without the weights. Numbers are kept in ``tables/DATA/KEY.json`` with nine digits, maps in
    the exhibit of the run, in half precision, as ``NAME.MAP``. Another network, as after training again, makes both
    anew.

    Args:
        name: Of the collection; several may share the files of a run.
        run: A finished run.
        shelf: Where its record and files lie.
        make: From the network to numbers and maps by name; a tensor with dimensions is a map.

    Returns:
        What `make` gives, as the files have it: numbers and float32 maps.

    Raises:
        FileNotFoundError: If nothing is kept of the network that the record describes, and there are no weights.
        ValueError: If the table is not readable, or the weights are not those of the record.
    """
    table, exhibit = shelf.path("tables", run, ".json"), shelf.path("exhibits", run, ".safetensors")
    record = shelf.record(run)
    belongs = {"weights_sha256": record.weights_sha256 if record else ""}

    def files() -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            known = json.loads(table.read_text(encoding="utf-8")) if table.exists() else belongs
        except ValueError as error:
            raise ValueError(f"{table} is not readable ({error}); delete it to make it again") from None
        same = known["weights_sha256"] == belongs["weights_sha256"]
        return known if same else dict(belongs), shelf.exhibit(run) if exhibit.exists() else {}

    def found() -> dict[str, Any] | None:
        numbers, maps = files()
        part = numbers.get(name)
        if part is None or not {f"{name}.{m}" for m in part["maps"]} <= maps.keys():
            return None
        return {**part["numbers"], **{m: maps[f"{name}.{m}"].float() for m in part["maps"]}}

    if (answer := found()) is not None:
        return answer
    if not shelf.path("weights", run, ".safetensors").exists():
        raise FileNotFoundError(
            f"no '{name}' of {run.method}, seed {run.seed}: {table} and its exhibit do not have it, and the weights to "
            "make it from are absent; take these files from the book's repository, or train anew with retrain=True"
        )
    made = make(shelf.model(run))
    new = {m: v for m, v in made.items() if isinstance(v, Tensor) and v.ndim}
    plain = {n: float(f"{float(v):.9g}") for n, v in made.items() if n not in new}
    with locked(table.with_suffix(".lock")):
        numbers, maps = files()
        maps |= {f"{name}.{m}": v.half().contiguous() for m, v in new.items()}
        text = json.dumps({**numbers, name: {"maps": [*new], "numbers": plain}}, indent=1) + "\n"
        if new:
            replace_atomically(exhibit, lambda f: f.write(safetensors.torch.save(maps)))
        replace_atomically(table, lambda f: f.write(text.encode()))
    answer = found()
    assert answer is not None
    return answer


def of_grid(shelf: Store, maps_of: Callable[[nn.Module], Tensor]) -> dict[str, Callable[[Record], float]]:
    """What a grid of two by two pixels takes of maps, kept of each run, as metrics for ``sdecor.report.frame``.

    Args:
        shelf: Where the runs lie.
        maps_of: From a network to maps (B, H, W).

    Returns:
        ``pixels``, the Gini index, ``within``, its mean over the four kinds of pixels, and ``seen``, the share on those
        whose row and column are odd, which a convolution of width three and stride two sees by four windows.
    """

    def numbers(net: nn.Module) -> dict[str, Tensor]:
        maps = maps_of(net)
        seen = maps[:, 1::2, 1::2].sum((1, 2)) / maps.sum((1, 2))
        indices = {"pixels": sharpness.gini(maps), "within": sharpness.sublattice_gini(maps), "seen": seen}
        return {name: values.nanmean() for name, values in indices.items()}

    def of(name: str) -> Callable[[Record], float]:
        return lambda record: float(kept("grid", record.run, shelf, numbers)[name])

    return {name: of(name) for name in GRID}


def every_map(data: ImageData | ImageStream) -> Callable[[nn.Module], Tensor]:
    """From a network to the magnitudes of its gradients of the predicted class, (N, H, W), for all images of `data`."""

    def maps(net: nn.Module) -> Tensor:
        batches = (logits_and_gradient(net, x)[1] for x, _ in data.batches(data.pass_size))
        return torch.cat([pixel_score(gradient) for gradient in batches])

    return maps
