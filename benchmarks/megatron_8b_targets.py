"""What FORGE is to reach in ``megatron_8b.py``, and the comparison of a result with it.

All are ratios to ``stock``: fp32 gradients, masters and moments, and torch's fused AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from micro_batches import largest, settled
from targets import Verdict

Row = dict[str, Any]

EXACT, SMALL = "forge:bf16+16/fp32", "forge:bf16+16/q8"
SMALLEST = "forge:bf16/q8"

# method → least and hoped-for ratio of the largest micro-batch to stock's.
MICRO_BATCH = {EXACT: (4.0, 6.0), SMALL: (7.0, 10.0), SMALLEST: (7.0, 10.0)}
# Least ratio of tokens/s: each at its largest micro-batch, and both at stock's largest.
SPEED_AT_LARGEST = 1.25
SPEED_AT_EQUAL = 1.10
# method → most optimizer memory per parameter, over stock's.
OPTIMIZER_MEMORY = {EXACT: 0.72, SMALL: 0.43, SMALLEST: 0.43}


def _of(rows: list[Row], name: str) -> dict[int, Row]:
    """A method's newest valid rows by micro-batch."""
    mine = [row for row in rows if row["name"] == name and not row.get("problem")]
    return {row["micro_batch"]: row for row in sorted(mine, key=lambda row: row["run"])}


def largest_of(rows: list[Row], name: str, most: int) -> int | None:
    """The largest micro-batch that fits; 0 where one sequence does not; None: not settled.

    A search that ended at its own bound has found one that fits, not the largest.
    """
    found = {
        size: (row["peak_gb"] or 0.0) if row["fits"] else None
        for size, row in _of(rows, name).items()
    }
    fits = largest(found)
    return fits if settled(found, most) and fits < most else None


def verdicts(result: Row) -> Iterator[Verdict]:
    """Every target of a result."""
    rows, most = result["rows"], result["conditions"]["most"]
    stock_rows, stock_size = _of(rows, "stock"), largest_of(rows, "stock", most)
    stock = stock_rows.get(stock_size or 0)

    def ratio(row: Row | None, field: str) -> float | None:
        return row[field] / stock[field] if row and stock else None

    for name, (least, hope) in MICRO_BATCH.items():
        mine, size = _of(rows, name), largest_of(rows, name, most)
        known = size is not None and bool(stock_size)
        times = size / stock_size if known else None  # type: ignore[operator]
        yield Verdict(f"{name}: largest micro-batch/stock's (aim {hope:g})", least, times, False)
        at_largest = ratio(mine.get(size or 0), "tokens_per_s")
        what = f"{name}: tokens/s over stock's, each at its largest"
        yield Verdict(what, SPEED_AT_LARGEST, at_largest, False)
        equal = mine.get(stock_size or 0)
        equal = equal if equal and equal["fits"] else None
        what = f"{name}: tokens/s over stock's at {stock_size or 'its'} micro-batch"
        yield Verdict(what, SPEED_AT_EQUAL, ratio(equal, "tokens_per_s"), False)
        held = ratio(equal, "optimizer_bytes_per_param")
        yield Verdict(f"{name}: optimizer memory/stock's", OPTIMIZER_MEMORY[name], held, True)


def check(path: Path) -> bool:
    """Print the verdicts of a result; whether none failed. Missing ones are only counted."""
    result = json.loads(path.read_text())
    found = list(verdicts(result))
    for verdict in found:
        print(verdict)
    problems = [row for row in result["rows"] if row.get("problem")]
    for row in problems:
        print(f"INVALID  {row['name']} micro-batch {row['micro_batch']}: {row['problem']}")
    failed = sum(verdict.passed is False for verdict in found)
    missing = sum(verdict.passed is None for verdict in found)
    passed = len(found) - failed - missing
    print(f"{passed} passed, {failed} failed, {missing} missing, {len(problems)} invalid")
    return not failed and not problems
