"""Several ranks over NCCL: what the tests of gloo do on CPUs, with a GPU for each rank."""

from __future__ import annotations

import pytest
import test_data_parallel as data_parallel
import test_host_comm as tensor_parallel
import torch
from ranks import on_ranks

from forge_train import AdamW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_shards_equal_the_whole_bit_for_bit() -> None:
    assert on_ranks(tensor_parallel.shards, 2, None, backend="nccl") == [32, 32]


@two_gpus
def test_ranks_together_are_one_rank_with_all_tokens() -> None:
    cases = data_parallel.CASES[2]
    for case, *got in zip(
        cases, *on_ranks(data_parallel.all_cases, 2, 2, backend="nccl"), strict=True
    ):
        data_parallel.check_case(case, 2, got)


@two_gpus
def test_ranks_that_differ_are_told_so_on_every_rank() -> None:
    first, second = on_ranks(data_parallel.all_disagreements, 2, None, backend="nccl")
    assert first == second
    for text, words in zip(first, data_parallel.DISAGREEMENTS.values(), strict=True):
        assert words in text, text


@two_gpus
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank() -> None:
    first, second = on_ranks(data_parallel.infinite, 2, None, backend="nccl")
    assert first == second and first[0] is False


@pytest.mark.parametrize("reduction", ["exchange", "panels"])
@pytest.mark.parametrize("schedule", ["immediate", "deferred", "accumulate"])
def test_an_only_replica_is_as_none(reduction: str, schedule: str) -> None:
    """NCCL between one rank and itself: copies, workspaces and streams."""
    arguments = {"rule": AdamW(lr=0.01), "schedule": schedule}
    [(told, weights, _)] = on_ranks(
        data_parallel.one_rank, 1, arguments, torch.float32, 1, backend="nccl"
    )
    with_replicas = {**arguments, "data_parallel_reduction": reduction}
    [got] = on_ranks(
        data_parallel.many_ranks, 1, with_replicas, torch.float32, 1, 7, backend="nccl"
    )
    assert got["told"] == told
    for name, value in weights.items():
        assert torch.equal(got["weights"][name], value), name
