"""No buffer of the size of a weight gradient exists at any time, in torch or in the library."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import forge_train
from forge_train import AdamW

WIDTH, TOKENS = 512, 8


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any torch operation makes, but for the known ones."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.bytes, self.operation = known, 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.known and storage.nbytes() > self.bytes:
                    self.bytes, self.operation = storage.nbytes(), str(func)
        return result


def _pointers(fused: forge_train.Fused) -> set[int]:
    pointers = set()
    for weight in fused.engine.weights:
        storage = weight.storage
        for tensor in (storage.weight, storage.weight_extra, *storage.states, *storage.scales):
            if tensor is not None:
                pointers.add(tensor.untyped_storage().data_ptr())
    return pointers


@pytest.mark.parametrize(
    ("dtype", "state_format"),
    [(torch.float32, "fp32"), (torch.bfloat16, "q8"), (torch.bfloat16, "bf16")],
)
@pytest.mark.parametrize(
    ("schedule", "max_norm"),
    [
        ("immediate", None),  # which refuses to clip
        *itertools.product(["deferred", "accumulate", "auto"], [None, 1.0]),
    ],
)
def test_no_torch_tensor_of_the_size_of_a_gradient(schedule, max_norm, dtype, state_format):
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)
    ).to(dtype)
    fused = forge_train.fuse(
        model, AdamW(), schedule=schedule, state_format=state_format, max_norm=max_norm
    )
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    with LargestTensor(_pointers(fused)) as largest:
        for _ in range(3):
            fused.optimizer.zero_grad()
            model(x).square().mean().backward()
            fused.optimizer.step()
    # Even an 8-bit gradient would be seen.
    assert largest.bytes < WIDTH * WIDTH, largest.operation


@pytest.mark.parametrize("schedule", ["deferred", "accumulate", "auto"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])  # 8: factors as large as the buffer
def test_a_plan_predicts_what_a_step_holds(schedule, micro_batches, tokens):
    fused = forge_train.fuse(
        torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)),
        AdamW(lr=1e-3),
        schedule=schedule,
        micro_batches=micro_batches,
        max_norm=1.0,
    )
    (weight,) = fused.engine.fused
    plan = weight.linear.plan(
        tokens=tokens, micro_batches=micro_batches, needs_norm=True, schedule=schedule
    )
    for _ in range(micro_batches):
        fused.model(torch.randn(tokens, 16)).sum().backward()
    held = fused.engine.memory()
    # The last backward folds what came before it, so this is what the step begins with.
    assert held["accumulators"] == plan.accumulator_bytes
    assert held["factors"] == plan.factor_bytes


def test_the_detector_sees_a_gradient():
    model = torch.nn.Linear(WIDTH, WIDTH)
    with LargestTensor({model.weight.untyped_storage().data_ptr()}) as largest:
        model(torch.randn(TOKENS, WIDTH)).square().mean().backward()
    assert largest.bytes == WIDTH * WIDTH * 4


_PEAK = """
import sys
import conftest
import torch
import forge_train

width, tokens = 3072, 16
how = sys.argv[1]
torch.set_num_threads(2)


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith(field + ":"))


model = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
if how == "stock":
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
else:
    max_norm = 1.0 if how.endswith("+clip") else None
    fused = forge_train.fuse(
        model, forge_train.AdamW(), schedule=how.removesuffix("+clip"), max_norm=max_norm
    )
    optimizer = fused.optimizer
x = torch.randn(tokens, width, requires_grad=True)


def step():
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


step()
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:  # 5: forget the peak
    peak.write("5")
for _ in range(3):
    step()
print(memory("VmHWM") - before, width * width * 4)
"""


def _growth(run_script, monkeypatch, how: str) -> float:
    # Freed blocks go back to the system at once, so that none of them hides an allocation.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    growth, gradient = map(int, run_script(_PEAK, how).split())
    return growth / gradient


def _can_reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
    except OSError:
        return False
    return True


needs_peak = pytest.mark.skipif(not _can_reset_peak(), reason="/proc/self/clear_refs is not there")


@needs_peak
@pytest.mark.parametrize("how", ["immediate", "deferred", "deferred+clip", "accumulate", "auto"])
def test_the_process_never_holds_a_gradient(run_script, monkeypatch, how):
    assert _growth(run_script, monkeypatch, how) < 0.25


@needs_peak
def test_the_process_of_a_stock_optimizer_does(run_script, monkeypatch):
    assert _growth(run_script, monkeypatch, "stock") > 0.9
