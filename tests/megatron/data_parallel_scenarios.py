"""Data parallelism: FORGE's own reduction beside Megatron's, against stock Megatron."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpt import Case, Run
from megatron.core import parallel_state
from registry import equal, load, save, scenario, states
from training_scenarios import follow, poisoned


@contextlib.contextmanager
def _replicas(tensor: int = 1, pipeline: int = 1) -> Iterator[None]:
    """Ranks that do not share out weights have copies of them, and other data."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    try:
        yield
    finally:
        world = torch.distributed.get_world_size()
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)


def _same_on_all_ranks(run: Run) -> None:
    for name, weight in run.weights().items():
        group = parallel_state.get_data_parallel_group()
        other = weight.clone()
        torch.distributed.broadcast(other, torch.distributed.get_global_rank(group, 0), group)
        assert torch.equal(weight, other), name


@scenario(2)
def replicas_follow_stock(_: Path) -> None:
    sharded = {"use_distributed_optimizer": True}
    overlapped = {"overlap_grad_reduce": True}
    with _replicas():
        for reduction in ("exchange", "panels"):
            for case in (
                Case(reduction=reduction),
                Case(reduction=reduction, clip_grad=1.0, micro_batches=4),
                Case(reduction=reduction, schedule="deferred", clip_grad=1.0, ddp=overlapped),
            ):
                _same_on_all_ranks(follow(case))
        case = Case(clip_grad=1.0, ddp=sharded, optimizer=sharded)
        run = follow(replace(case, bf16=True, weight_format="bf16+16"), loss=2e-3, norm=2e-3)
        _same_on_all_ranks(run)
        assert ", DP 2" in run.fused.summary()
        layer = run.fused.layers[0]
        assert 2 * layer.raw()["exp_avg"].shape[0] == layer.weight.shape[0]


@scenario(4)
def replicas_of_shards_follow_stock(_: Path) -> None:
    for tensor, pipeline in ((2, 1), (1, 2)):
        with _replicas(tensor, pipeline):
            for reduction in ("exchange", "panels"):
                case = Case(reduction=reduction, sequence_parallel=tensor > 1)
                _same_on_all_ranks(follow(replace(case, clip_grad=1.0, micro_batches=4)))


@scenario(2)
def replicas_with_a_loss_per_token_follow_stock(_: Path) -> None:
    with _replicas():
        for reduction in ("exchange", "panels"):
            _same_on_all_ranks(follow(Case(per_token=True, reduction=reduction, micro_batches=2)))


@scenario(2)
def one_replica_with_inf_skips_the_step_everywhere(_: Path) -> None:
    with _replicas():
        run = Run(Case(clip_grad=1.0))
        run.train(1)
        weights, before = run.weights(), states(run)
        with poisoned(run, rank=1):
            assert not run.attempt()
        equal(run.weights(), weights)
        equal(states(run), before)
        run.train(1)
        _same_on_all_ranks(run)


_FORMATS = {
    "fp32": Case(clip_grad=1.0, micro_batches=2),
    "bf16+16-q8": Case(bf16=True, weight_format="bf16+16", state_format="q8", clip_grad=1.0),
}


@scenario(2)
def replicas_resume_bit_for_bit(tmp: Path) -> None:
    with _replicas():
        for name, case in _FORMATS.items():
            whole = Run(case)
            whole.train(2)
            folder = tmp / f"replicas-{name}"
            save(whole, folder)
            expected = whole.train(3)
            resumed = Run(case, seed=99)
            load(resumed, folder)
            assert resumed.train(3) == expected, name
            equal(resumed.weights(), whole.weights())
            equal(states(resumed), states(whole))
            with pytest.raises(NotImplementedError, match="torch_dist"):
                whole.optimizer.state_dict()


@scenario(2)
def write_checkpoints_for_one_replica(tmp: Path) -> None:
    with _replicas():
        for name, case in _FORMATS.items():
            run = Run(case)
            run.train(2)
            save(run, tmp / f"of-replicas-{name}")
            layers = {x.name: [x.export_weight(), *_states(x)] for x in run.fused.layers}
            if torch.distributed.get_rank() == 0:
                torch.save(layers, tmp / f"of-replicas-{name}.pt")


def _states(layer: object) -> list[torch.Tensor]:
    return [layer.export_state(index) for index in range(len(layer.state_names))]


@scenario(2)
def checkpoints_of_shards_continue_with_replicas(tmp: Path) -> None:
    with _replicas():
        for name, case in _FORMATS.items():
            run = Run(case, seed=99)
            load(run, tmp / f"reshard-{name}")
            save(run, tmp / f"shards-of-replicas-{name}")
            run.train(1)
            _same_on_all_ranks(run)


@scenario(1)
def checkpoints_of_two_replicas_continue_with_one(tmp: Path) -> None:
    for name, case in _FORMATS.items():
        # Written by shards, by replicas that had loaded that, and read by one rank.
        first, second = Run(case, seed=98), Run(case, seed=99)
        load(first, tmp / f"reshard-{name}")
        load(second, tmp / f"shards-of-replicas-{name}")
        equal(first.weights(), second.weights())
        equal(states(first), states(second))
        run = Run(case, seed=99)
        load(run, tmp / f"of-replicas-{name}")
        written = torch.load(tmp / f"of-replicas-{name}.pt")
        for layer in run.fused.layers:
            ours = [layer.export_weight(), *_states(layer)]
            assert all(map(torch.equal, ours, written[layer.name])), layer.name
        save(run, tmp / f"of-one-{name}")
        run.train(1)


@scenario(2)
def ranks_that_differ_are_told_so(_: Path) -> None:
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError, match=r"fuse: rank 1 has clip_grad: 2\.0, but rank 0 has 1\.0"):
        Run(Case(clip_grad=1.0 + rank))
    wider = {"ffn_hidden_size": 96 + 32 * rank}
    with pytest.raises(ValueError, match=r"tensor_parallel: rank 1 has decoder\.layers\.0\.mlp"):
        Run(Case(model=wider))
    with _replicas(), pytest.raises(ValueError, match=r"data_parallel: rank 1 has decoder\.layers"):
        Run(Case(model=wider))
