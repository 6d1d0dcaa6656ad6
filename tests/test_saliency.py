"""The input gradient against captum and finite differences; the model as it was before; scores of pixels."""

from __future__ import annotations

import doctest
import warnings

import pytest
import torch
from networks import F64, Counting, flags
from torch import Tensor, nn

import sdecor.saliency
from sdecor.models import build
from sdecor.registers import SCORES
from sdecor.saliency import frozen_eval, input_gradient, logits_and_gradient, pixel_score
from sdecor.whitening import whiten


def test_docstrings() -> None:
    assert doctest.testmod(sdecor.saliency).failed == 0


@pytest.mark.parametrize("name", ["lenet", "cnn_bn"])
def test_equals_captum(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.attr import Saliency

        model = build(name, 3, 5, 16).double().eval()
        x, y = torch.randn(4, 3, 16, 16, dtype=F64), torch.tensor([0, 4, 2, 2])
        theirs = Saliency(model).attribute(x.clone().requires_grad_(), target=y, abs=False)
    logits, gradient = logits_and_gradient(model, x, y)
    torch.testing.assert_close(gradient, theirs, rtol=1e-12, atol=1e-15)
    assert torch.equal(logits, model(x))
    assert not logits.requires_grad
    assert not gradient.requires_grad


def test_equals_finite_differences() -> None:
    model = Counting().double().eval()
    x, y, h = torch.randn(2, 3, 4, 4, dtype=F64), torch.tensor([3, 1]), 1e-5
    _, gradient = logits_and_gradient(model, x, y)
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(x[0].numel()):
            step = torch.zeros_like(x[0]).flatten()
            step[i] = h
            change = model(x + step.view_as(x[0])) - model(x - step.view_as(x[0]))
            expected.flatten(1)[:, i] = change[torch.arange(2), y] / (2 * h)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


def test_a_linear_model_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(3, 1, 2, 2)
    for target in (torch.tensor([2, 0, 1]), None):
        logits, gradient = logits_and_gradient(model, x, target)
        chosen = logits.argmax(1) if target is None else target
        assert torch.equal(gradient.flatten(1), model[1].weight.detach()[chosen])


def test_batch_size_does_not_matter() -> None:
    model, x = Counting().double(), torch.randn(5, 3, 4, 4, dtype=F64)
    _, together = logits_and_gradient(model, x)
    alone = torch.cat([logits_and_gradient(model, x[i : i + 1])[1] for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-15)


def test_one_forward_pass_and_nothing_left_behind() -> None:
    model = Counting()
    for parameter in (model.conv.bias, model.head.weight):
        parameter.requires_grad_(False)
    model.train()
    model.norm.eval()
    x = torch.randn(3, 3, 4, 4)
    kept, before = x.clone(), flags(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first = logits_and_gradient(model, x)
    assert model.calls == 1
    assert flags(model) == before
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = logits_and_gradient(model, x)  # in evaluation mode dropout draws nothing
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_flags_are_restored_when_the_model_raises() -> None:
    model = Counting()
    model.head.bias.requires_grad_(False)
    model.drop.eval()
    model.broken = True
    before = flags(model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        logits_and_gradient(model, torch.randn(2, 3, 4, 4))
    assert flags(model) == before


def test_frozen_eval_inside() -> None:
    model = Counting()
    with frozen_eval(model):
        assert flags(model) == [False] * len(flags(model))
    assert flags(model) == [True] * len(flags(model))


def test_without_gradients_and_with_frozen_parameters() -> None:
    model, x = Counting(), torch.randn(2, 3, 4, 4)
    _, expected = logits_and_gradient(model, x)
    with torch.no_grad():
        _, gradient = logits_and_gradient(model, x)
        assert not torch.is_grad_enabled()
    assert torch.equal(gradient, expected)
    model.requires_grad_(False)
    assert torch.equal(logits_and_gradient(model, x)[1], expected)
    assert not any(p.requires_grad for p in model.parameters())
    leaf = x.clone().requires_grad_()
    assert torch.equal(logits_and_gradient(model, leaf)[1], expected)
    assert leaf.grad is None


def test_the_graph_survives_only_when_asked_to() -> None:
    model, y = Counting(), torch.tensor([0, 1])
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    for retain in (True, False):
        logits = model(x)
        gradient = input_gradient(logits, x, y, retain_graph=retain)
        assert not gradient.requires_grad
        if retain:
            logits.sum().backward()
            assert all(p.grad is not None for p in model.parameters())
        else:
            with pytest.raises(RuntimeError, match="second time"):
                logits.sum().backward()


def test_float32_parts_go_backward_in_float32_under_autocast() -> None:
    model = nn.Linear(16, 3)
    x, y = torch.randn(40, 16, 1, 1, requires_grad=True), torch.randint(3, (40,))

    def forward() -> Tensor:
        white = whiten(x.flatten(1))
        with torch.autocast("cpu", enabled=False):
            return model(white)

    expected = input_gradient(forward(), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = input_gradient(forward(), x, y)
    assert torch.equal(gradient, expected)


def test_scores_on_three_channels_by_hand() -> None:
    gradient = torch.tensor([[[[1.0, 0.0]], [[-3.0, 0.5]], [[1.0, 0.25]]]])  # (1, 3, 1, 2)
    assert torch.equal(pixel_score(gradient, "absolute"), torch.tensor([[[5.0, 0.75]]]))
    assert torch.equal(pixel_score(gradient, "signed"), torch.tensor([[[-1.0, 0.75]]]))
    assert torch.equal(pixel_score(gradient), pixel_score(gradient, "absolute"))
    one = torch.randn(2, 1, 3, 3)
    assert torch.equal(pixel_score(one, "signed"), one[:, 0])
    assert torch.equal(pixel_score(one), one[:, 0].abs())
    assert torch.equal(pixel_score(one[:, 0], "signed"), one[:, 0])  # a method that scores whole pixels
    assert torch.equal(pixel_score(one[:, 0]), one[:, 0].abs())


def test_unknown_score() -> None:
    with pytest.raises(ValueError) as error:
        pixel_score(torch.zeros(1, 1, 2, 2), "squared")
    assert str(error.value) == "unknown score 'squared'; known: absolute, signed, random"
    with pytest.raises(ValueError) as error:
        pixel_score(torch.zeros(1, 1, 2, 2), "random")
    assert str(error.value) == "score 'random' asks for 'images'; it can have: gradient"


def test_random_scores_are_uniform_and_come_from_the_generator() -> None:
    images, score = torch.zeros(3, 2, 20, 30), SCORES["random"]
    first, again = (
        score.ask({"images": images, "generator": torch.Generator().manual_seed(4), "gradient": None}) for _ in range(2)
    )
    assert first.shape == (3, 20, 30)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(4)))
    assert score.ask({"images": images, "generator": None}).std() > 0.2


def test_a_score_of_ones_own() -> None:
    @sdecor.saliency.score
    def largest(gradient: Tensor) -> Tensor:
        return gradient.abs().amax(1)

    try:
        gradient = torch.randn(2, 3, 4, 4)
        assert torch.equal(pixel_score(gradient, "largest"), gradient.abs().amax(1))
        assert torch.equal(pixel_score(gradient[:, 0], "largest"), gradient[:, 0].abs())
    finally:
        del SCORES["largest"]
