"""Cost of measures beside bare forward passes and beside Quantus: ``python tests/benchmarks/measures.py [--rounds N]``.

Timed as in `run.py` beside it. Both sides do the same work, in batches of the same size, which is checked by their
results before anything is timed. Then the seconds, on two threads, of every measure there is for the gradient of one
LeNet on 1,000 test images of MNIST, or of digits where MNIST is not.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import quantus
import torch
from run import Step, fresh, medians
from torch import Tensor

from sdecor.config import Objective, Schedule
from sdecor.data import load
from sdecor.measures.case import Case, evaluate
from sdecor.measures.faithfulness import perturbation_curve
from sdecor.measures.localization import auroc, pointing_game, relevance_mass, relevance_rank
from sdecor.registers import MEASURES
from sdecor.saliency import frozen_eval, logits_and_gradient
from sdecor.sources import available
from sdecor.training import fit

FILL = 0.123  # the value of no pixel: Quantus warns of replacements that change nothing, and that would take time
SHARED = ("deletion", "max_sensitivity")  # the first that asks for the curves, and for the maps of noisy images
PLAIN = {"normalise": False, "abs": False, "disable_warnings": True, "display_progressbar": False}


def same(name: str, ours: Tensor, theirs: object) -> None:
    """Stop unless both sides found the same."""
    difference = np.abs(ours.numpy() - np.asarray(theirs, dtype=float)).max()
    if not difference < 1e-5:
        raise SystemExit(f"{name}: the results differ by up to {difference:.2g}, so the times cannot be compared")


def faithfulness_steps(count: int) -> dict[str, Step]:
    """Curves of `count` digits, ours and Quantus', and forward passes of as many rows."""
    data = load("digits").subset(count)
    model, _ = fresh("lenet", data)
    images, target = next(iter(data.batches(count)))
    score = torch.rand(count, *images.shape[2:], generator=torch.Generator().manual_seed(0))
    model.eval()
    arrays = {"x_batch": images.numpy(), "y_batch": target.numpy(), "a_batch": score[:, None].numpy()}

    def ours(fractions: list[float], patch: int = 1) -> Tensor:
        return perturbation_curve(
            model,
            images,
            target,
            score,
            fill="constant",
            fill_value=FILL,
            fractions=fractions,
            patch=patch,
            batch_size=count,
        )

    def forward(passes: int) -> Step:
        def step() -> None:
            with frozen_eval(model), torch.no_grad():
                for _ in range(passes):
                    model(images)

        return step

    pixels, patch, regions = score[0].numel(), 4, 16
    eighths = [i / 8 for i in range(1, 9)]
    patches = [i * patch**2 / pixels for i in range(regions + 1)]
    flipping = quantus.PixelFlipping(features_in_step=pixels // 8, perturb_baseline=FILL, **PLAIN)
    perturbation = quantus.RegionPerturbation(
        patch_size=patch, regions_evaluation=regions, perturb_baseline=FILL, **PLAIN
    )

    def theirs(metric: quantus.PixelFlipping | quantus.RegionPerturbation) -> list[list[float]]:
        return metric(model=model, batch_size=count, softmax=True, **arrays)

    same("pixels", ours(eighths), theirs(flipping))
    curve = ours(patches, patch)
    same("patches", curve[:, :1] - curve[:, 1:], theirs(perturbation))
    return {
        "pixels, forward": forward(len(eighths)),
        "pixels, ours": lambda: ours(eighths),
        "pixels, Quantus": lambda: theirs(flipping),
        "patches, forward": forward(len(patches)),
        "patches, ours": lambda: ours(patches, patch),
        "patches, Quantus": lambda: theirs(perturbation),
    }


def localization_steps(count: int, side: int = 28) -> dict[str, Step]:
    """Localization of `count` maps on random rectangles, ours and Quantus'."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(count, side, side, generator=generator)
    low, high = torch.randint(1, side, (2, 2, count, 1), generator=generator).sort(0).values
    place = torch.arange(side)
    rows, columns = (low <= place) & (place <= high)
    masks = rows[:, :, None] & columns[:, None]
    arrays = {"x_batch": maps[:, None].numpy(), "a_batch": maps[:, None].numpy(), "s_batch": masks[:, None].numpy()}
    pairs = {
        "relevance_mass": (relevance_mass, quantus.RelevanceMassAccuracy(**PLAIN)),
        "relevance_rank": (relevance_rank, quantus.RelevanceRankAccuracy(**PLAIN)),
        "pointing_game": (pointing_game, quantus.PointingGame(**PLAIN)),
        "auroc": (auroc, quantus.AUC(**PLAIN)),
    }
    steps: dict[str, Step] = {}
    for name, (measure, metric) in pairs.items():

        def ours(measure=measure) -> Tensor:
            return measure(maps, masks)

        def theirs(metric=metric) -> list[float]:
            return metric(model=None, y_batch=np.zeros(count, dtype=int), batch_size=count, **arrays)

        same(name, ours(), theirs())
        steps |= {f"{name}, ours": ours, f"{name}, Quantus": theirs}
    return steps


def full_table(root: str | None, count: int) -> None:
    """Print the seconds of every measure for the gradient maps of `count` test images."""
    name = "mnist" if any(s.name == "mnist" and s.present for s in available(root)) else "digits"
    train, test = (load(name, root, split) for split in ("train", "test"))
    model, _ = fresh("lenet", train)
    fit(model, train.subset(5000), Objective("standard"), Schedule(epochs=2), seed=0, progress=False)
    test = test.subset(torch.arange(count) % len(test))
    images = test.normalized()
    logits, gradient = logits_and_gradient(model, images)
    case = Case(
        attribution=gradient,
        mask=test.object_masks,
        model=model,
        images=images,
        target=logits.argmax(1),
        explain=lambda net, images, target: logits_and_gradient(net, images, target)[1],
    )
    seconds = {}
    for metric in MEASURES:
        started = time.perf_counter()
        evaluate(case, [metric])
        seconds[metric] = time.perf_counter() - started
    repeated = "" if name == "mnist" else ", each taken several times: MNIST is not here"
    what = f"all {len(MEASURES)} measures of {count} gradient maps of {name}{repeated}"
    print(f"{what}, {torch.get_num_threads()} threads: {sum(seconds.values()):.1f} s (should be < 60)")
    for metric in sorted(seconds, key=lambda metric: -seconds[metric])[:5]:
        print(f"  {metric:24s} {seconds[metric]:6.1f} s{', with what others share' if metric in SHARED else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--table", type=int, default=1000, help="test images on which every measure is timed")
    parser.add_argument("--data-root", help="where MNIST may lie; by default $SDECOR_DATA or a folder of your cache")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Quantus
        seconds = medians(faithfulness_steps(given.images) | localization_steps(given.maps), given.rounds)
    print(
        f"curves of {given.images} digits by a lenet, localization of {given.maps} maps, {given.rounds} rounds, one "
        f"thread, torch {torch.__version__}, quantus {quantus.__version__}"
    )
    print(f"{'work':16s} {'forward ms':>10s} {'ours ms':>10s} {'Quantus ms':>10s}   ratios")
    for name in dict.fromkeys(step.split(",")[0] for step in seconds):
        forward, ours, theirs = (seconds.get(f"{name}, {side}") for side in ("forward", "ours", "Quantus"))
        bare = f"{1e3 * forward:10.1f}" if forward else f"{'':10s}"
        ratio = f"ours / forward {ours / forward:.2f} (should be <= 1.4), " if forward else ""
        bound = 1.8 if forward else 10
        print(
            f"{name:16s} {bare} {1e3 * ours:10.2f} {1e3 * theirs:10.1f}   "
            f"{ratio}Quantus / ours {theirs / ours:.2f} (should be >= {bound})"
        )
    torch.set_num_threads(2)
    full_table(given.data_root, given.table)


if __name__ == "__main__":
    main()
