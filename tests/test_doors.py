"""What a classifier must give, at every function that takes one: logits (B, K) of two classes or more, finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdecor.attribution import ATTRIBUTIONS, attribute
from sdecor.config import Objective, Schedule
from sdecor.decorrelation import decorrelation
from sdecor.evaluation import exhibit, grid_pointing_game, measure
from sdecor.images import ImageData
from sdecor.measures import Case, evaluate, faithfulness, robustness, sanity
from sdecor.measures.case import MEASURES, needs
from sdecor.models import build, default_layers
from sdecor.objective import losses
from sdecor.prepare import remove_salient
from sdecor.saliency import logits_and_gradient, logits_of
from sdecor.training import device_of, fit
from sdecor.training import evaluate as accuracy
from sdecor.whitening import whiten

K, SIDE = 5, 12
COUNT = 6


class Net(nn.Module):
    """A small network, and what becomes of its logits."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.flat(self.pool(self.relu(self.conv(x))))))


def pictures(count: int = COUNT) -> ImageData:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    return ImageData.from_tensors(pixels, torch.arange(count) % K)


DATA = pictures()
X, Y = DATA.normalized(), DATA.labels
MAPS = torch.rand(COUNT, SIDE, SIDE)
FEW: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "guided_ig": {"steps": 2},
    "rise": {"samples": 4},
    "feature_ablation": {"segments": 4},
    "kernel_shap": {"segments": 4},
    "shapley_sampling": {"segments": 4, "samples": 2},
    "occlusion": {"window": 6},
}
GUIDED = Objective("saliencydecor-absolute", group_size=4)


def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return attribute(model, images, target)


def of_measure(name: str, model: nn.Module) -> Tensor:
    known: dict[str, Any] = {"model": model, "images": X, "target": Y, "explain": explain, "fill": "uniform"}
    return evaluate(Case(attribution=MAPS, samples=1, **known), [name])[name]


def of_training(model: nn.Module) -> list[float]:
    return fit(model, DATA, Objective("standard"), Schedule(epochs=1, batch_size=COUNT), progress=False).terms["total"]


#: Every function that takes a classifier, and what it makes of one.
DOORS: dict[str, Callable[[nn.Module], Any]] = {
    "logits_of": lambda m: logits_of(m, X),
    "logits_and_gradient": lambda m: logits_and_gradient(m, X)[1],
    "logits_and_gradient of a target": lambda m: logits_and_gradient(m, X, Y)[1],
    "accuracy": lambda m: torch.tensor(list(accuracy(m, DATA).values())),
    "measure": lambda m: torch.tensor(measure(m, DATA, metrics=())[0]["gini"]),
    "exhibit": lambda m: exhibit(m, DATA)["saliency"].float(),
    "grid_pointing_game": lambda m: grid_pointing_game(m, pictures(8)),
    "remove_salient": lambda m: remove_salient(DATA, m, "gradient", 0.3).images.float(),
    "default_layers": lambda m: default_layers(m, X) == ("conv", "pool"),
    "losses": lambda m: losses(m, X, Y, GUIDED, generator=torch.Generator().manual_seed(0))["total"].detach(),
    "fit": lambda m: torch.tensor(of_training(m)),
    "attack": lambda m: robustness.attack(m, X, Y, epsilon=0.1, steps=2),
    "perturbation_curve": lambda m: faithfulness.perturbation_curve(m, X, Y, MAPS, fill="constant"),
    "faithfulness": lambda m: torch.stack([*faithfulness.faithfulness(m, X, Y, MAPS, fill="constant").values()]),
    "parameter_randomization": lambda m: torch.stack([*sanity.parameter_randomization(m, _maps, X, Y).values()]),
    **{f"attribution {n}": lambda m, n=n: attribute(m, X, Y, n, **FEW.get(n, {})) for n in ATTRIBUTIONS},
    **{f"prediction by {n}": lambda m, n=n: attribute(m, X, None, n, **FEW.get(n, {})) for n in ("gradient", "rise")},
    **{f"measure {n}": lambda m, n=n: of_measure(n, m) for n in MEASURES if "model" in needs(n)},
}


def _maps(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return attribute(model, images, target, "absolute")


class Stripped:
    """As a library's own output object: the logits are an attribute."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


LOGITS = "model must return logits (B, K)"
#: Changes of the logits, and what has to be said.
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dict": (lambda z: {"logits": z}, f"{LOGITS} as a tensor, it returned a dict; wrap it to return that alone"),
    "tuple": (lambda z: (z, z), f"{LOGITS} as a tensor, it returned a tuple; wrap it to return that alone"),
    "list": (lambda z: [z], f"{LOGITS} as a tensor, it returned a list; wrap it to return that alone"),
    "object": (Stripped, f"{LOGITS} as a tensor, it returned a Stripped; wrap it to return that alone"),
    "namespace": (lambda z: SimpleNamespace(logits=z), f"{LOGITS} as a tensor, it returned a SimpleNamespace; wrap it"),
    "array": (
        lambda z: z.detach().numpy(),
        f"{LOGITS} as a tensor, it returned a ndarray; wrap it to return that alone",
    ),
    "none": (lambda z: None, f"{LOGITS} as a tensor, it returned a NoneType; wrap it to return that alone"),
    "one logit": (lambda z: z[:, :1], f"{LOGITS} of two classes or more, it returned 1; of one logit z, torch.cat("),
    "no logit": (lambda z: z[:, :0], f"{LOGITS} of two classes or more, it returned 0; "),
    "flat": (lambda z: z[:, 0], f"{LOGITS}, it returned torch.float32 of shape ("),
    "maps": (lambda z: z[:, :, None, None].expand(-1, -1, 4, 4), f"{LOGITS}, it returned torch.float32 of shape ("),
    "whole numbers": (lambda z: z.long(), f"{LOGITS}, it returned torch.int64 of shape ("),
    "one row": (lambda z: z.repeat(2, 1), f"{LOGITS}, it returned torch.float32 of shape ("),
    "nan": (lambda z: z * torch.nan, f"{LOGITS} that are finite, it returned NaN or infinity for "),
    "infinity": (lambda z: z / 0, f"{LOGITS} that are finite, it returned NaN or infinity for "),
}
#: Training says of a loss that is not finite which step it was; layers are no matter of numbers.
OF_NUMBERS = {"losses", "default_layers"}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(door=st.sampled_from(sorted(DOORS)), wrong=st.sampled_from(sorted(WRONG)))
def test_every_door_refuses_what_is_no_logits_in_one_line(door: str, wrong: str) -> None:
    change, said = WRONG[wrong]
    model = Net(change)
    modes, asked = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    if wrong in ("nan", "infinity") and door in OF_NUMBERS:
        return
    if wrong in ("nan", "infinity") and door == "fit":
        with pytest.raises(FloatingPointError, match="^loss term 'classification' became .* at step 0; "):
            DOORS[door](model)
        return
    with pytest.raises(ValueError) as caught:
        DOORS[door](model)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value), f"{door}, {wrong}: {caught.value}"
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == (modes, asked)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("door", DOORS)
def test_logits_in_half_precision_are_logits(door: str) -> None:
    if door in ("attribution deeplift", "measure local_lipschitz", "measure max_sensitivity"):
        return  # they look at differences that are below the precision of such logits
    torch.manual_seed(1)
    expected = DOORS[door](Net())
    torch.manual_seed(1)
    found = DOORS[door](Net(lambda z: z.bfloat16()))
    if isinstance(expected, bool):
        assert found == expected
    elif expected.numel():
        close = (found.double() - expected.double()).abs() <= 0.1 * expected.double().abs().max() + 0.02
        assert close.double().mean() > 0.9 or door in UNSTEADY, door


#: Ranks and searches, where a small change may decide another way.
UNSTEADY = {
    "attack",
    "measure monotonicity",
    "measure explanation_shift",
    "remove_salient",
    "measure faithfulness_correlation",
}


@pytest.mark.parametrize("door", DOORS)
def test_a_mode_without_gradients_around_it_changes_nothing(door: str) -> None:
    torch.manual_seed(1)
    expected = DOORS[door](Net())
    model = Net()
    for mode in (torch.inference_mode, torch.no_grad):
        torch.manual_seed(1)
        with mode():
            if door == "losses":  # whose result has a graph: it is for training alone
                continue
            if door == "fit":
                found = DOORS[door](Net()) if mode is torch.no_grad else expected
            else:
                found = DOORS[door](model)
        assert found == expected if isinstance(expected, bool) else torch.equal(found, expected)


def test_two_logits_of_one_have_its_probabilities() -> None:
    """What the message says to do is right."""
    z = torch.randn(7, 1, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([torch.zeros_like(z), z], 1).softmax(1)[:, 1:], z.sigmoid())


@pytest.mark.parametrize("target", [3, [3] * COUNT, (3,) * COUNT, np.full(COUNT, 3), np.int64(3), torch.tensor(3)])
def test_a_target_may_be_a_number_a_list_or_an_array(target: Any) -> None:
    expected = attribute(Net(), X, torch.full((COUNT,), 3))
    assert torch.equal(attribute(Net(), X, target), expected)
    assert torch.equal(logits_and_gradient(Net(), X, target)[1], expected)


@pytest.mark.parametrize(
    "target", ["cat", [0.5] * COUNT, [[1]] * COUNT, [0, 1], {"a": 1}, [None] * COUNT, True, [1j] * COUNT]
)
def test_other_targets_are_refused_by_name(target: Any) -> None:
    with pytest.raises(ValueError, match="^target must be class indices, integers of shape .*; got "):
        attribute(Net(), X, target)


@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "gradcam", "guided_backprop", "deeplift", "guided_ig"])
def test_a_model_that_cuts_the_graph_is_refused_in_plain_words(method: str) -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                return super().forward(x)

    said = "^the logits of this model cannot be differentiated: it detaches something on the way to them$"
    with pytest.raises(ValueError, match=said):
        attribute(Cut(), X, Y, method, **FEW.get(method, {}))
    with pytest.raises(ValueError, match=said):
        losses(Cut(), X, Y, Objective("consistency-absolute"))


@pytest.mark.parametrize("name", ["consistency-absolute", "gradient-penalty", "adversarial", "saliencydecor-absolute"])
def test_a_model_that_cuts_the_graph_below_a_head(name: str) -> None:
    class Head(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                z = self.flat(self.pool(self.relu(self.conv(x))))
            return self.head(z)

    settings = {"group_size": 4} if name == "saliencydecor-absolute" else {}
    with pytest.raises(ValueError, match="^the logits of this model cannot be differentiated"):
        fit(Head(), DATA, Objective(name, **settings), Schedule(epochs=1), progress=False)
    assert fit(Head(), DATA, Objective("standard"), Schedule(epochs=1), progress=False).seconds


@pytest.mark.parametrize("model", [None, lambda x: x, "lenet"])
def test_a_model_is_a_module(model: Any) -> None:
    doors: list[Any] = [logits_and_gradient, attribute, default_layers]
    doors += [lambda m, _: fit(m, DATA, GUIDED), lambda m, _: measure(m, DATA), lambda m, _: accuracy(m, DATA)]
    for door in doors:
        with pytest.raises(ValueError, match="^model must be a torch.nn.Module, got "):
            door(model, X)


@pytest.mark.parametrize("data", [(X, Y), [X], torch.utils.data.TensorDataset(X, Y)])
def test_a_data_set_is_one_of_ours(data: Any) -> None:
    doors: list[Any] = [lambda: fit(Net(), data, GUIDED), lambda: measure(Net(), data), lambda: accuracy(Net(), data)]
    for door in doors:
        with pytest.raises(ValueError, match="^(train|data) must be ImageData or ImageStream, got .*from_tensors"):
            door()


def test_what_training_is_told(tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedule": Schedule(epochs=1), "progress": False}
    by_name = fit(Net(), DATA, "standard", checkpoint=str(tmp_path / "ck.pt"), **how)  # type: ignore[arg-type]
    assert by_name.terms == fit(Net(), DATA, Objective("standard"), **how).terms and (tmp_path / "ck.pt").exists()
    with pytest.raises(ValueError, match="^schedule must be of the class Schedule, got int$"):
        fit(Net(), DATA, GUIDED, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^objective must be of the class Objective, got dict$"):
        fit(Net(), DATA, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [1, [0, 1, 2, 3, 4, 0], Y.int(), Y.numpy()])
def test_losses_take_every_kind_of_target(target: Any) -> None:
    wanted = torch.as_tensor(target).long().expand(COUNT)
    objective = Objective("standard")
    assert losses(Net(), X, target, objective)["total"] == losses(Net(), X, wanted, objective)["total"]


@pytest.mark.parametrize("z", [X.numpy(), [1.0], None, X * 1j])
def test_features_are_a_tensor(z: Any) -> None:
    for door in (whiten, decorrelation):
        with pytest.raises(ValueError, match="^z must be "):
            door(z)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_a_ridge_is_a_number_from_0_on(eps: float) -> None:
    with pytest.raises(ValueError, match="^eps must be finite and at least 0, got "):
        whiten(torch.randn(9, 4), 2, eps=eps)


@pytest.mark.parametrize("size", [2.0, "2", 0, -2, 3])
def test_a_group_size_is_a_whole_number(size: Any) -> None:
    for door in (whiten, decorrelation):
        with pytest.raises(ValueError, match="^group_size=.* does not divide the 4 channels of layer 'features'"):
            door(torch.randn(9, 4), group_size=size)


def test_a_model_made_where_nothing_can_be_differentiated() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(400, K)).train()
    for name in ATTRIBUTIONS:
        with pytest.raises(ValueError, match="^Sequential was made under torch.inference_mode, .* load its state_dict"):
            attribute(model, X, Y, name)
    assert model.training and model[1].inplace and all(p.requires_grad for p in model.parameters())


def test_modes_come_back_by_the_modules_own_train() -> None:
    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> Merging:
            if mode == self.merged:
                self.weight.data += 1 if self.merged is False else -1
                self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Merging(4, K))
    model.train()[1].eval()
    before = model[4].weight.clone()
    attribute(model, X, Y)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert not model[4].merged and torch.allclose(model[4].weight, before)


def test_a_scripted_model_that_works_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(400, K))
    expected = attribute(model, X, Y)
    torch.testing.assert_close(attribute(torch.jit.script(model), X, Y), expected)


def test_weights_made_of_the_images_have_their_share_of_the_gradient() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bias = nn.Conv2d(3, 2, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.bias(x.mean((0, 2, 3)))
            return F.conv2d(x, self.conv.weight, bias, (1, 1), (1, 1)).tanh().mean((2, 3))

    model, leaf = Dynamic(), X[:1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(attribute(model, X[:1], 0), expected)


def test_a_model_of_one_size_with_a_pooled_gate_is_measured_without_mosaics() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv(self.pool(x)).sigmoid()

    size = 8 * SIDE**2
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Gate(), nn.Flatten(), nn.Linear(size, 8))
    model.extend([nn.ReLU(), nn.Linear(8, K)])
    metrics = measure(model, pictures(8))[0]
    assert "grid_pointing_game" not in metrics and "gini" in metrics
    assert "grid_pointing_game" in measure(Net(), pictures(8))[0]


@pytest.mark.parametrize("x", [X.numpy(), X.tolist(), None])
def test_images_are_a_tensor(x: Any) -> None:
    with pytest.raises(ValueError, match=r"^x must be a tensor of images \(B, C, H, W\), got .*; pass torch.as_tensor"):
        attribute(Net(), x)


def test_precision_of_images_and_model() -> None:
    for model, x in ((Net().double(), X), (Net(), X.double()), (Net().half(), X)):
        with pytest.raises(ValueError, match=r"^the images are torch.* on cpu, the model is torch.* on cpu; convert"):
            attribute(model, x)
        with pytest.raises(ValueError, match="^the images are "):
            logits_and_gradient(model, x)
    exact = attribute(Net().double(), X.double())
    torch.testing.assert_close(attribute(Net(), X).double(), exact, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="^the images are torch.float32 on cpu, the model is torch.float64 on cpu"):
        fit(Net().double(), DATA, Objective("standard"), progress=False)


# --- training networks of one's own ---------------------------------------------------------------------------------


def curve(model: nn.Module, **how: Any) -> list[float]:
    torch.manual_seed(0)
    return fit(model, DATA, GUIDED, Schedule(epochs=2, batch_size=3), progress=False, **how).terms["total"]


def test_a_compiled_model_is_trained_as_itself() -> None:
    plain, given_ = Net(), Net()
    expected = curve(plain, compiled=True)
    assert curve(torch.compile(given_)) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), given_.parameters(), strict=True))
    found = measure(torch.compile(given_), DATA, metrics=())[0]
    assert found == measure(given_, DATA, metrics=())[0] and "correlation_conv" in found


def test_frozen_parameters_stay_and_a_model_without_others_is_refused() -> None:
    model = Net().requires_grad_(False)
    with pytest.raises(ValueError, match="^Net has no parameter to train: none has requires_grad$"):
        curve(model)
    model.head.requires_grad_(True)
    before = model.conv.weight.clone()
    curve(model)
    assert torch.equal(model.conv.weight, before) and not model.conv.weight.requires_grad


def test_lazy_layers_are_filled_by_the_seed() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(K))

    plan = Schedule(epochs=1, batch_size=3)
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # of no effect
        runs.append(fit(lazy(), DATA, Objective("standard"), plan, seed=3, progress=False).terms["total"])
    assert runs[0] == runs[1]
    assert fit(lazy(), DATA, Objective("standard"), plan, seed=4, progress=False).terms["total"] != runs[0]


def test_what_does_not_fit_the_images_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^Sequential cannot take images of shape \(2, 3, 12, 12\): .*1 channels"):
        fit(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 4)), DATA, Objective("standard"))


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cpu:3"])
def test_devices_that_are_none_to_compute_on(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device '{name}' is none that sdecor computes on; use cpu, cuda "):
        device_of(name)
    assert device_of("cpu:0").type == "cpu"


MAKERS = """
import torch
from torch import nn

def thirteen(c, k, side): return nn.Sequential(nn.Flatten(), nn.Linear(c * side * side, 13))
def deaf(c, k, side): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(k))
def nothing(c, k, side): return None
def two(c, k): return nn.Linear(c, k)
def lazy(c, k, side): return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(k))
number = 3
obj = nn.Linear(2, 2)
"""


def test_factories_that_will_not_do(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "makers.py").write_text(MAKERS)
    monkeypatch.syspath_prepend(tmp_path)
    said = {
        "thirteen": "model 'makers:thirteen' gives 13 logits for 5 classes; it must use its num_classes",
        "deaf": r"model 'makers:deaf' does not do for images of shape \(1, 8, 8\): .*to have 3 channels, but got 1 .*",
        "nothing": "model 'makers:nothing' must return an nn.Module, it returned NoneType",
        "two": r"model 'makers:two' must take \(in_channels, num_classes, image_size\), it takes \(c, k\): .*",
        "obj": "model 'makers:obj' must name what makes a network, it names a Linear itself",
        "number": "model 'makers:number' must name a callable, it names a int",
        "absent": "model 'makers:absent': module 'makers' has no 'absent'",
    }
    for name, message in said.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            build(f"makers:{name}", 1, 5, 8)
    torch.manual_seed(0)
    net = build("makers:lazy", 1, 5, 8)
    torch.manual_seed(0)
    again = build("makers:lazy", 1, 5, 8)
    assert [p.shape for p in net.parameters()] == [(4, 1, 3, 3), (4,), (5, 144), (5,)]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    (tmp_path / "makers.py").write_text(MAKERS.replace("LazyConv2d(4", "LazyConv2d(6"))
    with pytest.raises(ValueError, match=r"makers\.py, or what it imports, has changed since it was loaded; start Pyt"):
        build("makers:lazy", 1, 5, 8)
