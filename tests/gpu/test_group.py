"""Many small weights at the step: few launches, and the bits of a launch for each."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, assert_same_bits, needs_gpu

import forge_train
from forge_train import AdamW
from forge_train.native import Linear, LinearSpec, Segment

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


@pytest.mark.parametrize("mainloop", ["", "sm80"])
def test_a_shared_launch_gives_the_bits_of_one_for_each(monkeypatch, mainloop):
    monkeypatch.setenv("FORGE_MAINLOOP", mainloop)
    (one, none), (many, names) = _step("immediate"), _step("deferred")
    assert none == []
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(p, q)
    launches = 2 if HOPPER and not mainloop else 1
    assert len(names) == launches + 1


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_small_weights_share_launches_on_every_gpu(micro_batches):
    _, names = _step("deferred", micro_batches)
    # 9.0's kernel takes thirty of one micro-batch each, the other up to 194.
    alone = HOPPER and micro_batches == 1
    assert sum("forge_wgrad_sm90" in name for name in names) == (2 if alone else 0)
    assert sum("forge_wgrad_sm80" in name for name in names) == (0 if alone else 1)
    assert sum("forge_reports" in name for name in names) == 1


@pytest.mark.skipif(not HOPPER, reason="9.0's own kernel")
@pytest.mark.parametrize(
    "formats",
    [("bf16", "bf16"), ("bf16", "q8"), ("bf16+fp32", "fp32"), ("bf16+16", "q8"), ("fp32", "fp32")],
    ids="-".join,
)
@pytest.mark.parametrize("shape", [(256, 512), (512, 384), (768, 200), (512, 1000)], ids=str)
@pytest.mark.parametrize("tokens", [64, 2100])
def test_a_group_on_hopper_is_each_of_its_weights(formats, shape, tokens):
    """Weights, states and reports; 40 weights, one of them with a gradient that is not finite."""
    from forge_train._lib import check, ffi, lib

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
        handles = ffi.new("forge_linear *[]", [linear.handle for linear in linears])
        context = linears[0].context
        with context.current():
            updates = ffi.new("forge_update *[]", calls)
            check(
                lib.forge_linear_update_group(handles, updates, LAYERS, context.stream()), "group"
            )
        for index, linear in enumerate(linears):
            report = linear.update([segments[index]], theirs[index], scalars)
            assert_same_bits(ours[index], theirs[index], f"layer {index}, step {step}")
            told = ffi.from_buffer("forge_report *", bytes(reports[index].cpu().numpy()))
            assert told.tiles > 0 and (told.nonfinite_tiles > 0) == (index == 11)
            if index != 11:
                assert told.sum_of_squares == pytest.approx(report.sum_of_squares, rel=1e-6)
