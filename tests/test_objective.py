"""The objective: each method a setting of the same sum, exact gradients from a reused graph, and an unchanged model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sdecor.objective
from sdecor.config import Objective
from sdecor.decorrelation import decorrelation
from sdecor.masking import lowest, masked, replacement
from sdecor.models import build
from sdecor.objective import DIRECTIONS, Step, capture, divergence, frozen_statistics, layers_of, losses
from sdecor.registers import FILLS, METHODS, PENALTIES, TERMS
from sdecor.saliency import pixel_score
from sdecor.whitening import GroupWhitening

F64 = torch.float64
BOTH = ("conv2", "fc2")
WEIGHT = "weight of '{}' must be finite and at least 0, got {}"
ALL = "correlation, zca, covariance, barlow, vicreg, decov"


def both(c: float = 1, d: float = 1, sign: str = "absolute", **settings: Any) -> Objective:
    """SaliencyDecor with weights c and d."""
    return Objective(f"saliencydecor-{sign}", {"consistency": c, "decorrelation": d}, **settings)


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return build("lenet", 1, 10, 28)


def batch(n: int = 8, channels: int = 1, size: int = 28) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, generator=draw), torch.randint(10, (n,), generator=draw)


def noise(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters())))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Settings -------------------------------------------------------------------------------------------------------------


def test_the_methods() -> None:
    six = ("standard", "decorrelation", "consistency-absolute", "consistency-signed")
    six += ("saliencydecor-absolute", "saliencydecor-signed")
    parts = {m: (list(Objective(m).terms), Objective(m).settings.get("score")) for m in METHODS}
    c, k, d = "classification", "consistency", "decorrelation"
    expected = [([c], None), ([c, d], None), ([c, k], "absolute"), ([c, k], "signed")]
    expected += [([c, k, d], "absolute"), ([c, k, d], "signed")]
    assert [parts[m] for m in six] == expected
    assert parts["consistency-random"] == ([c, k], "random")
    assert parts["noise"] == ([c, "masked_classification"], None)
    o = both(0.5, 2, "signed", fraction=0.3, fill="blur", layers=("fc2",))
    assert o.terms == {c: 1.0, k: 0.5, d: 2.0}
    assert o.settings == {
        "score": "signed", "fraction": 0.3, "fill": "blur", "fill_value": 0.0, "direction": "clean_to_masked",
        "penalty": "correlation", "group_size": 16, "layers": ("fc2",), "place": "before",
    }  # fmt: skip
    assert len({Objective(m) for m in METHODS}) == len(METHODS)
    assert Objective() == Objective("saliencydecor-absolute") == both()
    assert Objective("decorrelation", {"decorrelation": 0}).settings == {}  # a term that is left out has no settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0}, "fraction must be strictly between 0 and 1, got 0.0"),
        ({"fraction": 1.0}, "fraction must be strictly between 0 and 1, got 1.0"),
        ({"fraction": float("nan")}, "fraction must be strictly between 0 and 1, got nan"),
        ({"fraction": "half"}, "fraction must be of type float, got 'half' (str)"),
        ({"fill": "noise"}, "unknown fill 'noise'; known: uniform, mean, constant, blur"),
        ({"fill_value": 1.0}, "fill_value has no effect with fill='uniform'"),
        ({"direction": "reverse"}, "unknown direction 'reverse'; known: clean_to_masked, detached, symmetric"),
        ({"penalty": "whitening"}, f"unknown penalty 'whitening'; known: {ALL}"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"score": "signed"}, "score='absolute' belongs to method 'saliencydecor-absolute'; choose another method"),
        (
            {"lambda_c": 2},
            "method 'saliencydecor-absolute' has no setting 'lambda_c'; it has: fraction, fill, fill_value, direction, "
            "penalty, group_size, layers, place",
        ),
        ({"place": "behind"}, "unknown place 'behind'; known: before, after"),
        ({"place": "after", "layers": ("fc2",)}, "place has no effect with layers=('fc2',)"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Objective(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("method", "weights", "message"),
    [
        ("consistency-signed", {"consistency": -1}, WEIGHT.format("consistency", -1.0)),
        ("noise", {"classification": float("nan")}, WEIGHT.format("classification", "nan")),
        ("decorrelation", {"decorrelation": float("inf")}, WEIGHT.format("decorrelation", "inf")),
        ("standard", {"consistency": 1}, "method 'standard' has no term 'consistency'; it has: classification"),
        ("standard", {"classification": 0}, "all terms of method 'standard' have weight 0"),
        ("sgt", {}, f"unknown method 'sgt'; known: {', '.join(METHODS)}"),
    ],
)  # fmt: skip
def test_impossible_weights(method: str, weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Objective(method, weights)
    assert str(error.value) == message


# The terms ------------------------------------------------------------------------------------------------------------


def test_standard_is_plain_training_bit_for_bit() -> None:
    x, y = batch()
    ours, plain = lenet(), lenet()
    for model, loss in (
        (ours, lambda m: losses(m, x, y, Objective("standard"))["total"]),
        (plain, lambda m: cross_entropy(m(x), y)),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    assert same(list(ours.parameters()), list(plain.parameters()))
    terms, expected = losses(ours, x, y, Objective("standard")), cross_entropy(plain(x), y)
    assert torch.equal(terms["total"], expected)
    assert same(gradients(ours, terms["total"]), gradients(plain, expected))
    assert list(terms) == ["classification", "total"]


@pytest.mark.parametrize("method", METHODS)
def test_terms_add_up_and_each_is_what_it_says(method: str) -> None:
    model, (x, y) = lenet(), batch()
    others = [name for name in METHODS[method].terms if name != "classification"]
    o = Objective(method, dict(zip(others, (0.7, 1.3), strict=False)))
    terms = losses(model, x, y, o, generator=noise())
    assert list(terms) == [*o.terms, "total"]
    assert all(t.shape == () for t in terms.values())
    assert torch.equal(terms["total"], sum(o.terms[name] * terms[name] for name in o.terms))
    if "classification" in terms:
        assert torch.equal(terms["classification"], cross_entropy(model(x), y))
    if "decorrelation" in terms:
        names = ("relu2", "relu4") if o.settings["place"] == "after" else BOTH
        with capture(model, names) as found:
            model(x)
        each = [decorrelation(found[n].detach(), kind=o.settings["penalty"]) for n in names]
        assert torch.equal(terms["decorrelation"], torch.stack(each).mean())
        assert terms["decorrelation"] > 0
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf)[torch.arange(len(y)), y].sum(), leaf)
    draws, kind = noise(), o.settings.get("score", "random")
    score = torch.rand(8, 28, 28, generator=draws) if kind == "random" else pixel_score(g, kind)
    blanked = masked(x, lowest(score, 0.5), replacement(x, generator=draws))
    if "consistency" in terms:
        assert torch.equal(terms["consistency"], divergence(model(x), model(blanked)))
        assert terms["consistency"] > 0
    if "masked_classification" in terms:
        assert torch.equal(terms["masked_classification"], cross_entropy(model(blanked), y))


def test_a_step_makes_each_quantity_once() -> None:
    model, x, y = Smooth(), torch.randn(5, 2, 4, 4, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    step = Step(model, x, y, generator=noise())
    first = step.masked_logits("absolute", 0.5, "uniform")
    assert model.calls == 2
    assert step.masked_logits("absolute", 0.5, "uniform") is first
    assert step.mask("absolute", 0.5) is step.mask("absolute", 0.5)
    assert step.saliency is step.saliency and step.logits is step.logits
    assert model.calls == 2
    assert step.masked_logits("absolute", 0.5, "mean") is not first
    assert model.calls == 3
    slope = step.gradient
    assert slope.requires_grad and not step.saliency.requires_grad
    assert torch.equal(slope.detach(), step.saliency)
    assert torch.equal(Step(model, x, y).score("signed"), slope.detach().sum(1))


def test_features_of_an_earlier_pass_are_not_taken_for_those_of_this_one() -> None:
    model, (x, y) = lenet(), batch()
    with capture(model, ("fc2",)) as found:
        model(x)
        step = Step(lenet(), x, y, layers=("fc2",), captured=found)
        with pytest.raises(ValueError, match="^the forward pass did not reach the layers fc2$"):
            _ = step.features


def test_a_gradient_penalty_is_differentiable_and_says_when_it_may_not_be() -> None:
    model, x, y = Smooth(), torch.randn(3, 2, 4, 4, dtype=F64), torch.tensor([0, 1, 2])

    def value(w: Tensor) -> Tensor:
        changed = dict(model.named_parameters()) | {"conv.weight": w}
        return (
            Step(lambda v: torch.func.functional_call(model, changed, v), x, y).gradient.square().sum((1, 2, 3)).mean()
        )

    assert torch.autograd.gradcheck(value, model.conv.weight.detach().clone().requires_grad_())
    step = Step(model, x, y, differentiable=False)
    with pytest.raises(ValueError, match="a term asks for the input gradient, but was entered with gradient=False"):
        _ = step.gradient
    compiled = Step(torch.compile(model, backend="eager"), x, y)
    assert torch.allclose(compiled.saliency, Step(model, x, y).saliency, rtol=1e-12)
    with pytest.raises(ValueError, match="asks for a second derivative, which a compiled model has not"):
        _ = compiled.log_probability_gradient
    assert {name for name, term in TERMS.items() if term.gradient} == {"consistency", "gradient_penalty"}


def test_consistency_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), np.array([[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]])
    clean = (torch.tensor(p).log() + 3).requires_grad_()
    blanked = (torch.tensor(q).log() - torch.tensor([[1.0], [2.0]])).requires_grad_()
    pq = (0.5 * np.log(2) + 0 + 0.25 * np.log(0.5)) / 2  # mean over the batch; the second image does not change
    qp = (0.25 * np.log(0.5) + 0 + 0.5 * np.log(2)) / 2
    expected = {"clean_to_masked": pq, "detached": pq, "symmetric": (pq + qp) / 2}
    assert tuple(expected) == DIRECTIONS
    for direction, value in expected.items():
        assert divergence(clean, blanked, direction).item() == pytest.approx(value, rel=1e-12)
    to_clean, to_masked = torch.autograd.grad(divergence(clean, blanked), [clean, blanked])
    np.testing.assert_allclose(to_masked, (q - p) / 2, atol=1e-15)  # of KL(p || q) with respect to the logits of q
    inner = p * (np.log(p / q) - (p * np.log(p / q)).sum(1, keepdims=True)) / 2
    np.testing.assert_allclose(to_clean, inner, atol=1e-15)
    detached = torch.autograd.grad(divergence(clean, blanked, "detached"), [clean, blanked], allow_unused=True)
    assert detached[0] is None
    assert torch.equal(detached[1], to_masked)
    both = torch.autograd.grad(divergence(clean, blanked, "symmetric"), [clean, blanked])
    other = torch.autograd.grad(divergence(blanked, clean), [clean, blanked])
    np.testing.assert_allclose(both[0], (to_clean + other[0]) / 2, atol=1e-15)
    np.testing.assert_allclose(both[1], (to_masked + other[1]) / 2, atol=1e-15)


def test_consistency_is_zero_for_the_same_logits_and_safe_for_extreme_ones() -> None:
    logits = torch.randn(4, 10)
    for direction in DIRECTIONS:
        assert divergence(logits, logits + 5, direction).abs() < 1e-6
        assert divergence(1e4 * logits, -1e4 * logits, direction).isfinite()
        assert divergence(logits.bfloat16(), logits.bfloat16() + 1, direction).dtype == torch.float32


def recomputed(model: nn.Module, x: Tensor, y: Tensor, o: Objective, generator: torch.Generator) -> Tensor:
    """The same objective with a forward and backward pass of its own just for the score."""
    s = o.settings
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf).gather(1, y[:, None]).sum(), leaf)
    blanked = masked(
        x, lowest(pixel_score(g, s["score"]), s["fraction"]), replacement(x, s["fill"], generator=generator)
    )
    with capture(model, BOTH) as features:
        logits = model(x)
        total = cross_entropy(logits, y)
        penalties = [decorrelation(features[n], kind=s["penalty"], group_size=s["group_size"]) for n in BOTH]
    change = divergence(logits, model(blanked), s["direction"])
    return total + o.terms["consistency"] * change + o.terms["decorrelation"] * torch.stack(penalties).mean()


@pytest.mark.parametrize("score", ["absolute", "signed"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_reused_graph_gives_the_same_bits_as_a_separate_scoring_pass(score: str, direction: str) -> None:
    model, (x, y) = lenet(), batch(16)
    o = both(0.8, 0.6, score, direction=direction)
    total = losses(model, x, y, o, generator=noise())["total"]
    ours = gradients(model, total)
    separate = recomputed(model, x, y, o, noise())
    assert torch.equal(total, separate)
    assert same(ours, gradients(model, separate))
    for call in ({}, {"inputs": list(model.parameters())}):  # and by backward, as in training
        model.zero_grad()
        losses(model, x, y, o, generator=noise())["total"].backward(**call)
        assert same([p.grad for p in model.parameters()], ours)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_same_bits_for_every_fill_and_penalty(fill: str, penalty: str) -> None:
    model, (x, y) = lenet(), batch(6)
    o = Objective(fill=fill, penalty=penalty, fraction=0.3)
    total, separate = losses(model, x, y, o, generator=noise())["total"], recomputed(model, x, y, o, noise())
    assert same(gradients(model, total), gradients(model, separate))


class Smooth(nn.Module):
    """Twice differentiable, in float64, with the same kinds of layers as a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tanh1 = nn.Conv2d(2, 4, 3), nn.Tanh()
        self.hidden, self.tanh2, self.head = nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)
        self.calls = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.tanh2(self.hidden(self.tanh1(self.conv(x)).flatten(1))))


@pytest.mark.parametrize("direction", ["clean_to_masked", "symmetric"])
@pytest.mark.parametrize("penalty", [k for k in PENALTIES if k != "zca"])
def test_gradient_of_the_total_equals_finite_differences(
    direction: str, penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = Smooth(), torch.randn(5, 2, 4, 4, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    o = both(3, 0.5, direction=direction, penalty=penalty, group_size=2, layers=("conv", "hidden"))
    fixed = lowest(torch.randn(5, 4, 4), 0.5)
    monkeypatch.setattr(sdecor.objective, "lowest", lambda score, fraction: fixed)

    def total() -> Tensor:
        return losses(model, x, y, o, generator=noise())["total"]

    parameters, h = list(model.parameters()), 1e-6
    analytic = gradients(model, total())
    assert total().dtype == F64
    for _ in range(3):
        direction_ = [torch.randn_like(p) for p in parameters]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, v in zip(parameters, direction_, strict=True):
                    p.add_(v, alpha=sign * h)
            values.append(float(total().detach()))
            with torch.no_grad():
                for p, v in zip(parameters, direction_, strict=True):
                    p.sub_(v, alpha=sign * h)
        expected = (values[0] - values[1]) / (2 * h)
        assert sum(float((g * v).sum()) for g, v in zip(analytic, direction_, strict=True)) == pytest.approx(
            expected, rel=1e-5, abs=1e-7
        )


def test_the_mask_is_a_constant() -> None:
    """With a constant fill the masked images carry no graph to the score: double backward never happens."""
    model, (x, y) = Smooth(), (torch.randn(5, 2, 4, 4, dtype=F64), torch.tensor([0, 1, 2, 1, 0]))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    losses(model, x, y, both(1, 0, fill="constant"))
    assert [s.requires_grad for s in seen] == [True, False]
    assert seen[1].grad_fn is None


# What the step costs and what it leaves behind ------------------------------------------------------------------------


#: Forward passes of the terms that take any of their own, beside the clean one.
PASSES = {"consistency": 1, "masked_classification": 1, "whitened_classification": 1, "adversarial": 2}


@pytest.mark.parametrize("method", METHODS)
def test_forward_passes(method: str) -> None:
    model, x, y = Smooth(), torch.randn(5, 2, 4, 4, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    some = {"group_size": 2} if "group_size" in Objective(method).settings else {}
    objective = Objective(method, **some)
    layers = layers_of(model, objective, x)
    model.calls = 0
    losses(model, x, y, objective, layers=layers)
    assert model.calls == 1 + sum(PASSES.get(term, 0) for term in METHODS[method].terms)


def test_another_generator_draws_otherwise() -> None:
    model, (x, y) = lenet(), batch()
    first, other = (losses(model, x, y, Objective(), generator=noise(n))["total"] for n in (2, 5))
    assert not torch.equal(first, other)


class Recorded(TorchDispatchMode):
    """The name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def face(model: nn.Module) -> tuple[object, ...]:
    """All that a user of the model can tell it by, except the values of its weights."""
    x, _ = batch(2, 3, 32)
    counter, recorded = FlopCounterMode(display=False), Recorded()
    with torch.no_grad(), counter:
        model.eval()(x)
    with torch.no_grad(), recorded:
        model(x)
    tree = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    state = [(name, tuple(v.shape), v.dtype) for name, v in model.state_dict().items()]
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    own = "forward" in vars(model)
    return counter.get_total_flops(), recorded.names, tree, state, flags, hooks(model), repr(model), own


@pytest.mark.parametrize("name", ["lenet", "cnn_bn"])
def test_after_a_step_the_model_is_one_that_was_trained_plainly(name: str) -> None:
    faces = []
    for method in ("standard", "saliencydecor-absolute", "saliencydecor-signed"):
        torch.manual_seed(0)
        model = build(name, 3, 10, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses(model, *batch(4, 3, 32), Objective(method))["total"].backward(inputs=list(model.parameters()))
        optimizer.step()
        faces.append(face(model))
    assert faces[0][0] > 1e5
    assert len(faces[0][1]) > 5
    assert faces[1] == faces[0]
    assert faces[2] == faces[0]


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def with_whitening() -> nn.Module:
    layers = [("conv", nn.Conv2d(3, 16, 3)), ("white", GroupWhitening(16)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(16 * 36, 10))]))


@pytest.mark.parametrize("make", [lambda: build("cnn_bn", 3, 10, 8), with_whitening])
def test_running_statistics_describe_clean_images_only(make: Callable[[], nn.Module]) -> None:
    model, (x, y) = make(), batch(6, 3, 8)
    plain = copy.deepcopy(model)
    plain(x)
    losses(model, x, y, Objective(layers=(("conv2",) if hasattr(model, "conv2") else ("conv",))))
    assert same(statistics(model), statistics(plain))
    assert all(getattr(m, "track_running_stats", True) for m in model.modules())
    model.eval()
    before = statistics(model)
    losses(model, x, y, both(1, 0))
    assert same(statistics(model), before)


def test_the_masked_pass_normalizes_with_its_own_batch() -> None:
    model, (x, _) = build("cnn_bn", 3, 10, 8), batch(6, 3, 8)
    expected = copy.deepcopy(model)(x)
    with frozen_statistics(model):
        assert torch.equal(model(x), expected)
        model.eval()
        in_eval = model(x)
    assert torch.equal(model(x), in_eval)


def test_frozen_statistics_are_restored_on_error_and_left_alone_where_off() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), GroupWhitening(16))
    with pytest.raises(RuntimeError, match="inside"), frozen_statistics(model):
        assert [m.track_running_stats for m in model] == [False, False, False]
        raise RuntimeError("inside")
    assert [m.track_running_stats for m in model] == [True, False, True]


# Precision ------------------------------------------------------------------------------------------------------------


def test_bfloat16_autocast_keeps_the_terms_in_float32() -> None:
    model, (x, y) = lenet(), batch(32)
    plain = losses(model, x, y, Objective(), generator=noise())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        terms = losses(model, x, y, Objective(), generator=noise())
    assert all(t.dtype == torch.float32 for t in terms.values())
    for name in ("classification", "decorrelation"):
        assert float(terms[name].detach()) == pytest.approx(float(plain[name].detach()), rel=0.02)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model, terms["total"]))
