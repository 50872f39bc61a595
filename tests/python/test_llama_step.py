"""``benchmarks/llama_step.py`` in tiny form on the CPU: the methods, its model, its runs.

No time is asserted anywhere: what is measured on a busy CPU says nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import llama
import llama_step
import llama_targets
import pytest
import step_process
import torch
import training_methods
from conftest import ROOT

import forge_train

CPU = torch.device("cpu")
CPU_METHODS = [
    method
    for method in training_methods.all_methods()
    if method.kind != "flashoptim_release"
    # FORGE's captured step runs as it is where there are no graphs; torch's needs a GPU.
    and (not method.graph or (method.kind == "forge" and hasattr(forge_train, "capture")))
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every method that a CPU can run, through the function that a method's process runs."""
    lines = tmp_path_factory.mktemp("rows") / "lines"
    for method in CPU_METHODS:
        options = argparse.Namespace(
            device="cpu", model="tiny", tokens=[16], steps=4, warm_up=2, lines=lines
        )
        step_process.run(method, options)
    return [json.loads(line) for line in lines.read_text().splitlines()]


def test_every_method_trains(rows: list[dict]) -> None:
    assert [row["name"] for row in rows] == [str(method) for method in CPU_METHODS]
    for row in rows:
        assert "unsupported" not in row and "problem" not in row, row
        if row["method"] == "frozen":
            assert row["loss_last"] == row["loss_first"], row
        else:
            assert row["loss_last"] < row["loss_first"], row
        assert len(row["times_ms"]) == 4 and min(row["times_ms"]) > 0


def test_every_method_starts_from_the_same_model_and_data(rows: list[dict]) -> None:
    assert len({row["loss_first"] for row in rows}) == 1


def test_methods_come_close_to_each_other(rows: list[dict]) -> None:
    """They are one algorithm; what differs is rounding. A capture makes some steps before."""
    fallen = {row["name"]: row["loss_first"] - row["loss_last"] for row in rows}
    for row in rows:
        if row["method"] == "frozen":
            continue
        like = "forge:bf16/bf16:immediate:graph" if row["graph"] else "adamw"
        assert fallen[row["name"]] == pytest.approx(fallen[like], rel=0.1), row["name"]


def test_a_refusal_is_a_row(tmp_path: Path) -> None:
    method = replace(CPU_METHODS[0], kind="forge", state_format="q7", schedule="deferred")
    options = argparse.Namespace(
        device="cpu", model="tiny", tokens=[8, 16], steps=1, warm_up=1,
        lines=tmp_path / "lines",
    )  # fmt: skip
    step_process.run(method, options)
    found = [json.loads(line) for line in options.lines.read_text().splitlines()]
    assert [row["tokens"] for row in found] == [8, 16]
    assert all("q7" in row["unsupported"] and "times_ms" not in row for row in found)


def test_a_method_that_does_not_train_is_found_out() -> None:
    """An optimizer that was collected, say, or that refers to other weights."""
    model = llama.build(llama.TINY, device=CPU)
    training = training_methods.Training(CPU_METHODS[0], model, lr=0.0)
    _, ids, labels = next(training_methods.batches([16], 256, CPU))
    row = step_process.measure(training, ids, labels, argparse.Namespace(steps=2, warm_up=1))
    assert "the loss went from" in row["problem"]


def test_torch_may_step_the_rest(tmp_path: Path) -> None:
    (method,) = training_methods.select(["forge:bf16/bf16:immediate:rest-torch"])
    model = llama.build(llama.TINY, device=CPU)
    training = training_methods.Training(method, model, 1e-3)
    before = model.model.embed_tokens.weight.detach().clone()
    _, ids, labels = next(training_methods.batches([8], 256, CPU))
    training.step(ids, labels)
    assert not torch.equal(model.model.embed_tokens.weight, before)
    clipped = replace(method, schedule="deferred", clip=True)
    with pytest.raises(ValueError, match="left out of the norm"):
        training_methods.Training(clipped, llama.build(llama.TINY, device=CPU), 1e-3)


def test_clipping_inside_the_backward_is_refused() -> None:
    hooks = training_methods.Method("adamw_in_backward", schedule="immediate", clip=True)
    with pytest.raises(ValueError, match="before the norm is known"):
        training_methods.Training(hooks, torch.nn.Linear(2, 2), 1e-3)


def test_a_run_writes_resumes_and_compares(tmp_path: Path) -> None:
    out = tmp_path / "llama_step.json"
    script = str(ROOT / "benchmarks" / "llama_step.py")
    command = [sys.executable, script, "--model", "tiny", "--device", "cpu", "--tokens", "8"]
    command += ["--steps", "2", "--methods", "adamw_fused", "--out", str(out)]
    subprocess.run(command, check=True, timeout=300)
    first = json.loads(out.read_text())
    assert {"device", "driver", "torch", "commit", "date", "versions"} <= set(first)
    (row,) = first["rows"]
    wanted = {*llama_step.FIELDS, "peak_gb", "step_ms", "step_ms_spread", "tokens_per_s"}
    assert wanted | {"limit_ms", "share_of_limit"} <= set(row)
    assert row["step_ms"] > 0 and row["tokens_per_s"] == pytest.approx(8e3 / row["step_ms"])
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == first, "a row that exists was measured again"
    assert llama_targets.check(out), "what is not measured does not fail"


def test_a_name_that_is_no_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        llama_step.parse(["--model", "tiny", "--methods", "forge:bf17/*"])
    error = capsys.readouterr().err
    assert "forge:bf17/*" in error and "forge:bf16/q8:immediate" in error
    with pytest.raises(SystemExit):
        llama_step.parse(["--device", "cpu"])
    assert "--model tiny runs on a CPU" in capsys.readouterr().err


def test_rounds_are_pooled_within_a_run(tmp_path: Path) -> None:
    options = argparse.Namespace(
        resume=False, retry=False, model="llama-3.1-8b", warm_up=3, steps=2
    )
    head = {"date": "now", "device": "NVIDIA H200", "commit": "c"}
    result = llama_step.Result(tmp_path / "r.json", head, options)
    row = step_process.row_of(training_methods.Method("adamw_fused"), 512)
    result.add({**row, "times_ms": [100.0, 102.0]})
    result.add({**row, "times_ms": [110.0, 112.0]})
    (pooled,) = result.rows.values()
    assert pooled["times_ms"] == [100.0, 102.0, 110.0, 112.0] and pooled["step_ms"] == 106.0
    assert pooled["share_of_limit"] == pytest.approx(pooled["limit_ms"] / 106.0)


def test_refused_rows_are_kept_until_they_are_retried(tmp_path: Path) -> None:
    head = {"date": "now", "device": "CPU", "commit": "c"}
    options = argparse.Namespace(resume=True, retry=False, model="tiny", warm_up=1, steps=1)
    path, method = tmp_path / "r.json", training_methods.Method("adamw_fused")
    result = llama_step.Result(path, head, options)
    result.add({**step_process.row_of(method, 8), "unsupported": "no reason"})
    result.write()
    assert llama_step.Result(path, head, options).has(method, 8)
    options.retry = True
    assert not llama_step.Result(path, head, options).has(method, 8)
    options.retry = False
    assert not llama_step.Result(path, {**head, "commit": "d"}, options).has(method, 8)


# -- the model --------------------------------------------------------------------------------


def test_the_8b_model_has_llama_3_1s_parameters() -> None:
    assert llama.LLAMA_3_1_8B.parameters() == 8_030_261_248
    counted = sum(p.numel() for p in llama.build(llama.TINY, device=CPU).parameters())
    assert counted == llama.TINY.parameters()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_model_is_that_of_transformers(scaled: bool) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = llama.RopeScaling(original_max_position_embeddings=64) if scaled else None
    config = replace(llama.TINY, rope_scaling=scaling)
    rope = {"rope_type": "default"}
    if scaling:
        rope = {"rope_type": "llama3", **asdict(scaling)}
    sizes = {key: value for key, value in asdict(config).items() if not key.startswith("rope")}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    ours = llama.build(config, device=CPU, dtype=torch.float32, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(256, (2, 200), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), theirs(ids, labels=ids).loss)
