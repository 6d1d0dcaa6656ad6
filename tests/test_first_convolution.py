"""The quick backward pass to the images gives what autograd gives, and is left where it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdecor.first_convolution import FirstConvolution, gradient_by_input
from sdecor.models import build
from sdecor.saliency import logits_and_gradient


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 4), outputs=st.integers(1, 9), height=st.integers(7, 13), width=st.integers(7, 13),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), block=st.sampled_from([1, 2, 4]), data=st.data(),
)  # fmt: skip
def test_gradient_by_input_equals_autograd(
    channels: int, outputs: int, height: int, width: int, kernel: tuple[int, int], block: int, data: st.DataObject
) -> None:
    padding = tuple(data.draw(st.integers(0, k - 1)) for k in kernel)
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, channels, *kernel, dtype=torch.float64)
    y = F.conv2d(x, weight, padding=padding)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gradient_by_input(g, weight, padding, x.shape, block), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_maps_of_a_network_are_those_of_autograd(channels: int, side: int) -> None:
    torch.manual_seed(0)
    model, x = build("lenet", channels, 10, side).eval(), torch.randn(5, channels, side, side)
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    (expected,) = torch.autograd.grad(logits.amax(1).sum(), leaf)
    ours = logits_and_gradient(model, x)
    assert torch.equal(ours[0], logits)
    torch.testing.assert_close(ours[1], expected, rtol=1e-5, atol=1e-7)


def double_backward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Something that is a function of the slope: its own derivatives go through the backward pass."""
    images = x.detach().requires_grad_() if not x.requires_grad else x
    first = FirstConvolution(images)
    with first:
        y = F.conv2d(images, weight, bias, (1, 1), (1, 1))
    with first.slope():
        (slope,) = torch.autograd.grad(y.tanh().sum(), images, create_graph=True)
    return slope.square().sum()


def test_the_slope_is_differentiable_by_the_weights() -> None:
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, b: double_backward(x, w, b), (weight, bias))


def test_weights_get_the_same_bits() -> None:
    torch.manual_seed(0)
    model, x = build("lenet", 1, 10, 28), torch.randn(6, 1, 28, 28)
    model(x).logsumexp(1).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    images = x.clone().requires_grad_()
    with FirstConvolution(images):
        y = model(images)
    y.logsumexp(1).sum().backward(inputs=list(model.parameters()))
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


class Counted:
    """Convolutions whose graph is ours."""

    def __call__(self, layer: nn.Module, x: Tensor, change: Any = lambda x: x) -> bool:
        images = x.clone().requires_grad_()
        with FirstConvolution(images):
            y = layer(change(images))
        names, todo, seen = set(), [y.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                names.add(node.name())
                todo += [n for n, _ in node.next_functions]
        return "_ConvolutionBackward" in names


def test_it_is_left_where_it_does_not_fit() -> None:
    ours, x = Counted(), torch.randn(2, 3, 9, 9)
    assert ours(nn.Conv2d(3, 4, 3, padding=1), x)
    assert ours(nn.Conv2d(3, 4, 3, bias=False), x)
    for layer in (
        nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 1),
        nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 2, padding=2),
    ):  # fmt: skip
        assert not ours(layer, x), layer
    assert not ours(nn.Conv2d(3, 4, 3), x, lambda v: 2 * v)  # not the images themselves
    assert not ours(nn.Conv2d(8, 4, 3), torch.randn(2, 8, 9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert not ours(nn.Conv2d(3, 4, 3), x)
