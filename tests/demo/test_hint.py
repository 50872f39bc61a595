"""The demo says so when its schedule holds more than the gradients would take."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Finished
from demo_cli import SMALL, demo

SHORT = (*SMALL, "--steps", "1", "--save-interval", "0", "--tp", "1", "--micro-batches", "8")


@pytest.mark.distributed
def test_many_micro_batches_point_to_auto(tmp_path: Path) -> None:
    stdout, _ = demo(tmp_path, *SHORT)
    (line,) = [line for line in stdout.splitlines() if line.startswith("hint:")]
    # 2 layers (QKV, projection, fc1, fc2) and the output layer; 64 fp32 tokens a micro-batch.
    shapes = 2 * [(768, 256), (256, 256), (1024, 256), (256, 512)] + [(256, 256)]
    factors = [8 * 64 * (rows + columns) * 4 / 2**20 for rows, columns in shapes]
    gradients = [rows * columns * 4 / 2**20 for rows, columns in shapes]
    buffered = [g + f / 8 if f > g + f / 8 else f for f, g in zip(factors, gradients, strict=True)]
    assert f"schedule deferred keeps factors of {sum(factors):.1f} MiB" in line
    assert f"would take {sum(gradients):.1f} MiB" in line
    assert f"--schedule auto keeps {sum(buffered):.1f} MiB" in line


@pytest.mark.distributed
def test_no_hint_where_auto_holds_no_less(tmp_path: Path, compared: Finished) -> None:
    assert "hint:" not in compared.stdout
    stdout, _ = demo(tmp_path, *SHORT, "--schedule", "auto")
    assert "hint:" not in stdout
