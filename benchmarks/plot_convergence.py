"""Plot ``convergence.json``: validation loss against steps, and final losses against AdamW's.

    python benchmarks/plot_convergence.py benchmarks/results/h200/convergence.json

Writes ``convergence.svg`` and ``convergence.png`` beside the JSON.
"""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib.pyplot as plt
from convergence_runs import MASTER
from convergence_targets import PERCENT, PERCENT_Q8, by_name, most_percent
from figures import result_of, save

Row = dict[str, Any]
REFERENCE, STOCHASTIC, NEAREST = "#555555", "#d1495b", "#4477aa"


def color(row: Row) -> str:
    """AdamW grey, FORGE with stochastic rounding or a master red, what rounds to nearest blue."""
    if row["name"] == "adamw:bf16" or (row["kind"] == "forge" and row["name"].endswith("nearest")):
        return NEAREST
    return REFERENCE if row["kind"] == "adamw" else STOCHASTIC


def percents(found: dict[str, dict[int, Row]], name: str) -> list[float]:
    """Percent above AdamW with an fp32 master, for each seed that both have."""
    peer = found.get(MASTER, {})
    own = found[name]
    return [
        100 * (own[seed]["valid_loss"] / peer[seed]["valid_loss"] - 1)
        for seed in sorted(own)
        if seed in peer
    ]


def draw(result: Row) -> Any:
    """Curves of the first seed on the left, final losses of all seeds on the right."""
    found = by_name(result["rows"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 0.3 * len(found) + 2.6), layout="constrained"
    )
    for seeds in found.values():
        row = seeds[min(seeds)]
        steps, losses = zip(*row["valid_losses"], strict=True)
        reference = row["name"] == MASTER
        left.plot(
            steps,
            losses,
            color="black" if reference else color(row),
            linewidth=2 if reference else 1,
            alpha=0.8,
        )
    left.set_xlabel("steps", fontsize=9)
    left.set_ylabel("validation loss, nats per byte", fontsize=9)
    entries = {
        "AdamW, fp32 master (thick) or fp32": REFERENCE,
        "FORGE, stochastic rounding or a master": STOCHASTIC,
        "rounded to nearest, FORGE and AdamW": NEAREST,
    }
    handles = [plt.Line2D([], [], color=shade, label=text) for text, shade in entries.items()]
    left.legend(handles=handles, fontsize=8)

    names = [name for name in found if name != MASTER and percents(found, name)]
    for place, name in enumerate(reversed(names)):
        values, row = percents(found, name), next(iter(found[name].values()))
        right.barh(place, statistics.fmean(values), color=color(row), alpha=0.6, height=0.6)
        right.plot(values, [place] * len(values), "k.", markersize=5)
        most = most_percent(row)
        if most is not None:
            right.plot([most, most], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    right.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    right.axvline(0.0, color="black", linewidth=1)
    right.set_xlabel(
        f"final validation loss, % above {MASTER}\n(dots: seeds; bar: their mean; line: the most "
        f"that is allowed, {PERCENT:g} %, q8 {PERCENT_Q8:g} %)",
        fontsize=8,
    )
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    conditions = result["conditions"]
    figure.suptitle(
        f"{conditions['parameters'] / 1e6:.3g} million parameters, {conditions['steps']} steps of "
        f"{conditions['batch']}×{conditions['length']} bytes\n{result['device']}, torch "
        f"{result['torch']}, commit {result['commit']}",
        fontsize=10,
    )
    return figure


def main() -> None:
    """Draw what the result holds."""
    path, result = result_of(__doc__)
    if not by_name(result["rows"]):
        raise SystemExit(f"{path} has no run that ended with a loss")
    figure = draw(result)
    save(figure, path.with_suffix(""))


if __name__ == "__main__":
    main()
