"""Sanity checks: which layers are drawn anew and how, who is fooled, and maps that look at no model."""

from __future__ import annotations

import copy
import doctest
import math
from itertools import islice

import pytest
import skimage.filters
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import close, flags, trained
from torch import Tensor, nn

from sdecor.measures import sanity
from sdecor.measures.robustness import spearman, ssim
from sdecor.measures.sanity import RANDOMIZATIONS, controls, parameter_randomization, randomized
from sdecor.models import build
from sdecor.registers import MODELS
from sdecor.saliency import logits_and_gradient, pixel_score

each_order = pytest.mark.parametrize("order", RANDOMIZATIONS)


def gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return pixel_score(logits_and_gradient(model, images, target)[1])


def changed(a: nn.Module, b: nn.Module) -> set[str]:
    """Names of the tensors that differ."""
    other = b.state_dict()
    return {name for name, value in a.state_dict().items() if not torch.equal(value, other[name])}


def spread(model: nn.Module) -> nn.Module:
    """Move every tensor away from where it is initialized, as training does."""
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.add_(torch.rand_like(value) + 1)
    return model


# Randomized copies


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str) -> None:
    model = spread(build(name, 3, 5, 32))
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    parameters = {n for n, _ in model.named_parameters()}
    names: list[str] = []
    before, last = model, model
    for name, last in randomized(model):
        own = changed(before, last) & parameters  # one layer more each time
        assert {n.rpartition(".")[0] for n in own} == {"" if name == "VisionTransformer" else name}
        names.append(name)
        before = last
    assert len(set(names)) == len(names)
    assert changed(model, last) >= parameters
    for (name, one), expected in zip(islice(randomized(model, order="independent"), 6), names, strict=False):
        own = changed(model, one)
        assert name == expected and {n.rpartition(".")[0] for n in own} == {name}
        assert not own & changed(one, last)  # drawn alike in both orders
    assert all(torch.equal(value, model.state_dict()[n]) for n, value in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_last_of_a_cascade_is_a_new_network() -> None:
    model = spread(build("cnn_bn", 1, 4, 8))
    *_, (name, last) = randomized(model)
    assert name == "conv1"
    fresh = build("cnn_bn", 1, 4, 8)
    for (name, a), b in zip(last.named_parameters(), fresh.parameters(), strict=True):
        if name.startswith("bn"):
            assert torch.equal(a, b)
        elif a.numel() > 50:  # uniform between the same bounds
            bound = max(a.abs().max(), b.abs().max())
            assert (a - b).abs().max() > 0.1 * bound
            close(a.std(), b.std(), 0.2)
    # running statistics are forgotten
    assert all(torch.equal(a, b) for a, b in zip(last.buffers(), fresh.buffers(), strict=True))


def test_seeds() -> None:
    model, _, _ = trained()
    first, again, other = (list(randomized(model, seed=seed)) for seed in (0, 0, 1))
    assert [name for name, _ in first] == ["7", "5", "1", "0"]
    assert all(not changed(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert changed(first[-1][1], other[-1][1]) == {f"{i}.{n}" for i in (0, 5, 7) for n in ("weight", "bias")}
    # a network trained from seed 0 is not given its own first weights
    torch.manual_seed(0)
    fresh = build("lenet", 1, 4, 12)
    *_, (_, last) = randomized(fresh)
    assert len(changed(fresh, last)) == 10
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    *_, (_, last) = randomized(twins)
    assert not torch.equal(last[0].weight, last[1].weight)


@each_order
def test_copies_stand_for_themselves(order: str) -> None:
    model = build("cnn_bn", 1, 4, 8).train()
    model.bn1.eval()
    model.fc1.weight.requires_grad_(False)
    before = flags(model)
    for _, one in randomized(model, order=order):
        assert flags(one) == before
        for p in one.parameters():
            p.data.fill_(7)
    assert not any((p == 7).all() for p in model.parameters())
    assert flags(model) == before


class Scaled(nn.Module):
    """Parameters of a module that cannot reset itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 40) * 3 + 5)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(40, 2)


def test_modules_without_reset() -> None:
    model = Scaled()
    (_, _), (name, last) = randomized(model)
    assert name == "Scaled"
    assert isinstance(last, Scaled)
    close(last.table.mean(), 5.0, 0.1)
    close(last.table.std(), 3.0, 0.1)
    assert spearman(last.table[None], model.table[None]).abs() < 0.1
    assert last.temperature == 2  # the spread of one number is zero


def test_attention_is_drawn_by_its_own_rule() -> None:
    model = spread(nn.MultiheadAttention(32, 2))
    layers = dict(randomized(model, order="independent"))
    assert list(layers) == ["out_proj", "MultiheadAttention"]
    own = layers["MultiheadAttention"]
    assert changed(model, own) == {"in_proj_weight", "in_proj_bias"}  # its rule sets the bias of out_proj too
    assert isinstance(own, nn.MultiheadAttention)
    assert own.in_proj_bias.eq(0).all()
    assert own.in_proj_weight.abs().max() <= math.sqrt(6 / (4 * 32))


def test_bad_order() -> None:
    with pytest.raises(ValueError) as caught:
        next(randomized(nn.Linear(2, 2), order="upwards"))
    assert str(caught.value) == "unknown order 'upwards'; known: cascading, independent"


# Parameter randomization


@each_order
def test_edges_are_found_out(order: str) -> None:
    model, images, target = trained()
    edges = parameter_randomization(model, lambda m, x, t: controls(x)["edges"], images, target, order=order)
    looks = parameter_randomization(model, gradient, images, target, order=order)
    assert list(edges) == list(looks) == ["7", "5", "1", "0"]
    for name in edges:
        close(edges[name], torch.ones(len(images), dtype=torch.float64))
        assert looks[name].shape == (len(images),)
    assert looks["7"].mean() < 0.9
    # border pixels have fewer weights in any convolutional network, so that even random maps agree a little
    assert looks["0"].mean() < 0.6


def test_layers_are_compared_by_name() -> None:
    model, images, target = trained()
    similar = parameter_randomization(model, gradient, images, target, seed=4)
    for name, network in randomized(model, seed=4):
        close(similar[name], spearman(gradient(model, images, target), gradient(network, images, target)))
    with pytest.raises(ValueError, match=r"^a and b must have the same shape \(B, H, W\), got \(40, 1, 8, 8\)"):
        parameter_randomization(model, lambda m, x, t: x, images, target)


# Controls


def test_controls_by_hand() -> None:
    images = torch.zeros(2, 2, 3, 4)
    images[0, 0, :, 2:] = 8
    images[1] = torch.tensor([3.0, -4.0]).view(2, 1, 1)
    mask = torch.zeros(2, 3, 4, dtype=torch.uint8)
    mask[0, 1, 1] = 1
    maps = controls(images, mask)
    assert list(maps) == ["constant", "edges", "image", "noise", "centre spot", "centre box", "ground truth"]
    assert maps["constant"].eq(1).all()
    assert maps["edges"][0].tolist() == [[0, 4, 4, 0]] * 3  # a step of 4 in the mean over channels
    assert maps["image"][0].eq(4).all()  # half 0, half 8, the mean is 4
    assert maps["edges"][1].eq(0).all() and maps["image"][1].eq(0).all()
    assert torch.equal(maps["noise"][0], maps["noise"][1])
    assert torch.equal(maps["ground truth"], mask.float())
    assert torch.equal(controls(images, mask.bool())["ground truth"], mask.float())


def test_edges_against_scikit_image() -> None:
    images = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    theirs = [skimage.filters.sobel(image.mean(0).numpy()) * math.sqrt(2) for image in images]  # which averages the two
    close(controls(images)["edges"], torch.stack([torch.tensor(t) for t in theirs]), 1e-12)


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shift=st.floats(-3, 3),
)
@settings(max_examples=30, deadline=None)
def test_controls_invariances(shape: tuple[int, ...], dtype: torch.dtype, shift: float) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    mask = images.detach()[:, 0] > 0
    before, state = images.detach().clone(), torch.get_rng_state()
    maps = controls(images, mask)
    for name, value in maps.items():
        assert value.shape == (shape[0], *shape[2:]) and value.dtype == dtype and not value.requires_grad
        assert (value >= 0).all()
        close(controls(images + shift, mask)[name], value, 1e-5)  # no zero of brightness
        for i in range(shape[0]):
            close(controls(images[i : i + 1], mask[i : i + 1])[name], value[i : i + 1], 1e-6)
    assert torch.equal(images.detach(), before) and torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform() -> None:
    noise = controls(torch.zeros(2, 1, 100, 100))["noise"]
    close(noise.mean(), 0.5, 0.02)
    close(noise.var(), 1 / 12, 0.02)
    assert not torch.equal(noise, controls(torch.zeros(2, 1, 100, 100), seed=1)["noise"])
    noise[0] = 0
    assert noise[1].any()


def test_centre_spot_is_a_gaussian_that_knows_no_image() -> None:
    x = torch.rand(3, 2, 9, 13, dtype=torch.float64)
    spot = sanity.centre_spot(x, width=0.5)
    assert spot.shape == (3, 9, 13)
    assert spot.dtype == torch.float64
    close(spot, spot.flip(1))
    close(spot, spot.flip(2))
    close(spot[0, 4, 6], torch.tensor(1.0, dtype=torch.float64))
    close(spot[1, 4, 6 + 3], torch.tensor(math.exp(-(3**2) / (2 * 4.5**2)), dtype=torch.float64))
    close(spot[2, 4 - 2, 6], torch.tensor(math.exp(-(2**2) / (2 * 4.5**2)), dtype=torch.float64))


def test_centre_box_covers_its_share() -> None:
    box = sanity.centre_box(torch.rand(2, 3, 9, 12, dtype=torch.float64), share=4 / 9)
    assert box.shape == (2, 9, 12) and box.dtype == torch.float64
    assert torch.equal(box[1].nonzero().amin(0), torch.tensor([2, 2])) and box[1].sum() == 5 * 8  # margins 1.5 and 2
    assert sanity.centre_box(torch.zeros(1, 1, 64, 64)).mean() == pytest.approx(46**2 / 64**2)
    assert sanity.centre_box(torch.zeros(1, 1, 3, 3), share=1).all()
    with pytest.raises(ValueError, match="^share must be from 0 to 1, got 2$"):
        sanity.centre_box(torch.zeros(1, 1, 3, 3), share=2)


def test_bad_controls() -> None:
    with pytest.raises(ValueError, match=r"^images must have shape \(B, C, H, W\), got \(2, 4, 4\)$"):
        controls(torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"^mask has shape \(2, 4, 5\), the maps have \(2, 4, 4\)"):
        controls(torch.ones(2, 1, 4, 4), torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match=r"^mask must hold only 0 and 1"):
        controls(torch.ones(2, 1, 4, 4), torch.full((2, 4, 4), 0.5))


def test_examples() -> None:
    failed, tried = doctest.testmod(sanity)
    assert failed == 0 < tried


def test_another_similarity() -> None:
    model, images, target = trained()
    similar = parameter_randomization(
        model, lambda m, x, t: gradient(m, x, t), images, target, similarity=ssim, order="cascading", seed=4
    )
    for name, network in randomized(model, seed=4):
        close(similar[name], ssim(gradient(model, images, target), gradient(network, images, target)))
    with pytest.raises(ValueError, match=r"^a and b must have the same shape \(B, H, W\), got \(40, 1, 8, 8\)"):
        parameter_randomization(model, lambda m, x, t: x, images, target)
