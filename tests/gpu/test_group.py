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
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


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
    # 9.0's kernel takes one micro-batch of each; it reads maps that another kernel writes.
    own = HOPPER and micro_batches == 1
    updates = ["forge_group_maps", "forge_wgrad_sm90"] if own else ["forge_wgrad_sm80"]
    expected = [*updates, "forge_reports"]
    assert len(names) == len(expected)
    assert all(want in name for want, name in zip(expected, names, strict=True))


@pytest.mark.parametrize("mainloop", ["sm80", None], ids=["sm80", "own"])
def test_a_captured_group_takes_its_scalars_from_memory(monkeypatch, mainloop):
    """A graph of one step's update, replayed for the next: the bits of updates one by one."""
    if mainloop:
        monkeypatch.setenv("FORGE_MAINLOOP", mainloop)
    torch.manual_seed(2)
    rule = AdamW(lr=1e-2)
    linears, ours, theirs, segments = [], [], [], []
    for index in range(LAYERS):
        spec = LinearSpec(
            256, 256, rule, factor_dtype=torch.bfloat16, weight_format="bf16",
            state_formats="bf16", parameter_id=3 * index,
        )  # fmt: skip
        linear = Linear(spec, name=f"layer {index}", device=torch.device(DEVICE))
        weight = torch.randn(256, 256, device=DEVICE).bfloat16()
        linears.append(linear)
        ours.append(linear.allocate(weight))
        theirs.append(linear.allocate(weight.clone()))
        dy, x = (torch.randn(100, 256, device=DEVICE).bfloat16() for _ in range(2))
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
    kernel = "forge_wgrad_sm90" if HOPPER and not mainloop else "forge_wgrad_sm80"
    assert "forge_prologue" in names[0] and kernel in names[-1] and len(names) <= 3
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


@pytest.mark.skipif(not HOPPER, reason="9.0's own kernel")
@pytest.mark.parametrize(
    "formats",
    [("bf16", "bf16"), ("bf16", "q8"), ("bf16+fp32", "fp32"), ("bf16+16", "q8"), ("fp32", "fp32")],
    ids="-".join,
)
@pytest.mark.parametrize("shape", [(256, 512), (512, 384), (768, 192), (384, 960)], ids=str)
@pytest.mark.parametrize("tokens", [64, 2100])
def test_a_group_on_hopper_is_each_of_its_weights(formats, shape, tokens):
    """Weights, states and reports; 40 weights, one of them with a gradient that is not finite."""
    from forge_train._lib import ffi

    weight_format, state_format = formats
    if state_format == "q8" and shape[1] % 128:
        pytest.skip("panels take it")
    torch.manual_seed(1)
    rule = AdamW(lr=1e-2)
    linears, ours, theirs, segments = [], [], [], []
    for index in range(LAYERS):
        spec = LinearSpec(
            *shape, rule, factor_dtype=torch.bfloat16, weight_format=weight_format,
            state_formats=state_format, parameter_id=7 * index, state_rounding="stochastic",
        )  # fmt: skip
        linear = Linear(spec, name=f"layer {index}", device=torch.device(DEVICE))
        weight = torch.randn(shape, device=DEVICE).to(
            torch.float32 if weight_format == "fp32" else torch.bfloat16
        )
        dy, x = (torch.randn(tokens, n, device=DEVICE).bfloat16() for n in shape)
        if index == 11:
            dy[3, 130] = float("inf")
        linears.append(linear)
        ours.append(linear.allocate(weight))
        theirs.append(linear.allocate(weight.clone()))
        segments.append(Segment.of(dy, x))
    size = ffi.sizeof("forge_report")
    for step in (1, 2):
        scalars = linears[0].scalars(rule.options, step=step, seed=3, grad_scale=0.5)
        calls, kept, reports = [], [], []
        for linear, storage, segment in zip(linears, ours, segments, strict=True):
            call, pointed_to = linear.update_struct([segment], storage, scalars)
            reports.append(torch.zeros(size, dtype=torch.uint8, device=DEVICE))
            call.device_report = ffi.cast("forge_report *", reports[-1].data_ptr())
            calls.append(call)
            kept.append(pointed_to)
        update_together(linears, calls)
        for index, linear in enumerate(linears):
            report = linear.update([segments[index]], theirs[index], scalars)
            assert_same_bits(ours[index], theirs[index], f"layer {index}, step {step}")
            told = ffi.from_buffer("forge_report *", bytes(reports[index].cpu().numpy()))
            assert told.tiles > 0 and (told.nonfinite_tiles > 0) == (index == 11)
            if index != 11:
                assert told.sum_of_squares == pytest.approx(report.sum_of_squares, rel=1e-6)
