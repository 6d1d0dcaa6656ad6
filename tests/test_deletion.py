"""Fair deletion: what patches are deleted, what the curves are worth, and that all else stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdecor.baselines import deleted_classification, patch_grid
from sdecor.config import Run, Schedule
from sdecor.data import load
from sdecor.deletion import deletion_curves, deletion_scores, tuned
from sdecor.evaluation import measure
from sdecor.images import ImageData
from sdecor.models import build
from sdecor.objective import Step
from sdecor.training import fit


class Corner(nn.Module):
    """Two classes by the sign of the first patch, 2 x 2; all else is without effect."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x[:, 0, :2, :2].sum((1, 2))
        return torch.stack([-seen, seen], 1)


def corners(count: int = 50) -> ImageData:
    labels = torch.arange(count) % 2
    images = torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, :, :2, :2] = (labels * 255).to(torch.uint8)[:, None, None, None]
    return ImageData.from_tensors(images, labels)


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(64, 64, 8), (28, 28, 7), (32, 48, 8), (30, 30, 6), (31, 31, 8), (62, 62, 8), (7, 5, 5)],
)
def test_patches_divide_the_image_or_nearly_so(height: int, width: int, count: int) -> None:
    assert patch_grid(torch.zeros(1, 1, height, width)) == count


@pytest.mark.parametrize("side", [30, 31, 32])
def test_no_side_makes_one_patch_of_an_image(side: int) -> None:
    """With 31 pixels, which nothing divides, the area was 0: the one patch was the whole image."""
    labels = torch.arange(40) % 2
    images = torch.zeros(40, 1, side, side, dtype=torch.uint8)
    images[:, :, :2, :2] = (labels * 255).to(torch.uint8)[:, None, None, None]
    curves, _ = deletion_curves(Corner(), ImageData.from_tensors(images, labels))
    assert curves["least"].mean(0)[:-1].eq(1).all() and curves["most"].mean(0)[1:].eq(0.5).all()


def test_the_curves_find_the_one_patch_that_counts() -> None:
    curves, maps = deletion_curves(Corner(), corners(), batch_size=20)
    most, least, random = (curves[name].mean(0) for name in ("most", "least", "random"))
    assert most[0] == least[0] == 1 and most[1:].eq(0.5).all()  # a tie of logits is class 0, half of the images
    assert least[:-1].eq(1).all() and least[-1] == 0.5
    assert (random[1:-1] > 0.5).all() and (random[1:-1] < 1).all()
    assert maps.shape == (50, 16, 16) and maps[:, 2:].eq(0).all()


def test_training_deletes_whole_patches_with_a_share_of_its_own_for_each_image() -> None:
    seen: list[torch.Tensor] = []

    class Eye(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)[:, :2]

    x = torch.rand(400, 3, 16, 16) + 1
    step = Step(Eye(), x, torch.zeros(400, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    loss = deleted_classification(step)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(seen[0].flatten(1)[:, :2], step.target))
    gone = seen[0] == 0
    assert torch.equal(seen[0][~gone], x[~gone])
    patches = gone.view(400, 3, 8, 2, 8, 2)
    assert (patches == patches[:, :1, :, :1, :, :1]).all()
    share = patches[:, 0, :, 0, :, 0].double().mean((1, 2))
    # of 64 patches with a share u, uniform: mean 1/2, variance 1/12 + E[u (1 - u)] / 64
    assert float(share.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(share.var()) == pytest.approx(1 / 12 + 1 / 6 / 64, abs=0.015)


def test_a_tuned_copy_stands_deletions_better_and_the_network_stays() -> None:
    train, test = load("shapes", limit=400), load("shapes", split="test", limit=200)
    run = Run.of(data="shapes", model="cnn_small", epochs=6, batch_size=40, lr=3e-3, tuning_epochs=6)
    model = build("cnn_small", 3, 8, 32)
    fit(model, train, run.objective, run.schedule, progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert run.tuning == Schedule(epochs=6, batch_size=40, lr=3e-3 / 10)
    metrics, curves = deletion_scores(model, train, test, run.tuning)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(metrics) == {
        *("deletion_area", "fair_deletion_area", "tuned_accuracy", "tuned_gini", "tuned_similarity"),
        "tuned_relevance_mass",
    }
    assert set(curves) == {f"{p}deletion_{order}" for p in ("", "fair_") for order in ("most", "least", "random")}
    assert sum(curves["fair_deletion_random"]) > sum(curves["deletion_random"])
    area = sum((a + b - c - d) / 20 for a, b, c, d in zip(*[
        curves["deletion_least"][:-1], curves["deletion_least"][1:],
        curves["deletion_most"][:-1], curves["deletion_most"][1:],
    ], strict=True))  # fmt: skip
    assert metrics["deletion_area"] == pytest.approx(area)
    again = tuned(model, train, run.tuning)
    assert not again.training and again is not model
    first, second = (dict(tuned(model, train, run.tuning).state_dict()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole, drawn = measure(model, test, metrics=(), train=train, tuning=run.tuning)
    assert metrics.items() <= whole.items() and curves.items() <= drawn.items()


def test_without_epochs_there_is_no_tuning() -> None:
    assert Run.of(data="shapes").tuning is None
    assert (
        "deletion_area" not in measure(build("lenet", 3, 8, 32), load("shapes", split="test", limit=9), metrics=())[0]
    )
