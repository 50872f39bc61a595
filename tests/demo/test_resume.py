"""A run that is killed and resumed ends in the same bits as one that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import TP2_SP, Finished
from demo_cli import (
    SMALL,
    STEPS,
    checkpoint,
    demo,
    differences,
    gone,
    log,
    ranks,
    start,
    wait_for_step,
)

#: FORGE_TEST_SEED repeats the moments that a failed run chose.
SEED = int(os.environ.get("FORGE_TEST_SEED") or time.time_ns() % 2**32)

BF16_Q8 = (*SMALL, "--tp", "1", "--weight-format", "bf16", "--state-format", "q8")


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A generator of its own for every test; pytest shows the seed of a test that fails."""
    print(f"FORGE_TEST_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


def _kill_and_resume(out: Path, flags: tuple[str, ...], chance: random.Random) -> None:
    """Kill at a random moment of a random step, maybe while a checkpoint is written; resume."""
    step, delay = chance.randint(1, STEPS - 2), chance.uniform(0.0, 0.1)
    print(f"kill -9 {delay:.2f} s after step {step}")
    process = start(out, *flags)
    wait_for_step(process, out / "demo", step)
    time.sleep(delay)
    workers = ranks(process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"
    # No rank may go on and write while the run is being resumed.
    deadline = time.monotonic() + 5.0
    while not all(gone(worker) for worker in workers):
        assert time.monotonic() < deadline, "a rank outlived its parent"
        time.sleep(0.01)
    assert not (out / "demo" / "summary.json").exists()
    demo(out, "--resume")


def _same_end(left: Path, right: Path, scratch: Path) -> None:
    assert log(left) == log(right)
    ours, theirs = checkpoint(left, scratch), checkpoint(right, scratch)
    assert sum(key.startswith("optimizer.state.exp_avg") for key in ours) >= 10
    assert "output_layer.weight" in ours
    assert not differences(ours, theirs)


@pytest.mark.distributed
def test_killed_fp32_run_at_tp2(compared: Finished, tmp_path: Path, chance: random.Random) -> None:
    _kill_and_resume(tmp_path, TP2_SP, chance)
    _same_end(tmp_path / "demo", compared.directory, tmp_path)


def test_killed_bf16_run_with_q8_states(tmp_path: Path, chance: random.Random) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    demo(whole, *BF16_Q8)
    _kill_and_resume(broken, BF16_Q8, chance)
    _same_end(broken / "demo", whole / "demo", tmp_path)


@pytest.mark.distributed
def test_resume_at_another_tp(compared: Finished, tmp_path: Path) -> None:
    middle = 14
    for name in ("config.json", "log.jsonl", f"checkpoints/step-{middle:08d}"):
        source, target = compared.directory / name, tmp_path / "demo" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    stdout, _ = demo(tmp_path, "--resume", "--tp", "1")
    assert f"(step {middle})" in stdout and "TP=1" in stdout
    ours, theirs = log(tmp_path / "demo"), log(compared.directory)
    assert ours[:middle] == theirs[:middle]
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["lr"] == other["lr"]


@pytest.mark.distributed
def test_a_dead_rank_ends_the_job(tmp_path: Path, chance: random.Random) -> None:
    process = start(tmp_path, *SMALL, "--steps", "100000", "--save-interval", "0", "--tp", "2")
    wait_for_step(process, tmp_path / "demo", 3)
    workers = ranks(process)
    victim = chance.randrange(2)
    os.kill(workers[victim], signal.SIGKILL)
    begin = time.monotonic()
    try:
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 1, stderr
    assert time.monotonic() - begin < 15
    # The rank that died is named, not the one that lost its partner.
    assert f"rank {victim} was ended by SIGKILL" in stderr
    assert all(gone(worker) for worker in workers)
