"""Features of named layers: what capture collects, what it leaves behind, and layers that cannot be used."""

from __future__ import annotations

import pytest
import torch
from networks import Compiled
from test_objective import batch, both, hooks, lenet, noise
from torch import Tensor, nn

from sdecor.config import Objective
from sdecor.models import default_layers
from sdecor.objective import Step, capture, losses


def test_capture_gives_outputs_and_leaves_no_hook() -> None:
    model, (x, _) = lenet(), batch(3)
    with capture(model, ("fc2", "conv2")) as found:
        assert found == {}
        model(x)
        assert {k: tuple(v.shape) for k, v in found.items()} == {"conv2": (3, 16, 10, 10), "fc2": (3, 80)}
        assert torch.equal(found["conv2"], model.conv2(nn.functional.relu(nn.functional.max_pool2d(model.conv1(x), 2))))
        assert hooks(model) == 2
    assert hooks(model) == 0


def test_an_open_capture_is_used_and_kept() -> None:
    model, (x, y) = lenet(), batch()
    o = Objective()
    expected = losses(model, x, y, o, generator=noise())["total"]
    with capture(model, default_layers(model, x)) as features:
        for _ in range(2):
            assert torch.equal(losses(model, x, y, o, generator=noise(), features=features)["total"], expected)
        assert hooks(model) == 2
        assert torch.equal(losses(Compiled(model), x, y, o, generator=noise(), features=features)["total"], expected)


def test_features_that_nobody_asked_to_keep() -> None:
    step = Step(lenet(), *batch())
    with pytest.raises(ValueError, match="none of the method's terms has the option 'layers'"):
        _ = step.features


def test_hooks_go_when_the_forward_pass_raises() -> None:
    model, (_, y) = lenet(), batch()
    with pytest.raises(RuntimeError):
        losses(model, torch.randn(8, 1, 5, 5), y, Objective())
    assert hooks(model) == 0


class Odd(nn.Module):
    """A layer that returns a tuple, and one that the forward pass never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.unused, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("rnn",), "layer 'rnn' returns a tuple; decorrelation needs a tensor"),
        (("unused",), "the forward pass did not reach the layers unused"),
        (("head", "unused"), "the forward pass did not reach the layers unused"),
        (("conv9",), "unknown layer 'conv9'; this model has: rnn, unused, head"),
        (("head", "conv9"), "unknown layer 'conv9'; this model has: rnn, unused, head"),
        (("head",), "group_size=16 does not divide the 10 channels of layer 'head'; use one of 1, 2, 5, 10"),
    ],
)
def test_layers_that_cannot_be_used(layers: tuple[str, ...], message: str) -> None:
    model, (x, y) = Odd(), batch(4, 1, 6)
    with pytest.raises(ValueError) as error:
        losses(model, x, y, Objective(layers=layers))
    assert str(error.value) == message
    assert hooks(model) == 0


def test_tokens_cannot_be_decorrelated() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x.flatten(1, 2)).mean(1))

    with pytest.raises(ValueError) as error:
        losses(Tokens(), *batch(4, 1, 6), Objective(layers=("embed",)))
    assert str(error.value) == (
        "layer 'embed' gives features of shape (4, 6, 16); decorrelation needs (B, C) or (B, C, H, W)"
    )


def test_a_batch_of_one() -> None:
    model, (x, y) = lenet(), batch(1)
    with pytest.raises(ValueError) as error:
        losses(model, x, y, Objective())
    assert str(error.value) == (
        "layer 'fc2' gives 1 sample of shape (1, 80); a covariance needs at least 2, so use a larger batch"
    )
    assert losses(model, x, y, Objective(layers=("conv2",)))["total"].isfinite()  # 100 positions are enough
    assert losses(model, x, y, both(1, 0))["total"].isfinite()
