"""What the tests of measures share: maps to try them on, comparison, and Quantus as an oracle."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sdecor.saliency import frozen_eval, input_gradient, logits_and_gradient, pixel_score

Explain = Callable[[Tensor, Tensor], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: Tensor | float, b: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


def one_hot(side: int, *places: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(places), side * side).view(-1, side, side).float()


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    """Non-negative maps (B, H, W), none of them zero, many with ties and zeros."""
    shape = draw(st.tuples(*[st.integers(1, 3), st.integers(2, 5), st.integers(2, 5)]))
    values = draw(st.lists(st.integers(0, 20), min_size=math.prod(shape), max_size=math.prod(shape)))
    result = torch.tensor(values, dtype=torch.float32).view(shape)
    result[:, 0, 0] += 1
    return result


def spoiled(value: float) -> Tensor:
    a = torch.ones(4, 2, 2)
    a[2:, 0, 1] = value
    return a


BAD_MAPS = [
    (torch.ones(2, 2), "saliency must have shape (B, H, W), got (2, 2)"),
    (torch.ones(2, 3, 4, 4), "saliency must have shape (B, H, W), got (2, 3, 4, 4)"),
    (torch.ones(2, 0, 4), "saliency has no pixels: its shape is (2, 0, 4)"),
    (spoiled(math.nan), "saliency has NaN in 2 of 4 rows (the first is row 2)"),
    (spoiled(math.inf), "saliency has infinity in 2 of 4 rows (the first is row 2)"),
    (spoiled(-0.5), "saliency must be non-negative, its smallest value is -0.5; pass its absolute value"),
]


@cache
def scenes() -> dict[str, tuple[Tensor, Tensor]]:
    """Maps (B, 8, 8) and masks: random, with heavy ties, mostly zero, and gradients of a small trained network."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    x, mask = images[:60].clone().requires_grad_(), images[:60, 0] > 0.4
    with frozen_eval(model):
        logits = model(x)
        assert (logits.argmax(1) == labels[:60]).float().mean() > 0.9
        gradient = input_gradient(logits, x, labels[:60])[:, 0].detach()
    random = torch.rand(60, 8, 8, generator=generator)
    return {
        "random": (random, mask),
        "ties": ((random * 4).floor() + 1, mask),
        "zeros": ((random - 0.9).clamp(min=0) + (random == random.amax((1, 2), keepdim=True)), mask),
        "gradients": (gradient.abs(), mask),
    }


@cache
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that knows the digits, and 40 of them that it gets right."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    right = model.eval()(images).argmax(1) == labels
    assert right.float().mean() > 0.97
    return model, images[right][:40], labels[right][:40]


def gradient_map(model: nn.Module) -> Explain:
    return lambda x, t: pixel_score(logits_and_gradient(model, x, t)[1])


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


def quantus_scores(metric: str, attribution: Tensor, mask: Tensor | None = None, **options: Any) -> np.ndarray:
    """What Quantus says about maps (B, H, W), as they are; of its arrays it gets copies, as it writes into them."""
    quantus = pytest.importorskip("quantus", reason="Quantus does not import here", exc_type=ImportError)
    a = attribution[:, None].double().numpy().copy()
    call = {"model": nn.Flatten(), "x_batch": np.zeros_like(a), "y_batch": np.zeros(len(a), int), "a_batch": a}
    if mask is not None:
        call["s_batch"] = mask[:, None].numpy().copy()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        options = {"normalise": False, "abs": False, "disable_warnings": True, "display_progressbar": False} | options
        return np.array(getattr(quantus, metric)(**options)(**call, device="cpu"), dtype=float)
