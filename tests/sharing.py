"""What the processes of test_processes.py run: steps of training, each with its part of a batch.

``torchrun tests/sharing.py FOLDER`` leaves there, for every process and case, what one process leaves with the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import sdecor.images
from sdecor import processes
from sdecor.config import Objective, Schedule
from sdecor.data import load
from sdecor.models import build
from sdecor.objective import capture, layers_of, losses
from sdecor.processes import average, joined, mean, mine, rank, together
from sdecor.registers import METHODS, PENALTIES
from sdecor.training import evaluate, fit
from sdecor.whitening import METHODS as WHITENINGS
from sdecor.whitening import GroupWhitening

BATCH, CLASSES, SIDE = 8, 4, 12


class Net(nn.Module):
    """Norms of three kinds and dropout of two, a convolution and a linear layer to decorrelate."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum)
        self.bn2, self.conv2 = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.drop2d, self.pool = nn.Dropout2d(0.25), nn.AdaptiveAvgPool2d(2)
        self.fc1, self.bn3, self.drop = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.25)
        self.tanh, self.relu, self.softplus, self.fc2 = nn.Tanh(), nn.ReLU(), nn.Softplus(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.tanh(self.bn1(self.conv1(x))))
        x = self.pool(self.drop2d(self.relu(self.norm(self.conv2(x)))))
        x = self.drop(self.softplus(self.bn3(self.fc1(x.flatten(1)))))
        result: Tensor = self.fc2(x)
        return result


def whitening(method: Any) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), GroupWhitening(8, 4, method=method), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def step(net: Callable[[], nn.Module], objective: Objective, method: str, kind: torch.dtype) -> dict[str, Tensor]:
    """Two steps of descent: terms and gradients of both, and what the network holds at the end."""
    torch.manual_seed(1)
    model = net().train()
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES
    x[: BATCH // 2] *= 1 + torch.rand(BATCH // 2, 1, 1, 1)  # so that the halves differ in range and moments
    if change := METHODS[method].network:
        model = change(model, x[:1])
    layers = layers_of(model, objective, x[:1])
    model, x = model.to(kind), x.to(kind)
    parameters, out = [*model.parameters()], {}
    noise = torch.Generator().manual_seed(3)
    with capture(model, layers) as features, together():
        x, y = mine(x), mine(y)
        for number in range(2):
            model.zero_grad()
            terms = losses(model, x, y, objective, generator=noise, features=features, layers=layers)
            terms["total"].backward(inputs=parameters)
            average(p.grad for p in parameters if p.grad is not None)
            out |= {f"{number} {name}": mean(value.detach()) for name, value in terms.items()}
            out |= {f"{number} {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            with torch.no_grad():
                for p in parameters:
                    p -= 0.05 * (0 if p.grad is None else p.grad)
    return out | {name: value.clone() for name, value in model.state_dict().items()}


def cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def case(net: Callable[[], nn.Module], method: str, kind: torch.dtype, **settings: Any) -> Callable[[], Any]:
        return lambda: step(net, Objective(method, **settings), method, kind)

    found = {f"{method} float64": case(Net, method, torch.float64) for method in METHODS}
    found |= {f"{m} float32": case(Net, m, torch.float32) for m in ("saliencydecor-absolute", "gradient-penalty")}
    for name in PENALTIES:
        for size in (4, None):
            key = f"penalty {name}, groups of {size}"
            found[key] = case(Net, "decorrelation", torch.float64, penalty=name, group_size=size)
    for name in WHITENINGS:
        found[f"layer {name}"] = case(lambda name=name: whitening(name), "consistency-absolute", torch.float64)
    found["cumulative averages"] = case(lambda: Net(None), "noise", torch.float64)
    return found


def training(folder: Path) -> dict[str, Tensor]:
    """What `fit` makes of a network, and of its history, and which of the image files in a folder were decoded here.

    In float64, and on images of noise: where the score of pixels ties but for rounding, as it does in black borders,
    rounding decides which are masked.
    """
    images, held_out = (load(str(folder / "images"), split=s, memory_limit=1, workers=0) for s in ("train", "val"))
    model = build("cnn_bn", 3, images.num_classes, 16)
    model = model.double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    seen, decode, kind = [], sdecor.images._decode, type(images)
    normalize = kind._normalize

    def noted(paths: Sequence[str], *rest: Any, **how: Any) -> Any:
        seen.extend(int(Path(path).stem) for path in paths)
        return decode(paths, *rest, **how)

    sdecor.images._decode = noted
    kind._normalize = lambda self, images, *layout: normalize(self, images, *layout).double()
    plan = Schedule(epochs=2, batch_size=8, lr=0.01, clip=1.0, augment=("flip",))
    history = fit(model, images, Objective(), plan, seed=5, validation=held_out)
    curves = {**history.terms, "accuracy": history.validation_accuracy}
    out = {name: torch.tensor(values, dtype=torch.float64) for name, values in curves.items()}
    with together():
        judged = evaluate(model, held_out, batch_size=2)  # the last batch of five has no part for one of them
    sdecor.images._decode, kind._normalize = decode, normalize
    judgement = torch.tensor([*judged.values()], dtype=torch.float64)
    return {**out, "decoded": torch.tensor(seen), "judgement": judgement, **model.state_dict()}


def batches(folder: Path) -> dict[str, Tensor]:
    """The images of an epoch, as this process gets them, from memory and from files."""
    out = {}
    for name, limit in (("memory", 2 << 30), ("files", 1)):
        data, order = load(str(folder / "images"), memory_limit=limit, workers=0), torch.Generator().manual_seed(4)
        how: dict[str, Any] = {"shuffle": True, "generator": order, "augment": ("crop", "flip", "cutout")}
        with together():
            for i, (x, y) in enumerate(data.batches(10, drop_last=True, **how)):
                out |= {f"{name} images {i}": x, f"{name} labels {i}": y}
    return out


def main(folder: Path) -> None:
    with joined("cpu"):
        assert processes.number() == 2
        made = {**cases(), "training": lambda: training(folder), "batches": lambda: batches(folder)}
        for name, make in made.items():
            safetensors.torch.save_file(make(), folder / f"{name} {rank()}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
