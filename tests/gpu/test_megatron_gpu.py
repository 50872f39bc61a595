"""The Megatron patch and the demo on one GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu_cases import needs_gpu

pytestmark = [
    needs_gpu,
    pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core"),
]

SMALL = "--steps 12 --layers 2 --hidden 128 --ffn 256 --heads 4 --save-interval 6 --tp 1"


def _demo(out: Path, flags: str) -> list[dict]:
    command = [sys.executable, "-m", "forge_train.demo", "--out", str(out), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (out / "demo" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_the_demos_losses_on_the_gpu_are_the_cpus(tmp_path):
    gpu = _demo(tmp_path / "gpu", f"--device cuda {SMALL}")
    cpu = _demo(tmp_path / "cpu", f"--device cpu {SMALL}")
    assert len(gpu) == len(cpu) == 12
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    summary = json.loads((tmp_path / "gpu" / "demo" / "summary.json").read_text())
    assert summary["device"] != "CPU" and summary["fused_gradient_bytes"] == 0


@pytest.mark.slow
def test_the_demo_follows_stock_megatron_and_resumes_on_the_other_device(tmp_path):
    log = _demo(tmp_path, f"--compare {SMALL}")
    stock = (tmp_path / "demo" / "stock" / "log.jsonl").read_text().splitlines()
    for ours, line in zip(log, stock, strict=True):
        assert ours["loss"] == pytest.approx(json.loads(line)["loss"], abs=1e-3)
    resumed = _demo(tmp_path, "--resume --steps 14 --device cpu")
    assert len(resumed) == 14


def test_bf16_weights_and_q8_states(tmp_path):
    log = _demo(tmp_path, f"{SMALL} --weight-format bf16+16 --state-format q8 --micro-batches 2")
    assert log[-1]["loss"] < log[0]["loss"] and not any(record["skipped"] for record in log)
