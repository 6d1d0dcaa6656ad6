"""All measures of maps by name, with their direction and range, and one call that fills a tidy table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256

import pandas as pd
import torch
from torch import Tensor, nn

from sdecor.measures import faithfulness, localization, robustness, sanity, sharpness
from sdecor.measures._checks import require_finite
from sdecor.saliency import pixel_score

#: Maps (B, C, H, W) or (B, H, W) that explain the target (B,) of images (B, C, H, W) under a model.
Explanation = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(eq=False, kw_only=True)
class Case:
    """Maps of some images, and what there is to judge them by; measures that need what is None are not to be had.

    All tensors and the model are on one device.

    Args:
        attribution: What is judged, (B, C, H, W) or (B, H, W), of any sign.
        mask: The object's pixels, (B, H, W), boolean or 0 and 1.
        model: The classifier that the maps explain.
        images: What it classified, (B, C, H, W).
        target: The class that each map explains, (B,).
        explain: How the maps were made, so that they can be made again for another image or model.
        adversarial: Images from `sdecor.measures.robustness.attack`; None makes them when they are needed.
        fill: What replaces pixels: see `sdecor.measures.faithfulness.perturbation_curve`.
        radius: Largest change of a value by noise or attack, in units of `images`.
        samples: Draws of noise for the measures that need some.
        batch_size: Rows of a forward pass.
        seed: Of all draws. They are the same for every image and every case.

    Raises:
        ValueError: If the maps have NaN or infinity, or do not fit the images.
    """

    attribution: Tensor
    mask: Tensor | None = None
    model: nn.Module | None = None
    images: Tensor | None = None
    target: Tensor | None = None
    explain: Explanation | None = None
    adversarial: Tensor | None = None
    fill: str = "linear"
    radius: float = 0.1
    samples: int = 10
    batch_size: int = 256
    seed: int = 0

    _made: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what not every measure would."""
        maps = self.attribution.shape
        if len(maps) not in (3, 4):
            raise ValueError(f"attribution must have shape (B, C, H, W) or (B, H, W), got {tuple(maps)}")
        if self.images is not None:
            of = self.images.shape
            if len(of) != 4 or (of[0], *of[2:]) != (maps[0], *maps[-2:]):
                raise ValueError(
                    f"images have shape {tuple(of)}, attribution has {tuple(maps)}; both need the same B, H and W"
                )
        require_finite(self.attribution, "attribution")

    @cached_property
    def score(self) -> Tensor:
        """Magnitude of each pixel, (B, H, W)."""
        return pixel_score(self.attribution)

    @cached_property
    def _curves(self) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(self.seed)
        return faithfulness.faithfulness(
            *self._classified, self.score, fill=self.fill, batch_size=self.batch_size, generator=draws
        )

    @cached_property
    def _attacked(self) -> Tensor:
        if self.adversarial is not None:
            return self.adversarial
        return robustness.attack(*self._classified, epsilon=self.radius, batch_size=self.batch_size, seed=self.seed)

    @property
    def _classified(self) -> tuple[nn.Module, Tensor, Tensor]:
        assert self.model is not None and self.images is not None and self.target is not None
        return self.model, self.images, self.target

    def _maps(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        parts = zip(images.split(self.batch_size), target.split(self.batch_size), strict=True)
        return torch.cat([self._part(model, *part) for part in parts])

    def _part(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        assert self.explain is not None
        if model is not self.model:
            return pixel_score(self.explain(model, images, target))
        key = sha256(images.detach().cpu().numpy().tobytes() + target.cpu().numpy().tobytes()).digest()
        if key not in self._made:  # the measures of robustness look at the same images
            self._made[key] = pixel_score(self.explain(model, images, target))
        return self._made[key]


Function = Callable[[Case], Tensor]


@dataclass(frozen=True)
class Metric:
    """A measure of maps.

    Args:
        title: For tables and figures.
        family: ``sharpness``, ``localization``, ``faithfulness``, ``robustness`` or ``sanity``.
        better: ``higher`` or ``lower``; for sharpness, the direction that is sharper.
        low: Least value that it can have.
        high: Largest.
        needs: Names of the parts of a `Case` that it looks at besides the maps.
        function: From a `Case` to one number per image, (B,) float64; NaN where it is undefined.
    """

    title: str
    family: str
    better: str
    low: float
    high: float
    needs: tuple[str, ...]
    function: Function

    @property
    def heading(self) -> str:
        """Title with an arrow in the better direction."""
        return f"{self.title} {'↑' if self.better == 'higher' else '↓'}"


_MODEL = ("model", "images", "target")


def _sharpness(title: str, better: str, function: Callable[[Tensor], Tensor]) -> Metric:
    return Metric(title, "sharpness", better, 0, 1, (), lambda case: function(case.score))


def _localization(title: str, function: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    def on_object(case: Case) -> Tensor:
        assert case.mask is not None
        return function(case.score, case.mask)

    return Metric(title, "localization", "higher", 0, 1, ("mask",), on_object)


def _curve(title: str, better: str, low: float, name: str) -> Metric:
    return Metric(title, "faithfulness", better, low, 1, _MODEL, lambda case: case._curves[name])


def _infidelity(case: Case) -> Tensor:
    return faithfulness.infidelity(
        *case._classified, case.attribution, noise=case.radius, batch_size=case.batch_size, seed=case.seed
    )


def _faithfulness_correlation(case: Case) -> Tensor:
    return faithfulness.faithfulness_correlation(
        *case._classified,
        case.score,
        fill=case.fill,
        batch_size=case.batch_size,
        generator=torch.Generator().manual_seed(case.seed),
    )


def _change(function: Callable[..., Tensor], case: Case) -> Tensor:
    model, images, target = case._classified
    return function(
        partial(case._maps, model),
        images,
        target,
        radius=case.radius,
        samples=case.samples,
        batch_size=case.batch_size,
        seed=case.seed,
    )


def _shift(case: Case) -> Tensor:
    model, images, target = case._classified
    return robustness.explanation_shift(partial(case._maps, model), images, case._attacked, target)


def _randomization(case: Case) -> Tensor:
    model, images, target = case._classified
    random = model
    for _, changed in sanity.randomized(model, seed=case.seed):
        random = changed  # the last has every layer drawn anew
    return robustness.spearman(case.score, case._maps(random, images, target))


_AGAIN = (*_MODEL, "explain")
_INF = math.inf

#: Name to measure. Names are mostly those of the functions in ``sdecor.measures``, whose docstrings define them.
METRICS: dict[str, Metric] = {
    "gini": _sharpness("Gini", "higher", sharpness.gini),
    "entropy": _sharpness("entropy", "lower", sharpness.entropy),
    "top_mass": _sharpness("top-10 % mass", "higher", sharpness.top_mass),
    "effective_support": _sharpness("effective support", "lower", sharpness.effective_support),
    "total_variation": _sharpness("total variation", "lower", sharpness.total_variation),
    "relevance_mass": _localization("mass on object", localization.relevance_mass),
    "relevance_rank": _localization("rank on object", localization.relevance_rank),
    "pointing_game": _localization("peak on object", localization.pointing_game),
    "auroc": _localization("AUROC", localization.auroc),
    "average_precision": _localization("average precision", localization.average_precision),
    "best_iou": _localization("best IoU", localization.best_iou),
    "deletion": _curve("deletion", "lower", 0, "deletion"),
    "insertion": _curve("insertion", "higher", 0, "insertion"),
    "area_between": _curve("area between curves", "higher", -1, "area_between"),
    "comprehensiveness": _curve("comprehensiveness", "higher", -1, "comprehensiveness"),
    "sufficiency": _curve("sufficiency", "lower", -1, "sufficiency"),
    "monotonicity": _curve("monotonicity", "higher", 0, "monotonicity"),
    "infidelity": Metric("infidelity", "faithfulness", "lower", 0, _INF, _MODEL, _infidelity),
    "faithfulness_correlation": Metric(
        "faithfulness correlation", "faithfulness", "higher", -1, 1, _MODEL, _faithfulness_correlation
    ),
    "max_sensitivity": Metric(
        "max-sensitivity", "robustness", "lower", 0, _INF, _AGAIN, partial(_change, robustness.max_sensitivity)
    ),
    "local_lipschitz": Metric(
        "local Lipschitz", "robustness", "lower", 0, _INF, _AGAIN, partial(_change, robustness.local_lipschitz)
    ),
    "explanation_shift": Metric("shift under attack", "robustness", "lower", 0, 1, _AGAIN, _shift),
    "randomization": Metric("like a random network's", "sanity", "lower", -1, 1, _AGAIN, _randomization),
}

#: What the experiment chapters report; the chapter on measures says why these.
RECOMMENDED = ("gini", "auroc", "area_between", "max_sensitivity", "randomization")


def known(metrics: Iterable[str]) -> tuple[str, ...]:
    """The given names, if all of them are in `METRICS`.

    Raises:
        ValueError: If one is not.
    """
    names = tuple(metrics)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'; known: {', '.join(METRICS)}")
    return names


def available(case: Case) -> tuple[str, ...]:
    """Names of the measures for which `case` has all that they need."""
    return tuple(name for name, metric in METRICS.items() if all(getattr(case, n) is not None for n in metric.needs))


def evaluate(case: Case, metrics: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Measure a case.

    Args:
        case: Maps and what there is to judge them by.
        metrics: Names in `METRICS`; None takes all that are `available`.

    Returns:
        Name to values, (B,) float64, NaN where a measure is undefined.

    Raises:
        ValueError: If a name is unknown, the case lacks what a measure needs, or a measure rejects its input.

    Example:
        >>> values = evaluate(Case(attribution=torch.eye(4)[None], mask=torch.eye(4)[None]), ["gini", "auroc"])
        >>> {name: value.tolist() for name, value in values.items()}
        {'gini': [0.75], 'auroc': [1.0]}
    """
    names = available(case) if metrics is None else known(metrics)
    for name in names:
        if missing := [n for n in METRICS[name].needs if getattr(case, n) is None]:
            raise ValueError(f"metric '{name}' needs {', '.join(missing)}, which this case does not have")
    return {name: METRICS[name].function(case) for name in names}


def table(cases: Mapping[str, Case], metrics: Iterable[str] | None = None) -> pd.DataFrame:
    """Measure many cases: one row for every attribution and measure.

    Args:
        cases: Name of an attribution to its case.
        metrics: As in `evaluate`.

    Returns:
        Columns ``attribution``, ``metric``, ``value`` (mean over the images where it is defined; NaN if there is none),
        ``undefined`` (how many images were left out) and ``images`` (how many there were).

    Raises:
        ValueError: As `evaluate`.
    """
    names = None if metrics is None else known(metrics)
    rows = [
        {
            "attribution": attribution,
            "metric": metric,
            "value": float(values.nanmean()),
            "undefined": int(values.isnan().sum()),
            "images": len(values),
        }
        for attribution, case in cases.items()
        for metric, values in evaluate(case, names).items()
    ]
    return pd.DataFrame(rows, columns=["attribution", "metric", "value", "undefined", "images"])
