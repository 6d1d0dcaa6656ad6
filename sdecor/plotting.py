"""Figures of the book: one style, colours that colour-blind readers can tell apart, an opaque background.

What an entry of a register looks like, its colour, its dashes and its name in a legend, is said where it is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sdecor.registers import METHODS, REGISTERS, Entry

#: For entries without a colour: Okabe and Ito's, then some of Paul Tol's; the yellow, faint on white, comes last.
PALETTE = (
    *("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"),
    *("#882255", "#999933", "#332288", "#f0e442"),
)
DASHES = ("-", "--", "-.", ":")


def style(entry: Entry) -> dict[str, Any]:
    """``color``, ``linestyle`` and ``label`` of an entry of a register, as ``ax.plot`` takes them.

    Entries without a colour get, in order of registration, the next one of `PALETTE` that no entry of their register
    has. Once all are taken, colours come again with other dashes.
    """
    colour, dash = entry.colour, getattr(entry, "dash", "-")
    if not colour:
        register = next(r for r in REGISTERS.values() if r.kind == entry.kind)
        colour, dash = _free(tuple(register.values()))[entry.name]
    return {"color": to_hex(colour), "linestyle": dash, "label": entry.title}


def _free(entries: tuple[Entry, ...]) -> dict[str, tuple[str, Any]]:
    """Colour and dash of every entry without a colour."""
    given = [(to_hex(e.colour), getattr(e, "dash", "-")) for e in entries if e.colour]
    plain = [e for e in entries if not e.colour]
    colours = (c for c in PALETTE if c not in dict(given))
    found = {e.name: (c, getattr(e, "dash", "-")) for c, e in zip(colours, plain, strict=False)}
    taken = {*given, *found.values()}
    dashes = chain(DASHES, ((0, (n, 2, 1, 2)) for n in count(4, 4)))
    pairs = (pair for dash in dashes for colour in PALETTE if (pair := (colour, dash)) not in taken)
    return found | {e.name: pair for e, pair in zip(plain[len(found) :], pairs, strict=False)}


def use_style() -> None:
    """Set the style of all figures that follow; in a notebook they become SVG without a date, the same at every run."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg", metadata={"Date": None}, bbox_inches="tight")  # type: ignore[no-untyped-call]
    rc: dict[str, Any] = {"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 110}
    rc |= {"figure.constrained_layout.use": True, "axes.titlesize": "medium", "svg.hashsalt": "sdecor"}
    sns.set_theme(context="notebook", style="whitegrid", rc=rc)


def top_share(score: Tensor, fraction: float = 0.1) -> Tensor:
    """Keep the highest-scoring share of each map ``(B, H, W)`` and set the rest to 0."""
    flat = score.flatten(1)
    index = flat.topk(round(fraction * flat.shape[1])).indices
    return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index)).view_as(score)


def gradient_gallery(images: Any, scores: Mapping[str, Any], *, fraction: float = 0.1) -> Figure:
    """Rows of methods; for each image its strongest gradients and its whole gradient map, side by side.

    Images ``(B, H, W)`` or ``(B, 1 or 3, H, W)`` in [0, 1] stand in the first row. Of each method's name, or any label,
    there are non-negative scores ``(B, H, W)``, each map scaled by its own maximum; all may be tensors or arrays. The
    left map of a pair shows that `fraction` of the pixels. In a vector file every pixel is kept as one, which is small.
    """
    shown = torch.as_tensor(images).float().cpu()
    shown = shown.movedim(1, -1).squeeze(-1) if shown.ndim == 4 else shown
    rows, columns = len(scores) + 1, 2 * len(shown)
    figure, axes = plt.subplots(rows, columns, figsize=(columns + 1, rows), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        sns.despine(ax=ax, left=True, bottom=True)
    for i, image in enumerate(shown):
        axes[0, 2 * i].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
        axes[0, 2 * i + 1].set_visible(False)
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center")
    for row, (name, maps) in enumerate(scores.items(), start=1):
        label = METHODS[name].title if name in METHODS else name
        axes[row, 0].set_ylabel(label.replace(", ", ",\n"), rotation=0, ha="right", va="center")
        score = torch.as_tensor(maps).float().cpu()
        strongest = top_share(score, fraction)
        for i in range(len(shown)):
            for j, values in enumerate((strongest[i], score[i])):
                top = float(score[i].max()) or 1.0
                axes[row, 2 * i + j].imshow(values, cmap="magma", vmin=0, vmax=top, interpolation="none")
                if row == 1:
                    axes[row, 2 * i + j].set_title(f"top {fraction:.0%}" if j == 0 else "all", fontsize="small")
    return figure


def frames(ax: Axes, boxes: Any, colour: str, width: float = 2) -> None:
    """Draw boxes (K, 4) of x0, y0, x1, y1 in pixels, the last two outside, over an image that ``ax.imshow`` shows."""
    for x0, y0, x1, y1 in (torch.as_tensor(boxes) - 0.5).tolist():  # the first pixel is drawn around 0
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width))


def framed(images: Any, boxes: Sequence[Any], titles: Sequence[str], *, colour: str = "red") -> Figure:
    """Images (B, C, H, W) in [0, 1], five in a row, with a title and the `frames` of its boxes each."""
    figure, axes = plt.subplots(-(-len(images) // 5), 5, figsize=(8.5, 2 * -(-len(images) // 5)), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, found, title in zip(axes.flat, images, boxes, titles, strict=False):
        ax.imshow(image.movedim(0, -1), interpolation="none")
        ax.set_title(title)
        frames(ax, found, colour)
    return figure


def box_steps(image: Tensor, saliency: Tensor, smooth: Tensor, threshold: float, known: Any, drawn: Any) -> Figure:
    """From the map (H, W) of an image (C, H, W) in [0, 1] to its box, by what `sdecor.measures.boxes` makes of it.

    That is the map blurred, `smooth`, and its box, `drawn`, at a threshold. It is framed in blue, `known` boxes in red.
    """
    panels = {"photograph": image.movedim(0, -1), "map": saliency, "blurred": smooth}
    panels[f"above {threshold:g} of the maximum"] = smooth >= threshold * smooth.max()
    figure, axes = plt.subplots(1, 4, figsize=(8.5, 2.5))
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.imshow(values, cmap="magma", interpolation="none")
        ax.set_title(title, fontsize=10)
        ax.axis("off")
    for ax in axes[[0, 3]]:
        frames(ax, known, "red")
    frames(axes[3], drawn, "#56b4e9")
    return figure


def bands(ax: Axes, x: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]], **line: Any) -> None:
    """Draw the mean of each method's curves, one a seed at positions `x`, and a band of one standard deviation.

    `line` goes to ``ax.plot``, in place of what `style` says.
    """
    for method, values in curves.items():
        v = np.asarray(values, dtype=float)
        mean, sd = v.mean(0), v.std(0, ddof=1) if len(v) > 1 else np.zeros(v.shape[1])
        look = {**style(METHODS[method]), **line}
        ax.plot(x, mean, **look)
        ax.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.15, linewidth=0)


def legend_below(figure: Figure, *, columns: int = 3) -> None:
    """One legend under all panels, made of the first panel's."""
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
