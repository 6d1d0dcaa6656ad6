"""Small images, files and messages that several tests share."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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


def boxed(root: Path, train: int = 24, test: int = 10, side: int = 28) -> Path:
    """A folder of noise in colour, in three classes, with a box in every image, which its boxes.csv names."""
    draw = np.random.default_rng(0)
    rows = ["file,x0,y0,x1,y1"]
    for split, count in (("train", train), ("val", 4), ("test", test)):
        for i in range(count):
            name = f"{split}/{'abc'[i % 3]}/{i:02}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            pixels, box = draw.integers(0, 256, (side, side, 3), np.uint8), draw.integers(0, side // 2, 2)
            pixels[box[1] : box[1] + 9, box[0] : box[0] + 9, i % 3] = 255
            Image.fromarray(pixels).save(root / name)
            rows.append(f"{name},{box[0]},{box[1]},{box[0] + 8},{box[1] + 8}")
    (root / "boxes.csv").write_text("\n".join(rows))
    return root
