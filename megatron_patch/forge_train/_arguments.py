"""Types of the command line's arguments."""

from __future__ import annotations

import argparse


def positive_count(text: str) -> int:
    """A whole number from 1 on that fits 31 bits."""
    if not (text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
