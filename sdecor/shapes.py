"""Procedural images with known ground truth: one object defines the class, a background cue may betray it.

Every image shows one object (its outline is the class; colour, place, size and angle are random) on a smooth random
texture. Around it, in a frame that the object never enters, lie ``cue_copies`` identical colour patches. Their hue is
the cue: with probability ``cue_strength`` it is the hue of the class, otherwise the hue of a class drawn uniformly.
Hence ``P(cue = class) = cue_strength + (1 - cue_strength) / 8``, and at 0 the cue carries no information at all.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, hypot, pi, sin
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sdecor.registers import Between, Option


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    angles = [2 * pi * k / 3 + pi / 2 for k in range(3)]
    return torch.stack([x * cos(a) - y * sin(a) for a in angles]).amax(0) - 0.54


def _star(x: Tensor, y: Tensor) -> Tensor:
    angle = torch.remainder(torch.atan2(x, y), 2 * pi / 5)
    angle = torch.minimum(angle, 2 * pi / 5 - angle)  # in one of ten mirrored sectors, where the edge is one line
    (px, py), (qx, qy) = (1.0, 0.0), (0.50 * cos(pi / 5), 0.50 * sin(pi / 5))
    u, v = torch.hypot(x, y) * torch.cos(angle), torch.hypot(x, y) * torch.sin(angle)
    return ((u - px) * (py - qy) + (v - py) * (qx - px)) / -hypot(px - qx, py - qy)


# Class to a distance-like field in the object's own frame, negative inside; areas are equal to within a few per cent.
_OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 0.70,
    "square": lambda x, y: _box(x, y, 0.62, 0.62),
    "triangle": _triangle,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.90, 0.25), _box(x, y, 0.25, 0.90)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.70).abs() - 0.17,
    "star": _star,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.72 - torch.hypot(x - 0.45, y)),
    "bar": lambda x, y: _box(x, y, 0.98, 0.40),
}
CLASSES = tuple(_OUTLINES)
MAX_COPIES = 12
Strength = Annotated[float, Between(0, 1)]
Copies = Annotated[int, Between(0, MAX_COPIES)]
#: Normalization constants of the generator, in [0, 1] units: constants, not statistics of one draw, so that a test set
#: with other knobs is normalized exactly as the training set was (a test holds them against a draw).
MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)

# Places of the cue's copies in units of the free span of the frame, ordered so that few copies lie far apart.
_PLACES = ((0, 0), (3, 3), (0, 3), (3, 0), (0, 1), (3, 2), (2, 0), (1, 3), (0, 2), (3, 1), (1, 0), (2, 3))
# Limits of the random numbers of an image, in the order in which `_render` names them.
_ANY = (0, 2 * pi)
_RANGES = ((0.3, 0.7), (0, pi), (8, 20), _ANY, (0.42, 0.6), (-1, 1), (-1, 1), _ANY, (0.75, 0.95), (0.05, 0.25), (0, 1))


def _hue(h: Tensor) -> Tensor:
    """Fully saturated colour of hue ``h`` in [0, 1): shape (..., 3), values in [0, 1]."""
    k = torch.tensor([0.0, 4.0, 2.0])
    return (torch.remainder(h[..., None] * 6 + k, 6) - 3).abs().sub(1).clamp(0, 1)


def _render(
    s: int, copies: int, labels: Tensor, cues: Tensor, coarse: Tensor, fine: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor]:
    """Paint images (B, 3, S, S) and masks (B, S, S) from what was drawn for them; `scalars` lie in [0, 1)."""
    drawn = zip(scalars[:, :, None, None].unbind(1), _RANGES, strict=True)
    grey, turn, wave, phase, radius, cx, cy, angle, light, dark, hue = (u * (b - a) + a for u, (a, b) in drawn)

    # Texture: two octaves of smooth noise and one faint grating, of low saturation, around a random grey.
    axis = (torch.arange(s) + 0.5) / s * 2 - 1  # pixel centres, the image spans [-1, 1]
    yy, xx = axis[None, :, None], axis[None, None, :]
    images = (grey + 0.05 * torch.sin(wave * (torch.cos(turn) * xx + torch.sin(turn) * yy) + phase))[:, None]
    for noise in (coarse, fine):
        images = images + interpolate(noise, size=(s, s), mode="bilinear", align_corners=True)

    # Object: inside the frame's inner square whatever its angle, and on the other side of mid-grey from the texture.
    reach = 1 - 2 * 5 / 32 - 1.1 * radius
    u, v = (xx - cx * reach) / radius, (yy - cy * reach) / radius
    u, v = torch.cos(angle) * u + torch.sin(angle) * v, torch.cos(angle) * v - torch.sin(angle) * u
    field = torch.empty(len(labels), s, s)
    for label, outline in enumerate(_OUTLINES.values()):
        chosen = labels == label
        field[chosen] = outline(u[chosen], v[chosen])
    coverage = (0.5 - field * radius * s / 2).clamp(0, 1)  # the edge is one pixel wide
    colour = _hue(hue)[:, 0, 0]
    luma = (colour * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    colour = (torch.where(grey < 0.5, light, dark)[:, 0] + 0.45 * (colour - luma)).clamp(0, 1)
    images.lerp_(colour[:, :, None, None], coverage[:, None])

    # Cue: the same patch at every place, in the hue of the class ``cues``.
    side = s * 4 // 32
    patch = _hue(cues / len(CLASSES))[:, :, None, None]
    for row, column in _PLACES[:copies]:
        top, left = (round(place * (s - side) / 3) for place in (row, column))
        images[:, :, top : top + side, left : left + side] = patch
    return images.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8), coverage > 0.5


def generate(
    samples: int, *, image_size: int = 32, cue_strength: Strength = 0.5, cue_copies: Copies = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw images: ``(images uint8 (N, 3, S, S), labels (N,), masks bool (N, S, S), cues (N,))``, N of them `samples`.

    Classes are as balanced as `samples` allows; masks are the object's pixels; cues the class whose hue the patches
    carry. The same arguments give the same bits. Masks, labels and cues do not depend on `cue_copies`, and the images
    differ only inside the patches. An argument out of range is a ValueError.
    """
    if image_size not in (32, 64):
        raise ValueError(f"image_size={image_size!r} is not possible for 'shapes'; use 32 or 64")
    Option("samples", None, Annotated[int, Between(1)]).checked(samples)
    Option("cue_strength", None, Strength).checked(cue_strength)
    Option("cue_copies", None, Copies).checked(cue_copies)
    n, k, g = samples, len(CLASSES), torch.Generator().manual_seed(seed)
    labels = torch.arange(n).remainder(k)[torch.randperm(n, generator=g)]
    stray = torch.randint(k, (n,), generator=g)
    cues = torch.where(torch.rand(n, generator=g) < cue_strength, labels, stray)
    coarse, fine = (
        amplitude * (torch.randn(n, 1, m, m, generator=g) + 0.4 * torch.randn(n, 3, m, m, generator=g))
        for m, amplitude in ((4, 0.10), (11, 0.06))
    )
    drawn = labels, cues, coarse, fine, torch.rand(n, len(_RANGES), generator=g)
    parts = zip(*(torch.split(values, 128) for values in drawn), strict=True)  # they fit the cache
    images, masks = zip(*(_render(image_size, cue_copies, *part) for part in parts), strict=True)
    return torch.cat(images), labels, torch.cat(masks), cues
