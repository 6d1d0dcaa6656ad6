"""Accuracy on masked images: what the model is shown, in which order, whatever the chunk."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from maps import seeded
from torch import Tensor, nn

from sdecor.measures import faithfulness
from sdecor.measures.faithfulness import perturbation_curve

masked_accuracy = partial(perturbation_curve, output="correct", own_order=True)


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
    run = partial(masked_accuracy, model, images, labels, score, fill=torch.tensor(-1.0))
    most = run(fractions=[0, 0.25, 0.5, 0.75, 1])
    assert most.T.tolist() == [[1, 1], [1, 0], [1, 0], [1, 0], [1, 0]]  # all replaced: argmax takes the first pixel
    assert [image[0].flatten().tolist() for image in torch.cat(model.seen)[:8:2]] == [
        [4, 3, 2, 1],
        [4, -1, 2, 1],
        [4, -1, 2, -1],
        [4, -1, -1, -1],
    ]
    model.seen.clear()
    assert run(fractions=[0.5], order="least").T.tolist() == [[0, 1]]
    assert [image[0].flatten().tolist() for image in model.seen[0]] == [[-1, 3, -1, 1], [1, -1, -1, 9]]


def test_masking_puts_the_replacement_there(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    fill = torch.randn(images.shape)
    inputs = [t.clone() for t in (images, labels, score, fill)]
    masked_accuracy(model, images, labels, score, fractions=[1 / 3], fill=fill)
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
    for s in (score, torch.ones_like(score)):
        run = partial(masked_accuracy, model, images, labels, s, fill=images * -1, fractions=[0.2, 0.6], order=order)
        results = [run(batch_size=n, generator=seeded(5)) for n in (1, 3, 7, 100)]
        assert results[0].shape == (7, 2)
        assert all(torch.equal(results[0], r) for r in results)


def test_equal_scores_come_in_random_order(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    count = 4000
    shuffle = torch.rand(count, 10, generator=seeded()).argsort(1)
    rank = faithfulness._places(torch.zeros(count, 10), "most", shuffle)
    assert (rank.sort(1).values == torch.arange(10)).all()
    share = (rank < 5).double().mean(0)  # each place comes first half of the time, within five standard errors
    assert ((share - 0.5).abs() < 5 * 0.5 / count**0.5).all()
    assert torch.equal(rank, faithfulness._places(torch.rand(count, 10), "random", shuffle))
    model, images, labels, _ = scene
    for own in (True, False):
        perturbation_curve(model, images, labels, torch.ones(7, 3, 3), fill=-images, fractions=[0.5], own_order=own)
        replaced = (model.seen.pop() < 0)[:, 0].flatten(1)
        assert (len(replaced.unique(dim=0)) > 1) == own


def test_masking_restores_the_model(scene: tuple[Brightest, Tensor, Tensor, Tensor]) -> None:
    model, images, labels, score = scene
    model.train()
    model.drop.eval()
    assert masked_accuracy(model, images, labels, score, fractions=[0.0], fill=images).eq(1).all()
    assert (model.training, model.drop.training, model.weight.requires_grad) == (True, False, True)
    for wrong, said in ((labels + 9, r"\d+\.\.\d+"), (labels - 9, r"-\d\.\.-\d")):
        with pytest.raises(ValueError, match=rf"^target must lie in 0\.\.8, got {said}$"):
            masked_accuracy(model, images, wrong, score, fractions=[0.0], fill=images)
    assert (model.training, model.drop.training) == (True, False)
