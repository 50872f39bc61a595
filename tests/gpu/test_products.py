"""Updates fed by factors: against fp64, on ragged shapes and strides, fused against two-phase."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    DEVICE,
    RULES,
    Case,
    Guard,
    assert_same_bits,
    factors,
    ids,
    initial,
    linear_on,
    needs_gpu,
    product,
    reference,
    storage_error,
    tensors,
    to_gpu,
)

from forge_train._structs import DeviceStructs, report_of
from forge_train.native import Segment

pytestmark = needs_gpu

# The first ones have the tensor cores' own kernel, the last ones exact or other products.
CASES = [
    Case("adamw", "bf16", "bf16"),
    Case("adamw", "bf16", "q8"),
    Case("adamw", "bf16+16", "fp32"),
    Case("adamw", "bf16+fp32", "fp32"),
    Case("adamw", "bf16", "bf16", "nearest"),
    Case("adamw", "bf16", "bf16", factor="fp16"),
    Case("sgd-momentum", "bf16", "bf16"),
    Case("lion", "bf16", "bf16"),
    Case("adamw", "fp32", "fp32"),
    Case("adamw", "fp32", "q8"),
    Case("adamw", "bf16+fp32", "bf16"),
    Case("adamw", "bf16", "fp32"),
]
#: out, in, tokens of each segment
SHAPES = [
    (8, 8, [1]),
    (128, 128, [64]),
    (136, 264, [100]),
    (200, 392, [7, 64, 1]),
    (512, 1024, [513]),
    (1000, 520, [1000]),
    (384, 256, [0]),
    (384, 256, []),
    (384, 264, [0, 130, 0]),
]


def _segments(case: Case, rows: int, cols: int, counts: list[int]) -> list[Segment]:
    return [factors(t, rows, cols, case.factor_dtype, seed=i) for i, t in enumerate(counts)]


def _check(case: Case, rows: int, cols: int, segments: list[Segment], step: int = 2) -> None:
    """One update on the GPU against fp64, with guard bands around everything."""
    linear = linear_on(DEVICE, case.spec(rows, cols))
    guard = Guard()
    storage = guard.storage(initial(linear))
    before = linear.export_weight(storage)
    states = [linear.export_state(storage, i) for i in range(len(storage.states))]
    exact, error = product(segments, rows, cols)
    report = linear.update(segments, storage, linear.scalars({}, step=step, seed=3))
    guard.check()
    assert report.nonfinite_tiles == 0
    assert report.sum_of_squares == pytest.approx(exact.square().sum().item(), rel=1e-4, abs=1e-30)

    rule = RULES[case.rule]
    want, want_states = reference(rule, before, states, exact, step)
    sides = [reference(rule, before, states, exact + sign * error, step) for sign in (-1, 1)]
    spread = torch.stack([(side[0] - want).abs() for side in sides]).amax(0)
    rounding = 16 * 2.0**-23 * (before.double().abs() + (want - before).abs() + 1e-30)
    bound = storage_error(case, want, "weight") + 2 * spread + rounding
    got = linear.export_weight(storage).double()
    wrong = (got - want).abs() > bound
    if isinstance(rule, type(RULES["lion"])):
        # The sign of a sum that cancels is anybody's.
        wrong &= (sides[0][0] - sides[1][0]).abs() == 0
    assert not wrong.any(), f"{wrong.sum()} weights; first at {wrong.nonzero()[0].tolist()}"
    for index, name in enumerate(linear.rule.state_names):
        exact_state = want_states[index]
        spread = torch.stack([(s[1][index] - exact_state).abs() for s in sides]).amax(0)
        bound = storage_error(case, exact_state, name) + 2 * spread
        size = states[index].double().abs() + exact_state.abs() + spread
        wrong = (linear.export_state(storage, index).double() - exact_state).abs() > (
            1.01 * bound + 16 * 2.0**-23 * size + 1e-30
        )
        assert not wrong.any(), f"{name}: {wrong.sum()}; first {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_updates_follow_fp64(case, shape):
    rows, cols, counts = shape
    _check(case, rows, cols, to_gpu(_segments(case, rows, cols, counts)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_ragged_shapes_and_token_counts(case, shape):
    rows, cols, counts = shape
    _check(case, rows, cols, to_gpu(_segments(case, rows, cols, counts)))


@pytest.mark.parametrize("shape", [(33, 17, [5]), (1, 131, [40]), (77, 256, [64])], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_dimensions_that_are_no_multiples_of_8(case, shape):
    rows, cols, counts = shape
    _check(case, rows, cols, to_gpu(_segments(case, rows, cols, counts)))


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
@pytest.mark.parametrize("first", [8, 3])
def test_strides_and_offsets_change_no_bit(case, first):
    """Factors inside wider matrices, aligned for TMA and not, and guarded by NaN around them."""
    rows, cols, tokens = 136, 264, 200
    (whole,) = to_gpu(_segments(case, rows, cols, [tokens]))
    wide = []
    for factor in (whole.dy, whole.x):
        matrix = torch.full(
            (tokens, factor.shape[1] + 16), float("nan"), dtype=factor.dtype, device=DEVICE
        )
        matrix[:, first : first + factor.shape[1]] = factor
        wide.append(matrix[:, first : first + factor.shape[1]])
    results = []
    for segment in (whole, Segment.of(*wide)):
        linear = linear_on(DEVICE, case.spec(rows, cols))
        storage = initial(linear)
        linear.update([segment], storage, linear.scalars({}, step=1, seed=3))
        results.append(storage)
    if first % 8 == 0:
        assert_same_bits(*results)
    else:  # another kernel may take what TMA cannot, and sum in another order
        difference = linear.export_weight(results[0]) - linear.export_weight(results[1])
        assert difference.abs().max() <= 0.03


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[8]], ids=str)
@pytest.mark.parametrize(
    "kind",
    ["zeros", "denormals", "huge"],
)
def test_adversarial_factors(case, kind):
    rows, cols = 136, 264
    (segment,) = _segments(case, rows, cols, [96])
    if kind == "zeros":
        segment.dy.zero_()
    elif kind == "denormals":
        segment.dy.mul_(1e-4 if case.factor == "fp16" else 1e-38)
    else:
        segment.dy[5, 3] = 3e4
    _check(case, rows, cols, to_gpu([Segment.of(segment.dy, segment.x)]))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[8], CASES[10]], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_nonfinite_factor_leaves_its_tiles_alone(case, value):
    """The tiles concerned keep every bit and are counted; all others are as without it."""
    rows, cols = 1024, 512
    (clean,) = _segments(case, rows, cols, [128])
    dirty = clean.dy.clone()
    dirty[17, 700] = value  # row 700 of dW
    linear = linear_on(DEVICE, case.spec(rows, cols))
    results = []
    for dy in (clean.dy, dirty):
        guard = Guard()
        storage = guard.storage(initial(linear))
        report = linear.update(
            to_gpu([Segment.of(dy, clean.x)]), storage, linear.scalars({}, step=2, seed=3)
        )
        guard.check()
        results.append((storage, report))
    (good, fine), (bad, report) = results
    assert fine.nonfinite_tiles == 0 and 0 < report.nonfinite_tiles < report.tiles
    untouched = initial(linear)
    changed = linear.export_weight(bad) != linear.export_weight(untouched)
    kept = ~changed.any(1)  # rows of tiles that were left alone in all columns
    assert kept[700]
    assert not changed[700].any()
    same = (bad.weight.view(torch.uint8) == good.weight.view(torch.uint8)).view(rows, -1).all(1)
    alone = bad.weight.view(torch.uint8) == untouched.weight.view(torch.uint8)
    assert (same | alone.view(rows, -1).all(1)).all(), "a row is neither updated nor left alone"
    assert same.sum() >= rows - 512, "more than the tiles concerned was left alone"
    for state, clean_state, old in zip(bad.states, good.states, untouched.states, strict=True):
        row = (state == clean_state).view(rows, -1).all(1) | (state == old).view(rows, -1).all(1)
        assert row.all()
        assert torch.equal(state[700], old[700])


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[10]], ids=str)
def test_a_nonfinite_buffer_leaves_its_elements_alone(case):
    """The same where the non-finite number comes from the buffer that is added to the product."""
    rows, cols = 512, 512
    (segment,) = _segments(case, rows, cols, [128])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    buffer = torch.zeros(rows, cols, device=DEVICE)
    buffer[100, 200] = float("nan")
    storage, untouched = initial(linear), initial(linear)
    report = linear.update(
        to_gpu([segment]), storage, linear.scalars({}, step=2, seed=3), accumulator=buffer
    )
    assert 0 < report.nonfinite_tiles < report.tiles
    for now, before in zip(tensors(storage), tensors(untouched), strict=True):
        assert now[100, 200] == before[100, 200]
    changed = linear.export_weight(storage) != linear.export_weight(untouched)
    assert changed.float().mean() > 0.4, "more than the tiles concerned was left alone"
    assert linear.export_weight(storage).isfinite().all()
    assert storage.weight.isfinite().all()


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[8]], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_nonfinite_scale_leaves_everything_alone(case, value):
    """Scalars in device memory, as a loss scale that overflowed: nobody has checked them."""
    rows, cols = 512, 512
    segments = to_gpu(_segments(case, rows, cols, [128]))
    linear = linear_on(DEVICE, case.spec(rows, cols))
    storage, untouched = initial(linear), initial(linear)
    numbers = linear.device_scalars(linear.scalars({}, step=2, seed=3))
    numbers.view(torch.float64)[2] = value  # grad_scale, after step and seed
    structs = DeviceStructs("forge_report", 1, linear.device)
    linear.update(segments, storage, numbers, report=structs.rows[0])
    report = structs.read(report_of)[0]
    assert report.nonfinite_tiles == report.tiles > 0
    assert_same_bits(storage, untouched, case)


def test_the_largest_of_a_q8_block_never_wraps_around():
    """Rounding by chance takes no second moment to 0 and turns no first moment's sign."""
    case, rows, cols = Case("adamw", "bf16", "q8"), 4096, 4096
    linear = linear_on(DEVICE, case.spec(rows, cols))
    storage = initial(linear)
    ones = torch.ones(rows, cols, device=DEVICE)
    # Equal magnitudes: every element is the largest of its block, at every draw there is.
    for step in range(1, 5):
        linear.update([], storage, linear.scalars({}, step=step, seed=step), accumulator=ones)
        linear.import_state(storage, 0, ones)
        linear.import_state(storage, 1, ones)
        dy = torch.full((1, rows), 1.0, dtype=torch.bfloat16, device=DEVICE)
        x = torch.full((1, cols), 1.0, dtype=torch.bfloat16, device=DEVICE)
        linear.update([Segment.of(dy, x)], storage, linear.scalars({}, step=step, seed=step))
        first, second = linear.export_state(storage, 0), linear.export_state(storage, 1)
        assert (first > 0.9).all() and (second > 0.9).all()


TWO_PHASE = [*CASES, Case("adam", "bf16", "bf16"), Case("sgd", "bf16", "fp32")]


@pytest.mark.parametrize("case", TWO_PHASE, ids=ids(TWO_PHASE))
@pytest.mark.parametrize(
    "shape", [(136, 264, [100, 7]), (4096, 1024, [512]), (1536, 2048, [4096])], ids=str
)
def test_fused_is_two_phase_bit_for_bit(case, shape):
    """A dW stored by ``accumulate``, then the rule: the bits of the fused update."""
    rows, cols, counts = shape
    segments = to_gpu(_segments(case, rows, cols, counts))
    linear = linear_on(DEVICE, case.spec(rows, cols))
    scalars = linear.scalars({}, step=2, seed=9, grad_scale=0.5)
    fused, stored = initial(linear), initial(linear)
    report = linear.update(segments, fused, scalars)
    guard = Guard()
    accumulator = guard(torch.zeros(rows, cols))
    linear.accumulate(segments, accumulator)
    guard.check()
    other = linear.update((), stored, scalars, accumulator)
    assert_same_bits(fused, stored, case)
    assert report.sum_of_squares == pytest.approx(other.sum_of_squares, rel=1e-6)


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_accumulated_and_kept_micro_batches(case):
    """A buffer of the first micro-batches plus the last one's factors follows fp64."""
    rows, cols = 136, 264
    segments = to_gpu(_segments(case, rows, cols, [64, 100, 33]))
    linear = linear_on(DEVICE, case.spec(rows, cols))
    buffer = torch.zeros(rows, cols, device=DEVICE)
    linear.accumulate(segments[:1], buffer)
    linear.accumulate(segments[1:2], buffer)
    exact, error = product(segments[:2], rows, cols)
    assert ((buffer.double() - exact).abs() <= error + 1e-30).all()
    kept = buffer.clone()
    together, apart = initial(linear), initial(linear)
    scalars = linear.scalars({}, step=2, seed=3)
    linear.update(segments[2:], together, scalars, buffer)
    assert torch.equal(buffer, kept), "an update wrote into the accumulator"
    linear.accumulate(segments[2:], buffer)
    linear.update((), apart, scalars, buffer)
    # One more rounding of the sum, at most: nothing that a bf16 weight would often show.
    difference = linear.export_weight(together) - linear.export_weight(apart)
    assert (difference != 0).float().mean() < (0.02 if case.weight == "bf16" else 1.1)
    assert difference.abs().max() <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048, 4096, 8192])
def test_every_tile_policy_follows_fp64(case, tokens):
    """Token counts on both sides of each choice of tile and path."""
    for rows, cols in ((4096, 4096), (1536, 2048)):
        _check(case, rows, cols, to_gpu(_segments(case, rows, cols, [tokens])))
