"""What :func:`~forge_train.megatron.fuse` did, as a table for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..rules import Rule
from .choose import Left
from .column_row import FusedLinear

_NUMBER = re.compile(r"\.\d+\.")


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _parallelism(layer: FusedLinear) -> str:
    """Such as ``column+SP, DP 2``."""
    linear = layer.fused.linear
    ranks = linear.layout.out_local // linear.layout.out_owned
    sequence = "+SP" if linear.spec.sequence_parallel else ""
    return linear.spec.parallel + sequence + (f", DP {ranks}" if ranks > 1 else "")


def _row(layer: FusedLinear) -> tuple[str, ...]:
    """One layer's line; layers of a stack that differ only by number get the same line."""
    spec, plan = layer.fused.linear.spec, layer.fused.plan
    return (
        _NUMBER.sub(".*.", layer.name),
        "x".join(str(size) for size in layer.weight.shape),
        _parallelism(layer),
        spec.weight_format,
        "/".join(layer.fused.linear.state_formats) or "-",
        layer.engine.schedule if plan is None else plan.schedule,
        "decided at the first backward" if plan is None else plan.reason,
    )


_HEADER = ("weight", "shard", "parallel", "format", "states", "schedule", "why")


def _table(rows: dict[tuple[str, ...], int]) -> list[str]:
    """Rows with their counts; from the third column on, what all rows share is said once."""
    common = {
        column: values[0]
        for column, values in enumerate(zip(*rows, strict=True))
        if column > 1 and len(set(values)) == 1
    }
    kept = [column for column in range(len(_HEADER)) if column not in common]
    lines = []
    if common:
        lines.append("All: " + ", ".join(f"{_HEADER[c]} {value}" for c, value in common.items()))
    table = [["count", *(_HEADER[c] for c in kept)]]
    table += [[str(count), *(row[c] for c in kept)] for row, count in rows.items()]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table if rows else []:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def summary(layers: Sequence[FusedLinear], left: Sequence[Left], rule: Rule) -> str:
    """Fused weights with shard, formats and schedule; then the rest, by reason.

    Args:
        layers: the fused weights of this rank.
        left: the parameters of the stock optimizer.
        rule: FORGE's rule.
    """
    elements = sum(layer.weight.numel() for layer in layers)
    rest = sum(item.elements for item in left)
    held = sum(layer.fused.storage.bytes for layer in layers)
    lines = [
        f"FORGE trains {len(layers)} weights, {elements:,} of {elements + rest:,} elements of this "
        f"rank, with {rule.name}.",
        f"Weights and states take {_mib(held)}; fp32 gradients would have taken "
        f"{_mib(4 * elements)} more.",
    ]
    rows: dict[tuple[str, ...], int] = {}
    for layer in layers:
        row = _row(layer)
        rows[row] = rows.get(row, 0) + 1
    lines += _table(rows)
    by_reason: dict[str, list[Left]] = {}
    for item in left:
        by_reason.setdefault(item.reason, []).append(item)
    if by_reason:
        lines.append("Left to the stock optimizer:")
    for reason, items in by_reason.items():
        count = sum(item.elements for item in items)
        names = items[0].name + (f" and {len(items) - 1} more" if len(items) > 1 else "")
        lines.append(f"  {names} ({count:,} elements): {reason}")
    return "\n".join(lines)
