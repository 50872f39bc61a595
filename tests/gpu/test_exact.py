"""fp32 factors: the GPU gives the CPU backend's bits, in products, rules, roundings and noise."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_cases import (
    DEVICE,
    RULES,
    Case,
    Guard,
    assert_same_bits,
    factors,
    generator,
    ids,
    initial,
    linear_on,
    needs_gpu,
    to_cpu,
    to_gpu,
)

pytestmark = needs_gpu

CASES = [
    *(Case(rule, "fp32", "fp32", factor="fp32") for rule in RULES),
    *(
        Case("adamw", w, s, r, "fp32")
        for w, s, r in itertools.product(
            ("fp32", "bf16", "bf16+fp32", "bf16+16"), ("fp32", "bf16"), ("stochastic", "nearest")
        )
        if (w, s) != ("fp32", "fp32")
    ),
    *(Case(rule, "bf16", "bf16", factor="fp32") for rule in ("sgd-nesterov", "lion", "ademamix")),
]
SHAPES = [(1, 1), (7, 131), (136, 264), (129, 255)]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_an_update_has_the_cpus_bits(case):
    for rows, cols in SHAPES:
        spec = case.spec(rows, cols)
        gpu, cpu = linear_on(DEVICE, spec), linear_on("cpu", spec)
        guard = Guard()
        theirs = to_cpu(initial(gpu))
        ours = guard.storage(theirs)
        buffer = torch.randn(rows, cols, generator=generator(9))
        for step, tokens in enumerate([(5, 0, 300), (257,), ()], start=1):
            segments = [
                factors(t, rows, cols, torch.float32, seed=10 * step + i)
                for i, t in enumerate(tokens)
            ]
            accumulator = buffer if step == 2 else None
            numbers = {"step": step, "seed": 3, "grad_scale": 0.75}
            cpu.update(segments, theirs, cpu.scalars({}, **numbers), accumulator)
            on_gpu = None if accumulator is None else guard(accumulator)
            gpu.update(to_gpu(segments), ours, gpu.scalars({}, **numbers), on_gpu)
            guard.check()
            assert_same_bits(ours, theirs, f"{case} {rows}x{cols} step {step}")


def test_an_accumulated_buffer_has_the_cpus_bits():
    rows, cols = 129, 255
    spec = Case(factor="fp32").spec(rows, cols)
    gpu, cpu = linear_on(DEVICE, spec), linear_on("cpu", spec)
    ours, theirs = torch.zeros(rows, cols, device=DEVICE), torch.zeros(rows, cols)
    for seed, tokens in enumerate((300, 7)):
        segment = factors(tokens, rows, cols, torch.float32, seed=seed)
        cpu.accumulate([segment], theirs)
        gpu.accumulate(to_gpu([segment]), ours)
    assert torch.equal(ours.cpu(), theirs)
