"""Masked accuracy: what the model is shown, in which order, whatever the chunk, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from maps import seeded
from torch import Tensor, nn

from sdecor.measures import _perturbation
from sdecor.measures.faithfulness import STEPS, masked_accuracy, perturbation_curve


class Brightest(nn.Module):
    """The class is the brightest pixel; notes every batch and its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        assert not torch.is_grad_enabled()
        logits: Tensor = self.drop(x.mean(1).flatten(1)) * self.weight
        return logits


@pytest.fixture
def scene() -> tuple[Brightest, Tensor, Tensor, Tensor]:
    """Images whose class is their brightest pixel, and the score that ranks pixels by brightness."""
    images = torch.rand(7, 2, 3, 3, generator=seeded()) + 0.1
    return Brightest(), images, images.mean(1).flatten(1).argmax(1), images.mean(1)


def test_masking_by_hand() -> None:
    model = Brightest()
    images = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]], [[[1.0, 2.0], [3.0, 9.0]]]])
    labels = torch.tensor([0, 3])
    score = torch.tensor([[[1.0, 9.0], [5.0, 7.0]], [[-1.0, -2.0], [-4.0, 8.0]]])
    most = masked_accuracy(model, images, labels, score, [0, 0.25, 0.5, 0.75, 1], torch.tensor(-1.0))
    assert most.tolist() == [[1, 1], [1, 0], [1, 0], [1, 0], [1, 0]]  # all replaced: argmax takes the first pixel
    assert [image[0].flatten().tolist() for image in torch.cat(model.seen)[:8:2]] == [
        [4, 3, 2, 1],
        [4, -1, 2, 1],
        [4, -1, 2, -1],
        [4, -1, -1, -1],
    ]
    model.seen.clear()
    least = masked_accuracy(model, images, labels, score, [0.5], torch.tensor(-1.0), order="least")
    assert least.tolist() == [[0, 1]]
    assert [image[0].flatten().tolist() for image in model.seen[0]] == [[-1, 3, -1, 1], [1, -1, -1, 9]]


def test_masking_puts_the_replacement_there(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    fill = torch.randn(images.shape)
    inputs = [t.clone() for t in (images, labels, score, fill)]
    masked_accuracy(model, images, labels, score, [1 / 3], fill)
    replaced = model.seen[0] != images
    assert torch.equal(model.seen[0], torch.where(replaced, fill, images))
    assert (replaced.sum((2, 3)) == 3).all()
    assert (replaced[:, 0] == replaced[:, 1]).all()
    highest = score.flatten(1).topk(3).indices
    assert replaced[:, 0].flatten(1).gather(1, highest).all()
    assert all(torch.equal(a, b) for a, b in zip(inputs, (images, labels, score, fill), strict=True))


@pytest.mark.parametrize("order", ["most", "least", "random"])
def test_masking_does_not_depend_on_the_chunk(order: str, scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    results = []
    for batch_size in (1, 3, 7, 100):
        for s in (score, torch.ones_like(score)):
            generator = seeded(5)
            out = masked_accuracy(
                model,
                images,
                labels,
                s,
                [0.2, 0.6],
                images * -1,
                order=order,
                batch_size=batch_size,
                generator=generator,
            )
            assert out.shape == (2, 7)
            results.append(out)
    assert all(torch.equal(results[0], r) for r in results[::2])
    assert all(torch.equal(results[1], r) for r in results[1::2])


def test_equal_scores_come_in_random_order() -> None:
    count = 4000
    shuffle = torch.rand(count, 10, generator=seeded()).argsort(1)
    rank = _perturbation.places(torch.zeros(count, 10), "most", shuffle)
    assert (rank.sort(1).values == torch.arange(10)).all()
    share = (rank < 5).double().mean(0)  # each place comes first half of the time, within five standard errors
    assert ((share - 0.5).abs() < 5 * 0.5 / count**0.5).all()
    assert torch.equal(rank, _perturbation.places(torch.rand(count, 10), "random", shuffle))


def test_accuracy_is_the_curve_of_correct_predictions(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    accuracy = masked_accuracy(model, images, labels, score, STEPS, images.flip(0))
    curve = perturbation_curve(model, images, labels, score, fill=images.flip(0), output="correct")
    assert torch.equal(accuracy, curve.T.float())


def test_masking_restores_the_model(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    model.train()
    model.drop.eval()
    out = masked_accuracy(model, images, labels, score, [0.0], images)
    assert out.eq(1).all()
    assert (model.training, model.drop.training, model.weight.requires_grad) == (True, False, True)
    with pytest.raises(ValueError, match="labels must lie"):
        masked_accuracy(model, images, labels + 5, score, [0.0], images)
    assert (model.training, model.drop.training) == (True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.ones(2, 3, 3)}, "images must have shape (B, C, H, W), got (2, 3, 3)"),
        ({"labels": torch.tensor([0, 0, 0])}, "labels must be 7 whole numbers, got shape (3,) of torch.int64"),
        ({"labels": torch.zeros(7)}, "labels must be 7 whole numbers, got shape (7,) of torch.float32"),
        ({"labels": torch.full((7,), 9)}, "labels must lie in 0..8, got 9..9"),
        ({"labels": torch.full((7,), -1)}, "labels must lie in 0..8, got -1..-1"),
        ({"score": torch.ones(7, 2, 3, 3)}, "score has shape (7, 2, 3, 3), these images need (7, 3, 3)"),
        ({"score": torch.full((7, 3, 3), math.nan)}, "score has NaN in 7 of 7 rows (the first is row 0)"),
        ({"fractions": [0.5, 1.5]}, "fractions must be from 0 to 1, got 1.5"),
        (
            {"replacement": torch.ones(3, 3, 3)},
            "replacement has shape (3, 3, 3), images (7, 2, 3, 3); it must broadcast to that",
        ),
        ({"order": "best"}, "unknown order 'best'; known: most, least, random"),
        ({"batch_size": 0}, "batch_size must be finite and at least 1, got 0"),
    ],
)
def test_bad_masking(changes: dict[str, object], message: str, scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    arguments = {"images": images, "labels": labels, "score": score, "fractions": [0.5], "replacement": images}
    with pytest.raises(ValueError) as caught:
        masked_accuracy(model, **(arguments | changes))
    assert str(caught.value) == message
