"""Norms, clipping, dX and the bias gradient against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import (
    DEVICE,
    Case,
    factors,
    initial,
    linear_on,
    needs_gpu,
    poisoned_outputs,
    product,
    to_gpu,
)

from forge_train._structs import DeviceStructs, norm_of
from forge_train.decision import clip_coefficient
from forge_train.native import Segment

pytestmark = needs_gpu

CASES = [
    Case("adamw", "bf16", "bf16"),
    Case("adamw", "fp32", "fp32"),
    Case("adamw", "bf16", "bf16", factor="fp16"),
]
SHAPES = [(136, 264, [100, 7]), (8, 8, [1]), (512, 640, [513]), (1024, 512, [3000]), (33, 17, [9])]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["auto", "gram", "tiles"])
def test_norm_follows_fp64(case, shape, method):
    rows, cols, counts = shape
    segments = to_gpu([factors(t, rows, cols, case.factor_dtype, seed=t) for t in counts])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    want = product(segments, rows, cols)[0].square().sum().item()
    norm = linear.norm(segments, method=method)
    assert math.sqrt(norm.sum_of_squares) == pytest.approx(math.sqrt(want), rel=1e-5)
    assert not norm.nonfinite and norm.method in ("gram", "tiles")
    structs = DeviceStructs("forge_norm", 2, linear.device)
    assert linear.norm(segments, method=method, out=structs.rows[1]) is None
    read = structs.read(norm_of)[1]
    assert read.sum_of_squares == norm.sum_of_squares and not read.nonfinite
    assert (structs.rows[0] == 0).all(), "the neighbouring row was written"


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_norm_with_an_accumulator(case):
    rows, cols = 136, 264
    segments = to_gpu([factors(60, rows, cols, case.factor_dtype)])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    buffer = torch.randn(rows, cols, device=DEVICE)
    exact = product(segments, rows, cols)[0]
    for given, want in ((segments, exact + buffer.double()), ([], buffer.double())):
        norm = linear.norm(given, buffer)
        assert norm.sum_of_squares == pytest.approx(want.square().sum().item(), rel=2e-5)


def test_norm_of_micro_batches_that_nearly_cancel():
    (first,) = to_gpu([factors(64, 256, 256, torch.float32)])
    second = Segment.of(-first.dy + 1e-5 * torch.randn_like(first.dy), first.x)
    linear = linear_on(DEVICE, CASES[1].spec(256, 256))
    want = product([first, second], 256, 256)[0].square().sum().item()
    norm = linear.norm([first, second])
    assert math.sqrt(norm.sum_of_squares) == pytest.approx(math.sqrt(want), rel=2e-2)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@pytest.mark.parametrize("method", ["auto", "gram", "tiles"])
def test_a_nonfinite_gradient_gives_a_nonfinite_norm(case, method):
    linear = linear_on(DEVICE, case.spec(136, 264))
    for value in (math.inf, math.nan):
        (segment,) = to_gpu([factors(50, 136, 264, case.factor_dtype)])
        segment.x[3, 5] = value
        norm = linear.norm([segment], method=method)
        assert norm.nonfinite and not math.isfinite(norm.sum_of_squares)
        structs = DeviceStructs("forge_norm", 1, linear.device)
        linear.norm([segment], method=method, out=structs.rows[0])
        assert structs.read(norm_of)[0].nonfinite


def test_clipping_with_the_norm_is_clip_grad_norms():
    case, rows, cols = CASES[1], 136, 264
    segments = to_gpu([factors(100, rows, cols, torch.float32, scale=50.0)])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    exact, _ = product(segments, rows, cols)
    parameter = torch.nn.Parameter(torch.zeros(rows, cols, device=DEVICE, dtype=torch.float64))
    parameter.grad = exact.clone()
    total = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    norm, coefficient = clip_coefficient(linear.norm(segments).sum_of_squares, 1.0, 1.0)
    assert norm == pytest.approx(total.item(), rel=1e-5)
    scale = (parameter.grad / exact).nanmean().item()
    assert coefficient == pytest.approx(scale, rel=1e-5)


DX_SHAPES = [(136, 264, 100), (8, 8, 1), (512, 640, 513), (1024, 512, 0), (33, 17, 9)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", DX_SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["update", "keep", "accumulate"])
def test_dx_and_dbias_follow_fp64_with_w_before_the_update(case, shape, mode):
    rows, cols, tokens = shape
    (segment,) = to_gpu([factors(tokens, rows, cols, case.factor_dtype)])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    storage = initial(linear)
    w, dy = storage.weight.double(), segment.dy.double()
    before = storage.weight.clone()
    accumulator = torch.zeros(rows, cols, device=DEVICE) if mode == "accumulate" else None
    scalars = linear.scalars({}, step=2, seed=3) if mode == "update" else None
    with poisoned_outputs():
        result = linear.backward(
            segment.dy, segment.x, storage, mode=mode, need_dbias=True,
            scalars=scalars, accumulator=accumulator,
        )  # fmt: skip
    ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    unit = ulp[case.factor_dtype]
    for got, want, size in (
        (result.dx, dy @ w, dy.abs() @ w.abs()),
        (result.dbias, dy.sum(0), dy.abs().sum(0)),
    ):
        bound = unit * want.abs() + (8 + max(rows, tokens)) * 2.0**-24 * size + 1e-7
        assert got.isfinite().all(), "not written everywhere"
        assert ((got.double() - want).abs() <= bound).all()
    if mode == "update":
        assert result.report.nonfinite_tiles == 0
        assert tokens == 0 or not torch.equal(storage.weight, before)
    else:
        assert torch.equal(storage.weight, before)
    if mode == "keep":
        assert result.segment.dy.data_ptr() == segment.dy.data_ptr()
    if mode == "accumulate":
        exact, error = product([segment], rows, cols)
        assert ((accumulator.double() - exact).abs() <= error + 1e-30).all()


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_backward_is_update_after_dgrad(case):
    rows, cols, tokens = 136, 264, 200
    (segment,) = to_gpu([factors(tokens, rows, cols, case.factor_dtype)])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    scalars = linear.scalars({}, step=2, seed=3)
    together, apart = initial(linear), initial(linear)
    dx = linear.backward(segment.dy, segment.x, together, mode="update", scalars=scalars).dx
    other = linear.dgrad(segment.dy, apart)
    linear.update([segment], apart, scalars)
    assert torch.equal(dx, other)
    assert torch.equal(together.weight, apart.weight)
