"""Each attribution method against captum, linear models, and what its authors wrote down."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from maps import trained
from networks import CHEAP, F64, Counting, captum, flags, images, linear, network
from torch import Tensor, nn

from sdecor.attribution import ATTRIBUTIONS, attribute, superpixels
from sdecor.models import build
from sdecor.saliency import frozen_eval, logits_and_gradient


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
    ours = attribute(model, x, y, "shapley_sampling", seed=4, segments=labels * 7 - 2, samples=20, baseline=base)
    for i in range(3):
        torch.manual_seed(4)
        one = {k: v[i : i + 1] if k != "baselines" else v for k, v in regions.items()}
        theirs = captum("ShapleyValueSampling", model, x[i : i + 1], **one, n_samples=20)[:, 0].double()
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-5, atol=1e-7)


def shapley(model: nn.Module, x: Tensor, y: int, labels: Tensor, base: Tensor) -> Tensor:
    """Shapley values by their definition, the mean over all orders, as a map."""
    count = int(labels.max()) + 1
    sets = torch.tensor(list(itertools.product([False, True], repeat=count)))
    shown = torch.where(sets[:, labels].unsqueeze(1), x, base)
    value = dict(zip(map(tuple, sets.tolist()), logits_and_gradient(model, shown)[0][:, y].tolist(), strict=True))
    result = torch.zeros(count, dtype=F64)
    for order in itertools.permutations(range(count)):
        members = [False] * count
        for i in order:
            before, members[i] = tuple(members), True
            result[i] += (value[tuple(members)] - value[before]) / math.factorial(count)
    return result[labels]


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_kernel_shap_of_few_regions_is_exact(count: int) -> None:
    model, x, base, y = network(), images(3), images(1), torch.tensor([0, 4, 2])
    labels = torch.arange(256).view(1, 16, 16) * count // 256
    expected = torch.stack([shapley(model, x[i], int(y[i]), labels[0], base[0]) for i in range(3)])
    how: dict[str, Any] = {"segments": labels.expand(3, -1, -1), "baseline": base}
    for samples in (2**count - 2, 500):
        ours = attribute(model, x, y, "kernel_shap", samples=samples, **how)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    near = attribute(model, x, y, "shapley_sampling", samples=300, **how)
    assert (near - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("count", "least"), [(4, 14), (5, 20), (49, 196)])
def test_kernel_shap_refuses_samples_that_give_noise(count: int, least: int) -> None:
    model, x = network(), images(2)
    labels = (torch.arange(256).view(1, 16, 16) * count // 256).expand(2, -1, -1)
    with pytest.raises(ValueError) as error:
        attribute(model, x, method="kernel_shap", segments=labels, samples=least - 1)
    assert str(error.value) == f"samples must be at least {least} for {count} regions, got {least - 1}"
    assert attribute(model, x, method="kernel_shap", segments=labels, samples=least).isfinite().all()


def test_kernel_shap_leaves_no_value_undecided() -> None:
    """Of sums a right fit is exact; in one draw of 100 so few sets as are allowed had decided too little."""

    class Add(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.sum((1, 2, 3))
            return torch.stack([total, -total], 1)

    for count in (5, 7, 8):
        x = torch.linspace(-3, 5, count, dtype=F64).view(1, 1, 1, count)
        segments = torch.arange(count).view(1, 1, count)
        for seed in range(60):
            result = attribute(Add(), x, 0, "kernel_shap", segments=segments, samples=4 * count, seed=seed)
            torch.testing.assert_close(result, x[:, 0], rtol=1e-9, atol=1e-9)


def test_kernel_shap_is_complete_and_nearer_than_captums() -> None:
    model, x, y = trained()
    x, y = x[:2], y[:2]
    how: dict[str, Any] = {"segments": (torch.arange(64).view(1, 8, 8) // 2).expand(2, -1, -1), "baseline": -1.0}
    logits = logits_and_gradient(model, torch.cat([x, torch.full_like(x[:1], -1)]))[0]
    change = (logits[:2] - logits[2]).gather(1, y[:, None])[:, 0]
    truth = attribute(model, x, y, "kernel_shap", samples=50000, **how)
    ours = [attribute(model, x, y, "kernel_shap", samples=500, seed=seed, **how) for seed in range(2)]
    for result in (truth, *ours):
        torch.testing.assert_close(result.sum((1, 2)) / 2, change, rtol=1e-5, atol=1e-5)
    theirs = []
    for one, k, labels in zip(x.split(1), y.split(1), how["segments"].split(1), strict=True):
        torch.manual_seed(0)
        theirs.append(captum("KernelShap", model, one, -1.0, k, feature_mask=labels.unsqueeze(1), n_samples=500)[0, 0])
    off = [float((result - truth).norm() / truth.norm()) for result in (*ours, torch.stack(theirs))]
    assert max(off[:2]) < min(0.1, off[2] / 2)
    assert np.corrcoef(*(result[0].flatten() for result in ours))[0, 1] > 0.99


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


@pytest.mark.parametrize("shape", [(16, 16), (13, 20), (5, 9)])
def test_rise_is_the_sum_of_its_masks_by_their_probabilities(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Flatten(), nn.Linear(3 * math.prod(shape), 4)).double(), torch.tensor([2])
    x, base = torch.randn(2, 1, 3, *shape, dtype=F64)
    ours = attribute(model, x, y, "rise", samples=30, grid=4, keep=0.4, baseline=base, seed=3, batch_size=7)
    torch.manual_seed(3)
    cells = [-(-side // 4) for side in shape]
    coarse = (torch.rand(30, 1, 4, 4) < 0.4).double()
    shift = (torch.rand(30, 2) * torch.tensor(cells)).long().tolist()
    large = F.interpolate(coarse, [5 * cell for cell in cells], mode="bilinear", align_corners=False)
    masks = torch.stack([m[:, i : i + shape[0], j : j + shape[1]] for m, (i, j) in zip(large, shift, strict=True)])
    probability = logits_and_gradient(model, base + (x - base) * masks)[0].softmax(1)[:, 2]
    expected = (probability.view(-1, 1, 1) * masks[:, 0]).sum(0) / (30 * 0.4)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=1e-8)  # F.interpolate has weights of single precision


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
    "such as F.relu: a map sums to "
)
GUIDED = "guided_backprop"
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
    assert str(error.value).startswith(message) if message == OTHER else str(error.value) == message
    assert flags(model) == before


class Far(nn.Module):
    """Bends far from where noise of unit size would look."""

    def __init__(self, bend: Any) -> None:
        super().__init__()
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        answer = self.bend(1 - 0.01 * x).flatten(1).sum(1)
        return torch.stack([answer, 0 * answer], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_deeplift_is_checked_where_it_is_used(dtype: torch.dtype) -> None:
    x, y = torch.full((3, 1, 2, 2), 50.0, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    straight = attribute(Far(F.relu), x, y, "deeplift")  # in no image does it bend
    torch.testing.assert_close(straight, torch.full_like(x, -0.5))
    x[1] = 200
    for start in (0, 1):
        with pytest.raises(ValueError, match="sums to 0, its logit changes by -4$") as error:
            attribute(Far(F.relu), x[start:], y[start:], "deeplift")
        assert "every nonlinearity of Far to be one of the modules ReLU" in str(error.value)
    right = attribute(Far(nn.ReLU()), x, y, "deeplift")
    torch.testing.assert_close(right, torch.stack([x[0] * 0 - 0.5, x[1] * 0 - 1, x[2] * 0 - 0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deeplift_in_half_precision_refuses_what_it_refuses(dtype: torch.dtype) -> None:
    bends: list[Any] = [F.softplus, F.relu, F.relu6, lambda z: F.hardtanh(z, -1, 1)]
    for bend in bends:
        for seed in range(6):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), Called(bend), nn.Linear(12, 3))
            for p in model.parameters():
                p.data *= 3
            with pytest.raises(ValueError, match="every nonlinearity"):
                attribute(model.to(dtype), torch.randn(2, 1, 4, 4).to(dtype), 0, "deeplift")


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_deeplift_within_autocast_is_that_without() -> None:
    model, x = network(), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attribute(model, x, 0, "deeplift")
    torch.testing.assert_close(inside, attribute(model, x, 0, "deeplift"), rtol=0, atol=0)


class Side(nn.Module):
    """A ReLU on the way to the logits, as a function or a module, and one beside it."""

    def __init__(self, relu: Any, of: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head, self.first = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), nn.ReLU()
        self.relu, self.aside, self.of = relu, nn.ReLU(), of
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(self.first(x))
        beside = {"features": z, "constants": self.table, "detached": z.detach()}[self.of]
        bias = self.aside(beside).mean() * (self.of != "features")
        return self.head(self.relu(z).mean((2, 3))) + bias


@pytest.mark.parametrize("of", ["features", "constants", "detached"])
def test_relus_beside_the_way_to_the_logits(of: str) -> None:
    x = torch.randn(3, 1, 6, 6)
    right = attribute(Side(nn.ReLU(), of), x, 1, "guided_backprop")
    plain = nn.Sequential(
        *[getattr(Side(nn.ReLU(), of), n) for n in ("first", "a", "relu")], *(nn.AdaptiveAvgPool2d(1),)
    )
    plain = nn.Sequential(*plain, nn.Flatten(), Side(nn.ReLU(), of).head)
    torch.testing.assert_close(right, captum("GuidedBackprop", plain, x, torch.tensor([1, 1, 1])))
    with pytest.raises(ValueError, match="applies ReLU as a function"):
        attribute(Side(F.relu, of), x, 1, "guided_backprop")


class Branch(nn.Module):
    """Applies ReLU as a module, or as a function where an image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        return self.head(torch.cat([F.relu(row) if row.mean() > 1 else self.relu(row) for row in h.split(1)]))


@pytest.mark.parametrize("rectify", [lambda h: h.clamp(min=0), lambda h: h.clamp_min(0), lambda h: h.clamp(0, 6)])
def test_guided_backprop_looks_at_all_images_and_all_names_of_relu(rectify: Any) -> None:
    x = torch.randn(4, 1, 2, 2) * 0.1
    assert attribute(Branch(), x, method="guided_backprop").shape == x.shape
    x[2] += 5
    with pytest.raises(ValueError, match=r"nn\.ReLU\); Branch applies ReLU as a function"):
        attribute(Branch(), x, method="guided_backprop")
    with pytest.raises(ValueError) as error:
        attribute(
            Parts(lambda h, relu: rectify(relu(h) - 0.1), nn.ReLU()), images(2, 1, 6, torch.float32), None, GUIDED
        )
    assert str(error.value) == FUNCTION
    kept = Parts(lambda h, relu: relu(h) / h.norm(dim=1, keepdim=True).clamp(min=1e-6), nn.ReLU())  # no ReLU
    assert attribute(kept, images(2, 1, 6, torch.float32), method="guided_backprop").isfinite().all()


def test_half_precision_is_full_precision_rounded() -> None:
    for method in ATTRIBUTIONS:
        model, x, y = network("lenet").float(), images(2, dtype=torch.float32), torch.tensor([0, 4])
        options = {
            **CHEAP.get(method, {}),
            **({"segments": superpixels(x, 6)} if "segments" in CHEAP.get(method, {}) else {}),
        }
        full = attribute(model, x, y, method, **options)
        for dtype in (torch.bfloat16, torch.float16):
            rounded = attribute(model.to(dtype), x.to(dtype), y, method, **options)
            assert rounded.dtype == dtype
            off = (rounded.float() - full).norm() / full.norm()
            assert off < 100 * torch.finfo(dtype).eps ** 0.9, (method, off)


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
