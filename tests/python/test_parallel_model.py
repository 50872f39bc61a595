"""The model of data parallelism's cost: against the library's own count, and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import parallel_layers
import parallel_model
import pytest
import torch

from forge_train import AdamW, Context, Linear, LinearSpec
from forge_train._comm import Place


def plan(ranks: int, tokens: int, shape: tuple[int, int]) -> object:
    context = Context(threads=1)
    spec = LinearSpec(*shape, AdamW(), factor_dtype=torch.bfloat16, weight_format="bf16")
    linear = Linear(spec, context=context, data_parallel=Place(context, 0, ranks))
    return linear.plan(tokens=tokens, micro_batches=1, needs_norm=True)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_model_counts_as_the_library_does(ranks: int) -> None:
    for shape in parallel_model.LAYER.values():
        most = int(parallel_model.crossover(*shape, ranks))
        exchanged, panelled = plan(ranks, most, shape), plan(ranks, most + 1, shape)
        assert (exchanged.reduction, panelled.reduction) == ("exchange", "panels")
        assert exchanged.wire_bytes == parallel_model.exchanged(*shape, most, ranks)
        assert panelled.wire_bytes == parallel_model.panelled(*shape, ranks)


def test_the_page_has_the_models_tables() -> None:
    text = parallel_model.PAGE.read_text(encoding="utf-8")
    assert parallel_model.page(text) == text, "run python benchmarks/parallel_model.py --page"
    assert parallel_model.page(text.replace("| 8 |", "| 9 |")) == text


@pytest.mark.distributed
def test_the_benchmark_of_several_ranks_measures_every_method(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    small = ["--device", "cpu", "--layers", "64x48", "--tokens", "16"]
    assert parallel_layers.main([*small, "--repeats=1", "--bursts=2", f"--out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    methods = [row["method"] for row in rows if row["ms"] > 0.0]
    assert methods[:4] == ["forge", "kernels", "wire", "stock"]
    assert methods[4:] == ["single", "exchange", "panels", "all_reduce", "distributed"]
    sent = {row["method"]: row["wire_bytes"] for row in rows if row["mode"] == "dp"}
    # dY and X of 8 tokens, half of dY's columns; then half of W.
    assert sent["exchange"] == 2 * 8 * (32 + 48) + 2 * 32 * 48
    assert sent["panels"] == sent["distributed"] == 4 * 32 * 48 + 2 * 32 * 48
