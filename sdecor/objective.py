"""The training objective: classification + consistency under masking + decorrelation, as named terms.

Standard training, saliency-guided training and decorrelation-only training are settings of the same objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sdecor.decorrelation import KINDS, decorrelation
from sdecor.masking import FILLS, lowest, masked, replacement
from sdecor.models import default_layers, layer
from sdecor.saliency import SCORES, input_gradient, pixel_score
from sdecor.whitening import GroupWhitening, full_precision

DIRECTIONS = ("clean_to_masked", "detached", "symmetric")

METHODS: dict[str, dict[str, Any]] = {
    "standard": {"consistency": False, "decorrelation": False},
    "decorrelation": {"consistency": False, "decorrelation": True},
    "consistency-absolute": {"consistency": True, "decorrelation": False, "score": "absolute"},
    "consistency-signed": {"consistency": True, "decorrelation": False, "score": "signed"},
    "saliencydecor-absolute": {"consistency": True, "decorrelation": True, "score": "absolute"},
    "saliencydecor-signed": {"consistency": True, "decorrelation": True, "score": "signed"},
}


@dataclass(frozen=True)
class Objective:
    """Weights and choices of the objective; checked when made.

    Args:
        lambda_c: Weight of the consistency term; 0 leaves the masked forward pass out.
        lambda_d: Weight of the decorrelation term; 0 leaves it out.
        score: ``absolute`` or ``signed`` input gradient of the true-class logit (see `sdecor.saliency.pixel_score`).
        fraction: Share of pixels masked, in (0, 1).
        fill: ``uniform``, ``mean``, ``constant`` or ``blur`` (see `sdecor.masking.replacement`).
        fill_value: For ``constant``, in normalized units.
        direction: ``clean_to_masked`` is KL(f(X) || f(X_masked)), ``detached`` holds f(X) fixed, ``symmetric`` averages
            both ways.
        penalty: Form of D(Z) (see `sdecor.decorrelation.decorrelation`).
        group_size: Channels per group of D(Z); None for all.
        layers: Names as in ``named_modules()``; empty takes `sdecor.models.default_layers`.

    Raises:
        ValueError: If a value is impossible.
    """

    lambda_c: float = 1.0
    lambda_d: float = 1.0
    score: str = "absolute"
    fraction: float = 0.5
    fill: str = "uniform"
    fill_value: float = 0.0
    direction: str = "clean_to_masked"
    penalty: str = "correlation"
    group_size: int | None = 16
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject impossible settings by name."""
        for name in ("lambda_c", "lambda_d"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie strictly between 0 and 1, got {self.fraction}")
        for name, known in {"score": SCORES, "fill": FILLS, "direction": DIRECTIONS, "penalty": tuple(KINDS)}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} '{getattr(self, name)}'; known: {', '.join(known)}")

    @classmethod
    def of(cls, method: str, *, lambda_c: float = 1.0, lambda_d: float = 1.0, **settings: Any) -> Objective:
        """The objective of a named method of `METHODS`; weights of terms the method lacks become 0.

        Raises:
            ValueError: If `method` is unknown or a setting is impossible.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method '{method}'; known: {', '.join(METHODS)}")
        terms = METHODS[method]
        if "score" in terms:
            settings["score"] = terms["score"]
        return cls(
            lambda_c=lambda_c if terms["consistency"] else 0.0,
            lambda_d=lambda_d if terms["decorrelation"] else 0.0,
            **settings,
        )


class Terms(NamedTuple):
    """Scalars of one step. `consistency` and `decorrelation` are unweighted, and 0 when switched off."""

    classification: Tensor
    consistency: Tensor
    decorrelation: Tensor
    total: Tensor


@contextmanager
def capture(model: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named layers during forward passes, without changing the model.

    Args:
        model: Any module.
        layers: Names as in ``named_modules()``.

    Yields:
        Dictionary that each forward pass refills: layer name to output.

    Raises:
        ValueError: If a layer does not exist.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in [(name, layer(model, name)) for name in layers]:  # all looked up before the first hook

        def keep(_m: nn.Module, _i: Any, output: Any, name: str = name) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer '{name}' returns a {type(output).__name__}; decorrelation needs a tensor")
            found[name] = output

        handles.append(module.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norm and `GroupWhitening` use a batch without averaging it: averages are to describe clean images."""
    kinds = (nn.modules.batchnorm._BatchNorm, GroupWhitening)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


def consistency(logits: Tensor, logits_masked: Tensor, direction: str = "clean_to_masked") -> Tensor:
    """KL divergence between predictions on clean and masked images, in nats, averaged over the batch.

    Args:
        logits: ``(B, K)`` on clean images.
        logits_masked: ``(B, K)`` on masked images.
        direction: See `Objective`.

    Returns:
        Scalar >= 0.
    """
    p, q = (log_softmax(full_precision(v), 1) for v in (logits, logits_masked))
    if direction == "detached":
        p = p.detach()
    forward = kl_div(q, p, reduction="batchmean", log_target=True)
    if direction == "symmetric":
        return (forward + kl_div(p, q, reduction="batchmean", log_target=True)) / 2
    return forward


def losses(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    generator: torch.Generator | None = None,
    features: dict[str, Tensor] | None = None,
) -> Terms:
    """All terms of one step; call ``.total.backward(inputs=parameters)`` on the result.

    Naming the parameters spares the gradient with respect to the images, which nobody needs a second time. The saliency
    score reuses the graph of the clean forward pass; the mask is a constant, so nothing is differentiated twice.

    Args:
        model: Classifier ``(B, C, H, W) -> (B, K)`` in the mode it is to be trained in.
        x: Images ``(B, C, H, W)``; not modified.
        y: True classes ``(B,)``.
        objective: Weights and choices.
        generator: For the noise of the fill, on the device of `x`.
        features: Dictionary of a `capture` that is already open (as a compiled model needs); None opens one.

    Returns:
        The terms, scalars with a graph.

    Raises:
        ValueError: As `capture` and `sdecor.decorrelation.decorrelation`.
    """
    o = objective
    if o.lambda_d > 0 and features is None:
        with capture(model, o.layers or default_layers(model)) as features:
            return losses(model, x, y, o, generator=generator, features=features)
    if o.lambda_c > 0:
        x = x.detach().requires_grad_()
    logits = model(x)
    classification = cross_entropy(full_precision(logits), y)
    zero = classification.new_zeros(())
    decor = change = zero
    if o.lambda_d > 0:
        wanted = o.layers or default_layers(getattr(model, "_orig_mod", model))  # a compiled model prefixes its names
        reached = features or {}
        if missed := [name for name in wanted if name not in reached]:
            raise ValueError(f"the forward pass did not reach the layers {', '.join(missed)}")
        penalties = [decorrelation(reached[n], kind=o.penalty, group_size=o.group_size, layer=n) for n in wanted]
        decor = torch.stack(penalties).mean()
    if o.lambda_c > 0:
        score = pixel_score(input_gradient(logits, x, y, retain_graph=True), o.score)
        x = x.detach()
        fill = replacement(x, o.fill, value=o.fill_value, generator=generator)
        with frozen_statistics(model):
            change = consistency(logits, model(masked(x, lowest(score, o.fraction), fill)), o.direction)
    return Terms(classification, change, decor, classification + o.lambda_c * change + o.lambda_d * decor)
