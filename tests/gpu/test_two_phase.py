"""Fused is two-phase, bit for bit: every rule, every format of weight and states, each mainloop."""

from __future__ import annotations

from dataclasses import replace

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
    initial,
    linear_on,
    needs_gpu,
    to_gpu,
)

pytestmark = [needs_gpu, pytest.mark.slow]

# By what the factors are multiplied.
WAYS = ("own", "sm80", "panel", "exact", "bf16x3")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_fused_is_two_phase(monkeypatch, rule, way):
    """Rows, columns and tokens that no tile divides; several segments, one of them empty."""
    monkeypatch.setenv("FORGE_MAINLOOP", way if way in ("sm80", "panel") else "")
    fp32 = way in ("exact", "bf16x3")
    for weight in WEIGHTS:
        for state in STATES:
            case = Case(rule, weight, state, factor="fp32" if fp32 else "bf16")
            # 9.0's own kernel takes whole blocks of codes alone.
            shapes = ((200, 392), (200, 384)) if way == "own" and state == "q8" else ((200, 392),)
            for rows, cols in shapes:
                _check(case, rows, cols, "bf16x3" if way == "bf16x3" else "exact")


def _check(case: Case, rows: int, cols: int, products: str) -> None:
    spec = replace(case.spec(rows, cols), fp32_products=products)
    linear = linear_on(DEVICE, spec)
    counts = (70, 0, 33)
    dtype = case.factor_dtype
    segments = to_gpu([factors(n, rows, cols, dtype, seed=i) for i, n in enumerate(counts)])
    scalars = linear.scalars({}, step=3, seed=5, grad_scale=0.7)
    guard = Guard()
    accumulator = guard(torch.zeros(rows, cols))
    fused, stored = (guard.storage(initial(linear)) for _ in range(2))
    report = linear.update(segments, fused, scalars)
    linear.accumulate(segments, accumulator)
    linear.update((), stored, scalars, accumulator)
    guard.check()
    assert report.nonfinite_tiles == 0, case
    assert_same_bits(fused, stored, case)
