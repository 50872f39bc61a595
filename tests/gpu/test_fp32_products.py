"""fp32 factors on tensor cores, each split into two bf16: what is left out, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, EPS32, Case, Guard, factors, initial, linear_on, needs_gpu, to_gpu

import forge_train
from forge_train import AdamW
from forge_train.native import Linear, Segment

pytestmark = needs_gpu
LEFT_OUT = 3 * 2.0**-16
SHAPES = [(64, 128, [16]), (200, 392, [7, 0, 64, 33]), (33, 20, [5]), (2048, 2112, [300])]


def _linear(rows: int, cols: int, products: str = "bf16x3") -> Linear:
    return linear_on(DEVICE, replace(Case().spec(rows, cols), fp32_products=products))


def _segments(rows: int, cols: int, counts: list[int]) -> list[Segment]:
    """Rows of factors a multiple of 16 bytes apart, with NaNs between them."""
    out = []
    for i, tokens in enumerate(counts):
        (segment,) = to_gpu([factors(tokens, rows, cols, torch.float32, seed=i)])
        wide = []
        for factor in (segment.dy, segment.x):
            width = (factor.shape[1] + 3) // 4 * 4 + 4
            matrix = torch.full((tokens, width), float("nan"), device=DEVICE)
            matrix[:, : factor.shape[1]] = factor
            wide.append(matrix[:, : factor.shape[1]])
        out.append(Segment.of(*wide))
    return out


def _products(linear: Linear, segments: list[Segment], rows: int, cols: int) -> torch.Tensor:
    guard = Guard()
    out = guard(torch.zeros(rows, cols))
    linear.accumulate(segments, out)
    guard.check()
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_leave_out_what_they_say(shape):
    rows, cols, counts = shape
    segments = _segments(rows, cols, counts)
    exact = sum(s.dy.double().T @ s.x.double() for s in segments)
    magnitude = sum(s.dy.abs().double().T @ s.x.abs().double() for s in segments)
    ours = _products(_linear(rows, cols), segments, rows, cols).double()
    bound = (LEFT_OUT + (8 + 3 * sum(counts)) * EPS32) * magnitude
    wrong = (ours - exact).abs() > bound
    assert not wrong.any(), f"{wrong.sum()}; first at {wrong.nonzero()[0].tolist()}"


def test_they_are_nearer_than_bf16_and_tf32():
    """One product of each element, so that nothing but what is left out is seen."""
    rows, cols = 256, 256
    (segment,) = _segments(rows, cols, [1])
    exact = segment.dy.double().T @ segment.x.double()

    def error(values: torch.Tensor) -> float:
        return ((values.double() - exact).abs() / exact.abs()).max().item()

    ours = error(_products(_linear(rows, cols), [segment], rows, cols))
    fma = error(_products(_linear(rows, cols, "exact"), [segment], rows, cols))
    rounded = error(segment.dy.bfloat16().double().T @ segment.x.bfloat16().double())
    assert fma <= 2.0**-24 < ours <= LEFT_OUT + 2.0**-23
    # TF32 keeps 11 bits of each factor, bf16 8.
    assert ours < 2.0**-11 / 10 and ours < rounded / 100


def test_one_update_of_both():
    """The rule sees nearly the same gradient: weights differ by what is left out of it."""
    rows, cols = 200, 392
    segments = _segments(rows, cols, [64, 33])
    after = []
    for products in ("exact", "bf16x3"):
        linear = _linear(rows, cols, products)
        storage = initial(linear)
        linear.update(segments, storage, linear.scalars({}, step=4, seed=1))
        after.append(storage)
    exact, fast = after
    assert not torch.equal(exact.weight, fast.weight)
    # A tenth of a step: where a gradient nearly cancels, what is left out shows.
    torch.testing.assert_close(fast.weight, exact.weight, rtol=0, atol=1e-3)
    magnitude = sum(s.dy.abs().double().T @ s.x.abs().double() for s in segments)
    gradient = sum(s.dy.double().T @ s.x.double() for s in segments)
    error = (LEFT_OUT + 3 * 97 * EPS32) * magnitude
    beta1, beta2 = 0.9, 0.999
    bounds = ((1 - beta1) * error, (1 - beta2) * (2 * gradient.abs() + error) * error)
    for ours, theirs, bound in zip(fast.states, exact.states, bounds, strict=True):
        # Beside it each rule's own roundings.
        off = (ours.double() - theirs.double()).abs()
        assert (off <= bound + 1e-6 * theirs.abs() + 1e-9).all()


def test_a_value_that_bf16_cannot_hold_skips_its_tiles_alone():
    rows, cols = 128, 256
    (segment,) = _segments(rows, cols, [32])
    segment.dy[5, 70] = 3.4e38
    linear = _linear(rows, cols)
    storage = initial(linear)
    before = storage.weight.clone()
    report = linear.update([segment], storage, linear.scalars({}, step=1, seed=1))
    assert (report.tiles, report.nonfinite_tiles) == (4, 2)
    assert torch.equal(storage.weight[64:], before[64:])
    assert not torch.equal(storage.weight[:64], before[:64])


def test_sixteen_bit_factors_refuse_it():
    spec = replace(Case("adamw", "bf16").spec(64, 64), fp32_products="bf16x3")
    with pytest.raises(ValueError, match="fp32_products: Bf16x3 with factors of Bf16"):
        linear_on(DEVICE, spec)


def test_a_fused_model_asks_for_it():
    losses, weights = [], []
    for products in ("exact", "bf16x3"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)).to(DEVICE)
        fused = forge_train.fuse(model, AdamW(lr=1e-2), fp32_products=products)
        x = torch.randn(128, 64, device=DEVICE)
        for _ in range(20):
            loss = (model(x) - x).square().mean()
            loss.backward()
            fused.optimizer.step()
        losses.append(loss.item())
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(*weights)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
