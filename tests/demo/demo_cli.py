"""Run the demo as a user does, in processes of its own, and read what it left."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[2]

STEPS = 20

#: A run of some seconds whose weights outweigh its activations.
SMALL = (
    *("--layers", "2", "--hidden", "256", "--ffn", "512", "--heads", "4", "--sequence", "32"),
    *("--steps", str(STEPS), "--save-interval", "7"),
)

#: What a log says of the machine rather than of the training.
_TIMINGS = ("seconds", "tokens_per_second", "memory_bytes")


def environment() -> dict[str, str]:
    """The installed wheel, or this working tree with its own library."""
    result = dict(os.environ)
    if "FORGE_LIBRARY" in result or importlib.util.find_spec("forge_train") is None:
        result.setdefault("FORGE_LIBRARY", str(ROOT / "target" / "release" / "libforge.so"))
        paths = [str(ROOT / "megatron_patch"), result.get("PYTHONPATH", "")]
        result["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return result


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
    """Start ``train.sh`` with runs under ``out``; its output is in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "forge_train.demo", "--out", str(out), *flags],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def demo(out: Path, *flags: str) -> tuple[str, str]:
    """Run to the end; stdout and stderr."""
    process = start(out, *flags)
    try:
        stdout, stderr = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, f"{flags}: {process.returncode}\n{stdout}\n{stderr}"
    return stdout, stderr


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def log(run: Path) -> list[dict[str, Any]]:
    """A run's log without timings."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in _TIMINGS} for record in records]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return when the run's log has reached ``step``."""
    path, deadline = run / "log.jsonl", time.monotonic() + 120
    while not path.is_file() or path.read_text().count("\n") < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"step {step} was not reached: {process.communicate()}")
        time.sleep(0.01)


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a running demo's ranks, in order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def gone(pid: int) -> bool:
    """Whether a process has ended (its parent may not have noticed yet)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def checkpoint(run: Path, scratch: Path, step: int = STEPS) -> dict[str, Any]:
    """Everything in a checkpoint, unsharded: tensors and Python objects by key."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08d}", scratch / "whole.pt")
    return torch.load(scratch / "whole.pt", weights_only=False)


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Where two checkpoints are not the same, bit for bit (NaN payloads and zero signs count)."""
    if type(left) is not type(right):
        return [f"{where}: {type(left)} and {type(right)}"]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{where}: {left.keys() ^ right.keys()}"]
        return [d for key in left for d in differences(left[key], right[key], f"{where}/{key}")]
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return [f"{where}: {len(left)} and {len(right)} items"]
        return [
            d for i, pair in enumerate(zip(left, right, strict=True))
            for d in differences(*pair, f"{where}/{i}")
        ]  # fmt: skip
    if isinstance(left, torch.Tensor):
        same = (left.dtype, left.shape) == (right.dtype, right.shape)
        left, right = (tensor.contiguous().flatten().numpy(force=True).tobytes()
                       if tensor.dtype != torch.bfloat16
                       else tensor.contiguous().view(torch.int16).numpy(force=True).tobytes()
                       for tensor in (left, right))  # fmt: skip
        return [] if same and left == right else [where]
    if hasattr(left, "tobytes"):
        return [] if left.tobytes() == right.tobytes() else [where]
    return [] if left == right else [f"{where}: {left} and {right}"]
