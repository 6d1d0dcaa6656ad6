"""The attribution methods against captum, finite differences and linear models; the model as it was before."""

from __future__ import annotations

import doctest
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdecor.saliency
from sdecor.models import MODELS, build
from sdecor.saliency import (
    ATTRIBUTIONS,
    attribute,
    frozen_eval,
    input_gradient,
    logits_and_gradient,
    pixel_score,
    superpixels,
)
from sdecor.whitening import whiten

F64 = torch.float64


class Counting(nn.Module):
    """A smooth classifier that counts its forward passes; batch norm and dropout tell the modes apart."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5 * 16, classes)
        self.calls = 0
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.broken:
            raise RuntimeError("broken on purpose")
        return self.head(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1))


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


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
    assert str(error.value) == "unknown score 'squared'; known: absolute, signed"


# small settings, so that each method runs on every model
CHEAP: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 3},
    "integrated_gradients": {"steps": 3},
    "guided_ig": {"steps": 3},
    "occlusion": {"window": 6, "stride": 5},
    "rise": {"samples": 5},
    "feature_ablation": {"segments": 6},
    "kernel_shap": {"segments": 6, "samples": 30},
    "shapley_sampling": {"segments": 6, "samples": 2},
}
NO_RULE = {("vit", "deeplift"), ("vit", "guided_backprop")}


def images(count: int, channels: int = 3, size: int = 16, dtype: torch.dtype = F64) -> Tensor:
    return F.avg_pool2d(torch.randn(count, channels, size, size, dtype=dtype), 3, 1, 1) * 2


def network(name: str = "cnn_bn", channels: int = 3, size: int = 16) -> nn.Module:
    """A classifier whose batch norms have been used."""
    torch.manual_seed(1)
    model = build(name, channels, 5, size).double()
    with torch.no_grad():
        for _ in range(3):
            model(images(8, channels, size))
    return model


def captum(name: str, model: nn.Module, /, *arguments: Any, **settings: Any) -> Tensor:
    with warnings.catch_warnings(), frozen_eval(model):
        warnings.simplefilter("ignore")
        import captum.attr

        kind = getattr(captum.attr, name)
        return kind(model, *settings.pop("made_with", ())).attribute(*arguments, **settings).detach()


def linear(size: int = 6, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * size * size, classes)).double()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_every_method_on_every_model(name: str, method: str) -> None:
    torch.manual_seed(0)
    size = {"resnet18": 8, "vgg11_bn": 32}.get(name, 16)
    model, x = build(name, 3, 4, size), images(2, size=size, dtype=torch.float32).requires_grad_()
    before, state, kept = flags(model), torch.get_rng_state(), x.detach().clone()
    if (name, method) in NO_RULE:
        with pytest.raises(ValueError, match=f"^{method} needs"):
            attribute(model, x, method=method)
    else:
        result = attribute(model, x, method=method, **CHEAP.get(method, {}))
        assert result.shape == (x.shape if ATTRIBUTIONS[method].per_channel else (2, size, size))
        assert result.dtype == x.dtype
        assert not result.requires_grad
        assert result.isfinite().all()
        assert (result.flatten(1).abs().amax(1) > 0).all()
    assert flags(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(x.detach(), kept)
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["lenet", "cnn_bn"])
@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_neither_company_nor_order_nor_chunks_matter(name: str, method: str) -> None:
    model, x = network(name), images(5)
    options = CHEAP.get(method, {}) | (
        {"baseline": x.flip(0) / 3} if method in ("rise", "guided_ig", "deeplift") else {}
    )
    together = attribute(model, x, method=method, **options)
    order = torch.tensor([3, 0, 4])
    options = {k: v[order] if isinstance(v, Tensor) else v for k, v in options.items()}
    chunks = [attribute(model, x[order], method=method, batch_size=size, **options) for size in (1, 2, 7)]
    # captum fits Kernel SHAP in single precision, with two weights of a million
    close = {"rtol": 1e-3, "atol": 1e-5} if method == "kernel_shap" else {"rtol": 1e-5, "atol": 1e-8}
    for part in chunks:
        torch.testing.assert_close(part, together[order], **close)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_no_forward_pass_has_more_rows_than_asked_for(method: str) -> None:
    model, rows = network(), []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    attribute(model, images(5), method=method, batch_size=2, **CHEAP.get(method, {}))
    assert max(rows) <= 2
    rows.clear()
    attribute(model, images(3), method=method, batch_size=64, **CHEAP.get(method, {}))
    if method in ("gradient", "absolute", "input_x_gradient", "gradcam"):
        assert rows == [3]


@pytest.mark.parametrize("method", ["smoothgrad", "rise", "kernel_shap", "shapley_sampling"])
def test_the_seed_decides_and_the_draws_are_common_to_all_images(method: str) -> None:
    model, x = network(), images(1).expand(3, -1, -1, -1)
    first, again, other = (attribute(model, x, method=method, seed=s, **CHEAP[method]) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[2])
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_the_target_is_the_predicted_class_unless_given(method: str) -> None:
    model, x = network(), images(2)
    predicted, options = logits_and_gradient(model, x)[0].argmax(1), CHEAP.get(method, {})
    assert torch.equal(attribute(model, x, method=method, **options), attribute(model, x, predicted, method, **options))
    other = attribute(model, x, ((predicted + 1) % 5).to(torch.int16), method, **options)
    assert not torch.allclose(other, attribute(model, x, predicted, method, **options))


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


def apart(model: nn.Module) -> nn.Sequential:
    """The same model with something linear between any two modules: captum needs it after a nonlinear one."""
    parts = [[nn.Flatten(), m] if m is getattr(model, "fc1", None) else [m] for m in model.children()]
    return nn.Sequential(*[step for part in parts for m in part for step in (m, Once())])


@pytest.mark.parametrize("name", ["lenet", "cnn_bn"])
def test_deeplift_is_complete_where_captums_is_not(name: str) -> None:
    model, x, base = network(name), images(4), images(4)
    logits, y = logits_and_gradient(model, x)[0], torch.tensor([0, 4, 2, 1])
    change = (logits - logits_and_gradient(model, base)[0]).gather(1, y[:, None])[:, 0]
    ours = attribute(model, x, y, "deeplift", baseline=base).sum((1, 2, 3))
    torch.testing.assert_close(ours, change, rtol=1e-9, atol=1e-12)
    # captum 0.9 takes the gradient at a nonlinear module's output before the rule of the next one has changed it
    theirs = captum("DeepLift", model, x, base, y).sum((1, 2, 3))
    assert ((theirs - change).abs() > 0.05 * change.abs().max()).any()


@pytest.mark.parametrize("name", ["lenet", "cnn_bn"])
def test_methods_that_are_captums(name: str) -> None:
    model, x, y = network(name), images(3), torch.tensor([0, 4, 2])
    base = images(1) / 4
    labels = superpixels(x, 6)
    regions: dict[str, Any] = {"target": y, "baselines": base, "feature_mask": labels.unsqueeze(1)}
    last = model.relu2 if name == "lenet" else model.relu3
    grad_cam = captum("LayerGradCam", model, x, y, made_with=(last,), relu_attributions=True)
    pairs = {
        "input_x_gradient": ({}, captum("InputXGradient", model, x, y)),
        "integrated_gradients": (
            {"baseline": base, "steps": 7},
            captum("IntegratedGradients", model, x, base, y, n_steps=7),
        ),
        "deeplift": ({"baseline": base}, captum("DeepLift", apart(model), x, base, y)),
        "guided_backprop": ({}, captum("GuidedBackprop", model, x, y)),
        "gradcam": ({}, F.interpolate(grad_cam, (16, 16), mode="bilinear")[:, 0]),
        "occlusion": (
            {"window": 5, "stride": 2, "baseline": base},
            captum("Occlusion", model, x, (3, 5, 5), (3, 2, 2), base.expand_as(x), y)[:, 0],
        ),
        "feature_ablation": ({"segments": 6, "baseline": base}, captum("FeatureAblation", model, x, **regions)[:, 0]),
    }
    for method, (options, theirs) in pairs.items():
        close = {"rtol": 1e-6, "atol": 1e-10} if theirs.dtype == F64 else {"rtol": 1e-5, "atol": 1e-7}  # captum's dtype
        torch.testing.assert_close(attribute(model, x, y, method, **options), theirs.double(), **close)
        assert theirs.abs().max() > 1e-4
    for method, kind in (("kernel_shap", "KernelShap"), ("shapley_sampling", "ShapleyValueSampling")):
        ours = attribute(model, x, y, method, seed=4, segments=labels * 7 - 2, samples=20, baseline=base)
        for i in range(3):
            torch.manual_seed(4)
            one = {k: v[i : i + 1] if k != "baselines" else v for k, v in regions.items()}
            theirs = captum(kind, model, x[i : i + 1], **one, n_samples=20)[:, 0].double()
            torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-3, atol=1e-5)


def test_smoothgrad_is_captums_noise_tunnel_with_the_noise_of_its_own_range() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.attr import NoiseTunnel, Saliency

    model, x, y = network(), images(2), torch.tensor([1, 3])
    ours = attribute(model, x, y, "smoothgrad", samples=5, noise=0.3, seed=2)
    for i in range(2):
        torch.manual_seed(2)
        one, deviation = x[i : i + 1], 0.3 * float(x[i].max() - x[i].min())
        with frozen_eval(model):
            theirs = NoiseTunnel(Saliency(model)).attribute(one, nt_samples=5, stdevs=deviation, target=y[i], abs=False)
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-5, atol=1e-8)
    no_noise = attribute(model, x, y, "smoothgrad", samples=2, noise=0)
    torch.testing.assert_close(no_noise, logits_and_gradient(model, x, y)[1])


def test_a_linear_model_gives_weight_times_change() -> None:
    model, x, base = linear(), images(3, 2, 6), images(1, 2, 6)
    y = torch.tensor([2, 0, 1])
    weight = model[1].weight.detach()[y].view_as(x)
    exact = weight * (x - base)
    for method in ("integrated_gradients", "guided_ig", "deeplift"):
        torch.testing.assert_close(attribute(model, x, y, method, baseline=base), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(attribute(model, x, y, "smoothgrad"), weight)
    torch.testing.assert_close(attribute(model, x, y, "input_x_gradient"), weight * x)
    torch.testing.assert_close(attribute(model, x, y, "absolute"), weight.abs().sum(1))
    torch.testing.assert_close(
        attribute(model, x, y, "occlusion", window=1, baseline=base), exact.sum(1), rtol=1e-5, atol=1e-7
    )
    labels = (torch.arange(36) // 7).view(1, 6, 6).expand(3, -1, -1)
    regions = torch.stack([(exact.sum(1) * (labels == k)).sum((1, 2)) for k in range(6)], 1)
    expected = regions.gather(1, labels.flatten(1)).view(3, 6, 6)
    for method in ("feature_ablation", "kernel_shap", "shapley_sampling"):
        result = attribute(model, x, y, method, segments=labels, baseline=base)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


class Tilted(nn.Module):
    """Two classes; the probability of the first is linear in the image."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        p = 0.5 + (x * self.weight).sum((1, 2, 3))
        return torch.stack([p, 1 - p], 1).log()


def test_rise_has_the_expectation_of_a_linear_probability() -> None:
    torch.manual_seed(0)
    size, keep = 8, 0.3
    weight = torch.randn(1, 2, size, size, dtype=F64) / 100
    x, base = torch.randn(1, 2, size, size, dtype=F64), torch.randn(1, 2, size, size, dtype=F64)
    ours = attribute(Tilted(weight), x, torch.tensor([0]), "rise", samples=40000, grid=2, keep=keep, baseline=base)
    # E[p M(i)] / keep, with Cov(M(i), M(j)) = keep (1 - keep) E[shares of i and j in the same cell] over all shifts
    cells = F.interpolate(torch.eye(4, dtype=F64).view(4, 1, 2, 2), (12, 12), mode="bilinear", align_corners=False)
    shifted = [cells[:, 0, a : a + 8, b : b + 8].flatten(1) for a in range(4) for b in range(4)]
    covariance = keep * (1 - keep) * torch.stack([c.T @ c for c in shifted]).mean(0)
    change = ((x - base) * weight).sum(1).flatten()
    start = 0.5 + (base * weight).sum()
    expected = (keep * (start + keep * change.sum()) + covariance @ change) / keep
    torch.testing.assert_close(ours.flatten(), expected, rtol=0.03, atol=0)
    assert (expected.max() - expected.min()) > 0.01


def test_rise_keeps_everything_or_sees_nothing() -> None:
    model, x = network(), images(2)
    probability = logits_and_gradient(model, x)[0].softmax(1).amax(1)
    kept = attribute(model, x, method="rise", samples=3, keep=1)
    torch.testing.assert_close(kept, probability.view(2, 1, 1).expand(2, 16, 16))
    # a constant model: every pixel's mean mask, the same for all images, near 1
    flat = attribute(Tilted(torch.zeros(1)), x, method="rise", samples=4000)
    assert torch.equal(flat[0], flat[1])
    assert (flat - 0.5).abs().max() < 0.05


def guided_ig_by_the_book(
    model: nn.Module, x: Tensor, y: int, base: Tensor, steps: int, fraction: float, dist: float
) -> Tensor:
    """One image in NumPy, after the pseudocode of arXiv:2106.09788."""

    def slope(at: Any) -> Any:
        return logits_and_gradient(model, torch.from_numpy(at)[None], torch.tensor([y]))[1][0].numpy()

    end, start = x.numpy(), base.numpy()
    now, result = start.copy(), np.zeros_like(end)
    length = np.abs(end - start).sum()
    for step in range(steps):
        actual = slope(now)
        ranked = np.abs(actual)
        alpha = (step + 1) / steps
        low = start + (end - start) * max(alpha - dist, 0.0)
        high = start + (end - start) * min(alpha + dist, 1.0)
        target = length * (1 - alpha)
        gamma = math.inf
        while gamma > 1:
            old = now.copy()
            position = (now - start) / (end - start)
            late = position < max(alpha - dist, 0.0)
            now[late] = low[late]
            current = np.abs(now - end).sum()
            if math.isclose(target, current, rel_tol=1e-9, abs_tol=1e-9):
                result += (now - old) * actual
                break
            ranked[now == high] = np.inf
            chosen = (ranked <= np.quantile(ranked, fraction, method="lower")) & (ranked < np.inf)
            reach = np.abs(now - high)[chosen].sum()
            gamma = (current - target) / reach if reach > 0 else math.inf
            now[chosen] = high[chosen] if gamma > 1 else (now + (high - now) * gamma)[chosen]
            result += (now - old) * actual
    return torch.from_numpy(result)


@pytest.mark.parametrize(("steps", "fraction", "dist"), [(10, 0.25, 0.02), (7, 0.1, 0.3), (4, 0.5, 1.0), (5, 1.0, 0.1)])
def test_guided_ig_equals_a_loop_over_images(steps: int, fraction: float, dist: float) -> None:
    model, x, y, base = network("lenet"), images(3), torch.tensor([0, 4, 2]), images(1)
    ours = attribute(model, x, y, "guided_ig", steps=steps, fraction=fraction, max_dist=dist, baseline=base)
    for i in range(3):
        plain = guided_ig_by_the_book(model, x[i], int(y[i]), base[0], steps, fraction, dist)
        torch.testing.assert_close(ours[i], plain, rtol=1e-6, atol=1e-9)


def test_guided_ig_on_the_straight_path_and_its_completeness() -> None:
    model, x, y = network("lenet"), images(3), torch.tensor([0, 4, 2])
    straight = attribute(model, x, y, "guided_ig", steps=9, max_dist=0.0)
    theirs = captum("IntegratedGradients", model, x, target=y, n_steps=9, method="riemann_left")
    torch.testing.assert_close(straight, theirs, rtol=1e-5, atol=1e-8)
    smooth, small = Counting().double(), torch.randn(6, 3, 4, 4, dtype=F64)
    logits = logits_and_gradient(smooth, small)[0]
    change = (logits - logits_and_gradient(smooth, torch.zeros_like(small))[0]).gather(1, logits.argmax(1, True))[:, 0]
    for method, steps in (("guided_ig", 400), ("integrated_gradients", 50)):
        total = attribute(smooth, small, method=method, steps=steps).sum((1, 2, 3))
        torch.testing.assert_close(total, change, rtol=0.02, atol=2e-3)
    x[:, :, 4:] = 0.25  # pixels that equal the baseline get nothing, and the path ends all the same
    part = attribute(model, x, y, "guided_ig", baseline=0.25)
    assert part[:, :, 4:].abs().max() == 0 < part.abs().max()
    assert attribute(model, torch.zeros_like(x), y, "guided_ig").abs().max() == 0


class Rectified(torch.autograd.Function):
    """ReLU that lets back only what is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(min=0) * (ctx.saved_tensors[0] > 0)


class Guided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rectified.apply(x)


def test_a_residual_network_that_uses_its_relus_again() -> None:
    model, x = network("resnet18"), images(2)
    y, base = torch.tensor([0, 3]), images(1)
    guided = attribute(model, x, y, "guided_backprop")
    rescaled = attribute(model, x, y, "deeplift", baseline=base)
    logits = logits_and_gradient(model, torch.cat([x, base]))[0]
    change = (logits[:2] - logits[2]).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(rescaled.sum((1, 2, 3)), change, rtol=1e-6, atol=1e-8)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Guided())
    torch.testing.assert_close(guided, logits_and_gradient(model, x, y)[1], rtol=1e-9, atol=1e-12)


class Parts(nn.Module):
    """Two linear maps with a function of the hidden units between them."""

    def __init__(self, between: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 20), nn.Linear(20, 3)
        self.between = between
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x.flatten(1)), *self.parts))


def test_a_relu_beside_a_shortcut_from_its_input() -> None:
    torch.manual_seed(0)
    model, x = Parts(lambda h, relu: h + relu(h), nn.ReLU(inplace=False)).double(), images(3, 1, 6)
    logits = logits_and_gradient(model, x)[0]
    zero = logits_and_gradient(model, torch.zeros_like(x))[0]
    change = (logits - zero).gather(1, logits.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(attribute(model, x, method="deeplift").sum((1, 2, 3)), change)
    wrong = captum("DeepLift", model, x, target=logits.argmax(1)).sum((1, 2, 3))  # loses the shortcut
    assert ((wrong - change).abs() > 0.01).any()
    expected = Parts(lambda h: h + Rectified.apply(h)).double()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(attribute(model, x, method="guided_backprop"), logits_and_gradient(expected, x)[1])


def twice(h: Tensor, relu: nn.Module) -> Tensor:
    if float(h.sum()) > 1e9:  # what torch.fx cannot trace
        return h
    return relu(relu(h) - 0.1)


KINDS = "ReLU, ELU, LeakyReLU, Sigmoid, Tanh, Softplus, MaxPool2d"
OTHER = (
    f"deeplift needs every nonlinearity of Parts to be one of the modules {KINDS}; it has another one, or a function "
    "such as F.relu"
)
FUNCTION = "guided_backprop needs ReLUs that are modules (nn.ReLU); Parts applies ReLU as a function"
NONE = "guided_backprop needs ReLUs that are modules (nn.ReLU); Parts has none"


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ("deeplift", Parts(F.relu), OTHER),
        ("deeplift", Parts(lambda h, relu: F.relu(relu(h) - 0.1), nn.ReLU()), OTHER),
        ("deeplift", Parts(torch.tanh), OTHER),
        ("deeplift", Parts(lambda h, a: a(h), nn.GELU()), OTHER),
        ("deeplift", Parts(lambda h, a: a(h), nn.Softmax(1)), OTHER),
        ("deeplift", Parts(lambda h, a: a(h) * h, nn.Sigmoid()), OTHER),
        ("deeplift", Parts(twice, nn.ReLU()), "deeplift needs one module per use, but parts.0 is used more than once"),
        ("guided_backprop", Parts(F.relu), FUNCTION),
        ("guided_backprop", Parts(lambda h, relu: F.relu(relu(h) - 0.1), nn.ReLU()), FUNCTION),
        ("guided_backprop", Parts(torch.tanh), NONE),
        ("gradcam", Parts(F.relu), "gradcam found no feature map in Parts; name a layer="),
    ],
)
def test_models_that_a_method_would_be_wrong_for(method: str, model: nn.Module, message: str) -> None:
    before = flags(model)
    with pytest.raises(ValueError) as error:
        attribute(model, images(2, 1, 6, torch.float32), method=method)
    assert str(error.value) == message
    assert flags(model) == before


def test_deeplift_refuses_pooling_windows_that_overlap() -> None:
    pool = nn.MaxPool2d(3, 2, padding=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Flatten(), nn.Linear(4 * 49, 3)).double()
    x, base = images(4), images(4)
    with pytest.raises(ValueError) as error:
        attribute(model, x, method="deeplift")
    assert str(error.value) == f"deeplift has no rule for windows that overlap, as in {pool}"
    y = torch.zeros(4, dtype=torch.int64)
    theirs = captum("DeepLift", model, x, base, target=y).sum((1, 2, 3))
    change = logits_and_gradient(model, x)[0][:, 0] - logits_and_gradient(model, base)[0][:, 0]
    assert ((theirs - change).abs() > 0.01).any()  # captum's is not complete there


@pytest.mark.parametrize("name", ["cnn_bn", "vgg11_bn", "resnet18"])
def test_gradcam_of_a_named_layer_is_captums(name: str) -> None:
    model, x = network(name, size=32), images(2, size=32)
    y = torch.tensor([1, 4])
    choices = {"cnn_bn": "bn2", "vgg11_bn": "features.10", "resnet18": "layer2.0"}
    last = {"cnn_bn": "relu3", "vgg11_bn": "features.27", "resnet18": "layer4"}
    for option, layer in (({"layer": choices[name]}, choices[name]), ({}, last[name])):
        theirs = captum("LayerGradCam", model, x, y, made_with=(model.get_submodule(layer),), relu_attributions=True)
        expected = F.interpolate(theirs, (32, 32), mode="bilinear")[:, 0]
        torch.testing.assert_close(attribute(model, x, y, "gradcam", **option), expected, rtol=1e-6, atol=1e-12)


def test_gradcam_of_a_transformer_by_hand() -> None:
    model, x = build("vit", 3, 5, 32).double().eval(), images(2, size=32)
    y = torch.tensor([1, 4])
    norm, found = model.get_submodule("encoder.layers.encoder_layer_5.ln_1"), []
    with frozen_eval(model):
        handle = norm.register_forward_hook(lambda module, inputs, output: found.append(output))
        logits = model(x.clone().requires_grad_())
        handle.remove()
        slope = torch.autograd.grad(logits[[0, 1], y].sum(), found[0])[0]
    cam = torch.einsum("bd,bnd->bn", slope[:, 1:].mean(1), found[0][:, 1:].detach()).relu()
    side = math.isqrt(cam.shape[1])
    expected = F.interpolate(cam.view(2, 1, side, side), (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(attribute(model, x, y, "gradcam"), expected)
    same = attribute(model, x, y, "gradcam", layer="encoder.layers.encoder_layer_5.ln_1")
    assert torch.equal(same, attribute(model, x, y, "gradcam"))


def test_gradcam_of_layers_that_will_not_do() -> None:
    model, x = network(), images(2)
    for layer, message in {
        "fc1": "gradcam needs a layer that gives feature maps (B, C, h, w), it gives (2, 128)",
        "nothing": "unknown layer 'nothing'; this model has: " + ", ".join(n for n, _ in model.named_modules() if n),
    }.items():
        with pytest.raises(ValueError) as error:
            attribute(model, x, method="gradcam", layer=layer)
        assert str(error.value) == message
    unused = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(392, 4)).double()
    unused[0].register_forward_hook(lambda module, inputs, output: inputs[0][:, :2, 1:-1, 1:-1] * 1.0)
    unused.add_module("last", Aside())
    with pytest.raises(ValueError, match="do not depend on the chosen layer"):
        attribute(unused, x, method="gradcam", layer="last.pool")


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(1)

    def forward(self, logits: Tensor) -> Tensor:
        self.pool(logits.view(2, 1, 2, 2))
        return logits


@pytest.mark.parametrize("method", ["gradient", "guided_ig", "deeplift", "guided_backprop", "gradcam", "occlusion"])
def test_activations_in_place_are_switched_off_and_on_again(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(784, 3),
    ).double()
    x, options = images(2), CHEAP.get(method, {})
    kept, inside = x.clone(), []
    model.register_forward_hook(lambda *_: inside.append((model[0].inplace, model[3].inplace)))
    result = attribute(model, x, method=method, **options)
    assert torch.equal(x, kept)
    assert set(inside) == {(False, False)}
    assert model[0].inplace and model[3].inplace
    model[0].inplace = model[3].inplace = False
    assert torch.equal(attribute(model, x, method=method, **options), result)
    assert not model[0].inplace and not model[3].inplace


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_everything_is_restored_when_the_model_raises(method: str) -> None:
    model, state = Counting(), torch.get_rng_state()
    model.head.bias.requires_grad_(False)
    model.drop.eval()
    model.inplace = model.broken = True
    before = flags(model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        attribute(model, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), method=method)
    assert flags(model) == before
    assert model.inplace
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 6, 6)},
            "x must be floating images (B, C, H, W), not empty; got torch.float32 of shape (2, 6, 6)",
        ),
        (
            {"x": torch.zeros(2, 2, 6, 6, dtype=torch.uint8)},
            "x must be floating images (B, C, H, W), not empty; got torch.uint8 of shape (2, 2, 6, 6)",
        ),
        (
            {"x": torch.zeros(0, 2, 6, 6)},
            "x must be floating images (B, C, H, W), not empty; got torch.float32 of shape (0, 2, 6, 6)",
        ),
        ({"x": torch.full((2, 2, 6, 6), math.nan)}, "x has NaN or infinity"),
        ({"target": torch.tensor([0, 3])}, "target must lie in 0 to 2, got 3"),
        ({"target": torch.tensor([-1, 0])}, "target must lie in 0 to 2, got -1"),
        (
            {"target": torch.tensor([0])},
            "target must be class indices, integers of shape (2,); got torch.int64 of shape (1,)",
        ),
        (
            {"target": torch.zeros(2)},
            "target must be class indices, integers of shape (2,); got torch.float32 of shape (2,)",
        ),
        ({"model": nn.Identity()}, "model must return logits (B, K), it returned shape (2, 2, 6, 6)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"model": linear().float(), "x": torch.randn(2, 2, 6, 6), "target": None} | change
    for method in ("gradient", "integrated_gradients", "guided_ig"):
        with pytest.raises(ValueError) as error:
            attribute(**call, method=method)
        slow = method == "integrated_gradients"  # one image at a time
        assert str(error.value) == (
            message.replace("shape (2, 2", "shape (1, 2") if slow and "model" in change else message
        )
    with pytest.raises(ValueError) as error:
        logits_and_gradient(**call)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "magic"}, f"unknown method 'magic'; known: {', '.join(ATTRIBUTIONS)}"),
        ({"method": "gradient", "steps": 3}, "gradient has no option 'steps'; it has: none"),
        (
            {"method": "guided_ig", "samples": 3},
            "guided_ig has no option 'samples'; it has: steps, fraction, max_dist, baseline",
        ),
        ({"method": "gradient", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"method": "smoothgrad", "samples": 0}, "samples must be a whole number from 1 to 1e+09, got 0"),
        ({"method": "smoothgrad", "samples": 2.5}, "samples must be a whole number from 1 to 1e+09, got 2.5"),
        ({"method": "guided_ig", "fraction": 2}, "fraction must be a number from 0 to 1, got 2"),
        ({"method": "occlusion", "window": 7}, "need 1 <= stride <= window <= 6, got window=7 and stride=3"),
        ({"method": "occlusion", "stride": 2}, "need 1 <= stride <= window <= 6, got window=1 and stride=2"),
        (
            {"method": "rise", "baseline": torch.zeros(4)},
            "baseline of shape (4,) cannot be broadcast to x, (2, 2, 6, 6)",
        ),
        ({"method": "rise", "baseline": math.inf}, "baseline has NaN or infinity"),
        (
            {"method": "kernel_shap", "segments": torch.zeros(2, 6, 5, dtype=torch.int64)},
            "segments must be integer labels of shape (2, 6, 6); got torch.int64 of shape (2, 6, 5)",
        ),
        (
            {"method": "feature_ablation", "segments": torch.zeros(2, 6, 6, dtype=torch.int64)},
            "segments must have at least two regions in each image",
        ),
    ],
)
def test_bad_options(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        attribute(linear().float(), torch.randn(2, 2, 6, 6), **call)
    assert str(error.value) == message


@given(st.integers(1, 4), st.integers(6, 20), st.integers(6, 20), st.integers(2, 40))
@settings(max_examples=15, deadline=None)
def test_superpixels_are_labels_without_gaps(channels: int, height: int, width: int, segments: int) -> None:
    x = torch.randn(2, channels, height, width)
    labels = superpixels(x, segments)
    assert labels.shape == (2, height, width)
    assert labels.dtype == torch.int64
    for one in labels:
        assert torch.equal(one.unique(), torch.arange(int(one.max()) + 1))
    assert torch.equal(superpixels(x.flip(0) * 3 - 1, segments), labels.flip(0))  # units do not matter


def test_superpixels_follow_the_object() -> None:
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    disc = ((row - 15) ** 2 + (column - 17) ** 2 < 81).float()
    for channels in (1, 3):
        labels = superpixels(disc.expand(1, channels, 32, 32))[0]
        assert 30 < int(labels.max()) < 80
        share = torch.stack([disc[labels == k].mean() for k in range(int(labels.max()) + 1)])
        mixed = torch.minimum(share, 1 - share)[labels]
        squares = F.interpolate(F.avg_pool2d(disc[None, None], 4), (32, 32))[0, 0]
        assert mixed.mean() < 0.6 * torch.minimum(squares, 1 - squares).mean()


def test_a_compiled_model_and_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = network(), images(2)
    plain = attribute(model, x, method="deeplift")
    compiled = nn.Module()  # as torch.compile makes it, with hooks that the modules inside do not see
    compiled._orig_mod = model
    assert torch.equal(attribute(compiled, x, method="deeplift"), plain)
    attribute(model, x, method="guided_ig", steps=1)
    assert capsys.readouterr().err == ""  # not a terminal
    attribute(model, x, method="guided_ig", steps=1, progress=True)
    assert "Guided integrated gradients:" in capsys.readouterr().err


def test_without_gradients_and_with_half_the_precision() -> None:
    model, x = network(), images(2)
    for method in ATTRIBUTIONS:
        options = CHEAP.get(method, {})
        exact = attribute(model, x, method=method, **options)
        with torch.no_grad():
            assert torch.equal(attribute(model, x, method=method, **options), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_on_a_gpu(method: str) -> None:
    model, x = network(), images(3)
    expected = attribute(model, x, method=method, **CHEAP.get(method, {}))
    state = torch.cuda.get_rng_state()
    result = attribute(model.cuda(), x.cuda(), method=method, **CHEAP.get(method, {}))
    assert result.device.type == "cuda"
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(torch.cuda.get_rng_state(), state)
