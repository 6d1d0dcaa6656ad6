"""The decorrelation penalties: each against its formula in numpy, their zeros, invariances and gradients."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

import sdecor.decorrelation
from sdecor.decorrelation import correlation_matrix, decorrelation
from sdecor.registers import PENALTIES
from sdecor.whitening import covariance, grouped, whiten

F64 = torch.float64
Rows = np.ndarray  # (N, g), samples of one group


def off(m: np.ndarray) -> np.ndarray:
    return m[~np.eye(len(m), dtype=bool)]


def zca_distance(x: Rows) -> float:
    centred = x - x.mean(0)
    w = scipy.linalg.inv(scipy.linalg.sqrtm(np.cov(x.T, bias=True) + 1e-5 * np.eye(x.shape[1])))
    return float(((centred - centred @ w) ** 2).mean())


FORMULAS: dict[str, Callable[[Rows], float]] = {
    "correlation": lambda x: (off(np.corrcoef(x.T)) ** 2).mean(),
    "zca": zca_distance,
    "covariance": lambda x: ((np.cov(x.T, bias=True) - np.eye(x.shape[1])) ** 2).sum() / x.shape[1],
    "barlow": lambda x: 0.0051 * (off(np.corrcoef(x.T)) ** 2).sum(),
    "vicreg": lambda x: (
        25 * np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean() + (off(np.cov(x.T)) ** 2).sum() / x.shape[1]
    ),
    "decov": lambda x: (np.linalg.norm(np.cov(x.T, bias=True)) ** 2 - (x.var(0) ** 2).sum()) / 2,
}


def uncorrelated(n: int = 40, c: int = 8, std: float = 1.0) -> Tensor:
    raw = torch.randn(n, c, dtype=F64)
    return torch.linalg.qr(raw - raw.mean(0))[0] * n**0.5 * std + 5


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(sdecor.decorrelation).failed == 0


def test_every_kind_has_a_formula() -> None:
    assert list(PENALTIES) == list(FORMULAS)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("group_size", [2, 4, 8, None])
@pytest.mark.parametrize("shape", [(12, 8), (5, 8, 2, 3)])
def test_formula(kind: str, group_size: int | None, shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, dtype=F64).cumsum(1) * 0.5 + 1
    kept = z.clone()
    value = decorrelation(z, kind=kind, group_size=group_size)
    assert value.shape == ()
    assert value.dtype == F64
    flat = z.numpy() if z.ndim == 2 else np.moveaxis(z.numpy(), 1, -1).reshape(-1, 8)
    g = group_size or 8
    expected = np.mean([FORMULAS[kind](flat[:, i : i + g]) for i in range(0, 8, g)])
    assert float(value) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(z, kept)


def test_by_hand() -> None:
    """Two channels (1, -1, 1, -1) and (2, 2, -2, -2) plus half the first: variances 1 and 4.25, covariance 0.5."""
    a, b = torch.tensor([1.0, -1, 1, -1], dtype=F64), torch.tensor([2.0, 2, -2, -2], dtype=F64)
    z = torch.stack([a, b + a / 2], 1)
    expected = {
        "correlation": 0.25 / 4.25,
        "covariance": (2 * 0.25 + 3.25**2) / 2,
        "barlow": 0.0051 * 2 * 0.25 / 4.25,
        "vicreg": (2 * (4 / 3 * 0.5) ** 2) / 2,  # both standard deviations exceed 1
        "decov": 0.25,
    }
    for kind, value in expected.items():
        assert float(decorrelation(z, kind=kind, group_size=2)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("kind", PENALTIES)
def test_zero_on_white_features(kind: str) -> None:
    z = uncorrelated()
    bound = 1e-9 if kind == "zca" else 1e-20  # its eps of 1e-5 shrinks features by 5e-6
    assert 0 <= float(decorrelation(z, kind=kind, group_size=4)) < bound


@pytest.mark.parametrize("kind", PENALTIES)
def test_which_kinds_ask_for_unit_variance_too(kind: str) -> None:
    values = [float(decorrelation(uncorrelated(std=s), kind=kind, group_size=4)) for s in (3.0, 0.3)]
    demands = {"zca": (4.0, 0.49), "covariance": (64.0, 0.91**2), "vicreg": (0.0, None)}.get(kind, (0.0, 0.0))
    for value, demand in zip(values, demands, strict=True):
        if demand is not None:
            assert value == pytest.approx(demand, rel=1e-3, abs=1e-12)
        else:
            assert value > 10


@pytest.mark.parametrize("kind", PENALTIES)
def test_zero_after_whitening_and_more_before(kind: str) -> None:
    z = torch.randn(60, 8, dtype=F64).cumsum(1)
    white = whiten(z, 4, eps=1e-12)
    after, before = (float(decorrelation(v, kind=kind, group_size=4)) for v in (white, z))
    assert after < 1e-8
    assert before > 1e-4


def test_copies_correlate_fully() -> None:
    copies = torch.randn(30, 1, dtype=F64) * torch.tensor([1.0, -2.0, 0.1, 50.0], dtype=F64) + 3
    assert float(decorrelation(copies, group_size=4)) == pytest.approx(1, abs=1e-12)
    assert float(decorrelation(copies, kind="barlow", group_size=4)) == pytest.approx(12 * 0.0051, abs=1e-12)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (1.001e-4, 1.0), (1e-5, 1e-4), (1e-6, 1e-8)])
def test_correlation_is_blind_to_scale_down_to_its_floor(scale: float, expected: float) -> None:
    a = uncorrelated(c=1, std=scale) - 5
    assert float(decorrelation(torch.cat([a, -a], 1), group_size=2)) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    scales=st.lists(st.floats(0.01, 1e3), min_size=4, max_size=4),
    shifts=st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4),
)
def test_correlation_and_barlow_ignore_scale_shift_and_sign(
    scales: list[float], shifts: list[float], signs: list[float]
) -> None:
    torch.manual_seed(0)
    z = torch.randn(20, 4, dtype=F64).cumsum(1)
    changed = z * torch.tensor(scales, dtype=F64) * torch.tensor(signs, dtype=F64) + torch.tensor(shifts, dtype=F64)
    for kind in ("correlation", "barlow"):
        before, after = (float(decorrelation(v, kind=kind, group_size=2)) for v in (z, changed))
        assert after == pytest.approx(before, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(2, 6), g=st.integers(1, 4), groups=st.integers(1, 3), side=st.sampled_from([None, (1, 1), (2, 3)]),
    kind=st.sampled_from(list(PENALTIES)), scale=st.sampled_from([0.0, 1e-6, 1.0, 1e5]),
)  # fmt: skip
def test_any_shape_and_scale(
    b: int, g: int, groups: int, side: tuple[int, int] | None, kind: str, scale: float
) -> None:
    z = (torch.randn(b, g * groups, *(side or ())) * scale).requires_grad_()
    value = decorrelation(z, kind=kind, group_size=g)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.isfinite()
    assert value >= 0
    assert gradient.isfinite().all()
    if kind == "correlation":
        assert value <= 1 + 1e-4
    if g == 1 and kind in ("correlation", "decov"):
        assert value == 0  # one channel has nothing to correlate with


@pytest.mark.parametrize("kind", [k for k in PENALTIES if k != "zca"])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 2, 2), (2, 4)])
def test_gradcheck(kind: str, shape: tuple[int, ...]) -> None:
    z = (torch.randn(*shape, dtype=F64) * 0.7).requires_grad_()
    assert gradcheck(lambda v: decorrelation(v, kind=kind, group_size=2), z)


def test_the_zca_target_is_held_fixed() -> None:
    z = torch.randn(9, 6, dtype=F64).cumsum(1).requires_grad_()
    (gradient,) = torch.autograd.grad(decorrelation(z, kind="zca", group_size=3), z)
    target = whiten(z.detach(), 3)
    centred = z.detach() - z.detach().mean(0)
    torch.testing.assert_close(gradient, 2 * (centred - target) / z.numel(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", PENALTIES)
def test_constant_channels_have_a_finite_gradient_and_correlate_with_nothing(kind: str) -> None:
    z = torch.randn(20, 4)
    z[:, 1], z[:, 3] = 0.0, 7.0
    leaf = z.clone().requires_grad_()
    value = decorrelation(leaf, kind=kind, group_size=4)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.isfinite().all()
    if kind in ("correlation", "decov"):
        pair = float(decorrelation(z[:, [0, 2]], kind=kind, group_size=2))
        assert float(value.detach()) == pytest.approx(pair * (1 / 6 if kind == "correlation" else 1), rel=1e-5)


def test_correlation_matrix_of_a_constant_channel_is_zero() -> None:
    z = torch.randn(20, 3, dtype=F64)
    z[:, 2] = -4.0
    c = correlation_matrix(covariance(grouped(z, None))[1])[0]
    np.testing.assert_allclose(c[:2, :2], np.corrcoef(z[:, :2].T.numpy()), rtol=1e-12)
    assert c[2].abs().max() < 1e-12


@pytest.mark.parametrize("kind", PENALTIES)
def test_half_precision_is_computed_in_float32(kind: str) -> None:
    half = torch.randn(32, 16).cumsum(1).bfloat16().requires_grad_()
    value = decorrelation(half, kind=kind)
    assert value.dtype == torch.float32
    assert torch.equal(value, decorrelation(half.detach().float(), kind=kind))
    assert torch.autograd.grad(value, half)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decorrelation(half, kind=kind), value)


@pytest.mark.parametrize("kind", PENALTIES)
def test_gradient_descent_decorrelates(kind: str) -> None:
    z = torch.randn(64, 8, dtype=F64).cumsum(1).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    first = float(decorrelation(z.detach(), kind=kind, group_size=4))
    for _ in range(60):
        optimizer.zero_grad()
        decorrelation(z, kind=kind, group_size=4).backward()
        optimizer.step()
    assert float(decorrelation(z.detach(), kind=kind, group_size=4)) < 0.2 * first
    assert float(decorrelation(z.detach(), group_size=4)) < 0.1


@pytest.mark.parametrize(
    ("z", "settings", "message"),
    [
        (
            torch.zeros(4, 16),
            {"kind": "orthogonal"},
            "unknown penalty 'orthogonal'; known: correlation, zca, covariance, barlow, vicreg, decov",
        ),
        (
            torch.zeros(4, 10, 16),
            {"layer": "encoder"},
            "layer 'encoder' gives features of shape (4, 10, 16); decorrelation needs (B, C) or (B, C, H, W)",
        ),
        (
            torch.zeros(1, 16),
            {"layer": "fc2"},
            "layer 'fc2' gives 1 sample of shape (1, 16); a covariance needs at least 2, so use a larger batch",
        ),
        (
            torch.zeros(1, 16, 1, 1),
            {},
            "layer 'features' gives 1 sample of shape (1, 16, 1, 1); "
            "a covariance needs at least 2, so use a larger batch",
        ),
        (
            torch.zeros(4, 20, 3, 3),
            {"layer": "conv2"},
            "group_size=16 does not divide the 20 channels of layer 'conv2'; use one of 1, 2, 4, 5, 10, 20",
        ),
    ],
)
def test_bad_input(z: Tensor, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        decorrelation(z, **settings)
    assert str(error.value) == message


def test_one_image_with_several_positions_is_enough() -> None:
    z = torch.randn(1, 4, 3, 3, dtype=F64)
    expected = FORMULAS["correlation"](z[0].flatten(1).T.numpy())
    assert float(decorrelation(z, group_size=4)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [4096, 65536])
def test_distance_to_zca_of_redundant_channels_is_that_of_double_precision(samples: int) -> None:
    for draw in range(5):
        torch.manual_seed(draw)
        a = 3 * torch.randn(samples, 2)
        z = torch.cat([a, a @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])], 1)
        value, exact = (decorrelation(v, kind="zca", group_size=4) for v in (z, z.double()))
        assert value.item() == pytest.approx(exact.item(), rel=1e-5) and 8 < exact < 10
