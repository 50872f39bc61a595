"""What the plots have in common: which result, and how figures are written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def result_of(description: str) -> tuple[Path, dict[str, Any]]:
    """The result that the command line names; ``description`` is the help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    plt.rcParams["svg.hashsalt"] = "forge"
    return path, json.loads(path.read_text())


def save(figure: Any, stem: Path) -> None:
    """As SVG and PNG, without a date: the same numbers give the same files."""
    for suffix in ("svg", "png"):
        path = stem.with_name(f"{stem.name}.{suffix}")
        figure.savefig(path, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        print(path)
    plt.close(figure)
