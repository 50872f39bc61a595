"""The performance that FORGE holds itself to on an H200, and the comparison of results with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TARGETS: dict[str, Any] = {
    # (weight, states) → tokens → most FORGE/limit, least speed-up over the unfused pair.
    "burst": {
        ("bf16", "bf16"): {
            512: (1.18, 1.45),
            1024: (1.50, 1.36),
            2048: (1.27, 1.25),
            4096: (1.16, 1.12),
            8192: (1.11, 1.03),
        },
        ("bf16", "fp32"): {
            512: (1.16, 1.24),
            1024: (1.28, 1.32),
            2048: (1.45, 1.30),
            4096: (1.21, 1.22),
            8192: (1.13, 1.10),
        },
    },
    # tokens → least speed-up.
    "sustained": {
        ("bf16", "bf16"): {512: 1.27, 1024: 1.17, 2048: 1.13, 4096: 1.05},
        ("bf16", "fp32"): {512: 1.17, 1024: 1.21, 2048: 1.19, 4096: 1.13},
    },
    # (out, in) → by how much the burst targets, both of them, may be missed.
    "slack": {
        (28672, 4096): 0.0,
        (4096, 14336): 0.0,
        (128256, 4096): 0.0,
        (4096, 4096): 0.08,
    },
    "sustained_shapes": ((28672, 4096), (4096, 14336)),
    # Least speed-up anywhere.
    "least_speedup": 0.98,
    # q8 states against bf16 states: most time anywhere, and at 512 tokens.
    "q8_over_bf16": 1.05,
    "q8_over_bf16_at_512": 1 / 1.10,
    "compile_ms": 5000.0,
    "cached_load_ms": 20.0,
    "workspace_mib": 64.0,
}


@dataclass(frozen=True)
class Verdict:
    """One comparison; ``measured`` is None where there is no result yet."""

    what: str
    wanted: float
    measured: float | None
    at_most: bool

    @property
    def passed(self) -> bool | None:
        """None: not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def __str__(self) -> str:
        """One line of the report."""
        word = {None: "missing", True: "pass", False: "FAIL"}[self.passed]
        sign = "<=" if self.at_most else ">="
        measured = "-" if self.measured is None else f"{self.measured:.3f}"
        return f"{word:<8} {self.what:<66} {measured:>9} {sign} {self.wanted:.3f}"


def _key(row: Row) -> tuple[Any, ...]:
    return (
        row["regime"],
        (row["out"], row["in"]),
        (row["weight_format"], row["state_format"]),
        row["tokens"],
    )


def _name(regime: str, shape: tuple[int, int], formats: tuple[str, str], tokens: int) -> str:
    return f"{regime} {shape[0]}x{shape[1]} {'/'.join(formats)} {tokens} tokens"


def speed_verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """Every target of ``wgrad_update.json``."""
    found = {_key(row): row for row in rows if row.get("forge_us")}

    def value(field: str, *key: Any) -> float | None:
        row = found.get(key)
        return row[field] if row else None

    for shape, slack in TARGETS["slack"].items():
        for formats, table in TARGETS["burst"].items():
            for tokens, (over, speedup) in table.items():
                key = ("burst", shape, formats, tokens)
                name, got = _name(*key), value("forge_over_limit", *key)
                yield Verdict(f"{name}: FORGE/limit", over + slack, got, True)
                got = value("speedup", *key)
                yield Verdict(f"{name}: speed-up", speedup - slack, got, False)
    for shape in TARGETS["sustained_shapes"]:
        for formats, sustained in TARGETS["sustained"].items():
            for tokens, speedup in sustained.items():
                key = ("sustained", shape, formats, tokens)
                got = value("speedup", *key)
                yield Verdict(f"{_name(*key)}: speed-up", speedup, got, False)
    for key, row in found.items():
        least = TARGETS["least_speedup"]
        yield Verdict(f"{_name(*key)}: pair/FORGE", least, row["speedup"], False)
        if row["state_format"] != "q8":
            continue
        plain = found.get((*key[:2], (row["weight_format"], "bf16"), key[3]))
        if plain:
            most = TARGETS["q8_over_bf16"]
            if row["tokens"] == 512:
                most = TARGETS["q8_over_bf16_at_512"]
            ratio = row["forge_us"] / plain["forge_us"]
            yield Verdict(f"{_name(*key)}: q8/bf16 states", most, ratio, True)


def _beside(path: Path, name: str) -> list[Row]:
    other = path.with_name(name)
    return json.loads(other.read_text())["rows"] if other.is_file() else []


def other_verdicts(path: Path) -> Iterator[Verdict]:
    """Targets of the results that lie beside ``wgrad_update.json``."""
    for row in _beside(path, "compile_time.json"):
        compiled, loaded = row["compile_ms"], row["cached_load_ms"]
        yield Verdict(f"{row['name']}: compile, ms", TARGETS["compile_ms"], compiled, True)
        yield Verdict(f"{row['name']}: load, ms", TARGETS["cached_load_ms"], loaded, True)
    for row in _beside(path, "peak_memory.json"):
        name = f"{row['out']}x{row['in']} {row['weight_format']}/{row['state_format']}"
        for field in ("allocator_mib", "driver_mib"):
            what = f"{name} {row['tokens']} tokens: {field}"
            yield Verdict(what, TARGETS["workspace_mib"], row[field], True)


def check(path: Path, verbose: bool = True) -> bool:
    """Print the verdicts of a result; whether none failed. Missing ones are only counted."""
    result = json.loads(path.read_text())
    verdicts = [*speed_verdicts(result["rows"]), *other_verdicts(path)]
    for verdict in verdicts:
        if verdict.passed is False or (verbose and verdict.passed):
            print(verdict)
    failed = sum(verdict.passed is False for verdict in verdicts)
    missing = sum(verdict.passed is None for verdict in verdicts)
    invalid = [row for row in result["rows"] if row.get("problem")]
    for row in invalid:
        print(f"INVALID  {_name(*_key(row))}: {row['problem']}")
    passed = len(verdicts) - failed - missing
    print(f"{passed} passed, {failed} failed, {missing} missing, {len(invalid)} invalid")
    return not failed and not invalid
