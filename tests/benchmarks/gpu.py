"""What training costs on a GPU: ``python tests/benchmarks/gpu.py [--device cpu] [--methods NAMES] [--widths 32,64]``.

For ResNet-18 on 32 px images, every method and width: images a second as `sdecor.training.fit` takes them, data and
augmentation included, eager and from a CUDA graph; the ratio to standard training (by count of passes at least 2.33 for
SaliencyDecor: 3 for a plain step, and 1 forward, 1 backward to the images and 2 backward for the masked ones more); the
share of the card's bf16 peak that the arithmetic takes; the time in kernels against the wall time; and whether graph
and eager agree. Without a GPU it runs small sizes, to show that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sdecor.config import Run
from sdecor.images import ImageData
from sdecor.objective import losses
from sdecor.registers import METHODS
from sdecor.store import network
from sdecor.training import device_of, fit

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, from the vendor's data sheets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", default="standard,saliencydecor-absolute")
    parser.add_argument("--widths", default="32,64")
    parser.add_argument("--batch-size", type=int, default=0, help="512 on a GPU, 32 without")
    parser.add_argument("--steps", type=int, default=0, help="an epoch; 30 on a GPU, 2 without")
    parser.add_argument("--csv", default="", help="file for the rows, as `data/gpu.csv` has them")
    return parser.parse_args()


class Products(TorchDispatchMode):
    """Counts the operations of convolutions and matrix products; torch's own counter refuses `autograd.grad`."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.number += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Run, data: ImageData, count: int = 32) -> float:
    """Multiply-adds times two of one training step, an image, counted on the CPU."""
    model, x = network(run, SHAPE), data.normalized(slice(0, count))
    with Products() as products:
        losses(model, x, data.labels[:count], run.objective)["total"].backward(inputs=list(model.parameters()))
    return products.number / count


SHAPE = {"channels": 3, "num_classes": 10, "image_size": 32}


def course(run: Run, data: ImageData, device: str, **how: Any) -> tuple[float, list[float]]:
    """Seconds a step in the best epoch after the first, and the loss of each epoch."""
    torch.manual_seed(0)
    history = fit(network(run, SHAPE), data, run.objective, run.schedule, device=device, progress=False, **how)
    steps = len(data) // run.schedule.batch_size
    return min(history.seconds[1:]) / steps, history.terms["total"]


def kernels(run: Run, data: ImageData, device: str, **how: Any) -> float:
    """Seconds in kernels, a step, of three epochs under the profiler."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        course(run, data, device, **how)
    spent = sum(e.time_range.elapsed_us() for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return spent / 1e6 / (len(data) // run.schedule.batch_size * run.schedule.epochs)


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a reader wants it."""
    shares = {"share of peak, %": row.get("share_of_peak"), "in kernels, %": row.get("in_kernels")}
    return {
        "width": row["width"],
        "method": METHODS[row["method"]].title,
        "images a second": row.get("images_per_second"),
        "step, ms": row.get("milliseconds"),
        "without graph, ms": row.get("eager_milliseconds"),
        "time of standard": row.get("ratio"),
        **{name: None if share is None else round(100 * share, 1) for name, share in shares.items()},
    }


def main() -> None:
    given = arguments()
    device = device_of(given.device)
    gpu = device.type == "cuda"
    batch, steps = given.batch_size or (512 if gpu else 32), given.steps or (30 if gpu else 2)
    widths = [int(w) for w in given.widths.split(",")] if gpu else [8]
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch * steps, 3, 32, 32), generator=draw, dtype=torch.uint8)
    data = ImageData.from_tensors(images, torch.randint(10, (batch * steps,), generator=draw))
    name = torch.cuda.get_device_name(device) if gpu else "CPU"
    peak = next((value for card, value in PEAK.items() if card in name), float("nan"))
    print(f"{name}, torch {torch.__version__}, batch {batch}")
    rows, plain = [], {}
    methods = list(METHODS) if given.methods == "all" else given.methods.split(",")
    for width in widths:
        for method in methods:
            run = Run.of(
                **dict(method=method, model="resnet18", model_options={"width": width}, epochs=3, batch_size=batch),
                **dict(optimizer="sgd", lr=0.05, augment=("flip", "crop"), shape="one-cycle"),
            )
            row: dict[str, Any] = {"width": width, "method": method}
            try:
                started = time.perf_counter()
                seconds, curve = course(run, data, str(device), amp=gpu)
                row |= {"images_per_second": round(batch / seconds), "milliseconds": round(1000 * seconds, 2)}
                if gpu:
                    eager, same = course(run, data, str(device), amp=True, graph=False)
                    row["eager_milliseconds"] = round(1000 * eager, 2)
                    row["largest_difference"] = max(abs(a - b) / abs(b) for a, b in zip(curve, same, strict=True))
                    if method in ("standard", "saliencydecor-absolute"):
                        busy = kernels(run, data, str(device), amp=True)
                        row["in_kernels"] = round(busy / seconds, 3)
                plain.setdefault(width, seconds)
                row["ratio"] = round(seconds / plain[width], 2)
                row["share_of_peak"] = round(flops(run, data) * batch / seconds / peak, 3) if gpu else None
                row["took"] = round(time.perf_counter() - started, 1)
            except Exception as error:  # one method that fails must not hide what the others cost
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)
            rows.append(row)
    if given.csv:
        pd.DataFrame([columns(row) for row in rows]).to_csv(given.csv, index=False)
    if ratios := [row["ratio"] for row in rows if row["method"] == "saliencydecor-absolute" and "ratio" in row]:
        print(f"SaliencyDecor takes {statistics.median(ratios):.2f} times the time of standard training (floor 2.33)")


if __name__ == "__main__":
    main()
