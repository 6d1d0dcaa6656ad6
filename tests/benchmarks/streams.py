"""What a folder of images costs that is streamed: ``python tests/benchmarks/streams.py [--images N --side S]``.

It makes a folder of so many JPEG files (500 x 375 pixels, 20 classes; every file is another image, of smooth noise with
some grain, about as large as a photograph) and streams it whole, to a consumer that does nothing, with so many workers;
then a part of it, also by threads of this process. The memory is that of this process and its workers, beside what all
images would take. Then `sdecor.pace` says for some networks whether reading or the step is slower. The folder goes when
this ends.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdecor.data import load
from sdecor.images import ImageStream
from sdecor.pace import Peak, described, measured

CLASSES, WIDTH, HEIGHT = 20, 500, 375


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=224, help="pixels to which they are brought")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--models", default="cnn_small,resnet18")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the pace of each model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to put it")
    return parser.parse_args()


def picture(i: int) -> bytes:
    """A JPEG file: noise of low resolution, enlarged, and a little of the finest."""
    draw = np.random.default_rng(i)
    smooth = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    grain = draw.integers(-24, 25, (HEIGHT, WIDTH, 1), np.int16)
    file = io.BytesIO()
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write(root: Path, split: str, i: int) -> int:
    content = picture(i)
    path = root / split / f"class{i % CLASSES:02}" / f"{i:06}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(content)


def made(root: Path, count: int, workers: int) -> int:
    """Bytes of the folder: so many training images, and one of each class to validate on."""
    with ProcessPoolExecutor(max(workers, 1)) as pool:
        train = pool.map(partial(write, root, "train"), range(count), chunksize=64)
        return sum(train) + sum(pool.map(partial(write, root, "val"), range(count, count + CLASSES)))


def epoch(data: ImageStream, batch_size: int) -> float:
    """Images a second."""
    started, count = time.perf_counter(), 0
    for x, _ in data.batches(batch_size, shuffle=True, generator=torch.Generator().manual_seed(0)):
        count += len(x)
    assert count == len(data)
    return count / (time.perf_counter() - started)


def main() -> None:
    given = arguments()
    root = Path(tempfile.mkdtemp(prefix="sdecor-streams-", dir=given.folder))
    try:
        started = time.perf_counter()
        size = made(root, given.images, given.workers)
        each = size / (given.images + CLASSES) / 1e3
        print(f"{given.images} images of {each:.0f} kB written in {time.perf_counter() - started:.0f} seconds")
        options = {"memory_limit": 0, "workers": given.workers}
        started = time.perf_counter()
        with Peak(torch.device("cpu")) as loading:
            data = load(f"folder:{root}", image_size=given.side, **options)
        assert isinstance(data, ImageStream)
        print(f"loaded in {time.perf_counter() - started:.1f} seconds, {loading.memory / 1e9:.2f} GB at most")
        with Peak(torch.device("cpu")) as peak:
            several = epoch(data, given.batch_size)
        whole = len(data) * 3 * given.side**2 / 1e9
        print(f"an epoch of {len(data)}: {several:.0f} images a second, {given.workers} workers")
        print(f"memory: {peak.memory / 1e9:.2f} GB at most, all images would take {whole:.2f} GB")
        few = data.subset(min(len(data), 8 * given.batch_size))
        with Peak(torch.device("cpu")) as peak:
            some = epoch(few, given.batch_size)
        print(f"memory: {peak.memory / 1e9:.2f} GB at most in an epoch of {len(few)}")
        print(f"{some / epoch(replace(few, workers=0), given.batch_size):.2f} times as fast as threads of this process")
        for model in given.models.split(","):
            run = described(
                data=f"folder:{root}", data_options={**options, "image_size": given.side}, model=model,
                batch_size=given.batch_size, epochs=10, augment=("flip", "crop"),
            )  # fmt: skip
            print(f"\n{model}\n{measured(run, device=given.device, seconds=given.seconds)}", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
