"""Many small weights at the step: few launches, and the bits of a launch for each."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, assert_same_bits, needs_gpu

import forge_train
from forge_train import AdamW
from forge_train.native import Linear, LinearSpec, Segment, update_together

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


def test_a_captured_group_takes_its_scalars_from_memory(monkeypatch):
    """A graph of one step's update, replayed for the next: the bits of updates one by one."""
    monkeypatch.setenv("FORGE_MAINLOOP", "sm80")
    torch.manual_seed(2)
    rule = AdamW(lr=1e-2)
    linears, ours, theirs, segments = [], [], [], []
    for index in range(LAYERS):
        spec = LinearSpec(
            192, 256, rule, factor_dtype=torch.bfloat16, weight_format="bf16",
            state_formats="bf16", parameter_id=3 * index,
        )  # fmt: skip
        linear = Linear(spec, name=f"layer {index}", device=torch.device(DEVICE))
        weight = torch.randn(192, 256, device=DEVICE).bfloat16()
        linears.append(linear)
        ours.append(linear.allocate(weight))
        theirs.append(linear.allocate(weight.clone()))
        dy, x = (torch.randn(100, n, device=DEVICE).bfloat16() for n in (192, 256))
        segments.append(Segment.of(dy, x))
    first = linears[0]
    in_memory = first.device_scalars(first.scalars(rule.options, step=1, seed=3))

    def update() -> None:
        work = zip(linears, segments, ours, strict=True)
        calls = [one.update_struct([segment], to, in_memory) for one, segment, to in work]
        update_together(linears, [call for call, _ in calls])

    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        update()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "forge_" in event.name]
    assert len(names) == 2 and "forge_prologue" in names[0] and "forge_wgrad_sm80" in names[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    for step in (2, 3):
        in_memory.copy_(first.device_scalars(first.scalars(rule.options, step=step, seed=3)))
        graph.replay()
    torch.cuda.synchronize()
    for index, linear in enumerate(linears):
        for step in (1, 2, 3):
            one = linear.device_scalars(linear.scalars(rule.options, step=step, seed=3))
            linear.update([segments[index]], theirs[index], one)
        assert_same_bits(ours[index], theirs[index], f"layer {index}")
