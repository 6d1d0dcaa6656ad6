"""Faithfulness: what the model is shown, scores by hand, Quantus and captum as oracles, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from typing import Any

import captum.metrics
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import close, seeded
from torch import Tensor, nn

from sdecor.masking import cells, impute
from sdecor.measures import faithfulness
from sdecor.measures.faithfulness import (
    SHARES,
    area_between,
    comprehensiveness,
    deletion,
    faithfulness_correlation,
    infidelity,
    insertion,
    monotonicity,
    perturbation_curve,
    sufficiency,
)
from sdecor.registers import FILLS

TENTHS = [i / 8 for i in range(9)]


# Curves


def linear(channels: int = 1, side: int = 4, classes: int = 3) -> nn.Module:
    """Logits that are weighted sums of pixels; the first layer's weights are (K, C * H * W)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes)).double()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A small network that learned which quarter is bright, images of 8 x 8, predictions, and its gradients."""
    generator = seeded()
    images = torch.rand(64, 2, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(64) % 4
    quarter = torch.nn.functional.one_hot(labels, 4).view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images += quarter
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    some = images[:9].clone().requires_grad_()
    logits = model(some)
    assert (logits.argmax(1) == labels[:9]).all()
    gradient = torch.autograd.grad(logits.gather(1, labels[:9, None]).sum(), some)[0]
    attribution = (gradient * images[:9]).sum(1)
    return model, images[:9], labels[:9], attribution + 1e-9 * torch.rand(9, 8, 8, generator=generator)  # breaks ties


@pytest.fixture(params=["trained", "random"])
def case(request: pytest.FixtureRequest, trained: tuple[nn.Module, Tensor, Tensor, Tensor]) -> Any:
    model, images, target, attribution = trained
    if request.param == "trained":
        return model, images, target, attribution
    return model, torch.randn_like(images), target.flip(0), torch.randn_like(attribution)


def test_a_linear_model_falls_by_what_is_taken_away() -> None:
    model = linear()
    images = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 1])
    contribution = (model[1].weight[target].view(5, 4, 4) * (images[:, 0] - 0.3)).detach()
    ordered = contribution.flatten(1).sort(1, descending=True).values
    whole = model(images).gather(1, target[:, None]).detach()
    removed = torch.cat([torch.zeros(5, 1), ordered.cumsum(1)], 1)[:, ::2]
    run = partial(perturbation_curve, model, images, target, contribution, fractions=TENTHS, output="logit")
    run = partial(run, fill="constant", fill_value=0.3)
    close(run(), whole - removed)
    close(run(insert=True), whole - removed[:, -1:] + removed)
    rising = torch.cat([torch.zeros(5, 1), ordered.flip(1).cumsum(1)], 1)[:, ::2]
    close(run(order="least"), whole - rising)
    logits = model(images - 0)
    close(run(output="probability")[:, 0], logits.softmax(1).gather(1, target[:, None])[:, 0])
    assert torch.equal(run(output="correct")[:, 0], (logits.argmax(1) == target).double())
    # what a trapezoid rule gives for that curve, and the shares of DeYoung et al. by hand
    close(deletion(run(), TENTHS), ((run()[:, 1:] + run()[:, :-1]) / 16).sum(1))
    assert (monotonicity(run()[:, : int((ordered[0] > 0).sum()) // 2 + 1])[0] == 1).all()


def test_patches_go_together_by_their_mean() -> None:
    model = linear()
    images = torch.arange(1.0, 17, dtype=torch.float64).view(1, 1, 4, 4)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    attribution = torch.zeros(1, 4, 4)
    attribution[0, :2, 2:] = torch.tensor([[9.0, -8.0], [0.0, 1.0]])  # sum 2
    attribution[0, 2, 0] = 3
    perturbation_curve(
        model, images, torch.tensor([0]), attribution, fill="constant", fractions=[0.25, 0.5], patch=2, batch_size=1
    )
    assert seen[0].flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 11, 12, 0, 0, 15, 16]
    assert seen[1].flatten().tolist() == [1, 2, 0, 0, 5, 6, 0, 0, 0, 0, 11, 12, 0, 0, 15, 16]


class InDouble(nn.Sequential):
    """Takes the float32 that Quantus makes of everything."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.double())
        return out


def quantus_scores(metric: str, case: tuple[nn.Module, Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    """What Quantus says, of its own copies, with probabilities and black pixels."""
    quantus = pytest.importorskip("quantus", reason="Quantus does not import here", exc_type=ImportError)
    model, images, target, attribution = case
    call = {"x_batch": images.numpy().copy(), "y_batch": target.numpy(), "a_batch": attribution[:, None].numpy().copy()}
    given = {"perturb_baseline": 0.0, "abs": False, "normalise": False, "disable_warnings": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure = getattr(quantus, metric)(**(given | options))
        return torch.tensor(np.array(measure(model=InDouble(model).eval(), **call, device="cpu", softmax=True)))


def test_curves_against_quantus_pixel_flipping(case: Any) -> None:
    # it flips values, not pixels: of two channels with one attribution, both at once as long as there are no ties
    close(
        perturbation_curve(*case, fill="constant", fractions=TENTHS[1:]),
        quantus_scores("PixelFlipping", case, features_in_step=16),
        1e-6,
    )


@pytest.mark.parametrize(("theirs", "ours"), [("morf", "most"), ("lerf", "least")])
def test_curves_against_quantus_region_perturbation(case: Any, theirs: str, ours: str) -> None:
    curve = perturbation_curve(*case, fill="constant", order=ours, fractions=[i / 16 for i in range(17)], patch=2)
    drop = quantus_scores("RegionPerturbation", case, patch_size=2, regions_evaluation=16, order=theirs)
    close(curve[:, :1] - curve[:, 1:], drop, 1e-6)


def test_monotonicity_against_quantus(case: Any) -> None:
    model, images, target, attribution = case
    state = iter(range(10**6))

    def put_back(arr: np.ndarray, indices: np.ndarray, **_: object) -> np.ndarray:
        next(state)
        out = arr.copy()
        np.put_along_axis(out, indices, np.take_along_axis(images.flatten(1).numpy(), indices, 1), 1)
        return out

    curve = perturbation_curve(*case, fill="constant", fractions=TENTHS)
    ours = monotonicity(curve[:, :-1])  # Quantus does not look at the image of which nothing is put back
    theirs = quantus_scores("Monotonicity", case, features_in_step=16, perturb_func=put_back)
    assert torch.equal(ours == 1, theirs.bool())
    assert next(state) == 8
    # as it comes, Quantus puts the baseline in place of the baseline: nothing ever changes, and all is monotone
    assert quantus_scores("Monotonicity", case, features_in_step=16).all()


def test_monotonicity_is_sometimes_one_and_sometimes_not(trained: Any) -> None:
    model, images, target, attribution = trained
    easy = linear(2, 8, 4)
    with torch.no_grad():
        easy[1].weight[target[0]] = 1
    curve = perturbation_curve(easy, images, target[:1].expand(9), attribution, fill="constant", output="logit")
    assert (monotonicity(curve) == 1).all()
    assert (monotonicity(-curve) == 0).all()


def test_correlation_against_quantus(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, target, attribution = case
    samples, size = 30, 13
    ours = faithfulness_correlation(*case, sets=samples, share=0.2, fill="constant", generator=seeded(1))
    rows = torch.rand(samples + 1, 64, generator=seeded(1)).argsort(1)[1:] < size
    subsets = iter(row.nonzero()[:, 0].repeat(2).add(torch.arange(2).repeat_interleave(size) * 64).numpy()
                   for row in rows for _ in images)  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "choice", lambda *_, **__: next(subsets))
        theirs = quantus_scores(
            "FaithfulnessCorrelation", case, nr_runs=samples, subset_size=2 * size, return_aggregate=False
        )
    close(ours, theirs, 1e-6)
    assert ((ours >= -1) & (ours <= 1)).all()


def test_correlation_of_a_linear_model_is_one() -> None:
    model, images, target = linear(3), torch.rand(4, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    contribution = (model[1].weight[target].view(4, 3, 4, 4) * images).sum(1).detach()
    run = partial(faithfulness_correlation, model, images, target, fill="constant", output="logit")
    close(run(contribution), torch.ones(4), 1e-9)
    close(run(-7 * contribution), -torch.ones(4), 1e-9)
    assert run(torch.zeros(4, 4, 4)).isnan().all()
    assert run(torch.full((4, 4, 4), 0.1)).isnan().all()
    assert faithfulness_correlation(model, images, target, contribution, fill=images).isnan().all()
    level = torch.tensor([[0.3, 0.1 + 0.2, 0.3]], dtype=torch.float64)  # constant but for rounding
    assert faithfulness._pearson(level, torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)).isnan().all()


# Infidelity


def test_infidelity_against_captum(case: Any) -> None:
    model, images, target, _ = case
    attribution = torch.randn_like(images)
    noise = 0.2 * torch.randn(6, 2, 8, 8, generator=seeded(3), dtype=torch.float64)

    def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
        change = noise.repeat(len(x) // 6, 1, 1, 1)
        return change, x - change

    for normalize in (True, False):
        ours = infidelity(model, images, target, attribution, noise=0.2, draws=6, normalize=normalize, seed=3)
        theirs = captum.metrics.infidelity(
            model, perturb, images, attribution, target=target, n_perturb_samples=6, normalize=normalize
        ).detach()
        close(ours, theirs, 1e-9)
        by_hand = torch.stack([model(images) - model(images - n) for n in noise])[:, range(9), target].detach()
        sums = (noise[:, None] * attribution).flatten(2).sum(2)
        scale = (sums * by_hand).sum(0) / (sums**2).sum(0) if normalize else 1
        close(ours, ((scale * sums - by_hand) ** 2).mean(0), 1e-9)


def test_infidelity_of_a_linear_model() -> None:
    model, images, target = linear(3), torch.rand(4, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    weight = model[1].weight[target].view(4, 3, 4, 4).detach()
    for attribution in (weight, weight.sum(1)):  # of whole pixels: the same noise in all channels
        close(infidelity(model, images, target, attribution, normalize=False), torch.zeros(4))
        close(infidelity(model, images, target, -3 * attribution), torch.zeros(4))
        assert (infidelity(model, images, target, attribution.flip(0)) > 1e-6).any()
    nothing = infidelity(model, images, target, torch.zeros(4, 4, 4), draws=2000, noise=0.5)
    close(nothing, 0.25 * (weight.sum(1) ** 2).sum((1, 2)), 0.15)


# Scores


def test_scores_by_hand() -> None:
    curve = torch.tensor([[1.0, 0.8, 0.2, 0.0]], dtype=torch.float64)
    fractions = [0, 0.25, 0.5, 1]
    close(deletion(curve, fractions), [0.25 * 0.9 + 0.25 * 0.5 + 0.5 * 0.1])
    close(insertion(curve.flip(1), fractions), [0.25 * 0.1 + 0.25 * 0.5 + 0.5 * 0.9])
    close(area_between(curve, torch.ones(1, 4), fractions), [0.6])
    close(comprehensiveness(curve), [(0.2 + 0.8 + 1) / 3])
    close(sufficiency(curve.flip(1)), [(0.2 + 0.8 + 1) / 3])
    close(monotonicity(torch.tensor([[3.0, 3, 1, 2, 0]])), [0.75])
    assert comprehensiveness(curve[:, :1]).isnan() and monotonicity(curve[:, :1]).isnan()
    with pytest.raises(ValueError) as caught:
        deletion(curve)
    assert str(caught.value) == "most must have shape (B, 11), one column per share, got (1, 4)"


@pytest.mark.parametrize("fill", [*FILLS, "linear"])
def test_all_scores_in_one_run(fill: str, case: Any) -> None:
    model, images, target, attribution = case
    run = partial(perturbation_curve, *case, fill=fill)
    most, least = run(generator=seeded()), run(order="least", generator=seeded())
    back = run(insert=True, generator=seeded())
    close(back, least.flip(1), 1e-9)  # one fill, no ties: the mirror image
    close(area_between(most, least), insertion(back) - deletion(most), 1e-9)
    rows = 0

    def count(_: nn.Module, x: tuple[Tensor]) -> None:
        nonlocal rows
        rows += len(x[0])

    handle = model.register_forward_pre_hook(count)
    scores = faithfulness.faithfulness(*case, fill=fill, generator=seeded())
    handle.remove()
    # 13 shares are replaced and 13 kept, and of those the whole image and the wholly replaced one come twice
    assert rows == 9 * (13 + 11)
    close(scores["deletion"], deletion(most), 1e-9)
    close(scores["insertion"], insertion(back), 1e-9)
    close(scores["area_between"], area_between(most, least), 1e-9)
    close(scores["comprehensiveness"], comprehensiveness(run(fractions=(0, *SHARES), generator=seeded())), 1e-9)
    kept = run(fractions=(*SHARES, 1), insert=True, generator=seeded())
    close(scores["sufficiency"], sufficiency(kept), 1e-9)
    close(scores["monotonicity"], monotonicity(most))


def test_a_good_map_scores_better_than_a_random_one(trained: Any) -> None:
    model, images, target, attribution = trained
    good = faithfulness.faithfulness(*trained, fill="mean")
    bad = faithfulness.faithfulness(model, images, target, -attribution, fill="mean")
    for name, sign in {"deletion": -1, "insertion": 1, "area_between": 1, "comprehensiveness": 1}.items():
        assert sign * good[name].mean() > sign * bad[name].mean(), name
    assert good["sufficiency"].mean() < bad["sufficiency"].mean()
    close(good["area_between"], -bad["area_between"], 1e-9)


# Invariances

MEASURES = {
    "uniform": partial(perturbation_curve, fill="uniform"),
    "linear": partial(perturbation_curve, fill="linear", patch=2),
    "random": partial(perturbation_curve, fill="mean", order="random", insert=True),
    "scores": lambda *a, **k: torch.stack(list(faithfulness.faithfulness(*a, **k).values()), 1),
    "correlation": partial(faithfulness_correlation, sets=7),
    "infidelity": lambda *a, generator, **k: infidelity(*a, draws=7, **k),
}


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), batch_size=st.sampled_from([1, 2, 5, 30]), levels=st.sampled_from([0, 2, 10**6]))
def test_invariances(name: str, trained: Any, seed: int, batch_size: int, levels: int) -> None:
    """Neither the images beside it, nor their order, nor the chunk decides over an image's score, ties or not."""
    model, images, target, _ = trained
    attribution = torch.randint(levels + 1, (9, 8, 8), generator=seeded(seed)).double() - levels / 2
    inputs = images, target, attribution
    copies = [t.clone() for t in inputs]
    state = torch.get_rng_state()
    model.train()
    model[1].eval()
    whole = MEASURES[name](model, *inputs, generator=seeded(seed))
    assert model.training and model[0].training and not model[1].training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert len(whole) == 9 and whole.dtype == torch.float64
    order = torch.randperm(9, generator=seeded(seed))[:5]
    part = MEASURES[name](model, *(t[order] for t in inputs), batch_size=batch_size, generator=seeded(seed))
    close(part, whole[order], 1e-9)
    empty = MEASURES[name](model, *(t[:0] for t in inputs), generator=seeded(seed))
    assert empty.shape == whole[:0].shape


@pytest.mark.parametrize("name", ["uniform", "linear", "scores", "correlation"])
def test_only_the_order_matters(name: str, trained: Any) -> None:
    model, images, target, attribution = trained
    whole = MEASURES[name](model, images, target, attribution, generator=seeded())
    scaled = attribution * 8 if name in ("linear", "correlation") else attribution**3 * 8
    close(MEASURES[name](model, images, target, scaled, generator=seeded()), whole, 1e-9)


def test_what_fills(trained: Any) -> None:
    model, images, target, attribution = trained
    everything = torch.ones(9, 8, 8, dtype=torch.bool)
    curve = partial(perturbation_curve, *trained, fractions=[1.0])
    close(curve(fill=torch.tensor(0.5).double()), curve(fill="constant", fill_value=0.5))
    close(curve(fill=images.mean((2, 3), keepdim=True)), curve(fill="mean"))
    close(curve(fill="linear", generator=seeded()), curve(fill=impute(images, everything, generator=seeded())), 1e-9)
    assert curve(fill="uniform", generator=seeded(1)).ne(curve(fill="uniform", generator=seeded(2))).any()
    close(perturbation_curve(*trained, fractions=[0.0], fill="blur"), perturbation_curve(*trained, fractions=[0.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.ones(2, 3, 3)}, "images must have shape (B, C, H, W), got (2, 3, 3)"),
        ({"target": torch.zeros(9)}, "target must be 9 whole numbers, got shape (9,) of torch.float32"),
        ({"target": torch.full((9,), 4)}, "target must lie in 0..3, got 4..4"),
        ({"attribution": torch.ones(9, 4)}, "attribution has shape (9, 4), these images need (9, 8, 8)"),
        (
            {"attribution": torch.full((9, 8, 8), math.inf)},
            "attribution has infinity in 9 of 9 rows (the first is row 0)",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"fractions": [-0.5]}, "fractions must be from 0 to 1, got -0.5"),
        ({"order": "best"}, "unknown order 'best'; known: most, least, random"),
        ({"output": "loss"}, "unknown output 'loss'; known: probability, logit, correct"),
        ({"fill": "noise"}, "unknown fill 'noise'; known: uniform, mean, constant, blur, linear, or a tensor"),
        (
            {"fill": ("mean", "blur")},
            "unknown fill of type tuple; known: uniform, mean, constant, blur, linear, or a tensor",
        ),
        ({"fill": torch.ones(3, 8, 8)}, "fill has shape (3, 8, 8), images (9, 2, 8, 8); it must broadcast to that"),
        ({"patch": 3}, "patch=3 does not divide images of 8 x 8 pixels"),
        ({"patch": 0}, "patch=0 does not divide images of 8 x 8 pixels"),
        ({"grid": 0}, "grid must be from 1 to 8, got 0"),
        ({"grid": 9}, "grid must be from 1 to 8, got 9"),
    ],
)
def test_bad_curves(changes: dict[str, Any], message: str, trained: Any) -> None:
    arguments = dict(zip(("images", "target", "attribution"), trained[1:], strict=True)) | changes
    functions = [perturbation_curve]
    if not {"fractions", "order", "patch", "grid", "output"} & changes.keys():
        functions.append(faithfulness.faithfulness)
    if not {"fractions", "order", "patch", "grid"} & changes.keys():
        functions.append(faithfulness_correlation)
    if not {"fractions", "order", "patch", "grid", "output", "fill", "attribution"} & changes.keys():
        functions.append(infidelity)
    maps = [arguments.pop(name) for name in ("images", "target", "attribution")]
    for function in functions:
        with pytest.raises(ValueError) as caught:
            function(trained[0], *maps, **arguments)
        assert str(caught.value).replace("saliency", "attribution") == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(faithfulness_correlation, sets=1), "sets must be at least 3, got 1"),
        (partial(faithfulness_correlation, share=1), "share must be strictly between 0 and 1, got 1"),
        (partial(infidelity, draws=1), "draws must be at least 2, got 1"),
        (partial(infidelity, draws=0, normalize=False), "draws must be at least 1, got 0"),
        (
            lambda m, x, t, a: infidelity(m, x, t, a[:, None].expand(-1, 3, -1, -1)),
            "attribution has shape (9, 3, 8, 8), images (9, 2, 8, 8); it must broadcast to that",
        ),
    ],
)
def test_bad_samples(call: Any, message: str, trained: Any) -> None:
    with pytest.raises(ValueError) as caught:
        call(*trained)
    assert str(caught.value) == message


def test_what_is_no_tensor_and_images_that_no_model_takes(trained: Any) -> None:
    model, *parts = trained
    for function in (perturbation_curve, faithfulness_correlation, infidelity, faithfulness.faithfulness):
        for i, name in enumerate(("images", "target", "attribution")):
            for other in (parts[i].tolist(), parts[i].numpy(), None):
                if other is None and name == "target":
                    continue
                with pytest.raises(ValueError) as caught:
                    function(model, *parts[:i], other, *parts[i + 1 :])
                words = f"{name} must be a tensor, got {type(other).__name__}; pass torch.as_tensor({name})"
                assert str(caught.value).replace("saliency", "attribution") == words
        with pytest.raises(ValueError) as caught:
            function(model, (parts[0] * 9).int(), *parts[1:])
        assert str(caught.value) == "images must be of a floating type, as the model takes them, got torch.int32"
        for other in (parts[1].float(), parts[1] > 0, parts[1][:3]):
            with pytest.raises(ValueError, match=r"^target must be 9 whole numbers, got shape \("):
                function(model, parts[0], other, parts[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", ["uniform", "mean", "constant", "blur", "linear", torch.zeros(2, 8, 8)])
def test_curves_in_every_precision(fill: Any, dtype: torch.dtype, trained: Any) -> None:
    model, images, target, attribution = trained
    model, images = copy.deepcopy(model).float(), images.float()
    full = perturbation_curve(model, images, target, attribution, fill=fill, generator=seeded())
    if dtype == torch.float64:  # maps and fill may be of another precision than the images
        other = perturbation_curve(
            model, images, target, attribution.to(dtype), generator=seeded(),
            fill=fill.to(dtype) if isinstance(fill, Tensor) else fill,
        )  # fmt: skip
        assert torch.equal(other, full)
        return
    half = model.to(dtype)
    rounded = perturbation_curve(half, images.to(dtype), target, attribution, fill=fill, generator=seeded())
    close(rounded, full, 0.1 if dtype == torch.bfloat16 else 0.02)


def test_patches_of_an_uneven_grid_are_replaced_as_wholes(case: Any) -> None:
    model, images, target, attribution = case  # of 8 x 8 pixels
    even = [
        perturbation_curve(model, images, target, attribution, fill="constant", **how)
        for how in ({"patch": 2}, {"grid": 4})
    ]
    close(*even)
    # three stretches of 8 pixels: 0 to 2, 3 to 5, 6 and 7
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    assert torch.equal(cells(8, 3), rows)
    means = torch.stack(
        [attribution[:, rows == i][:, :, rows == j].mean((1, 2)) for i in range(3) for j in range(3)], 1
    )
    for b, place in enumerate(means.argmax(1).tolist()):
        gone = images[b : b + 1].clone()
        gone[..., (rows == place // 3).nonzero(), (rows == place % 3).nonzero().T] = 0
        found = perturbation_curve(
            model,
            images[b : b + 1],
            target[b : b + 1],
            attribution[b : b + 1],
            fill="constant",
            fractions=[1 / 9],
            grid=3,
        )
        close(found[0], model(gone).double().softmax(1)[0, target[b]][None], 1e-6)
