"""Rules of one's own on the GPU: the documented one, per-step values, and mistakes in CUDA C."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from gpu_cases import (
    DEVICE,
    Guard,
    assert_same_bits,
    factors,
    initial,
    linear_on,
    needs_gpu,
    to_cpu,
    to_gpu,
)

from forge_train import ForgeError, UserRule, fuse
from forge_train.native import LinearSpec

pytestmark = needs_gpu


def documented() -> UserRule:
    path = Path(__file__).resolve().parents[2] / "examples" / "user_rule.py"
    spec = importlib.util.spec_from_file_location("user_rule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RULE


def spec_of(rule: UserRule, rows: int, cols: int, **changes: object) -> LinearSpec:
    return LinearSpec(rows, cols, rule, parameter_id=77, **changes)


@pytest.mark.parametrize(
    ("weight", "state"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16+16", "fp32")]
)
def test_the_documented_rule_has_the_cpus_bits(weight, state):
    """With fp32 factors; by its function in torch."""
    rows, cols = 129, 264
    spec = spec_of(
        documented(), rows, cols, factor_dtype=torch.float32, weight_format=weight,
        state_formats=state,
    )  # fmt: skip
    gpu, cpu = linear_on(DEVICE, spec), linear_on("cpu", spec)
    guard = Guard()
    theirs = to_cpu(initial(gpu))
    ours = guard.storage(theirs)
    for step in (1, 2):
        segments = [factors(40, rows, cols, torch.float32, seed=step)]
        numbers = {"step": step, "seed": 3, "grad_scale": 0.75}
        cpu.update(segments, theirs, cpu.scalars({}, **numbers))
        gpu.update(to_gpu(segments), ours, gpu.scalars({}, **numbers))
        guard.check()
        assert_same_bits(ours, theirs, step)


@pytest.mark.parametrize("state", ["fp32", "bf16", "q8"])
def test_either_mainloop_applies_it(state, monkeypatch):
    rows, cols = 256, 512
    spec = spec_of(
        documented(), rows, cols, factor_dtype=torch.bfloat16, weight_format="bf16",
        state_formats=state,
    )  # fmt: skip
    linear = linear_on(DEVICE, spec)
    start = initial(linear)
    results = []
    for mainloop in ("", "sm80"):
        monkeypatch.setenv("FORGE_MAINLOOP", mainloop)
        storage = Guard().storage(start)
        segments = to_gpu([factors(96, rows, cols, torch.bfloat16)])
        report = linear.update(
            segments, storage, linear.scalars({}, step=1, seed=3, grad_scale=1.0)
        )
        assert report.nonfinite_tiles == 0
        assert not torch.equal(storage.weight, start.weight)
        results.append(storage)
    # Another kernel sums dW in another order; weights agree to a bf16 step.
    a, b = (r.weight.float() for r in results)
    torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)


def test_per_step_values_are_computed_on_the_gpu():
    rule = UserRule(
        "gpu_bias", states=["m"], lr=0.5, beta=0.9,
        per_step={"bias": "1.0 - pow(beta, step)", "rate": "lr / bias"},
        cuda="m += (1.0f - beta) * (g - m); w -= rate * m;",
    )  # fmt: skip
    rows, cols = 8, 128
    linear = linear_on(DEVICE, spec_of(rule, rows, cols, factor_dtype=torch.float32))
    storage = linear.allocate(torch.zeros(rows, cols, device=DEVICE))
    gradient = torch.ones(rows, cols, device=DEVICE)
    m, w = 0.0, 0.0
    for step in (1, 2, 3):
        linear.update((), storage, linear.scalars({}, step=step, seed=0, grad_scale=1.0), gradient)
        m += 0.1 * (1.0 - m)
        w -= 0.5 / (1 - 0.9**step) * m
    torch.testing.assert_close(storage.weight.cpu(), torch.full((rows, cols), w))


def test_a_rule_without_cuda_source_is_refused():
    def descend(g, w, *, lr, weight_decay, step):
        w.sub_(lr * g)

    rule = UserRule("cpu_only_rule", cpu=descend)
    with pytest.raises(ForgeError, match="'cpu_only_rule' has a CPU function and no CUDA source"):
        fuse(torch.nn.Linear(64, 64, device=DEVICE), rule)


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        ("gpu_typo", "w -= lr * gradient;", r"rule 'gpu_typo'.*\"gradient\" is undefined"),
        ("gpu_semicolon", "w -= lr * g", r"rule 'gpu_semicolon'.*expected a"),
    ],
)
def test_a_mistake_in_the_source_is_shown_with_the_compilers_words(name, cuda, message):
    model = torch.nn.Linear(64, 64, device=DEVICE)
    before = model.weight.detach().clone()
    with pytest.raises(ForgeError, match=f"(?s){message}"):
        fuse(model, UserRule(name, cuda=cuda))
    assert torch.equal(model.weight, before)


def test_the_same_inputs_give_the_same_bits():
    rows, cols = 64, 256
    spec = spec_of(documented(), rows, cols, factor_dtype=torch.bfloat16, weight_format="bf16")
    linear = linear_on(DEVICE, spec)
    start = initial(linear)
    runs = []
    for _ in range(2):
        storage = Guard().storage(start)
        segments = to_gpu([factors(33, rows, cols, torch.bfloat16)])
        linear.update(segments, storage, linear.scalars({}, step=1, seed=3, grad_scale=1.0))
        runs.append(storage)
    assert_same_bits(*runs)
