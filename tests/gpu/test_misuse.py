"""Tensors on the wrong device are refused by name; nothing is written."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, Case, factors, initial, linear_on, needs_gpu, tensors, to_gpu

import forge_train
from forge_train._context import Context, default_context
from forge_train.native import HostComm, Linear, Segment

pytestmark = needs_gpu

CASE, ROWS, COLS = Case("adamw", "bf16", "bf16"), 64, 128


@pytest.fixture
def linear():
    return linear_on(DEVICE, CASE.spec(ROWS, COLS))


@pytest.fixture
def segment():
    return factors(16, ROWS, COLS, torch.bfloat16)


def _refused(call, *parts):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("wrong", ["dY", "X"])
def test_a_factor_on_the_cpu(linear, segment, wrong):
    storage = initial(linear)
    before = [t.clone() for t in tensors(storage)]
    (on_gpu,) = to_gpu([segment])
    dy = segment.dy if wrong == "dY" else on_gpu.dy
    x = segment.x if wrong == "X" else on_gpu.x
    scalars = linear.scalars({}, step=1, seed=0)
    parts = (wrong, "cpu", "cuda:", "case", "to(")
    _refused(lambda: linear.backward(dy, x, storage, mode="update", scalars=scalars), *parts)
    _refused(lambda: linear.update([Segment.of(dy, x)], storage, scalars), *parts)
    _refused(lambda: linear.norm([Segment.of(dy, x)]), *parts)
    buffer = torch.zeros(ROWS, COLS, device=DEVICE)
    _refused(lambda: linear.accumulate([Segment.of(dy, x)], buffer), *parts)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(storage), strict=True))


def test_a_weight_accumulator_or_report_on_the_cpu(linear, segment):
    storage, segments = initial(linear), to_gpu([segment])
    scalars = linear.scalars({}, step=1, seed=0)
    _refused(
        lambda: linear.allocate(torch.zeros(ROWS, COLS, dtype=torch.bfloat16)), "weight", "cpu"
    )
    on_cpu = torch.zeros(ROWS, COLS)
    _refused(lambda: linear.accumulate(segments, on_cpu), "accumulator", "cpu")
    _refused(lambda: linear.update(segments, storage, scalars, on_cpu), "accumulator", "cpu")
    report = torch.zeros(32, dtype=torch.uint8)
    _refused(lambda: linear.update(segments, storage, scalars, report=report), "report", "cpu")
    storage.states[1] = storage.states[1].cpu()
    _refused(lambda: linear.update(segments, storage, scalars), "state 1", "cpu")


def test_gpu_tensors_for_a_layer_of_the_cpu(segment):
    linear = linear_on("cpu", CASE.spec(ROWS, COLS))
    _refused(lambda: linear.norm(to_gpu([segment])), "dY", "cuda:", "cpu")


def test_contexts_and_devices():
    assert default_context(DEVICE) is default_context(torch.device(DEVICE, 0))
    assert default_context("cpu") is default_context()
    spec = CASE.spec(ROWS, COLS)
    _refused(lambda: Linear(spec, context=default_context(), device=DEVICE), "cuda", "cpu")
    _refused(lambda: HostComm(default_context(DEVICE)), "NCCL")
    with pytest.raises(forge_train.ForgeError):
        Context(device=torch.device("cuda", torch.cuda.device_count()))  # no such GPU


def test_a_model_on_two_devices():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, device=DEVICE))
    _refused(
        lambda: forge_train.fuse(model, forge_train.SGD()), "0.weight on cpu", "on cuda:0", "device"
    )
    assert type(model[0]) is torch.nn.Linear


def test_a_model_that_moves_after_fuse():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    forge_train.fuse(model, forge_train.SGD())
    model.to(DEVICE)
    loss = model(torch.randn(4, 8, device=DEVICE)).sum()
    _refused(lambda: loss.backward(), "0.weight", "cuda:0", "cpu", "before fuse()")
