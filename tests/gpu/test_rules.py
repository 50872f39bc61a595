"""Rules and formats against the CPU backend, with the same dW in both: fed by the accumulator."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_cases import (
    DEVICE,
    FURTHER_RULES,
    STATES,
    WEIGHTS,
    Case,
    Guard,
    generator,
    ids,
    initial,
    linear_on,
    needs_gpu,
    to_cpu,
)

pytestmark = needs_gpu

# Every format with AdamW, every rule with some: each line is a kernel to compile at first use.
CASES = [
    *(Case("adamw", w, s) for w, s in itertools.product(WEIGHTS, STATES)),
    *(Case("adamw", "bf16", s, "nearest") for s in STATES),
    *(Case(rule, "bf16", "bf16") for rule in ("sgd", "sgd-nesterov", "adam", "lion")),
    Case("adamw-maximize", "fp32", "fp32"),
    *(Case("sgd-momentum", "fp32", s) for s in STATES),
    Case("lion", "fp32", "q8"),
    # In coded form the gradient's sign enters by another constant.
    Case("adamw-maximize", "bf16", "q8"),
    *(Case(rule, w, s) for rule in FURTHER_RULES for w, s in (("fp32", "fp32"), ("bf16", "q8"))),
]
REST = [
    case
    for rule, weight, state, rounding in itertools.product(
        ("sgd", "sgd-momentum", "sgd-nesterov", "adam", "adamw", "lion"),
        WEIGHTS,
        STATES,
        ("stochastic", "nearest"),
    )
    if (case := Case(rule, weight, state, rounding)) not in CASES
]


def _flips(ours: torch.Tensor, theirs: torch.Tensor, share: float, what: str) -> None:
    """Codes that differ by one at most, and few: where fp32 results lie on a rounding's edge."""
    difference = (ours.cpu().int() - theirs.int()).abs()
    assert difference.max() <= 1, f"{what}: codes differ by {difference.max()}"
    allowed = max(3.0, share * difference.numel())
    assert difference.sum() <= allowed, f"{what}: {difference.sum()} of {difference.numel()} differ"


def _monotone(values: torch.Tensor) -> torch.Tensor:
    """bf16 bits as integers in the order of their values."""
    bits = values.cpu().view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


def _close(ours: torch.Tensor, theirs: torch.Tensor, size: torch.Tensor, what: str) -> None:
    """fp32 values within a few roundings of the numbers that went into them."""
    error = (ours.cpu().double() - theirs.double()).abs()
    bound = 8 * 2.0**-23 * size.double() + 1e-36
    worst = (error - bound).max()
    assert worst <= 0, f"{what}: off by {error.max()} with bound {bound.flatten()[error.argmax()]}"


def _compare(case: Case, rows: int, cols: int, gradient: torch.Tensor, seed: int = 3) -> None:
    spec = case.spec(rows, cols)
    gpu, cpu = linear_on(DEVICE, spec), linear_on("cpu", spec)
    guard = Guard()
    ours = guard.storage(initial(gpu))
    accumulator = guard(gradient.to(DEVICE))
    for step in (2, 3):
        theirs = to_cpu(ours)  # from the same bits at every step
        before = cpu.export_weight(theirs)
        states = [cpu.export_state(theirs, i) for i in range(len(theirs.states))]
        scalars = cpu.scalars({}, step=step, seed=seed, grad_scale=0.75)
        want = cpu.update((), theirs, scalars, gradient)
        got = gpu.update(
            (), ours, gpu.scalars({}, step=step, seed=seed, grad_scale=0.75), accumulator
        )
        assert got.nonfinite_tiles == want.nonfinite_tiles == 0
        assert got.sum_of_squares == pytest.approx(want.sum_of_squares, rel=1e-6)
        guard.check()
        assert torch.equal(accumulator.cpu(), gradient), "the accumulator was written"

        after = cpu.export_weight(theirs)
        weight_size = before.abs() + 4 * (after - before).abs() + 0.1 * gradient.abs()
        if case.weight == "bf16":
            _flips(_monotone(ours.weight), _monotone(theirs.weight), 2e-3, "weight")
        else:
            _close(gpu.export_weight(ours), after, weight_size, "weight")
            if case.weight != "fp32":
                _flips(_monotone(ours.weight), _monotone(theirs.weight), 2e-3, "model weight")
        for index, name in enumerate(gpu.rule.state_names):
            if case.state == "fp32":
                new = cpu.export_state(theirs, index)
                pull = gradient.square() if name.endswith("sq") else gradient.abs() + before.abs()
                size = states[index].abs() + new.abs() + pull
                _close(gpu.export_state(ours, index), new, size, name)
            elif case.state == "bf16":
                _flips(_monotone(ours.states[index]), _monotone(theirs.states[index]), 2e-3, name)
            else:
                _flips(ours.states[index], theirs.states[index], 5e-3, name)
                scale, other = ours.scales[index].cpu(), theirs.scales[index]
                # v − a² cancels, so its roundings grow.
                rtol = 1e-4 if "centered" in case.rule else 1e-6
                assert torch.allclose(scale, other, rtol=rtol, atol=1e-36), f"{name}: scales"


def _gradient(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, cols, generator=generator(seed)) * 0.3


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_a_rule_is_the_cpus_rule(case):
    _compare(case, 136, 264, _gradient(136, 264))


@pytest.mark.slow
@pytest.mark.parametrize("case", REST, ids=ids(REST))
def test_every_other_combination_is_the_cpus(case):
    _compare(case, 136, 264, _gradient(136, 264))


SHAPES = [(1, 1), (1, 1000), (7, 131), (8, 8), (24, 4096), (129, 255), (512, 640)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "case", [Case("adamw", "bf16", "q8"), Case("adamw", "fp32", "fp32")], ids=str
)
def test_shapes(case, shape):
    _compare(case, *shape, _gradient(*shape))


@pytest.mark.parametrize(
    "case", [Case("adamw", "bf16", "q8"), Case("adamw", "fp32", "fp32")], ids=str
)
@pytest.mark.parametrize("kind", ["zeros", "denormals", "huge", "one-huge"])
def test_adversarial_gradients(case, kind):
    """Zeros, denormals and one element that dwarfs its block leave numbers, as on the CPU."""
    rows, cols = 64, 256
    gradient = _gradient(rows, cols)
    if kind == "zeros":
        gradient.zero_()
    elif kind == "denormals":
        gradient *= 1e-39
    elif kind == "huge":
        gradient *= 1e18
    else:
        gradient[3, 7] = 1e15
    spec = case.spec(rows, cols)
    gpu, cpu = linear_on(DEVICE, spec), linear_on("cpu", spec)
    guard = Guard()
    ours = guard.storage(initial(gpu, warm=False))
    theirs = to_cpu(ours)
    for step in (1, 2, 3):
        scalars = cpu.scalars({}, step=step, seed=3)
        cpu.update((), theirs, scalars, gradient)
        assert gpu.update((), ours, scalars, gradient.to(DEVICE)).nonfinite_tiles == 0
    guard.check()
    got, want = gpu.export_weight(ours).cpu(), cpu.export_weight(theirs)
    assert got.isfinite().all()
    # A step of AdamW moves a weight by a few learning rates at most, whatever the gradient's size.
    bound = 1e-3 if case.weight == "fp32" else 2.0**-6
    assert ((got - want).abs() <= bound * (1 + want.abs())).all()
    for index in range(len(ours.states)):
        assert gpu.export_state(ours, index).isfinite().all()


def test_the_draws_are_the_cpus():
    """Zero gradient, zero decay: a weight between two bf16 numbers goes where its draw sends it."""
    rows, cols = 96, 1032
    case = Case("sgd", "bf16", "fp32")
    linears = {}
    for device in (DEVICE, "cpu"):
        linear = linear_on(device, case.spec(rows, cols))
        storage = linear.allocate(torch.ones(rows, cols, dtype=torch.bfloat16, device=device))
        # w − lr·g is 1 + 1/512 exactly: a quarter of the way to the next bf16 number.
        gradient = torch.full((rows, cols), -1 / 512, device=device)
        options = {"lr": 1.0, "weight_decay": 0.0}
        for step in (1, 2**31):
            linear.update((), storage, linear.scalars(options, step=step, seed=2**40 + 5), gradient)
        linears[device] = storage.weight.cpu()
    assert torch.equal(linears[DEVICE], linears["cpu"])
    assert len(linears["cpu"].unique()) > 1


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("state", STATES)
def test_images_round_trip_and_are_the_cpus(weight, state):
    rows, cols = 40, 200
    case = Case("adamw", weight, state)
    gpu, cpu = linear_on(DEVICE, case.spec(rows, cols)), linear_on("cpu", case.spec(rows, cols))
    guard = Guard()
    ours, theirs = guard.storage(initial(gpu)), initial(cpu)
    assert torch.equal(gpu.export_weight(ours).cpu(), cpu.export_weight(theirs))
    assert torch.equal(ours.weight.cpu(), theirs.weight)
    for index in range(2):
        got, want = gpu.export_state(ours, index), cpu.export_state(theirs, index)
        assert torch.allclose(got.cpu(), want, rtol=1e-6, atol=1e-30)
        # What a format can hold it gives back.
        gpu.import_state(ours, index, got)
        assert torch.allclose(gpu.export_state(ours, index), got, rtol=1e-6, atol=1e-30)
    guard.check()
