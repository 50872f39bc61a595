"""A rank is killed, stopped or fails at a random place: the other says so, a checkpoint resumes.

``FORGE_ROUNDS=50`` for as many rounds; ``FORGE_BACKEND=nccl`` with two GPUs.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import device, on_ranks, run_ranks
from small_models import Transformer, tokens_loss

from forge_train import AdamW, fuse

pytestmark = pytest.mark.distributed

ROUNDS = int(os.environ.get("FORGE_ROUNDS", "3"))
BACKEND = os.environ.get("FORGE_BACKEND", "gloo")
LIMIT = 10.0
"""Seconds after which a collective has failed."""
STEPS, LAST_SAVED = 4, 2
SCHEDULES = ("immediate", "deferred", "accumulate")
REDUCTIONS = ("exchange", "panels")
HOW = ("killed", "stopped", "failed")
PLACES = ("head", "blocks.1.up", "blocks.1.qkv", "blocks.0.down", "step")


def fused_model(schedule: str, reduction: str) -> Any:
    torch.manual_seed(3)
    model = Transformer().to(device())
    return fuse(
        model,
        AdamW(lr=0.01),
        schedule=schedule,
        max_norm=None if schedule == "immediate" else 0.5,
        data_parallel=True,
        data_parallel_reduction=reduction,
    )


def train(fused: Any, first: int, last: int) -> None:
    """Steps ``first`` to ``last``, from 1, on this rank's part of the tokens."""
    import torch.distributed as dist

    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 40, (4, 9), generator=generator)
        own = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        tokens_loss(fused.model, own.to(device())).backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()


def whole_run(schedule: str, reduction: str) -> dict[str, torch.Tensor]:
    """Without any loss."""
    fused = fused_model(schedule, reduction)
    train(fused, 1, STEPS)
    return {name: p.detach().cpu() for name, p in fused.model.named_parameters()}


def resumed_run(schedule: str, reduction: str, path: str) -> dict[str, torch.Tensor]:
    """From the checkpoint."""
    saved = torch.load(path)
    fused = fused_model(schedule, reduction)
    fused.model.load_state_dict(saved["model"])
    fused.optimizer.load_state_dict(saved["optimizer"])
    train(fused, LAST_SAVED + 1, STEPS)
    return {name: p.detach().cpu() for name, p in fused.model.named_parameters()}


def lost_run(schedule: str, reduction: str, how: str, place: str, path: str) -> None:
    """Saves after a step, and loses rank 1 within the next; rank 0 says what it was told."""
    import torch.distributed as dist

    fused = fused_model(schedule, reduction)
    train(fused, 1, LAST_SAVED)
    state = {"model": fused.model.state_dict(), "optimizer": fused.optimizer.state_dict()}
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    if dist.get_rank() == 1:

        def lose(*_: object) -> None:
            if how == "failed":
                raise ValueError("a bug on one rank")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

        if place == "step":
            fused.optimizer.register_step_pre_hook(lose)
        else:
            fused.model.get_submodule(place).register_full_backward_hook(lose)
    begin = time.monotonic()
    try:
        train(fused, LAST_SAVED + 1, STEPS)
        if BACKEND == "nccl":
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"told after {time.monotonic() - begin:.1f} s: {error}", flush=True)
        os._exit(5)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_lost_rank_is_told_of_in_time_and_a_checkpoint_resumes(
    number: int, tmp_path: Path
) -> None:
    draw = random.Random(number)
    schedule, reduction = draw.choice(SCHEDULES), draw.choice(REDUCTIONS)
    how, place = HOW[number % len(HOW)], draw.choice(PLACES)
    case = (schedule, reduction, how, place)
    path = str(tmp_path / "checkpoint.pt")
    begin = time.monotonic()
    [(code, text, _)] = run_ranks(
        lost_run, 2, *case, path, timeout=LIMIT, wait_for=(0,), backend=BACKEND
    )
    assert code == 5 and "told after" in text, (case, text)
    assert time.monotonic() - begin < 4 * LIMIT, case
    want = on_ranks(whole_run, 2, schedule, reduction, backend=BACKEND)
    got = on_ranks(resumed_run, 2, schedule, reduction, path, backend=BACKEND)
    for mine, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), (case, name)
