"""Masking: exact shares whatever the ties, and fills that keep to each image."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import seeded

import sdecor.masking
from sdecor.masking import impute, lowest, masked, replacement
from sdecor.registers import FILLS


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(sdecor.masking).failed == 0


# Which pixels ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    b=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 9),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True), levels=st.integers(1, 4),
)  # fmt: skip
def test_exact_count_and_nothing_lower_is_left_whatever_the_ties(
    b: int, h: int, w: int, fraction: float, levels: int
) -> None:
    score = torch.randint(levels, (b, h, w)).float()
    kept, mask = score.clone(), lowest(score, fraction)
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    assert mask.flatten(1).sum(1).tolist() == [round(fraction * (h * w))] * b
    for m, s in zip(mask, score, strict=True):
        if m.any() and not m.all():
            assert s[m].max() <= s[~m].min()
    assert torch.equal(score, kept)


def test_lowest_by_hand() -> None:
    score = torch.tensor([[[0.5, -2.0, 3.0], [0.0, 1.0, -1.0]], [[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]]])
    expected = [[[False, True, False], [True, False, True]], [[False] * 3, [True] * 3]]
    assert lowest(score, 0.5).tolist() == expected
    assert lowest(score, 1 / 6).nonzero().tolist() == [[0, 0, 1], [1, 1, 2]]
    assert lowest(score, 5 / 6).logical_not().nonzero().tolist() == [[0, 0, 2], [1, 0, 0]]


def test_all_scores_equal() -> None:
    assert lowest(torch.zeros(2, 28, 28), 0.5).sum((1, 2)).tolist() == [392, 392]
    assert lowest(torch.zeros(1, 32, 32), 0.1).sum() == 102
    assert lowest(torch.full((1, 4, 4), -3.0).bfloat16(), 0.25).sum() == 4


def test_more_masked_contains_less_masked() -> None:
    score = torch.randn(3, 8, 8)
    masks = [lowest(score, f) for f in (0.1, 0.3, 0.7, 0.9)]
    for fewer, more in zip(masks, masks[1:], strict=False):
        assert (fewer <= more).all()


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.1, 1.5, 50, float("nan"), float("inf")])
def test_fraction_outside(fraction: float) -> None:
    with pytest.raises(ValueError) as error:
        lowest(torch.zeros(1, 4, 4), fraction)
    assert str(error.value) == f"fraction must lie strictly between 0 and 1, got {fraction}"


# What they are replaced with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_untouched_input(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    kept = x.clone()
    fill = replacement(x, kind)
    mask = lowest(torch.randn(2, 8, 8), 0.5)
    out = masked(x, mask, fill)
    assert fill.shape == out.shape == x.shape
    assert fill.dtype == out.dtype == dtype
    assert torch.equal(x, kept)
    where = mask.unsqueeze(1).expand_as(x)
    assert torch.equal(out[~where], x[~where])
    assert torch.equal(out[where], fill[where])


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e4, 1e4, width=32), width=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_uniform_stays_in_the_range_of_each_image_and_channel(low: float, width: float, dtype: torch.dtype) -> None:
    x = (low + width * torch.rand(2, 2, 6, 6) * torch.tensor([1.0, 100.0])[:, None, None]).to(dtype)
    fill = replacement(x, "uniform")
    smallest, largest = torch.aminmax(x.flatten(2), dim=2)
    assert (fill.flatten(2) >= smallest[..., None]).all()
    assert (fill.flatten(2) <= largest[..., None]).all()


def test_uniform_is_uniform() -> None:
    x = torch.zeros(1, 2, 100, 100)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 2.0, -4.0
    fill = replacement(x)[0].flatten(1).sort(1).values
    for sorted_values, (low, high) in zip(fill, [(0, 2), (-4, 0)], strict=True):
        empirical = np.linspace(0, 1, 10_000)
        distance = np.abs((sorted_values.numpy() - low) / (high - low) - empirical).max()
        assert distance < 1.63 / 100  # Kolmogorov-Smirnov, 1 %
    assert fill.flatten().unique().numel() > 19_000  # every pixel has its own draw


def test_the_generator_decides_and_the_global_state_stands_still() -> None:
    x = torch.randn(2, 3, 5, 5)
    before = torch.get_rng_state()
    first, again = (replacement(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = replacement(x, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    for kind in set(FILLS) - {"uniform"}:
        generator = torch.Generator().manual_seed(3)
        state = generator.get_state()
        replacement(x, kind, generator=generator)
        assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)


def test_constant_and_mean() -> None:
    x = torch.arange(16.0).view(1, 2, 2, 4)
    assert torch.equal(replacement(x, "constant"), torch.zeros_like(x))
    assert torch.equal(replacement(x, "constant", value=-0.4242), torch.full_like(x, -0.4242))
    assert replacement(x, "mean")[0, :, 0, 0].tolist() == [3.5, 11.5]
    assert replacement(x, "mean").std((2, 3)).max() == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (5, 5), (8, 8), (9, 9), (28, 28), (28, 4), (4, 28), (28, 1)])
def test_blur_keeps_constants_and_works_on_small_images(size: tuple[int, int]) -> None:
    constant = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, *size)
    torch.testing.assert_close(replacement(constant, "blur"), constant.clone())
    x = torch.randn(2, 2, *size)
    blurred = replacement(x, "blur")
    assert blurred.isfinite().all()
    assert (blurred.amax((2, 3)) <= x.amax((2, 3)) + 1e-6).all()
    if min(size) >= 8:
        assert blurred.var() < 0.5 * x.var()


def test_blur_is_a_gaussian_of_a_tenth_of_the_height() -> None:
    x = torch.zeros(1, 1, 30, 30)
    x[0, 0, 15, 15] = 1
    blurred = replacement(x, "blur")[0, 0].numpy()
    line = np.exp(-0.5 * ((np.arange(30) - 15) / 3) ** 2) * (np.abs(np.arange(30) - 15) <= 6)
    np.testing.assert_allclose(blurred, np.outer(line, line) / line.sum() ** 2, rtol=1e-4, atol=1e-9)


def test_unknown_fill() -> None:
    with pytest.raises(ValueError) as error:
        replacement(torch.zeros(1, 1, 4, 4), "inpaint")
    assert str(error.value) == "unknown fill 'inpaint'; known: uniform, mean, constant, blur"


# Put together ---------------------------------------------------------------------------------------------------------


def test_masked_hits_all_channels_of_a_pixel() -> None:
    x = torch.arange(8.0).view(1, 2, 2, 2)
    out = masked(x, torch.tensor([[[True, False], [False, True]]]), torch.full_like(x, -1))
    assert out.tolist() == [[[[-1, 1], [2, -1]], [[-1, 5], [6, -1]]]]


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (4, 3, 5, 6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masked_gives_the_very_bits_and_a_gradient(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3.0, -7.5])
    x, filling = (special[torch.randint(8, shape)].to(memory_format=layout) for _ in range(2))
    mask = torch.rand(4, 5, 6) < 0.5
    for new in (filling, filling[:, :, :1, :1].expand(shape)):
        expected = torch.where(mask[:, None].expand(shape), new, x)
        assert torch.equal(masked(x, mask, new).view(torch.int32), expected.view(torch.int32))
    for kept, other in ((True, False), (False, True)):
        x, new = torch.randn(shape, requires_grad=kept), torch.randn(shape, requires_grad=other)
        (gradient,) = torch.autograd.grad(masked(x, mask, new).sum(), x if kept else new)
        assert torch.equal(gradient != 0, (mask ^ kept)[:, None].expand(shape))


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_lowest_marks_what_topk_finds_with_ties_and_without(levels: int) -> None:
    score = torch.randint(levels, (16, 12, 12)).float() / levels
    for fraction in (0.001, 0.01, 0.5, 0.77, 0.999):
        mask, count = lowest(score, fraction), round(fraction * 144)
        assert mask.dtype == torch.bool
        assert mask.sum((1, 2)).tolist() == [count] * 16
        ranked = score.flatten(1).sort(1).values
        found = score.masked_fill(~mask, 2.0).flatten(1).sort(1).values
        assert torch.equal(found[:, :count], ranked[:, :count])


# Filled in from the neighbours ----------------------------------------------------------------------------------------

WEIGHTS = {(dy, dx): 1 / 6 if 0 in (dy, dx) else 1 / 12 for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx}


def plainly_solved(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One channel (H, W): a row per masked pixel, which is the mean of its neighbours inside the image."""
    number = {tuple(place): i for i, place in enumerate(np.argwhere(mask))}
    system, right = scipy.sparse.lil_matrix((len(number), len(number))), np.zeros(len(number))
    for (y, x), i in number.items():
        inside = {(y + dy, x + dx): w for (dy, dx), w in WEIGHTS.items()
                  if 0 <= y + dy < mask.shape[0] and 0 <= x + dx < mask.shape[1]}  # fmt: skip
        system[i, i] = 1
        for place, weight in inside.items():
            share = weight / sum(inside.values())
            if mask[place]:
                system[i, number[place]] -= share
            else:
                right[i] += share * image[place]
    out = image.copy()
    out[mask] = scipy.sparse.linalg.spsolve(system.tocsc(), right)
    return out


@settings(max_examples=30, deadline=None)
@given(
    h=st.integers(2, 12), w=st.integers(2, 12), fraction=st.floats(0.05, 0.98),
    offset=st.sampled_from([0.0, 1e3]), blocks=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_imputation_solves_the_plain_system(
    h: int, w: int, fraction: float, offset: float, blocks: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, h, w, generator=generator, dtype=torch.float64) + offset
    mask = torch.rand(3, h, w, generator=generator) < fraction
    if blocks:
        mask[1] = True
        mask[1, -1, 0] = mask[1, 0, 0] = False  # two corners know all
        mask[2] = False
    mask[:, 0, 1] = False
    kept = x.clone(), mask.clone()
    out = impute(x, mask, noise=0)
    assert torch.equal(x, kept[0]) and torch.equal(mask, kept[1])
    for image, where, result in zip(x, mask, out, strict=True):
        for channel, filled in zip(image, result, strict=True):
            expected = plainly_solved(channel.numpy(), where.numpy()) if where.any() else channel.numpy()
            np.testing.assert_allclose(filled, expected, rtol=1e-9, atol=1e-6)
    masked_by_nan = x.masked_fill(mask.unsqueeze(1), torch.nan)
    assert torch.equal(impute(masked_by_nan, mask, noise=0), out)  # what is masked does not matter
    close_to = impute(x[[2, 0]], mask[[2, 0]], noise=0)
    assert torch.equal(close_to, out[[2, 0]])  # nor does what else is in the batch


def test_imputation_against_quantus() -> None:
    functions = pytest.importorskip(
        "quantus.functions.perturb_func", reason="Quantus does not import here", exc_type=ImportError
    )
    x = torch.rand(4, 3, 9, 7, dtype=torch.float64)
    mask = torch.rand(4, 9, 7) < 0.6
    out = impute(x, mask, noise=0)
    for image, where, result in zip(x, mask, out, strict=True):
        indices = where.flatten().nonzero()[:, 0].numpy()
        theirs = functions.noisy_linear_imputation(image.numpy(), indices, noise=0)
        np.testing.assert_allclose(result, theirs, atol=1e-6)


def test_imputation_by_hand() -> None:
    x = torch.tensor([[[[6.0, 12, 0], [0, 99, 24], [0, 0, 12]]]])
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 1, 1] = True
    assert impute(x, mask, noise=0)[0, 0, 1, 1].item() == pytest.approx((12 + 24) / 6 + (6 + 12) / 12)
    mask = mask.roll((-1, -1), (1, 2))  # a corner: 1/6 of 12, 1/6 of 0, 1/12 of 99, out of 5/12
    assert impute(x, mask, noise=0)[0, 0, 0, 0].item() == pytest.approx((12 / 6 + 99 / 12) / (5 / 12))


def test_imputation_of_a_whole_image_and_of_none() -> None:
    x = torch.randn(2, 3, 8, 8)
    mask = torch.tensor([True, False]).view(2, 1, 1).expand(2, 8, 8)
    out = impute(x, mask, noise=0)
    torch.testing.assert_close(out[0], x[0].mean((1, 2), keepdim=True).expand(3, 8, 8))
    assert torch.equal(out[1], x[1])
    assert impute(x[:0], mask[:0]).shape == (0, 3, 8, 8)
    assert impute(x.bfloat16(), mask).dtype == torch.bfloat16
    zeros = torch.zeros(1, 1, 8, 8)
    assert torch.equal(impute(zeros, mask[:1], noise=0), zeros)


def test_noise_of_imputation() -> None:
    x, mask = torch.randn(2, 1, 100, 100), torch.rand(2, 100, 100) < 0.7
    smooth = impute(x, mask, noise=0)
    noisy = impute(x, mask, noise=0.3, generator=torch.Generator().manual_seed(1))
    difference = noisy - smooth
    assert torch.equal(noisy[~mask[:, None]], x[~mask[:, None]])
    assert difference[mask[:, None]].std().item() == pytest.approx(0.3, rel=0.05)
    both = (mask[0] & mask[1])[None]
    torch.testing.assert_close(difference[0][both], difference[1][both])  # common to all images
    assert torch.equal(noisy, impute(x, mask, noise=0.3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("mask", [torch.ones(2, 4, 5, dtype=torch.bool), torch.ones(2, 4, 4)])
def test_bad_mask_of_imputation(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError) as error:
        impute(torch.zeros(2, 1, 4, 4), mask)
    expected = f"mask must be boolean of shape (2, 4, 4), got {tuple(mask.shape)} of {mask.dtype}"
    assert str(error.value) == expected


def test_common_noise_is_scaled_to_each_image() -> None:
    x = torch.rand(3, 2, 5, 5) * torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1)
    fill = replacement(x, common=True, generator=torch.Generator().manual_seed(0))
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    noise = (fill - low) / (high - low)
    torch.testing.assert_close(noise[0], noise[1])
    torch.testing.assert_close(noise[0], noise[2])
    alone = replacement(x[2:], common=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone, fill[2:])


# What is given --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[[[0.5]]], np.ones((1, 2, 2)), None])
def test_what_is_no_tensor(value: Any) -> None:
    x, mask = torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    for name, call in {
        "score": lambda: lowest(value, 0.5),
        "x": lambda: replacement(value),
        "mask": lambda: impute(x, value),
        "filling": lambda: masked(x, mask, value),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"{name} must be a tensor, got {type(value).__name__}; pass torch.as_tensor({name})"


@pytest.mark.parametrize("kind", FILLS)
def test_images_of_whole_numbers_have_no_fill(kind: str) -> None:
    with pytest.raises(ValueError) as error:
        replacement(torch.ones(1, 1, 2, 2, dtype=torch.int64), kind)
    assert str(error.value) == "x must be of a floating type, got torch.int64"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_full_precision_rounded(dtype: torch.dtype) -> None:
    x, eps = torch.randn(3, 2, 9, 8), 4 * torch.finfo(dtype).eps
    mask = lowest(torch.rand(3, 9, 8), 0.4)
    for call in [
        *(lambda v, kind=kind: replacement(v, kind, value=0.3, generator=seeded()) for kind in FILLS),
        lambda v: replacement(v, common=True, generator=seeded()),
        lambda v: impute(v, mask, generator=seeded()),
        lambda v: masked(v, mask, -v),
    ]:
        rounded = call(x.to(dtype))
        assert rounded.dtype == dtype
        torch.testing.assert_close(rounded.float(), call(x), rtol=eps, atol=3 * eps)
    score = torch.randperm(144).view(2, 9, 8).float()
    assert torch.equal(lowest(score.to(dtype), 0.4), lowest(score, 0.4))
