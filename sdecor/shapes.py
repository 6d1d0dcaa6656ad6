"""Procedural images with known ground truth: one object defines the class, a background cue may betray it.

Every image shows one object (its outline is the class; colour, place, size and angle are random) on a smooth random
texture. Around it, in a frame that the object never enters, lie ``cue_copies`` identical colour patches. Their hue is
the cue: with probability ``cue_strength`` it is the hue of the class, otherwise the hue of a class drawn uniformly.
Hence ``P(cue = class) = cue_strength + (1 - cue_strength) / 8``, and at 0 the cue carries no information at all.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sdecor.registers import Between, Option

CLASSES = ("disc", "square", "triangle", "cross", "ring", "star", "crescent", "bar")
MAX_COPIES = 12
Strength = Annotated[float, Between(0, 1)]
Copies = Annotated[int, Between(0, MAX_COPIES)]
#: Normalization constants of the generator, in [0, 1] units: constants, not statistics of one draw, so that a test set
#: with other knobs is normalized exactly as the training set was (a test holds them against a draw).
MEAN = (0.5, 0.5, 0.5)
STD = (0.2, 0.2, 0.2)

# Places of the cue's copies in units of the free span of the frame, ordered so that few copies lie far apart.
_PLACES = ((0, 0), (3, 3), (0, 3), (3, 0), (0, 1), (3, 2), (2, 0), (1, 3), (0, 2), (3, 1), (1, 0), (2, 3))


def _half_planes(x: Tensor, y: Tensor, sides: int) -> Tensor:
    """Largest projection on the outward normals of a regular polygon: a level set of it is that polygon."""
    angles = [2 * math.pi * k / sides + math.pi / 2 for k in range(sides)]
    return torch.stack([x * math.cos(a) + y * math.sin(a) for a in angles]).amax(0)


def _distance(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Distance-like field in the object's own frame, negative inside; areas are equal to within a few per cent."""
    r, ax, ay = torch.hypot(x, y), x.abs(), y.abs()
    if kind == 0:
        return r - 0.70
    if kind == 1:
        return torch.maximum(ax, ay) - 0.62
    if kind == 2:
        return _half_planes(x, -y, 3) - 0.54
    if kind == 3:
        return torch.minimum(torch.maximum(ax - 0.90, ay - 0.25), torch.maximum(ay - 0.90, ax - 0.25))
    if kind == 4:
        return (r - 0.70).abs() - 0.17
    if kind == 5:  # fold the plane into one of ten mirrored sectors; there the star's edge is one line
        angle = torch.remainder(torch.atan2(x, y), 2 * math.pi / 5)
        angle = torch.minimum(angle, 2 * math.pi / 5 - angle)
        (px, py), (qx, qy) = (1.0, 0.0), (0.50 * math.cos(math.pi / 5), 0.50 * math.sin(math.pi / 5))
        u, v = r * torch.cos(angle), r * torch.sin(angle)
        return ((u - px) * (py - qy) + (v - py) * (qx - px)) / -math.hypot(px - qx, py - qy)
    if kind == 6:
        return torch.maximum(r - 0.95, 0.72 - torch.hypot(x - 0.45, y))
    return torch.maximum(ax - 0.98, ay - 0.40)


def _hue(h: Tensor) -> Tensor:
    """Fully saturated colour of hue ``h`` in [0, 1): shape (..., 3), values in [0, 1]."""
    k = torch.tensor([0.0, 4.0, 2.0])
    return (torch.remainder(h[..., None] * 6 + k, 6) - 3).abs().sub(1).clamp(0, 1)


def _render(
    labels: Tensor, cues: Tensor, coarse: Tensor, fine: Tensor, scalars: Tensor, copies: int, s: int
) -> tuple[Tensor, Tensor]:
    """Paint images (B, 3, S, S) and masks (B, S, S) from what was drawn for them; `scalars` lie in [0, 1)."""
    draw = iter(scalars[:, :, None, None].unbind(1))

    def uniform(low: float, high: float) -> Tensor:
        return next(draw) * (high - low) + low

    # Texture: two octaves of smooth noise and one faint grating, of low saturation, around a random grey.
    grey = uniform(0.3, 0.7)
    axis = (torch.arange(s) + 0.5) / s * 2 - 1  # pixel centres, the image spans [-1, 1]
    yy, xx = axis[None, :, None], axis[None, None, :]
    turn, wave, phase = uniform(0, math.pi), uniform(8, 20), uniform(0, 2 * math.pi)
    images = (grey + 0.05 * torch.sin(wave * (torch.cos(turn) * xx + torch.sin(turn) * yy) + phase))[:, None]
    for noise in (coarse, fine):
        images = images + interpolate(noise, size=(s, s), mode="bilinear", align_corners=True)

    # Object: inside the frame's inner square whatever its angle, and on the other side of mid-grey from the texture.
    radius = uniform(0.42, 0.60)
    reach = 1 - 2 * 5 / 32 - 1.1 * radius
    cx, cy, angle = uniform(-1, 1) * reach, uniform(-1, 1) * reach, uniform(0, 2 * math.pi)
    u, v = (xx - cx) / radius, (yy - cy) / radius
    u, v = torch.cos(angle) * u + torch.sin(angle) * v, torch.cos(angle) * v - torch.sin(angle) * u
    field = torch.empty(len(labels), s, s)
    for kind in range(len(CLASSES)):
        chosen = labels == kind
        field[chosen] = _distance(kind, u[chosen], v[chosen])
    coverage = (0.5 - field * radius * s / 2).clamp(0, 1)  # the edge is one pixel wide
    light, dark = uniform(0.75, 0.95), uniform(0.05, 0.25)
    colour = _hue(next(draw))[:, 0, 0]
    luma = (colour * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    colour = (torch.where(grey < 0.5, light, dark)[:, 0] + 0.45 * (colour - luma)).clamp(0, 1)
    images.lerp_(colour[:, :, None, None], coverage[:, None])

    # Cue: the same patch at every place, in the hue of the class ``cues``.
    side = s * 4 // 32
    step = (s - side) / 3
    patch = _hue(cues / len(CLASSES))[:, :, None, None]
    for row, column in _PLACES[:copies]:
        top, left = round(row * step), round(column * step)
        images[:, :, top : top + side, left : left + side] = patch
    return images.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8), coverage > 0.5


def generate(
    samples: int, *, image_size: int = 32, cue_strength: Strength = 0.5, cue_copies: Copies = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw ``samples`` images: ``(images uint8 (N, 3, S, S), labels (N,), masks bool (N, S, S), cues (N,))``.

    Classes are as balanced as ``samples`` allows; ``masks`` are the object's pixels; ``cues`` the class whose hue the
    patches carry. The same arguments give the same bits. Masks, labels and cues do not depend on ``cue_copies``, and
    the images differ only inside the patches.

    Raises:
        ValueError: an argument is out of range.
    """
    if image_size not in (32, 64):
        raise ValueError(f"image_size={image_size!r} is not possible for 'shapes'; use 32 or 64")
    Option("samples", None, Annotated[int, Between(1)]).checked(samples)
    Option("cue_strength", None, Strength).checked(cue_strength)
    Option("cue_copies", None, Copies).checked(cue_copies)
    n, s, k = samples, image_size, len(CLASSES)
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n).remainder(k)[torch.randperm(n, generator=g)]
    stray = torch.randint(k, (n,), generator=g)
    cues = torch.where(torch.rand(n, generator=g) < cue_strength, labels, stray)

    coarse, fine = (
        amplitude * (torch.randn(n, 1, m, m, generator=g) + 0.4 * torch.randn(n, 3, m, m, generator=g))
        for m, amplitude in ((4, 0.10), (11, 0.06))
    )
    scalars = torch.rand(n, 11, generator=g)
    parts = zip(*(torch.split(t, 128) for t in (labels, cues, coarse, fine, scalars)), strict=True)  # fit the cache
    images, masks = zip(*(_render(y, c, a, b, r, cue_copies, s) for y, c, a, b, r in parts), strict=True)
    return torch.cat(images), labels, torch.cat(masks), cues
