"""Plot ``llama_step.json``: memory at the fewest tokens, step time against tokens.

    python benchmarks/plot_llama_step.py benchmarks/results/h200/llama_step.json

Writes ``llama_step_memory.svg`` and ``llama_step_time.svg`` and the same as PNG beside the JSON.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from figures import result_of, save
from llama_targets import ratio
from matplotlib.ticker import FuncFormatter, NullLocator
from plot_labels import label

Row = dict[str, Any]
# Distinguishable when colour-blind: FORGE warm, the others cold or grey.
FORGE_COLORS = ("#d1495b", "#edae49", "#8a4f7d", "#f28f79", "#6b4226", "#c9a227")
PEER_COLORS = ("#4477aa", "#228833", "#66ccee", "#888888", "#bbbbbb", "#33557f")
MARKERS = "os^DvPX*"
# Curves of all would hide one another; the table has the rest.
CURVES = (
    "adamw_fused",
    "adamw_fused:clip",
    "adamw_in_backward",
    "flashoptim_release:bf16+8/q8",
    "forge:bf16/bf16:immediate",
    "forge:bf16/q8:immediate",
    "forge:bf16+16/q8:immediate",
    "forge:bf16/bf16:deferred",
    "forge:bf16/bf16:deferred:clip",
)


def measured(rows: list[Row]) -> list[Row]:
    """The rows with figures; of several runs' the newest, in the order of first appearance."""
    newest: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row.get("step_ms") and not row.get("problem"):
            place = (row["name"], row["tokens"])
            if place not in newest or row["run"] > newest[place]["run"]:
                newest[place] = row
    return list(newest.values())


def colors(rows: list[Row]) -> dict[str, str]:
    """One for each method's name."""
    names = {row["name"]: row["method"] for row in rows}
    ours = [name for name, method in names.items() if method == "forge"]
    peers = [name for name in names if name not in ours]
    return {
        name: palette[index % len(palette)]
        for group, palette in ((ours, FORGE_COLORS), (peers, PEER_COLORS))
        for index, name in enumerate(group)
    }


def title(result: Row, what: str) -> str:
    """Two lines: what is shown, and on what it was measured."""
    conditions = result["conditions"]
    return (
        f"{what}: one step of {conditions['model']}, batch 1\n{result['device']}, driver "
        f"{result['driver']}, torch {result['torch']}, commit {result['commit']}; median of "
        f"{conditions['steps']} steps after {conditions['warm_up']}"
    )


def memory(result: Row, rows: list[Row]) -> Any:
    """Bars of the peak at the fewest tokens; None where no memory was measured."""
    rows = [row for row in rows if row["peak_gb"]]
    if not rows:
        return None
    tokens = min(row["tokens"] for row in rows)
    rows = sorted((r for r in rows if r["tokens"] == tokens), key=lambda row: -row["peak_gb"])
    shades = [FORGE_COLORS[0] if row["method"] == "forge" else PEER_COLORS[0] for row in rows]
    figure, axis = plt.subplots(figsize=(9.5, 0.3 * len(rows) + 1.6), layout="constrained")
    peaks = [row["peak_gb"] for row in rows]
    bars = axis.barh([label(row) for row in rows], peaks, color=shades)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.bar_label(bars, [f"{peak:.1f}" for peak in peaks], padding=3, fontsize=8)
    axis.set_xlabel("peak of allocated memory, GB (1e9 bytes)", fontsize=9)
    axis.set_xlim(0, 1.1 * max(peaks))
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.suptitle(title(result, f"Memory, {tokens} tokens"), fontsize=10)
    return figure


def times(result: Row, rows: list[Row]) -> Any:
    """Step times, and below them their ratio to torch's fused AdamW: 1 is the crossover."""
    rows = [row for row in rows if row["name"] in CURVES] or rows
    palette, names = colors(rows), list(dict.fromkeys(row["name"] for row in rows))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9.5, 9.5), sharex=True, layout="constrained"
    )
    lines = {}
    for index, name in enumerate(names):
        own = sorted((r for r in rows if r["name"] == name), key=lambda row: row["tokens"])
        style = {
            "color": palette[name],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.2,
            "linestyle": "--" if own[0]["clip"] else "-",
        }
        ticks = [row["tokens"] for row in own]
        (lines[name],) = above.plot(ticks, [row["step_ms"] for row in own], **style)
        lines[name].set_label(label(own[0]))
        points = [(row["tokens"], ratio(result["rows"], row)) for row in own]
        known = [(tick, value) for tick, value in points if value]
        if known:
            below.plot(*zip(*known, strict=True), **style)
    limits = {}
    for row in rows:
        if row["limit_ms"] and row["name"] == "forge:bf16/bf16:immediate":
            limits[row["tokens"]] = row["limit_ms"]
    if limits:
        above.plot(
            *zip(*sorted(limits.items()), strict=True),
            color="black",
            linewidth=1,
            label="speed of light, bf16 weights and states",
        )
    above.set_yscale("log")
    plain = FuncFormatter(lambda value, _place: f"{value:g}")
    above.yaxis.set_major_formatter(plain)
    above.yaxis.set_minor_formatter(plain)
    above.set_ylabel("step time, ms", fontsize=9)
    below.axhline(1.0, color="black", linewidth=1)
    below.set_ylabel("time / torch's fused AdamW, same run and clipping", fontsize=9)
    below.set_xlabel("tokens", fontsize=9)
    for axis in (above, below):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["tokens"] for row in rows}))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    figure.suptitle(title(result, "Time"), fontsize=10)
    return figure


def main() -> None:
    """Draw what the result holds."""
    path, result = result_of(__doc__)
    rows = measured(result["rows"])
    if not rows:
        raise SystemExit(f"{path} has no row with a time")
    for kind, draw in (("memory", memory), ("time", times)):
        figure = draw(result, rows)
        if figure is not None:
            save(figure, path.with_name(f"{path.stem}_{kind}"))


if __name__ == "__main__":
    main()
