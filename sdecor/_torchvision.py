"""Lets torchvision be imported beside a torch that its compiled part was not built for.

The Linux wheel of torchvision on the Python package index is built for CUDA. Beside a CPU-only torch its C++ extension
does not load, so the operators ``torchvision::nms`` and ``torchvision::qnms`` do not exist, and ``import torchvision``
fails where it registers their shapes, though data sets, transforms and models need neither. Declaring both mends the
import. Where the extension does load, nothing is declared and the real operators stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[object] = []  # torch forgets an operator together with the Library object that declared it


def declare_missing_operators(folder: Path) -> None:
    """Declare the operators that the extension in torchvision's `folder` fails to provide, found out as it does."""
    import torch

    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _SCHEMAS[name])
        _declared.append(library)


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing: it acts when torchvision is looked for, so that ``import sdecor`` alone imports no torch."""

    done = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Declare what is missing the first time that torchvision is about to be imported."""
        if name == "torchvision" and not self.done:
            self.done = True
            found = PathFinder.find_spec(name)
            if found is not None and found.origin is not None:
                declare_missing_operators(Path(found.origin).parent)
        return None


def install() -> None:
    """Arrange it, once, on the only system whose torchvision wheels have this trouble."""
    if sys.platform == "linux" and not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
