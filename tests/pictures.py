"""Small images, files and messages that several tests share."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sdecor.data import MNIST, ImageData


def exactly(message: object) -> str:
    return f"^{re.escape(str(message))}$"


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(n: int = 10, channels: int = 3, size: int = 16) -> ImageData:
    pixels = torch.randint(256, (n, channels, size, size), generator=generator(), dtype=torch.uint8)
    return ImageData.from_tensors(pixels, torch.arange(n) % 5)


def fake_mnist(root: Path) -> Path:
    """Files of the right size and magic number, all zero behind the header."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, (magic, size, _) in MNIST.items():
        images_ = magic == 0x803
        items = (size - 16) // 784 if images_ else size - 8
        head = b"".join(v.to_bytes(4, "big") for v in ((magic, items, 28, 28) if images_ else (magic, items)))
        with (raw / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
    return raw
