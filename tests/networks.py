"""What the tests of attribution share: small networks and images, settings that are quick, and captum as an oracle."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdecor.models import build
from sdecor.saliency import frozen_eval

F64 = torch.float64

# small settings, so that each method runs on every model
CHEAP: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 3},
    "integrated_gradients": {"steps": 3},
    "guided_ig": {"steps": 3},
    "occlusion": {"window": 6, "stride": 5},
    "rise": {"samples": 5},
    "feature_ablation": {"segments": 6},
    "kernel_shap": {"segments": 6, "samples": 60},
    "shapley_sampling": {"segments": 6, "samples": 2},
}


class Compiled(nn.Module):
    """Names its modules as `torch.compile` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._orig_mod(x)
        return result


class Counting(nn.Module):
    """A smooth classifier that counts its forward passes; batch norm and dropout tell the modes apart."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5 * 16, classes)
        self.calls = 0
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.broken:
            raise RuntimeError("broken on purpose")
        return self.head(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1))


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


def images(count: int, channels: int = 3, size: int = 16, dtype: torch.dtype = F64) -> Tensor:
    return F.avg_pool2d(torch.randn(count, channels, size, size, dtype=dtype), 3, 1, 1) * 2


def network(name: str = "cnn_bn", channels: int = 3, size: int = 16) -> nn.Module:
    """A classifier whose batch norms have been used."""
    torch.manual_seed(1)
    model = build(name, channels, 5, size).double()
    with torch.no_grad():
        for _ in range(3):
            model(images(8, channels, size))
    return model


def captum(name: str, model: nn.Module, /, *arguments: Any, **settings: Any) -> Tensor:
    with warnings.catch_warnings(), frozen_eval(model):
        warnings.simplefilter("ignore")
        import captum.attr

        kind = getattr(captum.attr, name)
        return kind(model, *settings.pop("made_with", ())).attribute(*arguments, **settings).detach()


def linear(size: int = 6, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * size * size, classes)).double()
