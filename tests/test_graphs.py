"""A step from a CUDA graph trains as one without; and on the CPU, that what a graph needs changes no number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sdecor.config import AUGMENTATIONS, Objective, Run, Schedule
from sdecor.graphs import Captured
from sdecor.images import ImageData
from sdecor.objective import losses
from sdecor.store import network
from sdecor.training import fit
from sdecor.whitening import inverse_sqrt, newton_schulz, whitening_matrix

F64 = torch.float64
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"channels": 3, "num_classes": 4, "image_size": 16}


def images(count: int = 96) -> ImageData:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return ImageData.from_tensors(pixels, torch.arange(count) % 4)


def model(method: str = "standard") -> nn.Module:
    torch.manual_seed(0)
    return network(Run.of(method=method, model="cnn_small"), SHAPE)


# --- on the CPU -----------------------------------------------------------------------------------------------------


def spd(condition: float, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Four positive definite matrices with eigenvalues from 1 down to 1 / condition, evenly on a logarithmic scale."""
    q = torch.linalg.qr(torch.randn(4, size, size, dtype=F64))[0]
    return ((q * torch.tensor(condition, dtype=F64) ** -torch.linspace(0, 1, size, dtype=F64)) @ q.mT).to(dtype)


def off_white(w: Tensor, s: Tensor) -> float:
    """Largest entry of W S W' - I, in float64."""
    w, s = w.double(), s.double()
    return float((w @ s @ w.mT - torch.eye(s.shape[-1])).abs().amax())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 25), (F64, 50)])
def test_fixed_newton_schulz_steps_whiten_as_an_eigendecomposition_does(
    condition: float, size: int, dtype: torch.dtype, steps: int
) -> None:
    """The steps that a GPU takes in place of `torch.linalg.eigh`, for which it would have to wait."""
    s, eps = spd(condition, size, dtype), torch.finfo(dtype).eps
    fixed, exact = newton_schulz(s, iterations=steps, tolerance=0), inverse_sqrt(s)
    assert off_white(fixed, s) <= 8 * off_white(exact, s) + 10 * eps
    assert off_white(fixed, s) <= max(10, condition) * eps  # what rounding of the covariance alone may do

    def slope(root: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        (g,) = torch.autograd.grad((root(leaf) * torch.linspace(-1, 1, size, dtype=at.dtype)).sum(), leaf)
        return (g + g.mT).double() / 2

    true = slope(inverse_sqrt, s.double())
    found = slope(lambda v: newton_schulz(v, iterations=steps, tolerance=0), s)
    assert float((found - true).norm() / true.norm()) < max(20, condition) * eps


def test_fewer_steps_would_not_do() -> None:
    s = spd(1e6, 16)
    assert off_white(newton_schulz(s, iterations=15, tolerance=0), s) > 0.1
    assert off_white(newton_schulz(s, iterations=25, tolerance=0), s) < 0.05


@pytest.mark.parametrize("augment", [(), AUGMENTATIONS])
@pytest.mark.parametrize("method", ["saliencydecor-absolute", "consistency-random", "adversarial"])
def test_generators_seeded_anew_draw_as_new_ones_did(method: str, augment: tuple[str, ...]) -> None:
    """`fit` gives the bits of a loop that makes its generators in every epoch, and clears gradients before a step."""
    data, plan, objective = images(), Schedule(3, 32, augment=augment), Objective(method)
    found, own = model(), model().to(memory_format=torch.channels_last)
    curves = fit(found, data, objective, plan, seed=5)
    optimizer, total = torch.optim.AdamW(own.parameters(), lr=plan.lr, weight_decay=plan.weight_decay), []
    for epoch in range(3):
        torch.manual_seed(5 * 1_000_003 + epoch)
        order = torch.Generator().manual_seed(torch.initial_seed())
        noise = torch.Generator().manual_seed(torch.initial_seed() + 500_009)
        batches = data.batches(32, shuffle=True, generator=order, augment=augment, drop_last=True)
        for step, (x, y) in enumerate(batches):
            x = x.to(memory_format=torch.channels_last)
            loss = losses(own, x, y, objective, generator=noise)["total"]
            optimizer.param_groups[0]["lr"] = plan.rate(3 * epoch + step, 9)
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=list(own.parameters()))
            clip_grad_norm_(own.parameters(), plan.clip)
            optimizer.step()
            total.append(float(loss.detach()))
    assert curves.terms["total"] == pytest.approx(torch.tensor(total, dtype=F64).view(3, 3).mean(1).tolist(), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), own.state_dict().values(), strict=True))


def test_on_the_cpu_a_graph_is_neither_made_nor_missed(caplog: pytest.LogCaptureFixture) -> None:
    one, other = model(), model()
    with caplog.at_level(logging.WARNING, "sdecor"):
        curves = [
            fit(m, images(), Objective(), Schedule(1, 32), graph=g).terms for m, g in ((one, True), (other, False))
        ]
    assert curves[0] == curves[1] and caplog.messages == []
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions in float32, the same ones each time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["standard", "saliencydecor-absolute", "zca-in-training", "adversarial"])
def test_a_step_from_a_graph_trains_as_one_without(method: str, optimizer: str, caplog: Any) -> None:
    plan = replace(Schedule(3, 16, optimizer, lr=1e-2), augment=AUGMENTATIONS)
    found = []
    with caplog.at_level(logging.WARNING, "sdecor"):
        for graph in (False, True):
            own = model(method)
            history = fit(own, images(), Objective(method), plan, seed=5, device="cuda", graph=graph)
            found.append((history.terms, own.state_dict()))
    assert caplog.messages == []
    (curves, weights), (others, other_weights) = found
    for name, curve in curves.items():
        assert others[name] == pytest.approx(curve, rel=1e-3), name
        assert len(set(curve)) == 3  # every epoch draws anew
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-2, atol=1e-2, msg=name)
    still = model(method).to("cuda").state_dict()
    assert all(not torch.allclose(still[name], v, atol=1e-3) for name, v in weights.items() if v.ndim > 1)


@gpu
def test_a_graph_runs_on_the_inputs_of_today_and_changes_state_once_a_call() -> None:
    count, draws = torch.zeros((), device="cuda"), torch.Generator("cuda")
    asked: list[int] = []

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(x))
        count.add_(1)
        return x.sum() * 2, torch.rand(3, generator=draws, device="cuda")

    captured, noise = Captured(function, draws), []
    for call in range(1, 9):
        total, random = captured(torch.full((4,), float(call), device="cuda"))
        assert float(total) == 8 * call and float(count) == call
        noise.append(tuple(random.tolist()))
    assert len(asked) == 4  # three calls as it is, and the captured one, which all others replay
    assert len(set(noise)) == 8
    draws.manual_seed(1)
    again = [captured(torch.ones(4, device="cuda"))[1].tolist() for _ in range(2)]
    expected = torch.Generator("cuda").manual_seed(1)
    assert again == [torch.rand(3, generator=expected, device="cuda").tolist() for _ in range(2)]


@gpu
def test_another_batch_shape_is_run_as_it_is() -> None:
    asked: list[int] = []

    def function(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x.square().sum()

    captured = Captured(function)
    for _ in range(5):
        captured(torch.ones(4, device="cuda"))
    asked.clear()
    sizes = (3, 4, 5, 4, 3)
    assert [float(captured(torch.full((n,), 2.0, device="cuda"))) for n in sizes] == [4.0 * n for n in sizes]
    assert asked == [3, 5, 3]


@gpu
def test_a_function_that_waits_for_the_gpu_runs_as_it_is_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.ones((), device="cuda", requires_grad=True)

    def function(x: Tensor) -> Tensor:
        loss = (weight * x).sum()
        loss = loss * (2 if loss.item() > 0 else 1)
        loss.backward()
        with torch.no_grad():
            weight.add_(weight.grad)
        weight.grad = None
        return loss.detach()

    captured = Captured(function)
    expected = 1.0
    with caplog.at_level(logging.WARNING, "sdecor"):
        for _ in range(7):
            assert float(captured(torch.ones(2, device="cuda"))) == 4 * expected
            expected += 4
            assert float(weight) == expected
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the step runs without a CUDA graph, several times slower: ")


@gpu
def test_whitening_on_a_gpu_is_that_on_the_cpu() -> None:
    for condition, dtype in ((1e4, torch.float32), (1e6, F64)):
        s = spd(condition, 16, dtype)
        cpu, there = whitening_matrix(s, eps=0), whitening_matrix(s.cuda(), eps=0).cpu()
        torch.testing.assert_close(there, cpu, rtol=1e-2, atol=1e-2 * float(cpu.abs().amax()))
        assert off_white(there, s) < 10 * condition * torch.finfo(dtype).eps
