"""What the child processes of test_experiment.py run; a module of its own, since a child imports it by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sdecor.config import Run
from sdecor.experiment import grid
from sdecor.models import build
from sdecor.store import Store


def die_before(operation: int, runs: list[Run], store: Store) -> None:
    """Do `runs`, but kill -9 this process before it syncs, renames or removes a file for the `operation`-th time.

    A file that is about to be synced is cut in half first, as if the kill had come in the middle of writing.
    """
    left = operation

    def deadly(function: Callable[..., Any], *, cut: bool = False) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if cut:
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    os.fsync = deadly(os.fsync, cut=True)
    Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
    Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
    grid(runs, store, threads=1, progress=False)


def help_out(runs: list[Run], store: Store, builds: Path) -> None:
    """Do `runs` together with others; `builds` says where `counted` leaves its lines."""
    os.environ["SDECOR_TEST_BUILDS"] = str(builds)
    grid(runs, store, threads=1, progress=False)


def counted(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """LeNet; leaves a line whenever one is built, that is, whenever a run is begun."""
    with Path(os.environ["SDECOR_TEST_BUILDS"]).open("a") as f:
        f.write(f"{os.getpid()}\n")
    return build("lenet", in_channels, num_classes, image_size)


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, num_classes)
        self.second = nn.Linear(features, num_classes)
        self.second.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        return self.first(x.flatten(1)) + self.second(x.flatten(1))


def tied(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """A model that shares a weight between layers."""
    return Tied(num_classes, in_channels * image_size**2)
