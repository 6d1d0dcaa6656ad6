"""Figures: what a method looks like, bands, galleries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from sdecor import plotting
from sdecor.measures.boxes import blurred, map_boxes
from sdecor.registers import ATTRIBUTIONS, METHODS, Method


@pytest.fixture
def more() -> Iterator[list[str]]:
    """Names of methods that are taken out again."""
    names: list[str] = []
    yield names
    for name in names:
        del METHODS[name]


def enter(names: list[str], count: int, **fields: str) -> None:
    for i in range(count):
        names.append(f"test-{len(names)}-{i}")
        METHODS[names[-1]] = Method({"classification": 1}, label=names[-1], **fields)


def looks() -> dict[str, tuple[str, object]]:
    return {name: (s["color"], s["linestyle"]) for name, s in ((n, plotting.style(e)) for n, e in METHODS.items())}


def test_methods_look_as_they_are_registered() -> None:
    assert [plotting.style(METHODS[name]) for name in list(METHODS)[:6]] == [
        {"color": "#000000", "linestyle": "-", "label": "standard"},
        {"color": "#009e73", "linestyle": "--", "label": "decorrelation only"},
        {"color": "#56b4e9", "linestyle": "-.", "label": "consistency, absolute mask"},
        {"color": "#e69f00", "linestyle": "-.", "label": "consistency, signed mask"},
        {"color": "#0072b2", "linestyle": "-", "label": "both, absolute mask"},
        {"color": "#d55e00", "linestyle": "-", "label": "both, signed mask"},
    ]


def test_every_method_has_its_own_colour_and_label() -> None:
    styles = [plotting.style(entry) for entry in METHODS.values()]
    for part in ("color", "label"):
        assert len({style[part] for style in styles}) == len(styles)


def test_a_new_method_gets_a_colour_that_nobody_has(more: list[str]) -> None:
    before = looks()
    enter(more, 1)
    (new,) = set(looks().values()) - set(before.values())
    assert new[0] in set(plotting.PALETTE) - {colour for colour, _ in before.values()}
    assert {name: looks()[name] for name in before} == before, "who was there keeps it"


def test_a_given_colour_is_taken_from_nobody_twice(more: list[str]) -> None:
    used = {colour for colour, _ in looks().values()}
    free = next(colour for colour in plotting.PALETTE if colour not in used)
    enter(more, 1)
    assert plotting.style(METHODS[more[0]])["color"] == free
    enter(more, 1, colour=free.upper())
    assert plotting.style(METHODS[more[1]])["color"] == free
    assert plotting.style(METHODS[more[0]])["color"] != free


def test_when_colours_are_used_up_pairs_of_colour_and_dash_stay_distinct(more: list[str]) -> None:
    enter(more, len(plotting.PALETTE) * (len(plotting.DASHES) + 1))
    found = looks()
    assert len({repr(look) for look in found.values()}) == len(METHODS)
    assert found == looks()
    drawn = [plotting.plt.plot([0], **plotting.style(METHODS[name]))[0] for name in more]
    assert len(drawn) == len(more), "matplotlib knows all of these dashes"
    plotting.plt.close("all")


def test_entries_of_other_registers_have_a_look_too() -> None:
    styles = [plotting.style(entry) for entry in ATTRIBUTIONS.values()]
    assert len({(s["color"], str(s["linestyle"])) for s in styles}) == len(ATTRIBUTIONS)
    assert [s["label"] for s in styles] == [entry.title for entry in ATTRIBUTIONS.values()]


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_palette_has_distinct_colours_and_the_faint_one_last() -> None:
    assert all(to_hex(colour) == colour for colour in plotting.PALETTE)
    for a, b in itertools.combinations(plotting.PALETTE, 2):
        gap = [int(a[i : i + 2], 16) - int(b[i : i + 2], 16) for i in (1, 3, 5)]
        assert sum(abs(g) for g in gap) > 60, (a, b)
    assert max(plotting.PALETTE, key=luminance) == plotting.PALETTE[-1]


@settings(deadline=None)  # the first call waits for torch
@given(st.integers(2, 6), st.integers(2, 6), st.floats(0.1, 0.9))
def test_top_share_keeps_the_largest(height: int, width: int, fraction: float) -> None:
    score = torch.rand(3, height, width)
    kept = plotting.top_share(score, fraction)
    count = round(fraction * (height * width))
    assert ((kept > 0).flatten(1).sum(1) == count).all()
    expected = score.flatten(1).sort(descending=True).values[:, :count].sum(1)
    torch.testing.assert_close(kept.flatten(1).sum(1), expected)


def test_bands_draw_mean_and_spread() -> None:
    figure, ax = plotting.plt.subplots()
    plotting.bands(ax, [0, 1], {"standard": [[0.0, 1.0], [2.0, 5.0]], "decorrelation": [[1.0, 1.0]]}, marker=".")
    mean, single = (line.get_ydata().tolist() for line in ax.lines)
    assert (mean, single) == ([1.0, 3.0], [1.0, 1.0])
    low = ax.collections[0].get_paths()[0].vertices[:, 1].min()
    assert low == pytest.approx(min(1 - 2**0.5, 3 - 8**0.5))
    assert [line.get_color() for line in ax.lines] == ["#000000", "#009e73"]
    assert ax.get_legend_handles_labels()[1] == ["standard", "decorrelation only"]
    with pytest.raises(ValueError, match="unknown method 'nothing'; known: standard, "):
        plotting.bands(ax, [0, 1], {"nothing": [[0.0, 1.0]]})
    plotting.plt.close(figure)


def test_frames_surround_their_pixels() -> None:
    _, ax = plotting.plt.subplots()
    plotting.frames(ax, [[0, 1, 3, 2]], "red")
    (box,) = ax.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (-0.5, 0.5, 3, 1)
    plotting.frames(ax, torch.zeros(0, 4), "red")
    assert len(ax.patches) == 1
    plotting.plt.close()


def test_images_are_framed_five_in_a_row() -> None:
    found = [torch.tensor([[0, 0, 2, 2]]), torch.zeros(0, 4), *[torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2]])] * 5]
    figure = plotting.framed(torch.rand(7, 3, 4, 4), found, [f"{i}" for i in range(7)])
    axes = figure.axes
    assert len(axes) == 10 and [len(ax.patches) for ax in axes] == [1, 0, *[2] * 5, 0, 0, 0]
    assert [ax.get_title() for ax in axes[:7]] == [f"{i}" for i in range(7)] and not axes[9].images
    plotting.plt.close()


def test_the_steps_from_a_map_to_its_box() -> None:
    saliency = torch.zeros(16, 16)
    saliency[4:8, 4:8] = 1
    parts = {"smooth": blurred(saliency[None])[0], "drawn": map_boxes(saliency[None], [0.35])[0]}
    figure = plotting.box_steps(torch.rand(3, 16, 16), saliency, threshold=0.35, known=[[4, 4, 8, 8]], **parts)
    assert [len(ax.patches) for ax in figure.axes] == [1, 0, 0, 2]
    cut, (known, drawn) = figure.axes[3].images[0].get_array(), figure.axes[3].patches
    (x0, y0), width, height = drawn.get_xy(), drawn.get_width(), drawn.get_height()
    assert np.nonzero(cut.any(0))[0].tolist() == list(range(int(x0 + 0.5), int(x0 + 0.5 + width)))
    assert np.nonzero(cut.any(1))[0].tolist() == list(range(int(y0 + 0.5), int(y0 + 0.5 + height)))
    assert known.get_xy() == (3.5, 3.5)
    plotting.plt.close()


def test_gallery_has_a_row_a_method_and_two_maps_an_image() -> None:
    figure = plotting.gradient_gallery(torch.rand(3, 8, 8), {"a": torch.rand(3, 8, 8), "b": torch.zeros(3, 8, 8)})
    assert len(figure.axes) == 3 * 6
    assert sum(ax.get_visible() for ax in figure.axes) == 3 + 12
    plotting.plt.close(figure)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_gallery_takes_what_exhibits_hold(channels: tuple[int, ...]) -> None:
    images = torch.rand(2, *channels, 8, 8).half()
    maps = torch.rand(2, 8, 8).half()
    figure = plotting.gradient_gallery(images.numpy(), {"saliencydecor-signed": maps.numpy(), "mine": maps})
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    np.testing.assert_array_equal(
        shown[0], images[0].movedim(0, -1).squeeze(-1).float() if channels else images[0].float()
    )
    np.testing.assert_array_equal(shown[3], maps[0].float())
    np.testing.assert_array_equal(shown[3], shown[7])
    assert [figure.axes[i].get_ylabel() for i in (0, 4, 8)] == ["image", "both,\nsigned mask", "mine"]
    plotting.plt.close(figure)
