"""What FORGE is to reach in ``llama_step.py`` on an H200, and the comparison of a result with it.

Times are over those of torch's fused AdamW in the same run, with ``clip_grad_norm_`` where FORGE
clips. The bounds on memory come from another project's table, whose "GB" are GiB: its fused AdamW
takes 60.08 of them, and weights, gradients and states alone are 64.24e9 bytes. Both readings are
compared and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets import Verdict

Row = dict[str, Any]
UNITS = {"peak_gib": "GiB", "peak_gb": "GB"}


@dataclass(frozen=True)
class Target:
    """A bound on one row of FORGE.

    Attributes:
        number: of the target.
        ratio: most time over the reference's.
        peak: most memory; None: no bound.
        over: the bound is on what the peak is above that of this target's row.
    """

    number: int
    tokens: int
    weight_format: str
    state_format: str
    schedule: str
    clip: bool
    ratio: float
    peak: float | None = None
    over: int | None = None

    def find(self, rows: list[Row]) -> Row | None:
        """The newest row that it is about; a step without a graph."""
        fields = ("tokens", "weight_format", "state_format", "schedule", "clip")
        found = [
            row
            for row in rows
            if row["method"] == "forge"
            and not row["graph"]
            and row["rest"] == "forge"
            and row.get("step_ms")
            and not row.get("problem")
            and all(row[field] == getattr(self, field) for field in fields)
        ]
        return max(found, key=lambda row: row["run"], default=None)

    def __str__(self) -> str:
        """As the report has it."""
        clip = ", clipped" if self.clip else ""
        formats = f"{self.weight_format}/{self.state_format}"
        return f"{self.number}. {self.tokens} tokens, {formats} {self.schedule}{clip}"


TARGETS = (
    Target(1, 512, "bf16", "bf16", "immediate", False, 0.62, 48.4),
    Target(2, 512, "bf16", "q8", "immediate", False, 0.64, 34.5),
    Target(3, 512, "bf16+16", "q8", "immediate", False, 0.70, 50.5),
    Target(4, 512, "bf16", "bf16", "deferred", True, 0.70, 3.0, over=1),
    Target(5, 4096, "bf16", "bf16", "immediate", False, 0.92),
)


def reference(rows: list[Row], row: Row) -> Row | None:
    """Torch's fused AdamW of the same run, tokens and clipping, without a graph."""
    for other in rows:
        same = all(other[field] == row[field] for field in ("run", "tokens", "clip"))
        if same and other["method"] == "adamw_fused" and not other["graph"]:
            return other if other.get("step_ms") and not other.get("problem") else None
    return None


def ratio(rows: list[Row], row: Row | None) -> float | None:
    """A row's time over its reference's; None where one of them is missing."""
    peer = reference(rows, row) if row else None
    return row["step_ms"] / peer["step_ms"] if row and peer else None


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """Every target of a result's rows."""
    by_number = {target.number: target.find(rows) for target in TARGETS}
    for target in TARGETS:
        row = by_number[target.number]
        yield Verdict(f"{target}: time/fused AdamW", target.ratio, ratio(rows, row), True)
        if target.peak is None:
            continue
        base = by_number[target.over] if target.over else None
        for field, unit in UNITS.items():
            peak = row[field] if row else None
            what = f"{target}: peak, {unit}"
            if target.over:
                what = f"{target}: peak over {target.over}'s, {unit}"
                known = peak is not None and base is not None and base[field] is not None
                peak = peak - base[field] if known else None
            yield Verdict(what, target.peak, peak, True)


def check(path: Path) -> bool:
    """Print the verdicts of a result; whether none failed. Missing ones are only counted."""
    result = json.loads(path.read_text())
    found = list(verdicts(result["rows"]))
    for verdict in found:
        print(verdict)
    problems = [row for row in result["rows"] if row.get("problem")]
    for row in problems:
        print(f"INVALID  {row['name']} {row['tokens']} tokens: {row['problem']}")
    failed = sum(verdict.passed is False for verdict in found)
    missing = sum(verdict.passed is None for verdict in found)
    passed = len(found) - failed - missing
    print(f"{passed} passed, {failed} failed, {missing} missing, {len(problems)} invalid")
    return not failed and not problems
