"""What a training step costs, as a multiple of a plain one: ``python tests/benchmarks/run.py [--rounds N --repeat N]``.

One process, one thread, CPU time, all candidates in turn in every round, medians over the rounds; so what else the
machine does disturbs the ratios little. How little, the repetitions of the whole show.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sdecor.config import Objective
from sdecor.data import load
from sdecor.evaluation import measure
from sdecor.images import ImageData
from sdecor.models import build
from sdecor.objective import layers_of, losses
from sdecor.registers import METHODS

Step = Callable[[], None]


def fresh(
    name: str, data: ImageData, layout: torch.memory_format = torch.channels_last
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build(name, data.channels, data.num_classes, data.image_size).to(memory_format=layout)
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch(data: ImageData) -> tuple[Tensor, Tensor]:
    """All of `data` as one batch in a new order: fetching it is part of a step."""
    return next(iter(data.batches(len(data), shuffle=True)))


def ours(name: str, data: ImageData, objective: Objective) -> Step:
    """A step as `sdecor.training.fit` takes it."""
    model, optimizer = fresh(name, data)
    parameters = list(model.parameters())
    layers = layers_of(model, objective, data.normalized(slice(1)))
    seen: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "layers": layers}

    def step() -> None:
        x, y = batch(data)
        x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        losses(model, x, y, objective, **seen)["total"].backward(inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def public(name: str, data: ImageData, layout: torch.memory_format, fraction: float = 0.5) -> Step:
    """A step with the structure of the public code of saliency-guided training (arXiv:2111.14338), in our words.

    The score comes from a forward and a backward pass of its own in evaluation mode, images are masked one by one in a
    Python loop with noise from NumPy, and the clean images ask for a gradient in the second pass too. Its tensors have
    torch's default layout; ours, `torch.channels_last`, is the better half of what we gain on a CPU.
    """
    model, optimizer = fresh(name, data, layout)
    count = int(fraction * data.images[0].numel())

    def step() -> None:
        x, y = batch(data)
        x.requires_grad_()
        model.eval()
        score = Saliency(model).attribute(x, y, abs=False).mean(1).detach().flatten(1)
        lowest = score.topk(count, dim=1, largest=False).indices
        masked = x.detach().clone().flatten(1)
        for i in range(len(masked)):
            low, high = masked[i].min().item(), masked[i].max().item()
            masked[i][lowest[i]] = torch.Tensor(np.random.uniform(low, high, len(lowest[i])))
        model.train()
        optimizer.zero_grad()
        clean, other = (log_softmax(model(images), 1) for images in (x, masked.view(x.shape)))
        loss = cross_entropy(clean, y) + kl_div(other, clean, reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()

    return step


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def profile(step: Step) -> str:
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(5):
            step()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)


RATIOS: tuple[tuple[str, Callable[[dict[str, float]], float], str], ...] = (
    ("SaliencyDecor / plain", lambda s: s["saliencydecor-absolute"] / s["standard"], "<= 2.9"),
    ("public code / SaliencyDecor", lambda s: s["public saliency-guided code"] / s["saliencydecor-absolute"], ">= 1.5"),
    ("the same in our memory layout", lambda s: s["the same in our layout"] / s["saliencydecor-absolute"], ""),
    ("whitening D(Z) / plain step", lambda s: s["decorrelation, zca"] / s["standard"] - 1, ""),
    (
        "whitening D(Z) / consistency",
        lambda s: s["saliencydecor-absolute, zca"] / s["consistency-absolute"] - 1,
        "<= 0.10",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3, help="measure everything so many times, for the spread")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--profile", action="store_true", help="show where a SaliencyDecor step spends its time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits").subset(given.batch_size)

    def method(name: str, **settings: str) -> Step:
        return ours(given.model, data, Objective(name, **settings))

    if given.profile:
        print(profile(method("saliencydecor-absolute")))
        return
    steps = {name: method(name) for name in METHODS}
    steps |= {f"{name}, zca": method(name, penalty="zca") for name in ("decorrelation", "saliencydecor-absolute")}
    steps["public saliency-guided code"] = public(given.model, data, torch.contiguous_format)
    steps["the same in our layout"] = public(given.model, data, torch.channels_last)
    all_seconds = [medians(steps, given.rounds) for _ in range(given.repeat)]
    rounds = f"{given.repeat} times {given.rounds} rounds"
    print(f"{given.model}, batch {len(data)}, {rounds}, one thread, torch {torch.__version__}")
    print(f"{'step':32s} {'ms':>7s} {'of plain':>9s}")
    for name in steps:
        milliseconds = 1e3 * statistics.median(seconds[name] for seconds in all_seconds)
        share = statistics.median(seconds[name] / seconds["standard"] for seconds in all_seconds)
        print(f"{name:32s} {milliseconds:7.2f} {share:9.2f}")
    print(f"{'ratio':32s} {'least':>7s} {'median':>9s} {'most':>7s}")
    for name, ratio, bound in RATIOS:
        found = [ratio(seconds) for seconds in all_seconds]
        spread = f"{min(found):7.2f} {statistics.median(found):9.2f} {max(found):7.2f}"
        print(f"{name:32s} {spread}" + f"  should be {bound}" * bool(bound))
    test = load("digits", split="test")
    model, _ = fresh(given.model, data)
    for thorough in (False, True):
        started = time.process_time()
        measure(model, test, thorough=thorough)
        spent = (time.process_time() - started) / len(test)
        what = "all that a run reports" if thorough else "measures of the map alone"
        print(f"{what:32s} {1e3 * spent:7.2f} ms an image")


if __name__ == "__main__":
    main()
