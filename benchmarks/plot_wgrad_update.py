"""Plot ``wgrad_update.json``: speed-up over the unfused pair against tokens, one plot per shape.

    python benchmarks/plot_wgrad_update.py benchmarks/results/h200/wgrad_update.json

Writes ``wgrad_update_burst.svg``, ``wgrad_update_sustained.svg``, ``wgrad_update_energy.svg`` and
the same as PNG beside the JSON.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from figures import result_of, save
from matplotlib.ticker import FuncFormatter, NullLocator

Row = dict[str, Any]
COLUMNS = 3
MARKERS = "os^DvPX*"
TITLES = {
    "burst": "Speed-up over cuBLAS wgrad + element-wise AdamW, burst regime",
    "sustained": "Speed-up over cuBLAS wgrad + element-wise AdamW, sustained regime",
    "energy": "Energy of cuBLAS wgrad + element-wise AdamW over FORGE's, sustained regime",
}


def curves(
    rows: list[Row], field: str
) -> dict[tuple[int, int], dict[str, list[tuple[int, float]]]]:
    """Shape → format → points in order of tokens."""
    found: dict[Any, Any] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row.get(field):
            name = f"{row['weight_format']} weights, {row['state_format']} states"
            found[row["out"], row["in"]][name].append((row["tokens"], row[field]))
    return found


def draw(rows: list[Row], kind: str, result: dict[str, Any], stem: Path) -> None:
    """One figure: a plot for each shape, a curve for each format."""
    field = "energy_ratio" if kind == "energy" else "speedup"
    by_shape = curves(rows, field)
    if not by_shape:
        return
    shapes = sorted(by_shape, key=lambda shape: (-len(by_shape[shape]), shape))
    names = list(dict.fromkeys(name for shape in shapes for name in by_shape[shape]))
    style = {name: (f"C{i}", MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    values = [value for plots in by_shape.values() for line in plots.values() for _, value in line]
    tokens = [t for plots in by_shape.values() for line in plots.values() for t, _ in line]
    low, high = min([0.9, *values]) - 0.05, max([1.1, *values]) + 0.05

    columns = min(COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.2 * columns, 3.1 * lines + 1.1),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        axis.axhspan(low, 1.0, color="0.85", zorder=0)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.annotate(
            "the unfused pair wins",
            (0.03, 1.0),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="0.3",
        )
        for name, points in by_shape[shape].items():
            color, marker = style[name]
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4)
        axis.set_title(f"out {shape[0]}, in {shape[1]}", fontsize=10)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(set(tokens)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.tick_params(axis="x", rotation=45)
        axis.set_ylim(low, high)
        axis.grid(alpha=0.3)
    figure.supylabel("unfused pair / FORGE", fontsize=10)
    handles = [
        plt.Line2D([], [], color=style[name][0], marker=style[name][1], label=name)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(names)), fontsize=8)
    regime = "sustained" if kind == "energy" else kind
    conditions = result["conditions"]
    figure.suptitle(
        f"{TITLES[kind]}\n{result['device']}, driver {result['driver']}, torch {result['torch']}, "
        f"commit {result['commit']}; {conditions[regime]}",
        fontsize=10,
        wrap=True,
    )
    save(figure, stem.with_name(f"{stem.name}_{kind}"))


def main() -> None:
    """Draw what the result holds."""
    path, result = result_of(__doc__)
    stem = path.with_suffix("")
    for row in result["rows"]:
        if row.get("pair_mj") and row.get("forge_mj"):
            row["energy_ratio"] = row["pair_mj"] / row["forge_mj"]
    for regime in ("burst", "sustained"):
        draw([row for row in result["rows"] if row["regime"] == regime], regime, result, stem)
    draw(result["rows"], "energy", result, stem)


if __name__ == "__main__":
    main()
