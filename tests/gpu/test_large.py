"""A weight of more than 2^31 elements follows fp64, also where its index passes 2^31."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, RULES, Case, linear_on, needs_gpu, reference

from forge_train.native import Segment

pytestmark = [needs_gpu, pytest.mark.slow]

ROWS, COLS, TOKENS = 131_080, 16_512, 40
PAST = 2**31 // COLS  # the row in which the index passes 2^31


@pytest.mark.parametrize("mainloop", ["", "sm80", "panel"])
@pytest.mark.parametrize("state", ["bf16", "q8"])
def test_more_than_2_to_the_31_elements(mainloop, state, monkeypatch):
    monkeypatch.setenv("FORGE_MAINLOOP", mainloop)
    assert ROWS * COLS > 2**31
    case = Case("adamw", "bf16", state, "nearest")
    linear = linear_on(DEVICE, case.spec(ROWS, COLS))
    generator = torch.Generator(DEVICE).manual_seed(1)
    weight = torch.empty(ROWS, COLS, device=DEVICE, dtype=torch.bfloat16)
    weight.normal_(generator=generator)
    rows = torch.tensor([0, 1, 65_535, 65_536, PAST - 1, PAST, PAST + 1, ROWS - 1], device=DEVICE)
    before = weight[rows].clone()
    storage = linear.allocate(weight)
    dy = torch.randn(TOKENS, ROWS, device=DEVICE, generator=generator).bfloat16()
    x = torch.randn(TOKENS, COLS, device=DEVICE, generator=generator).bfloat16()
    scalars = linear.scalars({}, step=1, seed=3, grad_scale=1.0)
    report = linear.update([Segment.of(dy, x)], storage, scalars)
    assert report.nonfinite_tiles == 0
    g = dy[:, rows].double().T @ x.double()
    zeros = [torch.zeros_like(g), torch.zeros_like(g)]
    want, _ = reference(RULES["adamw"], before, zeros, g, 1)
    torch.testing.assert_close(storage.weight[rows].double(), want, rtol=2**-8, atol=2e-4)
    squares = sum(
        (dy[:, first : first + 4096].float().T @ x.float()).square().sum(dtype=torch.float64)
        for first in range(0, ROWS, 4096)
    )
    # All of dW was seen, once.
    assert report.sum_of_squares == pytest.approx(float(squares), rel=1e-4)
