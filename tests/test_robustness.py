"""Robustness: closed forms, captum and Quantus as oracles, and an attack that has to work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import Explain, close, flags, gradient_map, seeded, trained
from torch import Tensor, nn

from sdecor.measures import robustness
from sdecor.measures.robustness import attack, explanation_shift, local_lipschitz, max_sensitivity, spearman, ssim
from sdecor.models import build
from sdecor.registers import MODELS
from sdecor.saliency import logits_and_gradient

MEASURES = {"max_sensitivity": max_sensitivity, "local_lipschitz": local_lipschitz}
each_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())


class Power(nn.Module):
    """Logits of the sum of a power of all values, and of 1 less; the gradient of the second power is 2 x."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).pow(self.exponent).sum(1)
        return torch.stack([total, total - 1], 1)


# Random noise


def test_a_linear_model_does_not_change() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    images, target = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 2, 1])
    for measure in MEASURES.values():
        assert measure(gradient_map(model), images, target).tolist() == [0, 0, 0, 0]


def test_a_quadratic_model_has_lipschitz_constant_two() -> None:
    images, target = torch.randn(4, 2, 3, 3), torch.zeros(4, dtype=torch.int64)

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return logits_and_gradient(Power(2), x, t)[1]

    close(local_lipschitz(gradient, images, target, radius=0.5), torch.full((4,), 2.0, dtype=torch.float64), 1e-6)
    # a change of 2 noise, relative to 2 x: the largest noise, twice as far for twice the radius
    noise = 0.5 * robustness._noise(images, 7, 3)
    wanted = ((images + noise[:, None]) - images).flatten(2).norm(dim=2).amax(0) / images.flatten(1).norm(dim=1)
    close(max_sensitivity(gradient, images, target, radius=0.5, samples=7, seed=3), wanted, 1e-6)


def test_the_noise_is_uniform_in_the_ball() -> None:
    noise = robustness._noise(torch.zeros(1, 10, 20, 25), 10, 0)
    assert noise.shape == (10, 10, 20, 25)
    assert scipy.stats.kstest(noise.flatten().numpy(), scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert not torch.equal(noise, robustness._noise(torch.zeros(1, 10, 20, 25), 10, 1))


def common(images: Tensor, radius: float, samples: int) -> Tensor:
    return radius * robustness._noise(images, samples, 0)


def test_max_sensitivity_against_captum() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.metrics import sensitivity_max

    model, images, target = trained()
    noise = common(images, 0.1, 6)
    explain = gradient_map(model)
    theirs = sensitivity_max(
        lambda x, target: (explain(x[0], target),) if isinstance(x, tuple) else explain(x, target),
        images,
        perturb_func=lambda x: x + noise.repeat(len(x) // 6, 1, 1, 1),
        n_perturb_samples=6,
        target=target,
    )
    close(max_sensitivity(explain, images, target, radius=0.1, samples=6), theirs, 1e-6)
    # captum divides by 1 where the map is zero
    masked = lambda x, t: x * (t == 1).view(-1, 1, 1, 1)  # noqa: E731
    assert max_sensitivity(masked, torch.ones(2, 1, 3, 3), torch.tensor([0, 1])).isnan().tolist() == [True, False]
    zero = sensitivity_max(lambda x, target: (x[0] * 0,), torch.ones(2, 1, 3, 3), target=torch.tensor([0, 1]))
    assert zero.tolist() == [0, 0]


def quantus_score(metric: str, explain: Explain, images: Tensor, target: Tensor, noise: Tensor) -> Any:
    quantus = pytest.importorskip("quantus", reason="Quantus does not import here", exc_type=ImportError)
    draws = cycle(noise.flatten(1).numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = getattr(quantus, metric)(
            nr_samples=len(noise),
            abs=False,
            normalise=False,
            perturb_func=lambda arr, indices, **_: arr + next(draws),
            disable_warnings=True,
            display_progressbar=False,
        )
        return score(
            model=trained()[0],
            x_batch=images.numpy(),
            y_batch=target.numpy(),
            a_batch=explain(images, target)[:, None].numpy(),
            explain_func=lambda model, inputs, targets, **_: explain(torch.as_tensor(inputs), torch.as_tensor(targets))[
                :, None
            ].numpy(),
            device="cpu",
        )


def test_against_quantus() -> None:
    model, images, target = trained()
    noise, explain = common(images, 0.1, 6), gradient_map(model)
    theirs = quantus_score("MaxSensitivity", explain, images, target, noise)
    close(max_sensitivity(explain, images, target, radius=0.1, samples=6), torch.tensor(theirs), 1e-6)
    # Quantus adds 1e-10 to the distance
    theirs = quantus_score("LocalLipschitzEstimate", explain, images, target, noise)
    close(local_lipschitz(explain, images, target, radius=0.1, samples=6), torch.tensor(theirs), 1e-6)
    # Quantus divides by a map of zeros
    from_first = lambda x, t: (x - images[0])[:, 0]  # noqa: E731
    with np.errstate(divide="ignore"):
        theirs = quantus_score("MaxSensitivity", from_first, images, target, noise)
    assert np.isinf(theirs).tolist() == [True] + [False] * 39
    assert max_sensitivity(from_first, images, target).isnan().tolist() == [True] + [False] * 39


@each_measure
@given(order=st.permutations(range(5)), batch_size=st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_noise_is_common_to_all_images(measure: Callable[..., Tensor], order: list[int], batch_size: int) -> None:
    model, images, target = trained()
    explain = gradient_map(model)
    before = torch.get_rng_state()
    value = measure(explain, images[:5], target[:5])
    assert value.shape == (5,)
    assert value.dtype == torch.float64
    again = measure(explain, images[order], target[order], batch_size=batch_size)
    close(again, value[order], 1e-4)
    close(measure(explain, images[2:3], target[2:3], batch_size=batch_size), value[2:3], 1e-4)
    assert torch.equal(torch.get_rng_state(), before)


@each_measure
def test_more_samples_find_more(measure: Callable[..., Tensor]) -> None:
    model, images, target = trained()
    explain = gradient_map(model)
    few, many = (measure(explain, images, target, samples=n) for n in (2, 20))
    assert (many >= few * (1 - 1e-6)).all()
    assert many.mean() > few.mean()
    small, large = (measure(explain, images, target, radius=r).mean() for r in (0.02, 0.2))
    assert small != large


def test_only_lipschitz_depends_on_the_scale() -> None:
    model, images, target = trained()
    explain = gradient_map(model)
    scaled = lambda x, t: explain(x, t) * 3  # noqa: E731
    close(max_sensitivity(scaled, images, target), max_sensitivity(explain, images, target), 1e-5)
    close(local_lipschitz(scaled, images, target), 3 * local_lipschitz(explain, images, target), 1e-5)


def test_calls_of_explain() -> None:
    rows: list[int] = []

    def explain(x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == len(t)
        rows.append(len(x))
        return x.requires_grad_() * t.view(-1, 1, 1, 1)

    images, target = torch.rand(5, 1, 3, 3), torch.arange(1, 6)
    inputs = images.clone(), target.clone()
    result = max_sensitivity(explain, images.requires_grad_(), target, samples=3, batch_size=4)
    assert rows == [4, 1, 4, 4, 4, 3]
    assert not result.requires_grad
    assert torch.equal(images, inputs[0]) and torch.equal(target, inputs[1])
    assert max_sensitivity(explain, images[:0], target[:0]).shape == (0,)
    # noise that float32 cannot add to ones
    assert local_lipschitz(lambda x, t: x, torch.ones(1, 1, 3, 3), torch.tensor([0]), radius=1e-12).isnan().all()


BAD_CALLS = [
    ({"images": torch.ones(2, 3, 3)}, "images must have shape (B, C, H, W), got (2, 3, 3)"),
    ({"target": torch.tensor([1])}, "target must be 2 whole numbers, got shape (1,) of torch.int64"),
    ({"target": torch.zeros(2)}, "target must be 2 whole numbers, got shape (2,) of torch.float32"),
    ({"batch_size": 0}, "batch_size must be greater than 0, got 0"),
]
BAD_NOISE = [
    ({"radius": 0.0}, "radius must be finite and greater than 0, got 0.0"),
    ({"samples": 0}, "samples must be greater than 0, got 0"),
    ({"maps_of": lambda x, t: x[:1]}, "maps_of gave shape (1, 1, 3, 3) for 2 images; it must be (B, ...)"),
    ({"maps_of": lambda x, t: x / 0}, "the result of maps_of has infinity in 2 of 2 rows (the first is row 0)"),
]
BAD_ATTACKS = [
    ({"epsilon": -0.1}, "epsilon must be finite and greater than 0, got -0.1"),
    ({"steps": 0}, "steps must be greater than 0, got 0"),
    ({"epsilon": math.nan}, "epsilon must be finite and greater than 0, got nan"),
]


@each_measure
@pytest.mark.parametrize(("changes", "message"), BAD_CALLS + BAD_NOISE)
def test_bad_noise(measure: Callable[..., Tensor], changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"maps_of": lambda x, t: x, "images": torch.ones(2, 1, 3, 3), "target": torch.tensor([0, 0])}
    with pytest.raises(ValueError) as caught:
        measure(**call | changes)
    assert str(caught.value) == message


# Attack


def test_attack_beats_noise_and_keeps_the_class() -> None:
    model, images, target = trained()
    explain = gradient_map(model)
    inputs, before, random_state = images.clone(), flags(model), torch.get_rng_state()
    adversarial = attack(model, images, target, epsilon=0.1)
    assert torch.equal(torch.get_rng_state(), random_state)
    close((adversarial - images).abs().amax(), 0.1, 1e-6)
    assert torch.equal(model(adversarial).argmax(1), target)
    shift = explanation_shift(explain, images, adversarial, target)
    assert ((shift >= 0) & (shift <= 1)).all()
    signs = torch.randint(0, 2, (20, *images.shape)) * 0.2 - 0.1
    noise = torch.stack([explanation_shift(explain, images, images + s, target) for s in signs])
    assert (shift > noise.mean(0)).all()
    assert shift.mean() > 1.5 * noise.mean()
    assert shift.mean() > noise.amax(0).mean()  # better than the best of twice as many draws
    assert torch.equal(images, inputs) and flags(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_attack_needs_smooth_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without softplus there is no direction to go; with it the maps of the unchanged network are attacked."""
    model, images, target = trained()
    monkeypatch.setattr(robustness, "_SmoothReLU", lambda: torch.enable_grad())
    with pytest.raises(ValueError, match="does not depend on the input, ReLU smoothed"):
        attack(model, images, target, epsilon=0.1)


class Functional(nn.Module):
    """The same ReLU by module, by three functions and by a method."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 32), nn.Linear(32, 3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x.flatten(1))))


RELU = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "keyword": lambda x: F.relu(input=x),
    "torch": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "statement": lambda x: (x.relu_(), x)[1],
    "function as statement": lambda x: (F.relu(x, inplace=True), x)[1],
    "function as statement, by place": lambda x: (F.relu(x, True), x)[1],
    "relu_ as statement": lambda x: (torch.relu_(x), x)[1],
}


def test_every_relu_is_smoothed() -> None:
    images, target = torch.randn(3, 1, 3, 3), torch.tensor([0, 1, 2])
    model = Functional(F.relu)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    results = []
    for relu in RELU.values():
        model.__dict__["relu"] = relu
        results.append(attack(model, images, target, epsilon=0.1))
        assert F.relu(torch.tensor(-1.0)) == 0  # smooth no longer
    assert all(torch.equal(r, results[0]) for r in results)
    assert not torch.equal(results[0], images)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(flags(model))


@pytest.mark.parametrize("name", MODELS)
def test_attack_of_every_model(name: str) -> None:
    model = build(name, 3, 4, 32)
    images = torch.randn(1, 3, 32, 32)
    target = torch.tensor([1])
    adversarial = attack(model, images, target, epsilon=0.02, steps=2)
    assert explanation_shift(gradient_map(model), images, adversarial, target).item() > 1e-3
    assert model.training


def test_attack_of_smooth_models() -> None:
    """x^3 has the gradient 3 x^2: equal values shift most when some go down and the others up."""
    images, target = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0])
    adversarial = attack(Power(3), images, target, epsilon=0.1)
    low, high = 0.9**2, 1.1**2
    ends = [1 - (n * low + (4 - n) * high) / (2 * math.sqrt(n * low**2 + (4 - n) * high**2)) for n in (1, 2, 3)]
    shift = explanation_shift(gradient_map(Power(3)), images, adversarial, target).item()
    assert min(abs(shift - end) for end in ends) < 1e-9


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), Functional(F.leaky_relu), Functional(lambda x: x.clamp(0))]
)
def test_models_that_cannot_be_attacked(model: nn.Module) -> None:
    before = flags(model)
    with pytest.raises(ValueError) as caught:
        attack(model, torch.randn(2, 1, 3, 3), torch.tensor([0, 1]), epsilon=0.1)
    assert str(caught.value) == (
        f"the input gradient of this {type(model).__name__} does not depend on the input, ReLU smoothed; "
        "a model with ReLU or smooth activations can be attacked"
    )
    assert flags(model) == before


@given(order=st.permutations(range(6)), batch_size=st.integers(1, 7))
@settings(max_examples=5, deadline=None)
def test_attack_of_each_image_by_itself(order: list[int], batch_size: int) -> None:
    model, images, target = trained()
    model.double()  # in single precision a sign may flip
    x, t = images[:6].double(), target[:6]
    whole = attack(model, x, t, epsilon=0.05, steps=3)
    parts = attack(model, x[order], t[order], epsilon=0.05, steps=3, batch_size=batch_size)
    model.float()
    close(parts, whole[order], 1e-9)


def test_a_step_that_changes_the_class_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, target = trained()
    uphill, starts = robustness._uphill, list[Tensor]()

    def recorded(model: nn.Module, x: Tensor, *others: Tensor) -> tuple[Tensor]:
        starts.append(x)
        return uphill(model, x, *others)

    monkeypatch.setattr(robustness, "_uphill", recorded)
    far = attack(model, images, target, epsilon=1.0, steps=5)
    assert len(starts) == 5
    assert all(torch.equal(model(x).argmax(1), target) for x in (*starts, far))
    stayed = [(a == b).flatten(1).all(1) for a, b in zip(starts, starts[1:], strict=False)]
    assert any(s.any() and not s.all() for s in stayed)
    # the target need not be the predicted class
    other = (target + 1) % 10
    assert torch.equal(model(attack(model, images, other, epsilon=0.5, steps=3)).argmax(1), target)

    class Border(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Class 0 only for the image of ones."""
            sum_of_cubes = x.flatten(1).pow(3).sum(1)
            return torch.stack([sum_of_cubes, sum_of_cubes + (x != 1).flatten(1).any(1) * 2.0 - 1], 1)

    ones = torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match="does not depend"):  # no step is taken, and at the image there is no slope
        attack(Border(), ones, torch.tensor([0, 0]), epsilon=0.1)


def test_attack_never_loses() -> None:
    model, images, target = trained()
    shifts = [
        explanation_shift(gradient_map(model), images, attack(model, images, target, epsilon=0.1, steps=n), target)
        for n in (1, 3, 9)
    ]
    assert (shifts[0] <= shifts[1] + 1e-9).all() and (shifts[1] <= shifts[2] + 1e-9).all()
    assert shifts[0].mean() < shifts[1].mean() < shifts[2].mean()


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS + BAD_ATTACKS)
def test_bad_attacks(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"images": torch.ones(2, 1, 3, 3), "target": torch.tensor([0, 0]), "epsilon": 0.1}
    with pytest.raises(ValueError) as caught:
        attack(Functional(F.relu), **call | changes)
    assert str(caught.value) == message


def test_shift_by_hand() -> None:
    images = torch.tensor([[[[3.0, 4.0]]], [[[1.0, 0.0]]], [[[0.0, 0.0]]], [[[2.0, 2.0]]], [[[1.0, 0.0]]]])
    copies = torch.tensor([[[[4.0, 3.0]]], [[[0.0, 5.0]]], [[[1.0, 1.0]]], [[[9.0, 9.0]]], [[[-1.0, 0.0]]]])
    shift = explanation_shift(lambda x, t: x[:, 0], images, copies, torch.zeros(5, dtype=torch.int64))
    close(shift, torch.tensor([1 - 24 / 25, 1, math.nan, 0, 2], dtype=torch.float64))
    with pytest.raises(ValueError) as caught:
        explanation_shift(lambda x, t: x, images, copies[:, :, :, :1], torch.zeros(5, dtype=torch.int64))
    assert str(caught.value) == "adversarial has shape (5, 1, 1, 1), images have (5, 1, 1, 2)"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_spearman_does_not_depend_on_its_chunk(chunk: int) -> None:
    a, b = torch.rand(2, 7, 190, 190, generator=seeded())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(spearman(a, b, chunk=chunk), spearman(a, b))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_agreement_of_whole_numbers_and_every_precision(kind: torch.dtype) -> None:
    a, b = torch.randint(2, (2, 3, 8, 9), generator=seeded())
    for function in (spearman, ssim):
        close(function(a.to(kind), b), function(a.float(), b.float()))


@pytest.mark.parametrize("value", [[[[1, 0], [0, 1]]], np.ones((1, 2, 2)), None])
def test_what_is_no_tensor(value: Any) -> None:
    model, x, y = trained()
    for name, call in {
        "a": lambda: spearman(value, torch.ones(1, 2, 2)),
        "b": lambda: ssim(torch.ones(1, 2, 2), value),
        "images": lambda: attack(model, value, y, epsilon=0.1),
        "adversarial": lambda: explanation_shift(gradient_map(model), x, value, y),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"{name} must be a tensor, got {type(value).__name__}; pass torch.as_tensor({name})"
    with pytest.raises(ValueError, match=f"^maps_of must give a tensor, it gave {type(value).__name__}$"):
        max_sensitivity(lambda x, t: value, x, y)
