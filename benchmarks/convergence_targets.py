"""How far a loss may be above AdamW's in ``convergence.py``, and the comparison of a result."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convergence_runs import REFERENCES
from targets import Verdict

Row = dict[str, Any]
PERCENT, PERCENT_Q8 = 0.3, 1.0


def most_percent(row: Row) -> float | None:
    """By how much a recipe's loss may be above a reference's; None: no target applies to it."""
    if row["kind"] != "forge" or row["rounding"] == "nearest":
        return None
    if row["weight_format"] not in ("bf16", "bf16+16"):
        return None
    return PERCENT_Q8 if row["state_format"] == "q8" else PERCENT


def by_name(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Recipe → seed → row, without runs that broke."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.get("valid_loss") is not None:
            found.setdefault(row["name"], {})[row["seed"]] = row
    return found


def above(rows: list[Row], name: str, reference: str) -> float | None:
    """Percent by which a recipe's final validation loss is above a reference's.

    The mean over the seeds that both have; each seed's runs see the same weights and data.
    """
    found = by_name(rows)
    own, peer = found.get(name, {}), found.get(reference, {})
    ratios = [own[seed]["valid_loss"] / peer[seed]["valid_loss"] for seed in own if seed in peer]
    return 100 * (statistics.fmean(ratios) - 1) if ratios else None


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """Every target of a result's rows."""
    for name, seeds in by_name(rows).items():
        most = most_percent(next(iter(seeds.values())))
        if most is None:
            continue
        for reference in REFERENCES:
            what = f"{name}, {len(seeds)} seeds: % above {reference}"
            yield Verdict(what, most, above(rows, name, reference), True)


def check(path: Path) -> bool:
    """Print the verdicts of a result; whether none failed and each recipe has two seeds."""
    result = json.loads(path.read_text())
    found = list(verdicts(result["rows"]))
    for verdict in found:
        print(verdict)
    failed = sum(verdict.passed is False for verdict in found)
    missing = sum(verdict.passed is None for verdict in found)
    broken = [row for row in result["rows"] if row.get("problem")]
    for row in broken:
        print(f"INVALID  {row['name']} seed {row['seed']}: {row['problem']}")
    few = [name for name, seeds in by_name(result["rows"]).items() if len(seeds) < 2]
    if few:
        print(f"one seed only: {', '.join(few)}")
    print(f"{len(found) - failed - missing} passed, {failed} failed, {missing} missing")
    return bool(found) and not (failed or broken or few)
