"""Put the tables of all committed results between the marks of ``docs/benchmarks.md``.

    python benchmarks/page.py            # rewrites the page's tables
    python benchmarks/page.py --check    # exits with 1 where a table is not what the results say

Each mark names a table: ``<!-- begin: llama_step -->``. A result that does not exist yet becomes
the command that makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convergence_targets
import llama_targets
from convergence_runs import REFERENCES
from plot_labels import label
from table import by_format, figure, markdown
from targets import Verdict

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "h200"
WIDTH = 106
_MARKS = re.compile(r"(<!-- begin: (\w+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def measured_on(result: Row) -> str:
    """One line on where the figures come from."""
    return (
        f"{result['device']}, driver {result['driver']}, torch {result['torch']}, commit "
        f"{result['commit']}, {result['date'][:10]}."
    )


def targets_line(verdicts: list[Verdict]) -> str:
    """How many targets are met, and each that is not."""
    known = [verdict for verdict in verdicts if verdict.passed is not None]
    missed = [verdict for verdict in known if not verdict.passed]
    line = f"{len(known) - len(missed)} of {len(known)} targets are met"
    if len(known) < len(verdicts):
        line += f", {len(verdicts) - len(known)} are not measured"
    reasons = [
        f"{verdict.what} {verdict.measured:.3f}, target {verdict.wanted:g}" for verdict in missed
    ]
    return f"{line}. Missed: {'; '.join(reasons)}." if reasons else f"{line}."


# -- one function for each result -------------------------------------------------------------


def llama_step(result: Row) -> list[str]:
    """A line for each method: memory at the fewest tokens; time and ratio for each number."""
    rows = [row for row in result["rows"] if not row.get("problem")]
    tokens = sorted({row["tokens"] for row in rows})
    # Of several runs' the newest; a reference is in all of them.
    newest: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["run"]):
        newest[row["name"], row["tokens"]] = row
    methods = {name: row["method"] for (name, _), row in newest.items()}
    # Torch's, FlashOptim's, FORGE's; within each as they were measured.
    order = {"flashoptim_release": 1, "forge": 2}
    names = sorted(methods, key=lambda name: order.get(methods[name], 0))

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        if not row.get("step_ms"):
            return "–"
        ratio = llama_targets.ratio(rows, row)
        share = row["share_of_limit"]
        parts = [f"{row['step_ms']:.1f}", f"{ratio:.2f}" if ratio else "–"]
        return "; ".join([*parts, f"{100 * share:.0f} %" if share else "–"])

    lines = []
    for name in names:
        own = [newest.get((name, count)) for count in tokens]
        some = next(row for row in own if row)
        least = own[0]
        peak = f"{least['peak_gb']:.1f}" if least and least.get("peak_gb") else "–"
        lines.append([label(some), peak, *map(cell, own)])
    header = ["method", f"GB, {tokens[0]} tokens", *map(str, tokens)]
    conditions = result["conditions"]
    refused = {label(row): row["unsupported"] for row in newest.values() if row.get("unsupported")}
    verdicts = list(llama_targets.verdicts(rows))
    return [
        f"{measured_on(result)} {conditions['model']}, one sequence, median of "
        f"{conditions['steps']} steps after {conditions['warm_up']}; GB are 1e9 bytes.",
        targets_line(verdicts),
        "Columns by tokens: ms; time over torch's fused AdamW's of the same run (with "
        "`clip_grad_norm_` where the method clips); share of the speed of light.",
        markdown(header, lines),
        *(f"{name}: {reason}" for name, reason in refused.items()),
        f"![Memory]({_picture('llama_step_memory')})\n![Time]({_picture('llama_step_time')})",
    ]


def _picture(stem: str) -> str:
    return f"../benchmarks/results/h200/{stem}.png"


def convergence(result: Row) -> list[str]:
    """A line for each recipe."""
    rows = result["rows"]
    lines = []
    for name, seeds in convergence_targets.by_name(rows).items():
        losses = [row["valid_loss"] for row in seeds.values()]
        most = convergence_targets.most_percent(next(iter(seeds.values())))
        cells = []
        for reference in REFERENCES:
            percent = convergence_targets.above(rows, name, reference)
            missed = most is not None and percent is not None and percent > most
            cells.append("–" if percent is None else figure(percent, missed))
        allowed = "" if most is None else f"{most:g}"
        loss = f"{statistics.fmean(losses):.4f}"
        lines.append([f"`{name}`", str(len(seeds)), loss, *cells, allowed])
    header = ["recipe", "seeds", "loss", *(f"% above `{name}`" for name in REFERENCES), "at most"]
    conditions = result["conditions"]
    return [
        f"{measured_on(result)} {conditions['parameters'] / 1e6:.1f} million parameters, "
        f"{conditions['steps']} steps of {conditions['batch']}×{conditions['length']} bytes of "
        f"{conditions['text']}.",
        targets_line(list(convergence_targets.verdicts(rows))),
        markdown(header, lines),
        f"![Losses]({_picture('convergence')})",
    ]


def wgrad_update(result: Row) -> list[str]:
    """Speed-ups in the burst regime."""
    rows = [row for row in result["rows"] if row.get("forge_us") and not row.get("problem")]
    rows = [row for row in rows if row["regime"] == "burst"]
    return [
        f"{measured_on(result)} Burst: {result['conditions']['burst']}. Time of cuBLAS's "
        "wgrad and an element-wise AdamW over FORGE's, by tokens.",
        by_format(rows, lambda row: f"{row['speedup']:.2f}", peers=False),
    ]


def rules(result: Row) -> list[str]:
    """Ratios to AdamW with as many bytes."""
    rows = result["rows"]
    lines = [
        [
            row["rule"],
            ", ".join(row["states"]) or "none",
            ", ".join(row["adamw_states"]),
            str(row["tokens"]),
            f"{row['us']:.0f}",
            figure(row["ratio"], row["met"] is False),
        ]
        for row in rows
    ]
    shape = f"{rows[0]['out']}×{rows[0]['in']}"
    header = ["rule", "states", "AdamW's states", "tokens", "µs", "over AdamW's"]
    return [f"{measured_on(result)} {shape}, bf16 weights.", markdown(header, lines)]


def small_layers(result: Row) -> list[str]:
    """Many small layers against one."""
    lines = [
        [
            str(row["tokens"]),
            *(
                f"{row[f'{part}_us']:.0f} / {row[f'{part}_peer_us']:.0f} = "
                + figure(row[f"{part}_ratio"], part == "both" and not row["met"])
                for part in ("backward", "update", "both")
            ),
        ]
        for row in result["rows"]
    ]
    row = result["rows"][0]
    what = (
        f"{row['layers']} layers of {row['out']}×{row['in']} / one of {row['peer_out']}×"
        f"{row['peer_in']}, µs. Target: {row['target']:g} for both together."
    )
    header = ["tokens", "backward", "update", "both"]
    return [f"{measured_on(result)} {what}", markdown(header, lines)]


def fp32_products(result: Row) -> list[str]:
    """Times and errors of fp32 products."""
    kinds = {
        "exact": "FORGE `exact`",
        "bf16x3": "FORGE `bf16x3`",
        "torch_fp32": "torch fp32",
        "torch_tf32": "torch TF32",
    }
    lines = [
        [
            f"{row['out']}×{row['in']}",
            str(row["tokens"]),
            *(f"{row[f'{kind}_us']:.0f}; {row[f'{kind}_error']:.1e}" for kind in kinds),
        ]
        for row in result["rows"]
    ]
    header = ["out × in", "tokens", *kinds.values()]
    what = "AdamW with fp32 weights, states and factors: µs; relative error of dW."
    return [f"{measured_on(result)} {what}", markdown(header, lines)]


TABLES: dict[str, Callable[[Row], list[str]]] = {
    "llama_step": llama_step,
    "convergence": convergence,
    "wgrad_update": wgrad_update,
    "rules": rules,
    "small_layers": small_layers,
    "fp32_products": fp32_products,
}


def table_of(name: str, folder: Path) -> str:
    """What goes between a table's marks."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet. On an H200: `python benchmarks/{name}.py`.\n"
    parts = TABLES[name](json.loads(path.read_text()))
    blocks = [part if part[0] in "|!" else textwrap.fill(part, WIDTH) for part in parts]
    return "\n" + "\n\n".join(blocks) + "\n\n"


def filled(page: str, folder: Path) -> str:
    """The page with its tables as the results in ``folder`` have them.

    Raises:
        ValueError: a mark names no table, or a table has no marks.
    """
    names = [match.group(2) for match in _MARKS.finditer(page)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"the page has marks of {names}, the tables are {list(TABLES)}")
    return _MARKS.sub(lambda m: f"{m[1]}{table_of(m[2], folder)}{m[4]}", page)


def main() -> None:
    """Rewrite the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    before = options.page.read_text()
    after = filled(before, options.results)
    if options.check:
        if before != after:
            sys.exit(f"{options.page} is not what the results say: python benchmarks/page.py")
        return
    options.page.write_text(after)


if __name__ == "__main__":
    main()
