"""``log.jsonl``: one JSON object per optimizer step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that a killed run left unfinished."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def cut_log(path: Path, steps: int) -> None:
    """Keep the records of the first ``steps`` steps: those that a checkpoint holds."""
    kept = read_log(path)[:steps]
    scratch = path.with_suffix(".incomplete")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept))
    scratch.replace(path)
