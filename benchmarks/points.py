"""What the points of a measurement are made of, and how a command line names them."""

from __future__ import annotations

Shape = tuple[int, int]
"""out, in."""
Formats = tuple[str, str]
"""Of weights, of states."""


def shapes(text: str) -> list[Shape]:
    """``OUTxIN,...``."""
    pairs = (item.lower().split("x") for item in text.split(","))
    return [(int(out), int(columns)) for out, columns in pairs]


def formats(text: str) -> list[Formats]:
    """``WEIGHT/STATE,...``."""
    pairs = (item.split("/") for item in text.split(","))
    return [(weight, state) for weight, state in pairs]


def numbers(text: str) -> list[int]:
    """``N,...``."""
    return [int(item) for item in text.split(",")]
