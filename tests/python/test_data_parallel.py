"""Data parallelism over gloo: ranks with a share of the tokens against one rank with all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import device, on_ranks
from small_models import Transformer, tokens_loss

import forge_train
import forge_train.data_parallel
from forge_train import AdamW, Lion, fuse

pytestmark = pytest.mark.distributed

STEPS, BATCH, LENGTH = 3, 4, 9


def model(dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(3)
    return Transformer().to(dtype).to(device())


def batches(seed: int = 5, micro_batches: int = 1) -> list[list[torch.Tensor]]:
    """Of each step its micro-batches ``[BATCH, LENGTH]``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randint(0, 40, (BATCH, LENGTH), generator=generator) for _ in range(micro_batches)]
        for _ in range(STEPS)
    ]


def train(fused: Any, steps: list[list[torch.Tensor]], rank: int = 0, size: int = 1) -> list[Any]:
    """Train on this rank's part of every micro-batch; what each step reports."""
    told = []
    for step in steps:
        for tokens in step:
            own = tokens.chunk(size)[rank].to(device())
            (tokens_loss(fused.model, own) / len(step)).backward()
            assert all(weight.parameter.grad is None for weight in fused.engine.fused)
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        last = fused.optimizer.last
        told.append((last.ok, last.norm))
    return told


def one_rank(arguments: dict[str, Any], dtype: torch.dtype, micro_batches: int) -> Any:
    fused = fuse(model(dtype), **arguments)
    told = train(fused, batches(micro_batches=micro_batches))
    return told, on_cpu(fused.export_weights()), on_cpu(fused.optimizer.state_dict())


def on_cpu(value: Any) -> Any:
    """The same with all tensors on the CPU, as a result of a rank has to be."""
    if isinstance(value, dict):
        return {key: on_cpu(each) for key, each in value.items()}
    if isinstance(value, list):
        return [on_cpu(each) for each in value]
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def many_ranks(
    arguments: dict[str, Any], dtype: torch.dtype, micro_batches: int, seed: int
) -> dict[str, Any]:
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    net = model(dtype)
    if rank > 0:  # weights are rank 0's
        for parameter in net.parameters():
            torch.nn.init.constant_(parameter, float(seed))
    fused = fuse(net, **arguments, data_parallel=True)
    told = train(fused, batches(micro_batches=micro_batches), rank, size)
    own = [w.storage.states[0].shape[0] / w.parameter.shape[0] for w in fused.engine.fused]
    return {
        "told": told,
        "weights": on_cpu(fused.export_weights()),
        "model": on_cpu(dict(net.named_parameters())),
        "state": on_cpu(fused.optimizer.state_dict()),
        "own": own,
        "rows": [(row.name, row.fused, row.note) for row in fused.rows],
    }


def assert_like(got: Any, want: Any, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    worst = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(1e-30)
    assert worst <= tolerance, f"{what}: {worst}"


# Of each number of ranks: schedule, micro-batches, max_norm, reduction.
CASES = {
    2: [
        ("immediate", 1, None, "exchange"),
        ("immediate", 1, None, "panels"),
        ("deferred", 2, 0.3, "panels"),
        ("deferred", 2, 0.3, "exchange"),
        ("accumulate", 3, 0.3, "exchange"),
        ("auto", 2, 0.3, "auto"),
    ],
    # By bytes: some layers exchange and some reduce panels.
    4: [
        ("deferred", 1, 0.3, "exchange"),
        ("accumulate", 3, None, "panels"),
        ("auto", 1, 0.3, "auto"),
    ],
}


def arguments_of(
    schedule: str, micro_batches: int, max_norm: float | None, reduction: str
) -> dict[str, Any]:
    return {
        "rule": AdamW(lr=0.01, eps=1e-3),
        "schedule": schedule,
        "micro_batches": micro_batches,
        "max_norm": max_norm,
        "data_parallel_reduction": reduction,
    }


def all_cases(ranks: int) -> list[dict[str, Any]]:
    return [many_ranks(arguments_of(*case), torch.float32, case[1], 7) for case in CASES[ranks]]


@pytest.mark.parametrize("ranks", list(CASES))
def test_ranks_together_are_one_rank_with_all_tokens(ranks: int) -> None:
    for case, *got in zip(CASES[ranks], *on_ranks(all_cases, ranks, ranks), strict=True):
        check_case(case, ranks, got)


def check_case(case: tuple[str, int, float | None, str], ranks: int, got: list[Any]) -> None:
    told, weights, state = one_rank(arguments_of(*case), torch.float32, case[1])
    for rank in got:
        assert rank["own"] == [1 / ranks] * len(rank["own"])
        for (ok, norm), (_, want) in zip(rank["told"], told, strict=True):
            assert ok and (norm is None) == (want is None)
            assert norm is None or norm == pytest.approx(want, rel=1e-5)
        for name, value in weights.items():
            assert_like(rank["weights"][name], value, 2e-5, name)
            # Every rank has the same bits, and what it exports is what it computes with.
            assert torch.equal(rank["model"][name], got[0]["model"][name]), name
            assert torch.equal(rank["weights"][name], rank["model"][name]), name
        for number, entry in state["state"].items():
            for name, value in entry.items():
                assert_like(rank["state"]["state"][number][name], value, 2e-4, f"{number} {name}")


LION = {
    "rule": Lion(lr=0.002),
    "state_format": "bf16",
    "weight_format": "bf16+16",
    "schedule": "deferred",
    "max_norm": 1.0,
}


def both_in_bf16(_: None) -> list[dict[str, Any]]:
    both = ({**LION, "data_parallel_reduction": how} for how in ("exchange", "panels"))
    return [many_ranks(arguments, torch.bfloat16, 1, 7) for arguments in both]


def test_formats_follow_fp32_and_all_ranks_store_the_same() -> None:
    told, weights, _ = one_rank(LION, torch.bfloat16, 1)
    for got in zip(*on_ranks(both_in_bf16, 2, None), strict=True):
        check_formats(list(got), told, weights)


def check_formats(got: list[Any], told: list[Any], weights: dict[str, torch.Tensor]) -> None:
    for rank in got:
        for (ok, norm), (_, want) in zip(rank["told"], told, strict=True):
            assert ok and norm == pytest.approx(want, rel=0.02)
        for name, value in weights.items():
            assert torch.equal(rank["model"][name], got[0]["model"][name]), name
            assert torch.equal(rank["weights"][name].bfloat16(), rank["model"][name]), name
            # Lion moves by its sign, which rounding turns where a gradient is near zero.
            turned = ((rank["weights"][name] - value).abs() > 0.001).float().mean()
            assert turned < 0.1, (name, turned)


def with_a_damaged_file(state: Any) -> str:
    import torch.distributed as dist

    fused = fuse(model(), AdamW(lr=0.01), data_parallel=True)
    if dist.get_rank() == 1:
        state["state"][1]["exp_avg"] = "damaged"
    try:
        fused.optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_a_file_that_is_damaged_on_one_rank_is_told_of_on_all() -> None:
    fused = fuse(model(), AdamW(lr=0.01))
    train(fused, batches()[:1])
    first, second = on_ranks(with_a_damaged_file, 2, fused.optimizer.state_dict())
    assert first == second
    assert "load_state_dict: rank 1 has a problem: " in first and "no tensor" in first


def with_another_gradient(_: None) -> str:
    import torch.distributed as dist

    net = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    fused = fuse(net, AdamW(lr=0.01), exclude=("0", "1"), data_parallel=True)
    net[dist.get_rank()](torch.ones(2, 4)).sum().backward()
    try:
        fused.optimizer.step()
    except ValueError as error:
        return str(error)
    return "stepped"


def test_gradients_of_different_parameters_are_not_added() -> None:
    first, second = on_ranks(with_another_gradient, 2, None)
    assert first == second and "rank 1 has what waits for the step" in first


def with_other_tokens(reduction: str) -> tuple[str, bool]:
    import torch.distributed as dist

    fused = fuse(model(), AdamW(lr=0.01), data_parallel=True, data_parallel_reduction=reduction)
    before = on_cpu(fused.export_weights())
    tokens = batches()[0][0][: 2 + dist.get_rank()].to(device())
    try:
        tokens_loss(fused.model, tokens).backward()
    except ValueError as error:
        same = all(
            torch.equal(w, before[name]) for name, w in on_cpu(fused.export_weights()).items()
        )
        return str(error), same
    return "went through", False


@pytest.mark.parametrize("reduction", ["auto", "exchange", "panels"])
def test_ranks_with_other_tokens_are_told_so_before_anything_changes(reduction: str) -> None:
    (first, same), second = on_ranks(with_other_tokens, 2, reduction)
    assert same and second == (first, True)
    assert "backward: rank 1 has tokens of" in first and "but rank 0 has" in first
    assert "pad the batch" in first


def of_two_steps(states: list[Any]) -> str:
    import torch.distributed as dist

    fused = fuse(model(), AdamW(lr=0.01), data_parallel=True)
    try:
        fused.optimizer.load_state_dict(states[dist.get_rank()])
    except ValueError as error:
        assert fused.engine.weights[0].step == 0
        return str(error)
    return "loaded"


def test_checkpoints_of_different_steps_are_told_apart() -> None:
    fused = fuse(model(), AdamW(lr=0.01))
    states = []
    for step in batches()[:2]:
        train(fused, [step])
        states.append(copy.deepcopy(fused.optimizer.state_dict()))
    said = on_ranks(of_two_steps, 2, states)
    assert said[0] == said[1]
    assert "load_state_dict: rank 1 has step of 0: 2.0, but rank 0 has 1.0" in said[0]


def resumed(state: Any, weights: dict[str, torch.Tensor], arguments: dict[str, Any]) -> Any:
    import torch.distributed as dist

    net = model()
    net.load_state_dict(weights)
    fused = fuse(net, **arguments, data_parallel=True)
    fused.optimizer.load_state_dict(state)
    train(fused, batches(6), dist.get_rank(), dist.get_world_size())
    return fused.export_weights(), fused.optimizer.state_dict()


@pytest.mark.parametrize("state_format", ["fp32", "q8"])
def test_a_checkpoint_is_of_no_number_of_ranks(state_format: str) -> None:
    """Saved by two ranks, it goes on with one, two and four, with the same bits of states."""
    arguments = {"rule": AdamW(lr=0.01), "schedule": "deferred", "state_format": state_format}
    first = on_ranks(many_ranks, 2, arguments, torch.float32, 1, 7)[0]
    state, weights = first["state"], first["model"]
    alone = model()
    alone.load_state_dict(weights)
    fused = fuse(alone, **arguments)
    fused.optimizer.load_state_dict(copy.deepcopy(state))
    again = fused.optimizer.state_dict()["state"]
    for number, entry in state["state"].items():
        for name, value in entry.items():
            assert torch.equal(again[number][name], value), (number, name)
    train(fused, batches(6))
    want = fused.export_weights()
    for ranks in (2, 4):
        for got, _ in on_ranks(resumed, ranks, state, weights, arguments):
            for name, value in want.items():
                assert_like(got[name], value, 2e-5 if state_format == "fp32" else 2e-2, name)


def odd(_: None) -> list[tuple[str, bool, str]]:
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 8))
    import torch.distributed as dist

    fused = fuse(net, AdamW(lr=0.1), data_parallel=dist.group.WORLD)
    own = torch.full((2, 6), 1.0 + dist.get_rank())
    net(own).sum().backward()
    fused.optimizer.step()
    return [(row.name, row.fused, row.note) for row in fused.rows], list(net.parameters())


def test_rows_that_do_not_divide_keep_their_gradient() -> None:
    (rows, mine), (_, other) = on_ranks(odd, 2, None)
    notes = {name: (fused, note) for name, fused, note in rows}
    assert notes["0.weight"] == (False, "rest: 9 rows do not divide by 2 data-parallel ranks")
    assert notes["1.weight"][0]
    assert all(map(torch.equal, mine, other))


def infinite(_: None) -> Any:
    import torch.distributed as dist

    net = model()
    fused = fuse(net, AdamW(lr=0.1), schedule="deferred", max_norm=1.0, data_parallel=True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    loss = tokens_loss(net, batches()[0][0])
    # One token of one rank: the exchange takes it to the owners of all rows that it reaches.
    (loss * (float("inf") if dist.get_rank() == 1 else 1.0)).backward()
    fused.optimizer.step()
    last = fused.optimizer.last
    same = all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    return last.ok, last.nonfinite_layers, same, fused.optimizer.skipped_steps


def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank() -> None:
    first, second = on_ranks(infinite, 2, None)
    assert first == second
    ok, layers, same, skipped = first
    assert (ok, same, skipped) == (False, True, 1)
    assert "head.weight" in layers


DISAGREEMENTS = {
    "lr": "rank 1 has lr of param group 0: 0.2, but rank 0 has 0.1",
    "rule": "rank 1 has rule: lion, but rank 0 has adamw",
    "shape": "rank 1 has embedding.weight: (42, 24)",
    "seed": "rank 1 has seed: 9, but rank 0 has 0",
    "library": "rank 1 has FORGE: 0.0.9, but rank 0 has ",
}


def all_disagreements(_: None) -> list[str]:
    return [disagreeing(what) for what in DISAGREEMENTS]


def disagreeing(what: str) -> str:
    import torch.distributed as dist

    rank = dist.get_rank()
    net: torch.nn.Module = model()
    arguments: dict[str, Any] = {"rule": AdamW(lr=0.1)}
    if rank == 1:
        if what == "lr":
            arguments["rule"] = AdamW(lr=0.2)
        elif what == "rule":
            arguments["rule"] = Lion(lr=0.1)
        elif what == "shape":
            net = Transformer(vocabulary=42)
        elif what == "seed":
            arguments["seed"] = 9
        elif what == "library":
            forge_train.data_parallel.version = lambda: "0.0.9"  # type: ignore[assignment]
    before = [type(module) for module in net.modules()]
    try:
        fuse(net, **arguments, data_parallel=True)
    except ValueError as error:
        assert before == [type(module) for module in net.modules()]
        return str(error)
    return "fused"


def test_ranks_that_differ_are_told_so_on_every_rank() -> None:
    first, second = on_ranks(all_disagreements, 2, None)
    assert first == second
    for text, words in zip(first, DISAGREEMENTS.values(), strict=True):
        assert words in text, text


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        fuse(model(), AdamW(), data_parallel=True)
    with pytest.raises(ValueError, match="data_parallel_reduction='ring' is not known"):
        fuse(model(), AdamW(), data_parallel_reduction="ring")
    assert forge_train.NcclComm.__doc__
