"""How far two maps agree: rank correlation and structural similarity, against SciPy and scikit-image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import scipy.stats
import skimage.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import close, gradient_map, maps, trained
from torch import Tensor

from sdecor.measures.robustness import spearman, ssim
from sdecor.saliency import logits_and_gradient


@given(a=maps(), seed=st.integers(0, 99), coarse=st.booleans())
@settings(max_examples=40, deadline=None)
def test_spearman_against_scipy(a: Tensor, seed: int, coarse: bool) -> None:
    b = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed))
    b = b.round() if coarse else b
    value = spearman(a, b)
    assert value.shape == (len(a),) and value.dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of constant maps
        theirs = [scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    close(value, torch.tensor(theirs, dtype=torch.float64), 1e-9)
    close(spearman(b, a), value)
    close(spearman(-a, b.double() * 7 - 3), -value)
    close(spearman(a.permute(0, 2, 1), b.permute(0, 2, 1)), value)
    close(torch.cat([spearman(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]), value)


def test_spearman_by_hand() -> None:
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    close(spearman(a, torch.tensor([[[0.0, 5.0], [5.0, 6.0]]]))[0], 4.5 / math.sqrt(22.5))
    assert spearman(torch.ones(1, 7, 9), torch.rand(1, 7, 9)).isnan().all()
    assert spearman(torch.rand(1, 7, 9), torch.full((1, 7, 9), 0.1)).isnan().all()
    assert spearman(torch.zeros(0, 2, 2), torch.zeros(0, 2, 2)).shape == (0,)
    assert spearman(a.expand(3, 2, 2), a.expand(3, 2, 2)).tolist() == [1, 1, 1]
    large = torch.rand(2, 100, 100)
    close(spearman(large, large.pow(3)), torch.ones(2, dtype=torch.float64))
    model, images, target = trained()
    gradient = logits_and_gradient(model, images, target)[1][:, 0]
    theirs = [scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(gradient, images, strict=True)]
    close(spearman(gradient, images[:, 0]), torch.tensor(theirs), 1e-9)


def test_ssim() -> None:
    model, images, target = trained()
    pairs = [
        (gradient_map(model)(images, target), images[:, 0] + 1),
        (torch.rand(3, 7, 12) * 1e-6, torch.rand(3, 7, 12) * 5e4),
    ]
    for a, b in pairs:
        value = ssim(a, b)
        assert value.shape == (len(a),) and value.dtype == torch.float64
        theirs = [
            skimage.metrics.structural_similarity((x / x.max()).numpy(), (y / y.max()).numpy(), data_range=1)
            for x, y in zip(a.double(), b.double(), strict=True)
        ]
        close(value, torch.tensor(theirs), 1e-9)
        close(ssim(b, a), value, 1e-9)
        close(ssim(a * 4, b / 8), value)
        close(ssim(a, a), torch.ones(len(a), dtype=torch.float64), 1e-9)
        close(ssim(a[1:], b[1:]), value[1:])
        assert (value < 0.9).all()
    a = torch.rand(3, 7, 7, requires_grad=True)
    b = a.detach() * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    assert ssim(a, b).isnan().tolist() == [False, True, False]
    assert ssim(b, a).isnan().tolist() == [False, True, False]
    assert ssim(a[:0], b[:0]).shape == (0,)


@pytest.mark.parametrize("measure", [spearman, ssim])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 8), torch.ones(2, 8), "a and b must have the same shape (B, H, W), got (2, 8) and (2, 8)"),
        (
            torch.ones(2, 8, 8),
            torch.ones(1, 8, 8),
            "a and b must have the same shape (B, H, W), got (2, 8, 8) and (1, 8, 8)",
        ),
        (torch.ones(1, 8, 8), torch.full((1, 8, 8), math.nan), "b has NaN in 1 of 1 rows (the first is row 0)"),
        (torch.full((1, 8, 8), math.inf), torch.ones(1, 8, 8), "a has infinity in 1 of 1 rows (the first is row 0)"),
    ],
)
def test_bad_pairs(measure: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        measure(a, b)
    assert str(caught.value) == message


def test_bad_maps_for_ssim() -> None:
    with pytest.raises(ValueError, match=r"^a and b must have at least 7 by 7 pixels, got \(8, 6\)$"):
        ssim(torch.ones(1, 8, 6), torch.ones(1, 8, 6))
    with pytest.raises(ValueError, match=r"^a and b must be non-negative; pass their absolute values$"):
        ssim(torch.ones(1, 8, 8), -torch.ones(1, 8, 8))
