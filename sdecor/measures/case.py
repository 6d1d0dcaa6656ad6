"""Measures of maps by name: what they may ask for, one call that measures, and one that fills a tidy table.

A measure is a function that gives one number per image, (B,) float64, NaN where it is undefined; `measure` enters it in
`sdecor.registers.MEASURES`. What it needs are the names of its parameters: parts of a `Case`, or quantities that
`quantity` enters, which ask for parts and other quantities in the same way. A parameter with a default keeps it if the
case has no such thing. Unknown names, and cases that lack what a measure needs, raise ValueError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from sdecor.measures._checks import require_finite
from sdecor.registers import MEASURES, Entry, Register
from sdecor.saliency import pixel_score
from sdecor.whitening import require_tensors

#: Maps (B, C, H, W) or (B, H, W) that explain the target (B,) of images (B, C, H, W) under a model.
Explanation = Callable[[nn.Module, Tensor, Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Any])

#: What the experiment chapters report; the chapter on measures says why these.
RECOMMENDED = ("gini", "auroc", "area_between", "max_sensitivity", "randomization")


@dataclass(frozen=True, kw_only=True)
class Quantity(Entry):
    """Something that measures may ask for: a function of parts of a case and of other quantities."""

    part: str = ""  #: Key in the dictionary that the function gives; without, the quantity is all that it gives.
    kept: bool = True  #: Whether a case keeps it.


QUANTITIES: Register[Quantity] = Register("quantity", Quantity, "sdecor.measures")


def measure(label: str, *, better: str, name: str = "", **about: Any) -> Callable[[F], F]:
    """Decorator that enters a measure, by its own name or the one given, and gives it back unchanged.

    `better` is ``higher`` or ``lower``; for sharpness, the direction that is sharper. More may be said `about` it:
    ``low``, ``high``, ``source``, and ``family``, by default the name of the module.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', got {better!r}")

    def enter(function: F) -> F:
        known = {"label": label, "better": better, "family": function.__module__.rpartition(".")[2]}
        return MEASURES.register(name, **{**known, **about})(function)

    return enter


def quantity(*parts: str, kept: bool = True) -> Callable[[F], F]:
    """Decorator that enters a function as a quantity, and `parts` of the dictionary that it gives as some more."""

    def enter(function: F) -> F:
        for part in ("", *parts):
            QUANTITIES.register(part or function.__name__, part=part, kept=kept)(function)
        return function

    return enter


@dataclass(eq=False, kw_only=True)
class Case:
    """Maps of some images, and what there is to judge them by. All tensors and the model are on one device.

    ``case[name]`` gives a part or a quantity, such as ``case["saliency"]``.
    """

    attribution: Tensor  #: What is judged, (B, C, H, W) or (B, H, W), of any sign, finite.
    mask: Tensor | None = None  #: The object's pixels, (B, H, W), boolean or 0 and 1.
    model: nn.Module | None = None  #: The classifier that the maps explain.
    images: Tensor | None = None  #: What it classified, (B, C, H, W).
    target: Tensor | None = None  #: The class that each map explains, (B,).
    explain: Explanation | None = None  #: How the maps were made, to make them again for another image or model.
    adversarial: Tensor | None = None  #: Images from `robustness.attack`; None makes them when they are needed.
    fill: str = "linear"  #: What replaces pixels: see `sdecor.measures.faithfulness`.
    radius: float = 0.1  #: Largest change of a value by noise or attack, in units of `images`.
    samples: int = 10  #: Draws of noise for the measures that need some.
    batch_size: int = 256  #: Rows of a forward pass.
    seed: int = 0  #: Of all draws. They are the same for every image and every case.
    _made: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what not every measure would."""
        parts = {name: getattr(self, name) for name in ("attribution", "mask", "images", "target", "adversarial")}
        require_tensors(**{name: part for name, part in parts.items() if part is not None or name == "attribution"})
        maps, of = self.attribution.shape, None if self.images is None else self.images.shape
        if len(maps) not in (3, 4):
            raise ValueError(f"attribution must have shape (B, C, H, W) or (B, H, W), got {tuple(maps)}")
        if of is not None and (len(of) != 4 or (of[0], *of[2:]) != (maps[0], *maps[-2:])):
            shapes = f"images have shape {tuple(of)}, attribution has {tuple(maps)}"
            raise ValueError(f"{shapes}; both need the same B, H and W")
        require_finite(self.attribution, "attribution")

    def __getitem__(self, name: str) -> Any:
        if (part := vars(self).get(name)) is not None:
            return part
        entry = QUANTITIES[name]
        made = self._made[entry.function] if entry.function in self._made else self.ask(entry)
        if entry.kept:
            self._made[entry.function] = made
        return made[entry.part] if entry.part else made

    def lacks(self, entry: Entry) -> tuple[str, ...]:
        """Names of the parts that a measure or quantity needs, or a quantity for it, and this case does not have."""
        lacking: list[str] = []
        for name, parameter in inspect.signature(entry.function).parameters.items():
            if parameter.default is not parameter.empty or vars(self).get(name) is not None:
                continue
            if name in QUANTITIES:
                lacking += self.lacks(QUANTITIES[name])
            elif name in vars(self):
                lacking.append(name)
            else:
                known = dict.fromkeys([*(part for part in vars(self) if part != "_made"), *QUANTITIES])
                raise ValueError(f"{entry.kind} '{entry.name}' asks for '{name}'; it can have: {', '.join(known)}")
        return tuple(dict.fromkeys(lacking))

    def ask(self, entry: Entry) -> Any:
        """Call a measure or the function of a quantity with what it asks for."""
        if lacking := self.lacks(entry):
            raise ValueError(f"{entry.kind} '{entry.name}' needs {', '.join(lacking)}, which this case does not have")
        had = [name for name in entry.parameters if vars(self).get(name) is not None]
        had += [n for n in entry.parameters if n in QUANTITIES and n not in had and not self.lacks(QUANTITIES[n])]
        return entry.function(**{name: self[name] for name in had})


@quantity()
def saliency(attribution: Tensor) -> Tensor:
    """Magnitude of each pixel, (B, H, W)."""
    return pixel_score(attribution)


@quantity()
def noise(radius: float) -> float:
    """Standard deviation of normal noise."""
    return radius


@quantity(kept=False)
def generator(seed: int) -> torch.Generator:
    """Source of draws, a new one for whoever asks."""
    return torch.Generator().manual_seed(seed)


@quantity()
def explain_with(explain: Explanation, batch_size: int) -> Explanation:
    """Function of a model, images and target that gives saliency (B, H, W), explained batch by batch."""

    def explained(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        parts = zip(images.split(batch_size), target.split(batch_size), strict=True)
        return torch.cat([pixel_score(explain(model, *part)) for part in parts])

    return explained


@quantity()
def maps_of(model: nn.Module, explain: Explanation, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The same under the case's own model, each batch explained once: measures of robustness look at the same ones."""
    made: dict[bytes, Tensor] = {}

    def once(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        bits = (part.detach().cpu().contiguous().view(torch.uint8).numpy() for part in (images, target))
        key = sha256(b"".join(part.tobytes() for part in bits)).digest()  # NumPy has no bfloat16
        if key not in made:
            made[key] = pixel_score(explain(model, images, target))
        return made[key]

    return partial(explain_with(once, batch_size), model)


def needs(name: str) -> tuple[str, ...]:
    """Names of the parts of a `Case` that a measure needs besides the attribution."""
    return Case(attribution=torch.zeros(1, 1, 1)).lacks(MEASURES[name])


def available(case: Case) -> tuple[str, ...]:
    """Names of the measures for which `case` has all that they need."""
    return tuple(name for name, entry in MEASURES.items() if not case.lacks(entry))


def evaluate(case: Case, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Values of a case by the names of measures, (B,) float64; None takes all that are `available`.

    Example:
        >>> values = evaluate(Case(attribution=torch.eye(4)[None], mask=torch.eye(4)[None]), ["gini", "auroc"])
        >>> {name: value.tolist() for name, value in values.items()}
        {'gini': [0.75], 'auroc': [1.0]}
    """
    entries = {name: MEASURES[name] for name in (available(case) if names is None else names)}
    return {name: case.ask(entry) for name, entry in entries.items()}


def table(cases: Mapping[str, Case], names: Iterable[str] | None = None) -> pd.DataFrame:
    """Measure many cases, given by the name of the attribution: one row for every attribution and measure of `names`.

    Columns are ``attribution``, ``metric``, ``value`` (mean over the images where it is defined; NaN if there is none),
    ``undefined`` (how many images were left out) and ``images`` (how many there were).
    """
    known = None if names is None else [MEASURES[name].name for name in names]
    rows = [
        (attribution, name, float(values.nanmean()), int(values.isnan().sum()), len(values))
        for attribution, case in cases.items()
        for name, values in evaluate(case, known).items()
    ]
    return pd.DataFrame(rows, columns=["attribution", "metric", "value", "undefined", "images"])
