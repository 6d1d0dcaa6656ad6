"""The procedural images: what they promise, and what they reject."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import exactly

from sdecor import images, shapes
from sdecor.data import ImageData, load


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 40),
    size=st.sampled_from([32, 64]),
    strength=st.floats(0, 1),
    copies=st.integers(0, shapes.MAX_COPIES),
    seed=st.integers(0, 2**31),
)
def test_shapes_hold_what_they_promise(samples: int, size: int, strength: float, copies: int, seed: int) -> None:
    arguments = {"image_size": size, "cue_strength": strength, "seed": seed}
    x, labels, masks, cues = shapes.generate(samples, cue_copies=copies, **arguments)
    plain, same_labels, same_masks, same_cues = shapes.generate(samples, cue_copies=0, **arguments)
    assert x.shape == (samples, 3, size, size) and x.dtype == torch.uint8 and masks.dtype == torch.bool
    assert torch.equal(labels, same_labels) and torch.equal(masks, same_masks) and torch.equal(cues, same_cues)
    counts = labels.bincount(minlength=8)
    assert counts.max() - counts.min() <= 1
    share = masks.float().mean((1, 2))
    assert share.min() > 0.04 and share.max() < 0.2
    # The copies are all that differs; they are alike, lie apart from each other and never on the object.
    side, changed = size * 4 // 32, (x != plain).any(1)
    assert not (changed & masks).any()
    assert changed.flatten(1).sum(1).max() <= copies * side**2
    patch = (shapes._hue(cues / 8) * 255).round().to(torch.uint8)
    alike = (x == patch[:, :, None, None]).all(1)
    assert (alike.flatten(1).sum(1) >= copies * side**2).all()
    again = shapes.generate(samples, cue_copies=copies, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, labels, masks, cues), strict=True))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_cue_agrees_with_the_class_as_often_as_asked(strength: float) -> None:
    n = 4000
    _, labels, _, cues = shapes.generate(n, cue_strength=strength, seed=5)
    p = strength + (1 - strength) / 8
    assert abs(float((labels == cues).float().mean()) - p) <= 4 * (p * (1 - p) / n) ** 0.5
    assert float(torch.bincount(8 * labels + cues, minlength=64).min()) > (0 if strength < 1 else -1)


def test_objects_stand_out_and_their_outline_is_all_that_tells_the_class() -> None:
    x, labels, masks, _ = shapes.generate(1600, cue_copies=0, seed=3)
    luma = (x.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1) / 255
    inside = (luma * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (luma * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    assert (inside - outside).abs().quantile(0.01) > 0.12
    area = masks.float().mean((1, 2))
    for value in (area, inside, outside):
        by_class = torch.stack([value[labels == c].mean() for c in range(8)])
        assert by_class.std() < 0.35 * value.std()


@pytest.mark.parametrize("options", [{}, {"image_size": 64}, {"cue_copies": 0}, {"cue_strength": 1.0, "cue_copies": 4}])
def test_the_constants_of_shapes_fit_its_pixels(options: dict[str, float]) -> None:
    x = load("shapes", limit=500, **options)  # type: ignore[arg-type]
    assert isinstance(x, ImageData)
    mean, std = images.moments(x.images)
    assert max(abs(a - b) for a, b in zip(mean + std, shapes.MEAN + shapes.STD, strict=True)) < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"samples": 4, "image_size": 48}, "image_size=48 is not possible for 'shapes'; use 32 or 64"),
        ({"samples": 4, "cue_strength": 1.5}, "cue_strength must be from 0 to 1, got 1.5"),
        ({"samples": 4, "cue_copies": 13}, "cue_copies must be from 0 to 12, got 13"),
    ],
)
def test_impossible_shapes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        shapes.generate(**arguments)
