"""The training objective: named terms of a step, and the methods that weigh them.

A term is a function of a `Step` and gives a scalar; its keyword-only parameters are its settings. A method is data:
terms and weights. Standard training, saliency-guided training, SaliencyDecor and every baseline differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sdecor.config import Objective
from sdecor.decorrelation import decorrelation as penalized
from sdecor.masking import lowest, masked, replacement
from sdecor.models import PLACES, channels_first, default_layers, layer
from sdecor.registers import FILLS, METHODS, PENALTIES, SCORES, TERMS, Between, Method, OneOf, OnlyWith
from sdecor.saliency import checked_target, input_gradient, logits_of, quick_slope
from sdecor.whitening import GroupWhitening, full_precision

term = TERMS.register
DIRECTIONS = ("clean_to_masked", "detached", "symmetric")
Share = Annotated[float, Between(0, 1, ends=False)]
FillName = Annotated[str, OneOf(FILLS)]
FillValue = Annotated[float, OnlyWith("fill", "constant")]


@contextmanager
def capture(model: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of layers, by their names in ``named_modules()``: a dictionary that each pass refills.

    They are copies, since a later operation of the model may work in place.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in [(name, layer(model, name)) for name in layers]:  # all looked up before the first hook

        def keep(_m: nn.Module, _i: Any, output: Any, name: str = name) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer '{name}' returns a {type(output).__name__}; decorrelation needs a tensor")
            found[name] = output.clone()

        handles.append(module.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Let norms and `GroupWhitening` use a batch without averaging it: averages are to describe clean images."""
    batch, instance = (nn.modules.batchnorm._BatchNorm, GroupWhitening), nn.modules.instancenorm._InstanceNorm
    norms: list[Any] = [m for m in model.modules() if isinstance(m, (*batch, instance)) and m.track_running_stats]
    flags = [("momentum", 0.0) if isinstance(m, instance) else ("track_running_stats", False) for m in norms]
    before = [getattr(m, name) for m, (name, _) in zip(norms, flags, strict=True)]
    try:
        for m, (name, value) in zip(norms, flags, strict=True):
            setattr(m, name, value)
        yield
    finally:
        for m, (name, _), value in zip(norms, flags, before, strict=True):
            setattr(m, name, value)


@dataclass(eq=False, repr=False)
class Step:
    """The quantities of one training step, each made when it is first asked for, and kept.

    One clean forward pass gives the logits, the features and the input gradient; each kind of masked images takes one
    more. Masks are constants: nothing is differentiated through the choice of pixels.
    """

    model: nn.Module  #: Classifier ``(B, C, H, W) -> (B, K)`` in the mode it is to be trained in.
    images: Tensor  #: ``(B, C, H, W)``; not modified.
    target: Tensor  #: True classes ``(B,)``.
    _: KW_ONLY
    layers: tuple[str, ...] = ()  #: Whose features are wanted.
    captured: dict[str, Tensor] | None = None  #: Dictionary of an open `capture` of these layers.
    generator: torch.Generator | None = None  #: For everything that is drawn, on the device of the images.
    differentiable: bool = True  #: Whether the input gradient may be asked for.

    def __post_init__(self) -> None:
        self._input = self.images.detach().requires_grad_() if self.differentiable else self.images
        self.images, self.target = self.images.detach(), checked_target(self.images, self.target)
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            self._kept[key] = make()
        made: Tensor = self._kept[key]
        return made

    @cached_property
    def logits(self) -> Tensor:
        """Logits of the clean images ``(B, K)``."""
        if self.captured:
            self.captured.clear()  # of what an earlier pass left
        quick = quick_slope(self.model, self._input) if self._input.requires_grad else nullcontext(nullcontext)
        with quick as self._to_images:
            out = logits_of(self.model, self._input, finite=False)  # what is not, training says of the loss
        self._kept["features"] = dict(self.captured or {})  # before another pass refills it
        return out

    @property
    def features(self) -> dict[str, Tensor]:
        """Features of the clean images by layer, in the order asked for."""
        if not self.layers:
            raise ValueError("a term asks for features, but none of the method's terms has the option 'layers'")
        _ = self.logits
        reached: dict[str, Tensor] = self._kept["features"]
        if missed := [name for name in self.layers if name not in reached]:
            raise ValueError(f"the forward pass did not reach the layers {', '.join(missed)}")
        return {n: channels_first(reached[n], layer(self.model, n), self.images) for n in self.layers}

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of each true class's logit by its image ``(B, C, H, W)``, itself differentiable."""
        return self._slope(self.logits, create_graph=True)

    @cached_property
    def log_probability_gradient(self) -> Tensor:
        """Gradient of each true class's log-probability by its image ``(B, C, H, W)``, itself differentiable."""
        return self._slope(log_softmax(full_precision(self.logits), 1), create_graph=True)

    @cached_property
    def saliency(self) -> Tensor:
        """The same gradient as a constant, from the graph of the clean pass; half the price of `gradient`."""
        return self.gradient.detach() if "gradient" in self.__dict__ else self._slope(self.logits, retain_graph=True)

    def _slope(self, of: Tensor, **how: bool) -> Tensor:
        if not self._input.requires_grad:
            raise ValueError("a term asks for the input gradient, but was entered with gradient=False")
        if how.get("create_graph") and hasattr(self.model, "_orig_mod"):
            raise ValueError("a term asks for a second derivative, which a compiled model has not: do not compile")
        with self._to_images():
            return input_gradient(of, self._input, self.target, **how)

    def score(self, kind: str) -> Tensor:
        """Score of each pixel ``(B, H, W)``, by the name of a score."""
        entry, given = SCORES[kind], {"images": self.images, "generator": self.generator}
        if "gradient" in entry.parameters:
            given["gradient"] = self.saliency
        return self._once(("score", kind), lambda: entry.ask(given))

    def mask(self, kind: str, fraction: float) -> Tensor:
        """The lowest-scoring share of each image's pixels, boolean ``(B, H, W)``."""
        return self._once(("mask", kind, fraction), lambda: lowest(self.score(kind), fraction))

    def masked_logits(self, kind: str, fraction: float, fill: str, value: float = 0.0) -> Tensor:
        """Logits of the images whose lowest-scoring share is replaced ``(B, K)``; running averages stay as they are."""

        def make() -> Tensor:
            mask = self.mask(kind, fraction)
            filling = replacement(self.images, fill, value=value, generator=self.generator)
            _ = self.logits  # the clean pass comes first
            with frozen_statistics(self.model):
                out: Tensor = self.model(masked(self.images, mask, filling))
            return out

        return self._once(("logits", kind, fraction, fill, value), make)


def divergence(logits: Tensor, logits_masked: Tensor, direction: str = "clean_to_masked") -> Tensor:
    """KL divergence, in nats, of predictions on clean and masked images ``(B, K)``, averaged over the batch."""
    p, q = (log_softmax(full_precision(v), 1) for v in (logits, logits_masked))
    if direction == "detached":
        p = p.detach()
    forward = kl_div(q, p, reduction="batchmean", log_target=True)
    if direction == "symmetric":
        return (forward + kl_div(p, q, reduction="batchmean", log_target=True)) / 2
    return forward


@term(label="cross-entropy (nats)", gradient=False)
def classification(step: Step) -> Tensor:
    """Cross-entropy of the true classes on clean images."""
    return cross_entropy(full_precision(step.logits), step.target)


@term(label="consistency (nats)", source="arXiv:2111.14338")
def consistency(
    step: Step,
    *,
    score: Annotated[str, OneOf(SCORES)] = "absolute",
    fraction: Share = 0.5,
    fill: FillName = "uniform",
    fill_value: FillValue = 0.0,
    direction: Annotated[str, OneOf(DIRECTIONS)] = "clean_to_masked",
) -> Tensor:
    """KL divergence between predictions on clean images and on images whose lowest-scoring pixels are replaced.

    The options are the score that ranks pixels, the share replaced, the fill (and its value in normalized units), and
    the direction: ``clean_to_masked`` is KL(f(X) || f(X_masked)), ``detached`` holds f(X) fixed, ``symmetric`` averages
    both ways.
    """
    return divergence(step.logits, step.masked_logits(score, fraction, fill, fill_value), direction)


@term(label="decorrelation", source="arXiv:2604.25315", gradient=False)
def decorrelation(
    step: Step,
    *,
    penalty: Annotated[str, OneOf(PENALTIES)] = "correlation",
    group_size: Annotated[int | None, Between(1)] = 16,
    layers: tuple[str, ...] = (),
    place: Annotated[str, OneOf(PLACES), OnlyWith("layers", ())] = "before",
) -> Tensor:
    """Mean over layers of a penalty on the correlation of their features.

    The options are the penalty, the channels per group (None for all), the layers by their names in
    ``named_modules()`` (none given: `sdecor.models.default_layers`), and whether these are taken before or after their
    nonlinearity.
    """
    values = [penalized(z, kind=penalty, group_size=group_size, layer=n) for n, z in step.features.items()]
    return torch.stack(values).mean()


@term(label="cross-entropy on noise (nats)", gradient=False)
def masked_classification(
    step: Step, *, fraction: Share = 0.5, fill: FillName = "uniform", fill_value: FillValue = 0.0
) -> Tensor:
    """Cross-entropy on images of which a random share of the pixels is replaced: plain noise augmentation."""
    logits = step.masked_logits("random", fraction, fill, fill_value)
    return cross_entropy(full_precision(logits), step.target)


_GUIDED, _BOTH = {classification: 1, consistency: 1}, {classification: 1, consistency: 1, decorrelation: 1}
_PAPER = "arXiv:2604.25315"
METHODS["standard"] = Method({classification: 1}, colour="#000000")
METHODS["decorrelation"] = Method(
    {classification: 1, decorrelation: 1}, label="decorrelation only", source=_PAPER, colour="#009e73", dash="--"
)
for _score, _colour in {"absolute": "#56b4e9", "signed": "#e69f00"}.items():
    _how: dict[str, Any] = {"settings": {"score": _score}, "label": f"consistency, {_score} mask", "dash": "-."}
    METHODS[f"consistency-{_score}"] = Method(_GUIDED, source="arXiv:2111.14338", colour=_colour, **_how)
for _score, _colour in {"absolute": "#0072b2", "signed": "#d55e00"}.items():
    _how = {"settings": {"score": _score}, "label": f"both, {_score} mask"}
    METHODS[f"saliencydecor-{_score}"] = Method(_BOTH, source=_PAPER, colour=_colour, **_how)
# Controls: what consistency does that is not owed to saliency.
METHODS["consistency-random"] = Method(
    _GUIDED, settings={"score": "random"}, label="consistency, random mask", dash="-."
)
METHODS["noise"] = Method({classification: 1, masked_classification: 1}, label="noise augmentation", dash=":")


def losses(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    generator: torch.Generator | None = None,
    features: dict[str, Tensor] | None = None,
    layers: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """All terms of one step; call ``["total"].backward(inputs=parameters)`` on the result.

    Naming the parameters spares the gradient by the images. The arguments are those of a `Step`, the objective, and the
    dictionary of a `capture` that is already open, as a compiled model needs, of these `layers`; None opens one, and
    finds the layers by a pass of one image. The result has the unweighted terms by name, and their weighted sum as
    ``total``: scalars with a graph.
    """
    if layers is None:
        layers = layers_of(model, objective, x)
    if layers and features is None:
        with capture(model, layers) as features:
            return losses(model, x, y, objective, generator=generator, features=features, layers=layers)
    asks = any(TERMS[name].gradient for name in objective.terms)
    step = Step(model, x, y, layers=layers, captured=features, generator=generator, differentiable=asks)
    out: dict[str, Tensor] = {name: TERMS[name].function(step, **objective.of(name)) for name in objective.terms}
    first, *others = (out[n] if weight == 1 else weight * out[n] for n, weight in objective.terms.items())
    return {**out, "total": sum(others, first)}


def layers_of(model: nn.Module, objective: Objective, images: Tensor) -> tuple[str, ...]:
    """The layers whose features the terms look at: the setting ``layers``, or the default ones; none without it.

    The `images` are those of `sdecor.models.default_layers`.
    """
    if "layers" not in objective.settings:
        return ()
    place = objective.settings.get("place", "before")
    return objective.settings["layers"] or default_layers(model, images, place=place)


__all__ = ["METHODS", "Objective", "Step", "capture", "divergence", "frozen_statistics", "losses", "term"]
