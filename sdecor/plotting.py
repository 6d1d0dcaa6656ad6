"""Figures of the book: one style, colours that colour-blind readers can tell apart, an opaque background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from torch import Tensor

LABELS = {
    "standard": "standard",
    "decorrelation": "decorrelation only",
    "consistency-absolute": "consistency, absolute mask",
    "consistency-signed": "consistency, signed mask",
    "saliencydecor-absolute": "both, absolute mask",
    "saliencydecor-signed": "both, signed mask",
}
_OKABE_ITO = ("#000000", "#009e73", "#56b4e9", "#e69f00", "#0072b2", "#d55e00")
COLOURS = dict(zip(LABELS, _OKABE_ITO, strict=True))
DASHES = dict(zip(LABELS, ("-", "--", "-.", "-.", "-", "-"), strict=True))


def use_style() -> None:
    """Set the style of all figures that follow; in a notebook they become SVG without a date, the same at every run."""
    set_matplotlib_formats("svg", metadata={"Date": None}, bbox_inches="tight")  # type: ignore[no-untyped-call]
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "svg.hashsalt": "sdecor",
        },
    )


def top_share(score: Tensor, fraction: float = 0.1) -> Tensor:
    """Keep the highest-scoring share of each map and set the rest to 0.

    Args:
        score: ``(B, H, W)``.
        fraction: Share kept.

    Returns:
        ``(B, H, W)``.
    """
    flat = score.flatten(1)
    index = flat.topk(round(fraction * flat.shape[1])).indices
    return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index)).view_as(score)


def gradient_gallery(images: Tensor, scores: Mapping[str, Tensor], *, fraction: float = 0.1) -> Figure:
    """Rows of methods; for each image its strongest gradients and its whole gradient map, side by side.

    Args:
        images: ``(B, H, W)`` in [0, 1], shown in the first row.
        scores: Row label to non-negative scores ``(B, H, W)``; each map is scaled by its own maximum.
        fraction: Share of pixels shown in the left map of each pair.

    Returns:
        The figure.
    """
    n = len(images)
    rows, columns = len(scores) + 1, 2 * n
    figure, axes = plt.subplots(rows, columns, figsize=(columns + 1, rows), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        sns.despine(ax=ax, left=True, bottom=True)
    for i in range(n):
        axes[0, 2 * i].imshow(images[i], cmap="gray", vmin=0, vmax=1)
        axes[0, 2 * i + 1].set_visible(False)
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center")
    for row, (label, score) in enumerate(scores.items(), start=1):
        axes[row, 0].set_ylabel(label.replace(", ", ",\n"), rotation=0, ha="right", va="center")
        strongest = top_share(score, fraction)
        for i in range(n):
            for j, values in enumerate((strongest[i], score[i])):
                axes[row, 2 * i + j].imshow(values, cmap="magma", vmin=0, vmax=float(score[i].max()) or 1.0)
                if row == 1:
                    axes[row, 2 * i + j].set_title(f"top {fraction:.0%}" if j == 0 else "all", fontsize="small")
    return figure


def bands(
    ax: Axes,
    x: Sequence[float],
    curves: Mapping[str, Sequence[Sequence[float]]],
    *,
    labels: Mapping[str, str] = LABELS,
    **line: Any,
) -> None:
    """Draw the mean of each method's curves and a band of one standard deviation over seeds.

    Args:
        ax: Where to draw.
        x: Positions ``(n,)``.
        curves: Method to curves, one a seed, each ``(n,)``.
        labels: Method to name in the legend.
        line: Handed to ``ax.plot``.
    """
    for method, values in curves.items():
        v = np.asarray(values, dtype=float)
        mean, sd = v.mean(0), v.std(0, ddof=1) if len(v) > 1 else np.zeros(v.shape[1])
        style = {"color": COLOURS[method], "linestyle": DASHES[method], "label": labels[method], **line}
        ax.plot(x, mean, **style)
        ax.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.15, linewidth=0)
