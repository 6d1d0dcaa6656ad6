"""Whitening: white to the digit, the gradient where it is hard, and finite where the covariance is singular."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor
from torch.autograd import gradcheck

import sdecor.whitening
from sdecor.whitening import (
    METHODS,
    GroupWhitening,
    covariance,
    grouped,
    inverse_sqrt,
    newton_schulz,
    ungrouped,
    whiten,
    whitening_matrix,
)

F64 = torch.float64
SMOOTH = tuple(m for m in METHODS if m != "pca")  # whose gradient exists at equal eigenvalues


def rotation(g: int) -> Tensor:
    return torch.linalg.qr(torch.randn(g, g, dtype=F64))[0]


def conditioned(condition: float, n: int = 60, groups: int = 2, g: int = 16) -> Tensor:
    """Samples ``(n, groups * g)`` around 3 whose covariance has exactly this condition number in each group."""
    parts = []
    for _ in range(groups):
        raw = torch.randn(n, g, dtype=F64)
        white = torch.linalg.qr(raw - raw.mean(0))[0] * n**0.5
        spectrum = torch.logspace(0, -np.log10(condition), g, dtype=F64)
        parts.append(white * spectrum.sqrt() @ rotation(g).mT)
    return torch.cat(parts, 1) + 3


def spd(g: int, low: float = 0.5, high: float = 4.0) -> Tensor:
    u = rotation(g)
    return (u * torch.linspace(low, high, g, dtype=F64)) @ u.mT


def numpy_covariances(z: Tensor, g: int) -> np.ndarray:
    flat = z.detach().double().numpy()
    flat = flat if flat.ndim == 2 else np.moveaxis(flat, 1, -1).reshape(-1, flat.shape[1])
    return np.stack([np.cov(flat[:, i : i + g].T, bias=True).reshape(g, g) for i in range(0, flat.shape[1], g)])


def iternorm(s: Tensor, steps: int = 5) -> Tensor:
    """IterNorm's own iteration (arXiv:1904.03441, algorithm 1), which divides by the trace."""
    p, scaled = torch.eye(len(s), dtype=s.dtype), s / s.trace()
    for _ in range(steps):
        p = (3 * p - p @ p @ p @ scaled) / 2
    return p / s.trace().sqrt()


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(sdecor.whitening).failed == 0


# What comes out is white ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_white_at_every_condition_number(method: str, condition: float) -> None:
    z = conditioned(condition)
    assert np.linalg.cond(numpy_covariances(z, 16)) == pytest.approx(condition, rel=1e-6)
    out = whiten(z, 16, method=method, eps=1e-12)
    assert out.dtype == F64
    assert np.abs(numpy_covariances(out, 16) - np.eye(16)).max() < 1e-4
    assert out.mean(0).abs().max() < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_feature_maps_are_white_over_batch_and_positions(method: str) -> None:
    out = whiten(torch.randn(6, 8, 3, 5, dtype=F64).cumsum(1), 4, method=method, eps=1e-12)
    assert out.shape == (6, 8, 3, 5)
    assert np.abs(numpy_covariances(out, 4) - np.eye(4)).max() < 1e-10


def test_zca_equals_scipy_and_is_symmetric() -> None:
    cov = torch.stack([spd(16, 1e-3, 10), spd(16)])
    for method, tolerance in (("zca", 1e-11), ("newton_schulz", 1e-6)):
        w = whitening_matrix(cov, method=method, eps=1e-3)
        expected = [scipy.linalg.inv(scipy.linalg.sqrtm(c + 1e-3 * np.eye(16))) for c in cov.numpy()]
        np.testing.assert_allclose(w, np.stack(expected), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(w, w.mT, atol=tolerance)


def test_pca_equals_scikit_learn_up_to_sign_and_order() -> None:
    z = conditioned(30.0, groups=1, g=4)
    theirs = PCA(whiten=True).fit_transform(z.numpy()) * (60 / 59) ** 0.5  # theirs divides by N - 1
    ours = whiten(z, 4, method="pca", eps=1e-14).numpy()[:, ::-1]  # theirs has the largest eigenvalue first
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-7, atol=1e-9)


def test_cholesky_is_lower_triangular_and_equals_scipy() -> None:
    cov = spd(5)
    w = whitening_matrix(cov[None], method="cholesky", eps=1e-9)[0].numpy()
    np.testing.assert_allclose(w, np.linalg.inv(scipy.linalg.cholesky(cov.numpy(), lower=True)), rtol=1e-7, atol=1e-9)
    assert (np.triu(w, 1) == 0).all()


def test_of_all_variants_zca_stays_closest_to_the_features() -> None:
    z = conditioned(50.0, groups=1, g=4)
    distance = {m: float((whiten(z, 4, method=m) - (z - z.mean(0))).square().sum()) for m in METHODS}
    assert distance["zca"] < 0.95 * min(distance["pca"], distance["cholesky"])
    assert distance["newton_schulz"] == pytest.approx(distance["zca"], rel=1e-6)


def test_pca_swaps_axes_where_zca_hardly_moves() -> None:
    white = whiten(torch.randn(200, 2, dtype=F64), 2, eps=1e-14)
    before, after = white * torch.tensor([1.0, 1.001]), white * torch.tensor([1.001, 1.0])
    change = {m: float((whiten(before, 2, method=m) - whiten(after, 2, method=m)).abs().max()) for m in ("zca", "pca")}
    assert change["zca"] < 1e-3
    assert change["pca"] > 1


def test_five_steps_of_iternorm_are_not_white_where_the_default_is() -> None:
    errors = []
    for _ in range(8):
        u = rotation(16)
        cov = (u * torch.logspace(0, -2, 16, dtype=F64)) @ u.mT
        five, default = newton_schulz(cov, iterations=5, tolerance=0), newton_schulz(cov)
        off = [float((w @ cov @ w.mT - torch.eye(16)).abs().max()) for w in (iternorm(cov), five, default)]
        errors.append(off)
        assert off[2] < 1e-6
    mean = np.mean(errors, 0)
    assert 0.42 < mean[0] < 0.63  # IterNorm as published: 0.53 on average over rotations, 0.4 to 0.7 for a single one
    assert mean[1] > 0.2  # dividing by the Frobenius norm helps, but not enough


def test_newton_schulz_steps_and_tolerance() -> None:
    for condition in (1e2, 1e6):
        u = rotation(8)
        cov = (u * torch.logspace(0, -np.log10(condition), 8, dtype=F64)) @ u.mT
        steps = int(np.ceil(np.log(condition) / np.log(9 / 4))) + 5
        w = newton_schulz(cov, iterations=steps, tolerance=0)
        assert (w @ cov @ w.mT - torch.eye(8)).abs().max() < 1e-6
    loose = newton_schulz(cov, tolerance=0.1)
    assert 1e-8 < (loose @ cov @ loose - torch.eye(8)).abs().max() < 0.2
    start = torch.eye(8, dtype=F64) / torch.linalg.matrix_norm(cov).sqrt()
    torch.testing.assert_close(newton_schulz(cov, iterations=0), start)


# Invariances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_groups_samples_and_positions(method: str) -> None:
    z = torch.randn(20, 8, 2, 3, dtype=F64).cumsum(1)
    kept, before = z.clone(), whiten(z, 4, method=method)
    assert torch.equal(z, kept)  # never modified
    changed = z.clone()
    changed[:, :4] = torch.randn(20, 4, 2, 3, dtype=F64)
    assert torch.equal(whiten(changed, 4, method=method)[:, 4:], before[:, 4:])
    flat = whiten(z.movedim(1, -1).reshape(-1, 8), 4, method=method)
    assert torch.equal(flat.view(20, 2, 3, 8).movedim(-1, 1), before)
    if method != "pca":  # whose signs may flip
        order = torch.randperm(20)
        torch.testing.assert_close(whiten(z[order], 4, method=method), before[order], rtol=0, atol=1e-11)
        torch.testing.assert_close(whiten(z - 7, 4, method=method), before, rtol=0, atol=1e-11)


def test_zca_turns_with_the_features_and_ignores_their_scale() -> None:
    z, q = conditioned(20.0, groups=1, g=6), rotation(6)
    torch.testing.assert_close(whiten(z @ q, 6), whiten(z, 6) @ q, rtol=0, atol=1e-10)
    torch.testing.assert_close(whiten(1e3 * z, 6, eps=1e-14), whiten(z, 6, eps=1e-14), rtol=0, atol=1e-10)


def test_group_size_none_is_one_group() -> None:
    z = torch.randn(20, 6, dtype=F64)
    assert torch.equal(whiten(z, None), whiten(z, 6))


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(2, 5), g=st.integers(1, 5), groups=st.integers(1, 3), side=st.sampled_from([None, (1, 1), (2, 3)]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]), method=st.sampled_from(METHODS),
)  # fmt: skip
def test_any_shape_and_scale(
    b: int, g: int, groups: int, side: tuple[int, int] | None, scale: float, method: str
) -> None:
    z = torch.randn(b, g * groups, *(side or ())) * scale
    x = grouped(z, g)
    n = b * (side[0] * side[1] if side else 1)
    assert x.shape == (groups, n, g)
    assert torch.equal(ungrouped(x, z), z)
    out = whiten(z, g, method=method)
    assert out.shape == z.shape
    assert out.abs().max() < 1.01 * n**0.5  # a channel of variance at most 1 reaches no further


# Gradients ------------------------------------------------------------------------------------------------------------


def weighted(f: Callable[[Tensor], Tensor], s: Tensor, g: Tensor) -> Tensor:
    """Gradient of sum(g * f(s))."""
    leaf = s.detach().clone().requires_grad_()
    return torch.autograd.grad((g * f(leaf)).sum(), leaf)[0]


def by_autograd(s: Tensor) -> Tensor:
    eigenvalues, u = torch.linalg.eigh(s)
    return (u / eigenvalues.sqrt().unsqueeze(-2)) @ u.mT


@pytest.mark.parametrize("eigenvalues", [(1, 1, 1, 1), (1, 1, 4, 4), (0.5, 1, 2, 3), (2, 2, 2, 5)])
@pytest.mark.parametrize("turned", [False, True])
def test_gradcheck_of_inverse_sqrt(eigenvalues: tuple[float, ...], turned: bool) -> None:
    u = rotation(4) if turned else torch.eye(4, dtype=F64)
    s = ((u * torch.tensor(eigenvalues, dtype=F64)) @ u.mT).requires_grad_()
    assert gradcheck(inverse_sqrt, s)
    assert gradcheck(newton_schulz, s)


@pytest.mark.parametrize("method", SMOOTH)
def test_gradcheck_near_singular(method: str) -> None:
    u = rotation(4)
    cov = ((u * torch.tensor([0.0, 0.0, 1e-4, 1.0], dtype=F64)) @ u.mT)[None]
    lower = torch.tril(torch.ones(4, 4, dtype=F64))

    def regularized(c: Tensor) -> Tensor:  # the free entries of a symmetric matrix
        return whitening_matrix(c * lower + (c * lower).mT, method=method, eps=1e-3)

    free = (cov * lower * (1 - torch.eye(4) / 2)).requires_grad_()
    assert gradcheck(regularized, free, eps=1e-7, rtol=1e-3)


def test_gradient_solves_the_sylvester_equation_close_to_singular() -> None:
    """From X X = S^-1 follows dX X + X dX = -S^-1 dS S^-1, whichever way dX is computed."""
    for smallest in (1e-2, 1e-5, 1e-8):
        u = rotation(6)
        s = (u * torch.tensor([smallest, smallest, smallest * 2, 0.5, 0.5, 1.0], dtype=F64)) @ u.mT
        s = (s + s.mT) / 2
        ds = torch.randn(6, 6, dtype=F64)
        ds = ds + ds.mT
        x, inverse = inverse_sqrt(s).numpy(), np.linalg.inv(s.numpy())
        dx = scipy.linalg.solve_sylvester(x, x, -inverse @ ds.numpy() @ inverse)
        g = torch.randn(6, 6, dtype=F64)
        ours = float((weighted(inverse_sqrt, s, g) * ds).sum())
        assert ours == pytest.approx(float((g.numpy() * dx).sum()), rel=1e-5)


def test_at_the_identity_autograd_through_eigenvectors_fails_and_ours_is_exact() -> None:
    g = torch.randn(5, 5, dtype=F64)
    for scale in (1.0, 4.0):
        s = scale * torch.eye(5, dtype=F64)
        assert torch.allclose(by_autograd(s), inverse_sqrt(s))
        assert not weighted(by_autograd, s, g).isfinite().all()
        torch.testing.assert_close(weighted(inverse_sqrt, s, g), -(g + g.mT) / 4 / scale**1.5)
    s = spd(5)  # where both exist they agree
    naive = weighted(by_autograd, s, g)
    torch.testing.assert_close(weighted(inverse_sqrt, s, g), (naive + naive.mT) / 2)


@pytest.mark.parametrize("method", SMOOTH)
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 2, 2), (2, 4)])
def test_gradcheck_of_whiten(method: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, dtype=F64, requires_grad=True)
    assert gradcheck(lambda v: whiten(v, 2, method=method, eps=1e-2), z)


def singular() -> dict[str, Tensor]:
    constant = torch.randn(64, 16)
    constant[:, [2, 5]] = 3.0
    copies = torch.randn(64, 1).repeat(1, 16)
    white = torch.linalg.qr(torch.randn(64, 16))[0]
    return {
        "fewer samples than channels": torch.randn(4, 16),
        "two samples": torch.randn(2, 16),
        "constant channels": constant,
        "all constant": torch.full((8, 16), 2.0),
        "all zero": torch.zeros(8, 16),
        "copies": copies,
        "equal eigenvalues": white * 8,
        "mostly zero": torch.relu(torch.randn(64, 16) - 2.5),
        "far from zero": torch.randn(64, 16) + 1e3,
    }


@pytest.mark.parametrize("case", singular())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_output_and_gradient_are_finite_where_the_covariance_is_singular(case: str, dtype: torch.dtype) -> None:
    for scale in (1e-4, 1.0, 1e2, 1e4):  # rounding gives negative eigenvalues beyond eps from 1e2 on in float32
        for method in METHODS:
            z = (singular()[case].to(dtype) * scale).requires_grad_()
            out = whiten(z, 16, method=method)
            assert out.isfinite().all()
            assert out.abs().max() <= 1.05 * len(z) ** 0.5, (scale, method)
            if method != "pca":
                (g,) = torch.autograd.grad(out, z, torch.randn_like(out))
                assert g.isfinite().all(), (scale, method)


def test_a_constant_channel_stays_out_of_the_others_way() -> None:
    z = torch.randn(50, 4, dtype=F64)
    z[:, 1] = 7.0
    out = whiten(z, 4)
    assert (out[:, 1].abs() < 1e-9).all()
    torch.testing.assert_close(out[:, [0, 2, 3]], whiten(z[:, [0, 2, 3]], 3), rtol=0, atol=1e-10)


# Precision ------------------------------------------------------------------------------------------------------------


def test_float32_inside_bfloat16_autocast() -> None:
    z = torch.randn(64, 32).cumsum(1)
    layer = GroupWhitening(32)
    plain, plain_layer = whiten(z), layer(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert (z @ z.T).dtype == torch.bfloat16
        for method in METHODS:
            assert whiten(z, method=method).dtype == torch.float32
        assert torch.equal(whiten(z), plain)
        assert torch.equal(layer(z), plain_layer)
    half = z.bfloat16().requires_grad_()
    out = whiten(half)
    assert out.dtype == torch.float32
    assert torch.equal(out, whiten(half.detach().float()))
    assert torch.autograd.grad(out.square().sum(), half)[0].dtype == torch.bfloat16
    assert np.abs(numpy_covariances(out, 16) - np.eye(16)).max() < 1e-3


# The layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_equals_training_under_the_same_statistics(method: str) -> None:
    z = torch.randn(12, 8, 3, 3, dtype=F64).cumsum(1)
    layer = GroupWhitening(8, 4, method=method).double()
    trained = layer(z)
    mean, cov = covariance(grouped(z, 4))
    layer.running_mean.copy_(mean)
    layer.running_covariance.copy_(cov)
    layer.eval()
    leaf, upstream = z.clone().requires_grad_(), torch.randn_like(z)
    out = layer(leaf)
    torch.testing.assert_close(out, trained, rtol=0, atol=1e-12)
    (g,) = torch.autograd.grad(out, leaf, upstream)
    w = whitening_matrix(cov, method=method)  # the map of training, statistics held fixed
    fixed = ungrouped(grouped(upstream, 4) @ w, z)
    assert g.isfinite().all()
    torch.testing.assert_close(g, fixed, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(z[3:4]), trained[3:4], rtol=0, atol=1e-12)  # one image is enough now
    assert layer(z[:0]).shape == (0, 8, 3, 3)


def test_running_statistics_average_the_unbiased_covariance() -> None:
    layer, momentum = GroupWhitening(8, 4, momentum=0.3).double(), 0.3
    mean, cov = np.zeros(8), np.stack([np.eye(4)] * 2)
    for _ in range(3):
        z = torch.randn(10, 8, 2, 2, dtype=F64).cumsum(1) + 2
        layer(z)
        flat = np.moveaxis(z.numpy(), 1, -1).reshape(-1, 8)
        mean = (1 - momentum) * mean + momentum * flat.mean(0)
        cov = (1 - momentum) * cov + momentum * np.stack([np.cov(flat[:, :4].T), np.cov(flat[:, 4:].T)])
    np.testing.assert_allclose(layer.running_mean.flatten(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_covariance, cov, rtol=1e-12)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    out = layer.eval()(z)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    w = scipy.linalg.inv(scipy.linalg.sqrtm(cov[0] + 1e-5 * np.eye(4)))
    np.testing.assert_allclose(out[0, :4, 0, 0], w @ (z[0, :4, 0, 0].numpy() - mean[:4]), rtol=1e-9)


def test_statistics_stand_still_when_asked_to() -> None:
    layer = GroupWhitening(4, 4)
    layer.track_running_stats = False
    z = torch.randn(9, 4)
    assert torch.equal(layer(z), whiten(z, 4))
    assert torch.equal(layer.running_covariance, torch.eye(4)[None])
    assert torch.equal(layer.running_mean, torch.zeros(1, 1, 4))


def test_the_layer_has_no_parameters_and_says_what_it_is() -> None:
    layer = GroupWhitening(32, 8, method="newton_schulz")
    assert list(layer.parameters()) == []
    assert list(layer.state_dict()) == ["running_mean", "running_covariance"]
    assert repr(layer) == "GroupWhitening(groups=4, group_size=8, method='newton_schulz', eps=1e-05)"


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: grouped(torch.zeros(4, 20), 16, layer="conv2"),
            "group_size=16 does not divide the 20 channels of layer 'conv2'; use one of 1, 2, 4, 5, 10, 20",
        ),
        (
            lambda: whiten(torch.zeros(4, 6), 0),
            "group_size=0 does not divide the 6 channels of layer 'features'; use one of 1, 2, 3, 6",
        ),
        (
            lambda: GroupWhitening(20),
            "group_size=16 does not divide the 20 channels of layer 'GroupWhitening'; use one of 1, 2, 4, 5, 10, 20",
        ),
        (
            lambda: whiten(torch.zeros(4, 8, 3), 4, layer="tokens"),
            "layer 'tokens' gives features of shape (4, 8, 3); decorrelation needs (B, C) or (B, C, H, W)",
        ),
        (
            lambda: whiten(torch.zeros(1, 8), 4, layer="fc2"),
            "layer 'fc2' gives 1 sample of shape (1, 8); a covariance needs at least 2, so use a larger batch",
        ),
        (
            lambda: GroupWhitening(8, 4)(torch.zeros(1, 8)),
            "layer 'GroupWhitening' gives 1 sample of shape (1, 8); "
            "a covariance needs at least 2, so use a larger batch",
        ),
        (
            lambda: GroupWhitening(8, 4).eval()(torch.zeros(2, 8, 3)),
            "layer 'GroupWhitening' gives features of shape (2, 8, 3); decorrelation needs (B, C) or (B, C, H, W)",
        ),
        (
            lambda: GroupWhitening(8, 4).eval()(torch.zeros(2, 4)),
            "GroupWhitening was made for 8 channels, got shape (2, 4)",
        ),
        (lambda: GroupWhitening(4, 4)(torch.zeros(2, 8)), "GroupWhitening was made for 4 channels, got shape (2, 8)"),
        (
            lambda: whiten(torch.zeros(4, 8), 4, method="svd"),
            "unknown whitening method 'svd'; known: zca, newton_schulz, pca, cholesky",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


@settings(max_examples=30, deadline=None)
@given(channels=st.integers(1, 40), g=st.integers(-3, 50))
def test_the_group_sizes_offered_work(channels: int, g: int) -> None:
    z = torch.zeros(2, channels)
    try:
        assert grouped(z, g).shape == (channels // g, 2, g)
        assert channels % g == 0
    except ValueError as error:
        offered = [int(d) for d in str(error).split("use one of ")[1].split(", ")]
        assert g not in offered
        assert [grouped(z, d).shape[2] for d in offered] == offered


def test_the_gradient_of_covariance_is_that_of_its_formula() -> None:
    x = torch.randn(3, 40, 5, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 5, 5, dtype=torch.float64)
    centred = x - x.mean(1, keepdim=True)
    (expected,) = torch.autograd.grad(((centred.mT @ centred / 40) * weight).sum(), x)
    mean, cov = covariance(x)
    (found,) = torch.autograd.grad((cov * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert gradcheck(lambda v: [part.square().sum() for part in covariance(v)], x)
    assert torch.autograd.grad(mean.sum(), x)[0].unique().tolist() == [1 / 40]


def redundant(n: int, g: int, seed: int, scale: float = 3.0) -> Tensor:
    """Float32 samples ``(n, g)`` of rank g / 2: sums and differences of independent channels beside these."""
    torch.manual_seed(seed)
    a = scale * torch.randn(n, g // 2)
    return torch.cat([a, a @ torch.linalg.qr(torch.randn(g // 2, g // 2))[0] * 2**0.5], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("g", [2, 4, 8, 16])
def test_redundant_channels_in_single_precision(g: int, method: str) -> None:
    for n, seed in ((4096, 0), (4096, 1), (65536, 2)):
        for scale in (3.0, 3000.0):
            z = redundant(n, g, seed, scale)
            white, exact = whiten(z, g, method=method), whiten(z.double(), g, method=method)
            # the directions without variance are those where rounding, over the ridge, shows
            worst = 2 * torch.finfo(torch.float32).eps * z.abs().max() * g / 1e-5**0.5
            if method != "pca":  # whose axes may change places
                torch.testing.assert_close(white.double(), exact, rtol=1e-4, atol=float(worst))
            assert white.abs().max() < 8 + worst
            # of a covariance that was summed in single precision, by the least eigenvalue that is left
            cov = covariance(grouped(z, g))[1]
            w = whitening_matrix(cov, method=method)
            assert w.isfinite().all() and torch.linalg.matrix_norm(w, 2).max() < 0.99e-5**-0.5


def test_a_covariance_in_single_precision_gets_what_its_least_eigenvalue_lacks() -> None:
    u = rotation(3)
    cov = ((u * torch.tensor([-0.3, 1.0, 4.0], dtype=F64)) @ u.mT)[None].float()
    w = whitening_matrix(cov, eps=0.1)
    torch.testing.assert_close(w[0], inverse_sqrt(cov[0] + 0.4 * torch.eye(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("g", [2, 4, 8, 12, 16, 32])
def test_a_spread_of_a_thousand_is_white_in_single_precision(g: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(4096, g) * torch.logspace(0, 3, g)
    cov = covariance(grouped(whiten(z, g).double(), g))[1][0]
    torch.testing.assert_close(cov, torch.eye(g, dtype=F64), rtol=0, atol=2e-5)  # 1e-5 is the ridge over variance 1


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_number_stays_so_in_its_group_alone(method: str) -> None:
    z = torch.randn(40, 8)
    z[3, 5] = torch.nan
    white = whiten(z, 4, method=method)
    assert white[:, 4:].isnan().all()
    torch.testing.assert_close(white[:, :4], whiten(z[:, :4], 4, method=method))
