"""``benchmarks/llama_step.py`` on a GPU, with its tiny model: events, memory and graphs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import needs_gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import step_process
import training_methods

import forge_train

pytestmark = needs_gpu

PATTERNS = ["adamw_*", "forge:bf16/bf16:*", "forge:bf16+16/q8:*", "flashoptim_release:bf16+8/q8"]
METHODS = [
    method
    for method in training_methods.select(PATTERNS)
    if method.kind != "forge" or not method.graph or hasattr(forge_train, "capture")
]


def _row(method: training_methods.Method, folder: Path) -> dict:
    options = argparse.Namespace(
        device="cuda", model="tiny", tokens=[128], steps=4, warm_up=2,
        lines=folder / "lines",
    )  # fmt: skip
    step_process.run(method, options)
    (line,) = options.lines.read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_trains_and_is_measured(method: training_methods.Method, tmp_path: Path) -> None:
    if method.kind == "flashoptim_release":
        pytest.importorskip("flashoptim")
    row = _row(method, tmp_path)
    assert "unsupported" not in row and "problem" not in row, row
    assert row["peak_gb"] > 0 and row["peak_gib"] == pytest.approx(row["peak_gb"] * 1e9 / 2**30)
    assert len(row["times_ms"]) == 4 and min(row["times_ms"]) > 0
    folder = tmp_path / "reference"
    folder.mkdir()
    reference = _row(training_methods.Method("adamw"), folder)
    assert row["loss_first"] == pytest.approx(reference["loss_first"], rel=1e-3)


def test_a_graph_of_torchs_step_gives_its_losses() -> None:
    """Replays are steps: the same losses as without a graph, one after the other."""
    losses = []
    for graph in (False, True):
        method = training_methods.Method("adamw_fused", graph=graph)
        model = step_process.build(step_process.MODELS["tiny"], device=torch.device("cuda"))
        training = training_methods.Training(method, model, 1e-3)
        batches = training_methods.batches([64], 256, torch.device("cuda"))
        _, ids, labels = next(batches)
        warm_up = training_methods.CAPTURE_WARM_UP
        if graph:
            call = training.captured(ids, labels)
            losses.append([call().item() for _ in range(5)])
        else:
            every = [training.step(ids, labels).item() for _ in range(warm_up + 5)]
            losses.append(every[warm_up:])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]
