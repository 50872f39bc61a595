"""A backward of a large layer needs less than 64 MiB beside weights, states, factors and dX."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, Case, linear_on, needs_gpu

from forge_train._context import default_context
from forge_train._structs import DeviceStructs

pytestmark = needs_gpu

LIMIT = 64 << 20
ROWS, COLS, TOKENS = 28672, 4096, 4096


@pytest.mark.parametrize(
    "case", [Case("adamw", "bf16", "bf16"), Case("adamw", "bf16", "q8")], ids=str
)
def test_a_backward_holds_no_gradient(case):
    context = default_context(DEVICE)
    linear = linear_on(DEVICE, case.spec(ROWS, COLS))
    weight = torch.zeros(ROWS, COLS, dtype=torch.bfloat16, device=DEVICE)
    storage = linear.allocate(weight)
    dy = torch.randn(TOKENS, ROWS, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(TOKENS, COLS, device=DEVICE, dtype=torch.bfloat16)
    report = DeviceStructs("forge_report", 1, linear.device).rows[0]

    def backward(step: int) -> torch.Tensor:
        scalars = linear.scalars({}, step=step, seed=3)
        return linear.backward(dy, x, storage, mode="update", scalars=scalars, report=report).dx

    dx = backward(1)  # compiles; loads cuBLASLt
    dx_bytes = dx.nbytes
    del dx
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    workspace = context.workspace.nbytes if context.workspace is not None else 0
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    least = free
    for step in range(2, 6):
        dx = backward(step)
        least = min(least, torch.cuda.mem_get_info()[0])
        del dx
    torch.cuda.synchronize()
    least = min(least, torch.cuda.mem_get_info()[0])
    allocated = torch.cuda.max_memory_allocated() - before - dx_bytes + workspace
    assert workspace < LIMIT
    assert allocated < LIMIT, f"{allocated / 2**20:.1f} MiB by torch's allocator"
    # The driver hands out dX in blocks of 2 MiB or more, and the allocator keeps what it was given.
    used = free - least - dx_bytes + workspace
    assert used < LIMIT + (4 << 20), f"{used / 2**20:.1f} MiB by the driver"


def test_a_step_of_a_model_holds_no_gradient():
    """Through autograd and the optimizer: the peak above what stands is far below one gradient."""
    import forge_train

    width, tokens = 8192, 64
    model = torch.nn.Linear(width, width, bias=False, device=DEVICE, dtype=torch.bfloat16)
    fused = forge_train.fuse(
        model, forge_train.AdamW(lr=1e-4), state_format="bf16", weight_format="bf16", max_norm=1.0
    )
    x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        fused.optimizer.zero_grad()
        model(x).square().mean().backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        x.grad = None

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    assert torch.cuda.max_memory_allocated() - before < width * width * 2 / 4
