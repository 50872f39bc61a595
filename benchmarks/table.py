"""Print ``wgrad_update.json`` as Markdown, or put it between the marks of a page.

    python benchmarks/table.py benchmarks/results/h200/wgrad_update.json [--into docs/kernels.md]

Figures that miss what ``targets.py`` asks for are bold.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from targets import TARGETS, speed_verdicts

Row = dict[str, Any]

BEGIN = "<!-- begin: benchmarks/table.py -->"
END = "<!-- end: benchmarks/table.py -->"
WIDTH = 106


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    """A table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *lines])


def figure(value: float, missed: bool, digits: int = 2) -> str:
    """A number, bold where it misses its target."""
    text = f"{value:.{digits}f}"
    return f"**{text}**" if missed else text


def burst_cell(row: Row) -> str:
    """Time, FORGE/limit, speed-up."""
    formats = (row["weight_format"], row["state_format"])
    slack = TARGETS["slack"].get((row["out"], row["in"]))
    target = TARGETS["burst"].get(formats, {}).get(row["tokens"])
    most, least = float("inf"), TARGETS["least_speedup"]
    if target and slack is not None:
        most, least = target[0] + slack, max(least, target[1] - slack)
    over, speedup = row["forge_over_limit"], row["speedup"]
    return f"{row['forge_us']:.0f}; {figure(over, over > most)}; {figure(speedup, speedup < least)}"


def sustained_cell(row: Row) -> str:
    """Time and speed-up."""
    formats = (row["weight_format"], row["state_format"])
    least = TARGETS["least_speedup"]
    if (row["out"], row["in"]) in TARGETS["sustained_shapes"]:
        least = max(least, TARGETS["sustained"].get(formats, {}).get(row["tokens"], least))
    # Three digits: some miss by less than a hundredth.
    return f"{row['forge_us']:.0f}; {figure(row['speedup'], row['speedup'] < least, 3)}"


def energy_cell(row: Row) -> str:
    """Energy of the pair and of FORGE."""
    return f"{row['pair_mj']:.0f} → {row['forge_mj']:.0f}"


def by_format(rows: list[Row], cell: Callable[[Row], str], peers: bool) -> str:
    """A line for each shape and format, a column for each number of tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    places = {(row["out"], row["in"], row["weight_format"], row["state_format"]) for row in rows}
    header = ["out × in", "weight, states", *(["update"] if peers else []), *map(str, tokens)]
    lines: list[list[str]] = []
    for place in sorted(places):
        own = {
            row["tokens"]: row
            for row in rows
            if place == (row["out"], row["in"], row["weight_format"], row["state_format"])
        }
        shape = f"{place[0]}×{place[1]}"
        if peers and all(line[0] != shape for line in lines):
            gemm = [f"{own[t]['gemm_us']:.0f}" if t in own else "" for t in tokens]
            lines.append([shape, "cuBLAS alone", "", *gemm])
        update = [f"{next(iter(own.values()))['update_us']:.0f}"] if peers else []
        cells = [cell(own[t]) if t in own else "" for t in tokens]
        lines.append([shape, f"{place[2]}, {place[3]}", *update, *cells])
    return markdown(header, lines)


def report(result: dict[str, Any]) -> str:
    """All tables of a result."""
    rows = [row for row in result["rows"] if row.get("forge_us") and not row.get("problem")]
    regimes = {
        regime: [r for r in rows if r["regime"] == regime] for regime in ("burst", "sustained")
    }
    with_energy = [
        row for row in regimes["sustained"] if row.get("pair_mj") and row.get("forge_mj")
    ]
    verdicts = [verdict for verdict in speed_verdicts(rows) if verdict.passed is not None]
    missed = sum(verdict.passed is False for verdict in verdicts)
    out = [
        f"{result['device']}, driver {result['driver']}, torch {result['torch']}, commit "
        f"{result['commit']}, {result['date'][:10]}. {result['conditions']['rounding']}. "
        f"{missed} of {len(verdicts)} comparisons with `benchmarks/targets.py` are missed."
    ]
    if regimes["burst"]:
        out.append(
            "**Burst.** Columns by tokens: µs; FORGE/limit; speed-up over the pair. `update` is "
            "the element-wise update alone, in µs. Bold misses its target."
        )
        out.append(by_format(regimes["burst"], burst_cell, peers=True))
    if regimes["sustained"]:
        out.append("**Sustained.** Columns by tokens: µs; speed-up over the pair.")
        out.append(by_format(regimes["sustained"], sustained_cell, peers=True))
    if with_energy:
        out.append("**Energy** of an update, sustained, in mJ: the pair → FORGE.")
        out.append(by_format(with_energy, energy_cell, peers=False))
    filled = [part if part[0] == "|" else textwrap.fill(part, WIDTH) for part in out]
    return "\n\n".join(filled)


def main() -> None:
    """Print, or write into a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help="replace what is between the marks"
    )
    options = parser.parse_args()
    text = report(json.loads(options.result.read_text()))
    if options.into is None:
        print(text)
        return
    page = options.into.read_text()
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"table: {options.into} lacks the marks {BEGIN} and {END}")
    options.into.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
