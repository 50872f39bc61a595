"""Many small weights at the step: few launches, and the bits of a launch for each."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, needs_gpu

import forge_train
from forge_train import AdamW

pytestmark = needs_gpu
LAYERS = 40


def _step(schedule: str, micro_batches: int = 1) -> tuple[torch.nn.Module, list[str]]:
    """A model of 512×512 after two steps, and the kernels of the second ``step()``."""
    torch.manual_seed(3)
    layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers).to(DEVICE, torch.bfloat16)
    fused = forge_train.fuse(
        model, AdamW(lr=1e-3), schedule=schedule, check_finite=False, state_format="bf16",
        micro_batches=micro_batches,
    )  # fmt: skip
    names: list[str] = []
    for _ in range(2):
        for _ in range(micro_batches):
            model(torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16)).sum().backward()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            fused.optimizer.step()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if "forge_" in event.name]
    return model, names


def test_a_shared_launch_gives_the_bits_of_one_for_each(monkeypatch):
    monkeypatch.setenv("FORGE_MAINLOOP", "sm80")
    (one, none), (many, names) = _step("immediate"), _step("deferred")
    assert none == []
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(names) == 2


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_small_weights_share_launches_on_every_gpu(micro_batches):
    _, names = _step("deferred", micro_batches)
    assert sum("forge_wgrad_sm80" in name for name in names) == 1
    assert sum("forge_reports" in name for name in names) == 1
    assert len(names) == 2
