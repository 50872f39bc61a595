"""Experts of a mixture, all on a rank or shared out over ranks, against stock Megatron."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpt import Case, Run
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from registry import equal, load, save, scenario, states
from training_scenarios import follow

MIXTURE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 64,
    "moe_token_dispatcher_type": "allgather",  # gloo's all-to-all takes no tensor of sizes
    "moe_aux_loss_coeff": 0.01,
    "moe_router_pre_softmax": True,
}
# With 32 tokens of a micro-batch some of these get none, in other steps and on other ranks others.
MANY = {**MIXTURE, "num_moe_experts": 16, "moe_router_topk": 1}


def _need_experts() -> None:
    if not hasattr(moe_utils, "te_general_gemm"):
        raise unittest.SkipTest("this megatron-core's router needs Transformer Engine")


@contextlib.contextmanager
def _experts(expert: int, tensor: int = 1, expert_tensor: int = 1) -> Iterator[None]:
    """Ranks that share out experts; ranks that are left over have copies of them."""
    _need_experts()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    try:
        yield
    finally:
        world = torch.distributed.get_world_size()
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)


def _follow(case: Case, **bounds: float) -> Run:
    run = follow(case, **bounds)
    fused = {layer.name for layer in run.fused.layers}
    experts = [name for name in fused if ".local_experts." in name]
    here = case.model["num_moe_experts"] // parallel_state.get_expert_model_parallel_world_size()
    assert len(experts) == 2 * here * case.layers, sorted(fused)
    assert not any("expert" in item.name for item in run.fused.left), run.fused.summary()
    return run


def _idle(run: Run) -> list[int]:
    """Tokens of each expert's backwards from now on, in the order in which they happen."""
    seen: list[int] = []
    for layer in run.fused.layers:
        if layer.expert:
            layer.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@scenario(1)
def experts_follow_stock(_: Path) -> None:
    _need_experts()
    for schedule in ("auto", "immediate", "deferred", "accumulate"):
        _follow(Case(model=MANY, schedule=schedule, steps=3))
    _follow(Case(model=MIXTURE, clip_grad=1.0, micro_batches=4))
    _follow(Case(model={**MIXTURE, "moe_token_dispatcher_type": "alltoall"}))
    shared = {"moe_shared_expert_intermediate_size": 32}
    _follow(Case(model={**MIXTURE, **shared}, clip_grad=1.0))
    case = Case(model=MIXTURE, bf16=True, weight_format="bf16+16", clip_grad=1.0)
    _follow(case, loss=3e-3, norm=5e-3)


@scenario(1)
def an_expert_without_tokens_decays_as_stock_does(_: Path) -> None:
    """Its gradient is zero: moments decay, and the weight by them and by weight decay."""
    _need_experts()
    case = Case(model=MANY, steps=3)
    stock, run = Run(case.stock()), Run(case)
    seen = _idle(run)
    stock.train()
    run.train()
    assert 0 in seen and max(seen) > 0, seen
    theirs = stock.weights()
    for name, weight in run.weights().items():
        assert torch.allclose(weight, theirs[name], atol=2e-6), name


@scenario(2)
def shared_out_experts_follow_stock(_: Path) -> None:
    # One half on each rank; copies on both; halves of every expert; tensor-parallel ranks that have
    # one half each, or copies.
    for expert, tensor, expert_tensor in ((2, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (1, 2, 1)):
        with _experts(expert, tensor, expert_tensor):
            model = {**MANY, "num_moe_experts": 8}
            case = Case(model=model, sequence_parallel=tensor > 1, steps=3)
            _follow(replace(case, clip_grad=1.0, micro_batches=4))
            if tensor == 1:
                _follow(case)
                _follow(replace(case, model=MIXTURE, schedule="deferred", clip_grad=1.0))


@scenario(4)
def copies_of_shared_out_experts_follow_stock(_: Path) -> None:
    for tensor in (1, 2):
        with _experts(2, tensor):
            model = {**MANY, "num_moe_experts": 8}
            case = Case(model=model, sequence_parallel=tensor > 1, steps=2)
            _follow(replace(case, clip_grad=1.0, micro_batches=2))


@scenario(2)
def experts_move_between_ranks_by_a_checkpoint(folder: Path) -> None:
    case = Case(model=MIXTURE, clip_grad=1.0)
    with _experts(2):
        run = Run(case)
        run.train(2)
        save(run, folder / "experts")
        again = Run(case, seed=8)
        load(again, folder / "experts")
        equal(again.weights(), run.weights())
        equal(states(again), states(run))
        ahead = run.train(2)
        assert again.train(2) == ahead
    with _experts(1):
        moved = Run(case, seed=9)
        load(moved, folder / "experts")
        losses, norms = moved.train(2)
        for ours, theirs in zip((*losses, *norms), (*ahead[0], *ahead[1]), strict=True):
            assert abs(ours - theirs) <= 1e-4 * abs(theirs), (losses, norms, ahead)


@scenario(2)
def a_stock_checkpoint_of_shared_out_experts_is_refused(folder: Path) -> None:
    case = Case(model=MIXTURE)
    with _experts(2):
        stock = Run(case.stock())
        stock.train(1)
        save(stock, folder / "stock-experts")
        run = Run(case)
        before = states(run)
        with pytest.raises(ValueError, match="keeps experts apart"):
            load(run, folder / "stock-experts")
        equal(states(run), before)
