"""Gradients that autograd leaves: read in the parameter's type, with the bits of a copy in fp32."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, needs_gpu

from forge_train import AdamW
from forge_train.native import Linear, LinearSpec

pytestmark = needs_gpu

# Whole tiles; tails; rows that are no runs of 8; an address that is no multiple of 16.
SHAPES = [(192, 128), (130, 264), (1, 4096), (7, 37)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("bf16+16", "fp32"), ("bf16", "q8")])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_bits_are_those_of_a_copy_in_fp32(shape, dtype, formats, offset):
    weight_format, state_format = formats
    spec = LinearSpec(*shape, AdamW(), dtype, weight_format, state_format)
    linear = Linear(spec, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
    elements = start.numel()
    memory = torch.randn(elements + 8, generator=generator).to(dtype).to(DEVICE)
    gradient = memory[offset : offset + elements].view(shape)
    memory[elements // 2] = float("nan")
    found = []
    for values in (gradient, gradient.float()):
        storage, told = linear.allocate(start.clone()), []
        for step in (1, 2):
            told.append(linear.norm((), values, "tiles"))
            scalars = linear.scalars({"lr": 1e-2}, step=step, seed=5)
            told.append(linear.update((), storage, scalars, values))
        found.append((storage, told))
    (ours, told), (theirs, wanted) = found
    assert told[1].nonfinite_tiles == wanted[1].nonfinite_tiles == 1
    assert told[0].nonfinite and wanted[0].nonfinite
    arrays = ([one.weight, one.weight_extra, *one.states, *one.scales] for one in (ours, theirs))
    for left, right in zip(*arrays, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def test_sums_of_squares():
    linear = Linear(LinearSpec(300, 520, AdamW(), torch.bfloat16, "bf16", "bf16"), device=DEVICE)
    gradient = torch.randn(300, 520, device=DEVICE).bfloat16()
    wanted = gradient.double().square().sum().item()
    for values in (gradient, gradient.float()):
        norm = linear.norm((), values, "tiles")
        assert norm.sum_of_squares == pytest.approx(wanted, rel=1e-12)
