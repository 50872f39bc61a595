"""The fused kernel of compute capability 8.0, which FORGE_MAINLOOP=sm80 takes on every GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    DEVICE,
    RULES,
    STATES,
    WEIGHTS,
    Case,
    Guard,
    assert_same_bits,
    factors,
    ids,
    initial,
    linear_on,
    needs_gpu,
    product,
    to_gpu,
)
from test_products import SHAPES, _check

from forge_train.native import Segment

pytestmark = needs_gpu

# Every rule with and without codes, every format with AdamW, fp16 factors.
CASES = [
    *(Case(rule, "bf16", state) for rule in RULES for state in ("bf16", "q8")),
    *(
        Case("adamw", weight, state, factor="bf16")
        for weight in WEIGHTS
        for state in STATES
        if weight != "bf16" or state == "fp32"
    ),
    Case("adamw", "bf16", "bf16", "nearest"),
    Case("adamw", "bf16", "bf16", factor="fp16"),
]
# For which test_products.py has a definition in fp64.
DEFINED = ("sgd", "sgd-momentum", "sgd-nesterov", "adam", "adamw", "adamw-maximize", "lion")
# What its stride of 16 bytes allows: factors of any width in wider matrices.
RAGGED = [(33, 17, [5]), (1, 131, [40]), (77, 250, [64, 3])]


@pytest.fixture(autouse=True)
def mainloop(monkeypatch):
    monkeypatch.setenv("FORGE_MAINLOOP", "sm80")


def _segments(case: Case, rows: int, cols: int, counts: list[int]) -> list[Segment]:
    """Factors whose rows lie a multiple of 16 bytes apart, with NaNs between them."""
    out = []
    for i, tokens in enumerate(counts):
        (segment,) = to_gpu([factors(tokens, rows, cols, case.factor_dtype, seed=i)])
        wide = []
        for factor in (segment.dy, segment.x):
            width = (factor.shape[1] + 7) // 8 * 8 + 8
            matrix = torch.full((tokens, width), float("nan"), dtype=factor.dtype, device=DEVICE)
            matrix[:, : factor.shape[1]] = factor
            wide.append(matrix[:, : factor.shape[1]])
        out.append(Segment.of(*wide))
    return out


def _kernels(call) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


def test_the_variable_chooses_the_kernel(monkeypatch):
    case, (rows, cols) = Case("adamw", "bf16", "bf16"), (136, 264)
    segments = _segments(case, rows, cols, [100])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    storage = initial(linear)

    def update():
        return linear.update(segments, storage, linear.scalars({}, step=1, seed=3))

    update()
    assert any("forge_wgrad_sm80" in name for name in _kernels(update))
    monkeypatch.setenv("FORGE_MAINLOOP", "panel")
    update()
    assert not any("forge_wgrad" in name for name in _kernels(update))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_fused_is_two_phase_bit_for_bit(case):
    """Ragged in all three dimensions, several segments; with AdamW also with a buffer."""
    rows, cols, counts = 200, 392, [7, 0, 64, 33]
    segments = _segments(case, rows, cols, counts)
    linear = linear_on(DEVICE, case.spec(rows, cols))
    scalars = linear.scalars({}, step=2, seed=9, grad_scale=0.5)
    guard = Guard()
    accumulator = guard(torch.zeros(rows, cols))
    for buffered in (False, True) if case.rule == "adamw" else (False,):
        fused, again, stored = (guard.storage(initial(linear)) for _ in range(3))
        buffer = accumulator.clone() if buffered else None
        report = linear.update(segments, fused, scalars, buffer)
        repeated = linear.update(segments, again, scalars, buffer)
        linear.accumulate(segments, accumulator)
        other = linear.update((), stored, scalars, accumulator)
        guard.check()
        assert_same_bits(fused, again, "a second time")
        assert report.sum_of_squares == repeated.sum_of_squares
        assert_same_bits(fused, stored, case)
        # Squares are summed in another order, eight or more of them in fp32.
        assert report.sum_of_squares == pytest.approx(other.sum_of_squares, rel=1e-6)
        assert report.tiles == other.tiles and report.nonfinite_tiles == 0
        norm = linear.norm(segments, buffer)
        assert norm.sum_of_squares == pytest.approx(report.sum_of_squares, rel=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES[:6], SHAPES[8], *RAGGED, (2048, 2112, [96])], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_follow_fp64(shape, dtype):
    """The products alone. The largest shape has tiles of 128 rows on an H200, the others of 64."""
    rows, cols, counts = shape
    case = Case("sgd", "bf16", "fp32", factor=dtype)
    segments = _segments(case, rows, cols, counts)
    linear = linear_on(DEVICE, case.spec(rows, cols))
    guard = Guard()
    accumulator = guard(torch.zeros(rows, cols))
    linear.accumulate(segments, accumulator)
    guard.check()
    exact, bound = product(segments, rows, cols)
    wrong = (accumulator.double() - exact).abs() > bound
    assert not wrong.any(), f"{wrong.sum()}; first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.rule in DEFINED], ids=lambda case: str(case)
)
def test_updates_follow_fp64(case):
    rows, cols, counts = 136, 264, [100]
    _check(case, rows, cols, _segments(case, rows, cols, counts))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_nonfinite_factor_leaves_its_tiles_alone(value):
    case, (rows, cols) = Case("adamw", "bf16", "q8"), (200, 264)
    segments = _segments(case, rows, cols, [70, 40])
    segments[1].dy[3, 70] = value
    linear = linear_on(DEVICE, case.spec(rows, cols))
    guard = Guard()
    storage = guard.storage(initial(linear))
    before = linear.export_weight(storage)
    report = linear.update(segments, storage, linear.scalars({}, step=1, seed=3))
    guard.check()
    assert (report.tiles, report.nonfinite_tiles) == (12, 3)
    after = linear.export_weight(storage)
    assert torch.equal(after[64:128], before[64:128])
    assert (after[:64] != before[:64]).any() and (after[128:] != before[128:]).any()
