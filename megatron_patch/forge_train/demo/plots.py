"""The two pictures of a run: ``loss.png`` and ``memory.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display needed

from matplotlib import pyplot

_STOCK, _FORGE = "#7f7f7f", "#d1495b"

#: Parts of a memory bar from the bottom up, and their colours (distinguishable when colour-blind).
_PARTS = {
    "weights": "#4477aa",
    "gradients": "#ee6677",
    "factors": "#ccbb44",
    "states": "#228833",
    "activations": "#bbbbbb",
}

_LABELS = {
    "weights": "weights (with master copies)",
    "gradients": "gradients",
    "factors": "factors kept until the update",
    "states": "optimizer states",
    "activations": "activations and temporaries",
}

MIB = 2**20

_BAR_WIDTH = 0.55


def loss_plot(path: Path, title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Loss over steps, one curve per run; with two runs their difference below."""
    both = len(runs) == 2
    figure, axes = pyplot.subplots(
        2 if both else 1,
        1,
        sharex=True,
        squeeze=False,
        figsize=(8, 6.5 if both else 5),
        height_ratios=(3, 1) if both else None,
        layout="constrained",
    )
    top = axes[0][0]
    # The first of two curves is drawn wide, so that it shows where the second one hides it.
    styles = [(_STOCK, 3.5), (_FORGE, 1.2)] if both else [(_FORGE, 1.5)]
    for (label, records), (colour, width) in zip(runs.items(), styles, strict=True):
        steps = [record["step"] for record in records]
        losses = [record["loss"] for record in records]
        top.plot(steps, losses, color=colour, linewidth=width, label=label)
    top.set_ylabel("training loss (nats per byte)")
    top.set_title(title, fontsize=10)
    top.grid(alpha=0.3)
    top.legend()
    if both:
        _difference(axes[1][0], *runs.values())
    axes[-1][0].set_xlabel("optimizer step")
    axes[-1][0].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _difference(axis: Any, stock: list[dict[str, Any]], forge: list[dict[str, Any]]) -> None:
    pairs = list(zip(stock, forge, strict=False))
    steps = [one["step"] for one, _ in pairs]
    differences = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    axis.plot(steps, differences, ".-", color="black", linewidth=0.8, markersize=3)
    if any(differences):
        axis.set_yscale("log", nonpositive="mask")  # equal losses are gaps
    axis.set_ylabel("|difference|\n(nats per byte)")
    axis.grid(alpha=0.3)


def memory_plot(path: Path, title: str, bars: dict[str, dict[str, int]]) -> None:
    """One stacked bar per run: bytes of one rank at the peak of a training step, in MiB."""
    figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    tallest = max(sum(parts.values()) for parts in bars.values()) / MIB
    bottoms = [0.0] * len(bars)
    positions = range(len(bars))
    for part, colour in _PARTS.items():
        heights = [parts[part] / MIB for parts in bars.values()]
        if not any(heights):
            continue
        axis.bar(positions, heights, _BAR_WIDTH, bottom=bottoms, color=colour, label=_LABELS[part])
        for position, height, bottom in zip(positions, heights, bottoms, strict=True):
            middle = bottom + height / 2
            if height > tallest / 30:
                axis.text(position, middle, f"{height:.1f}", ha="center", va="center")
            elif height:  # too thin to write in
                axis.text(
                    position + _BAR_WIDTH / 2 + 0.02,
                    middle,
                    f"{part} {height:.2g}",
                    va="center",
                    fontsize=8,
                )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, total in zip(positions, bottoms, strict=True):
        axis.text(
            position,
            total + tallest / 100,
            f"{total:.1f} MiB",
            ha="center",
            va="bottom",
            weight="bold",
        )
    axis.set_xticks(list(positions), list(bars))
    axis.set_xlim(-0.45, len(bars) - 0.2)
    axis.set_ylim(0, tallest * 1.1)
    axis.set_ylabel("memory of one rank at a training step's peak (MiB)")
    axis.set_title(title, fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
