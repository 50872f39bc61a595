"""Philox's parameter ids: which random numbers a weight's stochastic rounding draws."""

from __future__ import annotations

import zlib
from collections.abc import Iterable


def parameter_id(name: str) -> int:
    """CRC-32 of the full name, so independent of ranks, of order and of layers added later."""
    return zlib.crc32(name.encode())


def check_distinct(names: Iterable[str]) -> None:
    """Refuse names that would draw the same noise.

    Raises:
        ValueError: two names have the same id.
    """
    by_id: dict[int, str] = {}
    for name in names:
        other = by_id.setdefault(parameter_id(name), name)
        if other != name:
            raise ValueError(
                f"{name} and {other} have the same parameter id (CRC-32 of the name), so they "
                "would draw the same rounding noise; rename one of the modules."
            )
