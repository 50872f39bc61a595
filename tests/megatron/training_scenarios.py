"""The patch, following stock step by step, and what must not happen.

Worker processes run these; ``test_megatron.py`` turns each into a pytest case. A scenario raises
(``assert``) when it fails. One process group serves all scenarios of a world size, because starting
Megatron costs more than running it at this size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gpt
import pytest
import torch
from gpt import Case, Run
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers as megatron_layers
from registry import METADATA, close, equal, save, scenario, states, tp

import forge_train.megatron as forge_megatron
from forge_train.megatron import patch

# -- the patch ------------------------------------------------------------------------------------


@scenario(1)
def patch_is_idempotent_and_reversible(_: Path) -> None:
    forge_megatron.uninstall()
    column, row = patch.linear_classes()
    before = column._forward_impl, row._forward_impl
    forge_megatron.install()
    once = column._forward_impl, row._forward_impl
    forge_megatron.install()
    assert (column._forward_impl, row._forward_impl) == once
    assert forge_megatron.installed()
    assert once[0].__wrapped__ is before[0]
    forge_megatron.uninstall()
    forge_megatron.uninstall()
    assert (column._forward_impl, row._forward_impl) == before
    assert not forge_megatron.installed()


@scenario(1)
def patch_names_what_has_moved(_: Path) -> None:
    forge_megatron.uninstall()
    method = megatron_layers.RowParallelLinear._forward_impl
    del megatron_layers.RowParallelLinear._forward_impl
    try:
        with pytest.raises(ImportError) as caught:
            forge_megatron.install()
    finally:
        megatron_layers.RowParallelLinear._forward_impl = method
    assert "RowParallelLinear._forward_impl" in str(caught.value)
    import megatron.core

    assert megatron.core.__version__ in str(caught.value)
    assert not forge_megatron.installed()


@scenario(1)
def a_removed_fusion_trains_as_stock_again(_: Path) -> None:
    case = Case(steps=2)
    run = Run(case)
    run.train()
    assert run.fused is not None
    run.fused.remove()
    layer = run.model.output_layer
    y, _bias = layer(torch.randn(3, 2, gpt.HIDDEN))
    y.sum().backward()
    assert layer.weight.grad is not None


# -- following stock ------------------------------------------------------------------------------


def follow(case: Case, loss: float = 1e-5, norm: float = 1e-4) -> Run:
    stock, run = Run(case.stock()), Run(case)
    stock_losses, stock_norms = stock.train()
    losses, norms = run.train()
    close(losses, stock_losses, loss)
    close([n / s for n, s in zip(norms, stock_norms, strict=True)], [1.0] * case.steps, norm)
    assert run.fused is not None
    fused = sum(layer.weight.numel() for layer in run.fused.layers)
    assert stock.gradient_buffer_elements() - run.gradient_buffer_elements() == fused
    for layer in run.fused.layers:
        assert layer.weight.grad is None and not hasattr(layer.weight, "main_grad")
        assert layer.weight.requires_grad
    return run


def _follows(sequence_parallel: bool) -> None:
    for clip_grad in (0.0, 1.0):
        for micro_batches in (1, 4):
            follow(
                Case(
                    sequence_parallel=sequence_parallel,
                    clip_grad=clip_grad,
                    micro_batches=micro_batches,
                )
            )


@scenario(1, 2)
def fp32_follows_stock(_: Path) -> None:
    _follows(sequence_parallel=False)


@scenario(2)
def fp32_follows_stock_with_sequence_parallelism(_: Path) -> None:
    _follows(sequence_parallel=True)


@scenario(1, 2)
def recomputed_activations_follow_stock(_: Path) -> None:
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    follow(Case(model=recompute, clip_grad=1.0, sequence_parallel=tp() > 1))


@scenario(1)
def overlapped_gradient_reduction_follows_stock(_: Path) -> None:
    follow(Case(ddp={"overlap_grad_reduce": True}, clip_grad=1.0, micro_batches=4))


@scenario(1)
def linear_biases_follow_stock(_: Path) -> None:
    follow(Case(model={"add_qkv_bias": True}, clip_grad=1.0))


@scenario(1)
def other_rules_follow_stock(_: Path) -> None:
    for rule, settings in {
        "sgd": {"optimizer": "sgd", "sgd_momentum": 0.8},
        "adam": {"decoupled_weight_decay": False},
    }.items():
        follow(Case(rule=rule, optimizer=settings, clip_grad=1.0, micro_batches=2))


@scenario(1, 2)
def bf16_with_master_follows_stock(_: Path) -> None:
    # Stock rounds every weight gradient to bf16 before it accumulates in fp32; FORGE does not.
    case = Case(bf16=True, weight_format="bf16+16", clip_grad=1.0, sequence_parallel=tp() > 1)
    for micro_batches in (1, 4):
        follow(replace(case, micro_batches=micro_batches), loss=2e-3, norm=2e-3)
    scaled = replace(case, loss_scale=8.0)
    follow(scaled, loss=2e-3, norm=2e-3)
    # A power of two of loss scale changes no bit of the update.
    plain, scaled_run = Run(case), Run(scaled)
    assert plain.train()[0] == scaled_run.train()[0]
    equal(plain.weights(), scaled_run.weights())


@scenario(1)
def both_kinds_of_master_agree(_: Path) -> None:
    low_half, full = (
        Run(Case(bf16=True, weight_format=name, clip_grad=1.0)) for name in ("bf16+16", "bf16+fp32")
    )
    # The masters follow one rule; the bf16 weights differ where a master is exactly between two
    # bf16 numbers: 16 low bits can only tell "ties away from zero".
    close(low_half.train()[0], full.train()[0], 1e-3)


@scenario(1, 2)
def schedules_are_the_same_run(_: Path) -> None:
    for micro_batches, schedules in (
        (1, ("deferred", "immediate")),
        (4, ("deferred", "accumulate")),
    ):
        runs = [
            Run(Case(schedule=s, micro_batches=micro_batches, sequence_parallel=tp() > 1))
            for s in schedules
        ]
        losses = [run.train()[0] for run in runs]
        close(losses[0], losses[1], 0.0 if micro_batches == 1 else 1e-6)
        if micro_batches == 1:
            equal(runs[0].weights(), runs[1].weights())


@scenario(1)
def a_distributed_optimizer_of_one_rank_follows_stock(tmp: Path) -> None:
    sharded = {"use_distributed_optimizer": True}
    case = Case(ddp=sharded, optimizer=sharded, bf16=True, weight_format="bf16+16", clip_grad=1.0)
    run = follow(case, loss=2e-3, norm=2e-3)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", **METADATA}
    save(run, tmp / "distributed", metadata)
    # With torch's Adam, Megatron's own distributed optimizer cannot load (it needs Apex or TE), so
    # only FORGE's part is read back.
    model = run.model.sharded_state_dict()
    template = run.optimizer.sharded_state_dict(model, metadata=metadata)["forge"]
    loaded = dist_checkpointing.load({"optimizer": {"forge": template}}, str(tmp / "distributed"))
    saved = loaded["optimizer"]["forge"]
    assert saved["step"] == case.steps
    for layer, entry in zip(run.fused.layers, saved["parameters"], strict=True):
        assert torch.equal(entry["exp_avg"], layer.export_state(0)), layer.name
        assert torch.equal(entry["fp32_param"], layer.export_weight()), layer.name


@scenario(1)
def the_scheduler_reaches_the_groups(_: Path) -> None:
    run = Run(Case(optimizer={"decoupled_lr": 1e-3, "decoupled_min_lr": 1e-4}))
    run.train(3)
    groups = run.optimizer.forge.param_groups
    assert sorted(len(group["params"]) for group in groups) == [1, 8]
    stock = {group["max_lr"]: group for group in run.optimizer.stock.param_groups}
    for group in groups:
        assert group["lr"] == stock[group["max_lr"]]["lr"]
        assert group["weight_decay"] == pytest.approx(0.1)
    assert run.optimizer.param_groups[-len(groups) :] == groups


# -- what must not happen -------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned(run: Run, rank: int) -> Iterator[None]:
    """Make one weight's gradient infinite on one rank."""

    def hook(_module: object, _inputs: object, output: tuple[torch.Tensor, object]) -> None:
        if output[0].requires_grad and torch.distributed.get_rank() == rank:
            output[0].register_hook(lambda grad: grad * math.inf)

    handle = run.model.decoder.layers[0].mlp.linear_fc1.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@scenario(1, 2)
def one_rank_with_inf_skips_the_step_everywhere(_: Path) -> None:
    run = Run(Case(clip_grad=1.0, sequence_parallel=tp() > 1))
    run.train(1)
    weights, before = run.weights(), states(run)
    with poisoned(run, rank=tp() - 1):
        success = run.attempt()
    assert not success
    equal(run.weights(), weights)
    equal(states(run), before)
    assert run.optimizer.forge.step_count == 1
    assert not run.fused.engine.pending()
    run.train(1)
    assert run.optimizer.forge.step_count == 2


@scenario(1)
def a_norm_above_the_skip_threshold_skips_both_kinds(_: Path) -> None:
    if not hasattr(OptimizerConfig, "grad_norm_skip_threshold"):
        return  # megatron-core before 0.19
    run = Run(Case(optimizer={"grad_norm_skip_threshold": 1e-3}, schedule="deferred"))
    weights = run.weights()
    assert not run.attempt()
    equal(run.weights(), weights)
    assert not run.fused.engine.pending()


@scenario(1)
def a_weight_used_twice_is_refused_or_summed(_: Path) -> None:
    x = torch.randn(5, 1, gpt.HIDDEN, requires_grad=True)
    run = Run(Case(schedule="immediate"))
    weights = run.weights()
    first, _bias = run.model.output_layer(x)
    with pytest.raises(RuntimeError, match=r"output_layer\.weight is used a second time"):
        run.model.output_layer(x)
    del first
    equal(run.weights(), weights)

    run = Run(Case(schedule="deferred"))
    layer = run.model.output_layer
    (layer(x)[0].sum() + layer(2 * x)[0].sum()).backward()
    assert not run.optimizer.forge.prepare_grads()
    gradient = (3 * x).sum(dim=(0, 1)).expand(layer.weight.shape)
    norm = float(gradient.detach().double().norm())
    assert run.optimizer.forge.get_grad_norm() == pytest.approx(norm, rel=1e-5)


@scenario(1)
def tied_frozen_and_shared_weights_are_left(_: Path) -> None:
    run = follow(Case(tied=True))
    assert run.fused is not None
    assert "tied to the embedding" in run.fused.summary()
    assert all("output_layer" not in layer.name for layer in run.fused.layers)

    model = Run(Case(forge=False)).model
    first, second = (layer.mlp for layer in model.decoder.layers)
    first.linear_fc1.weight.requires_grad_(False)
    second.linear_fc2.weight = first.linear_fc2.weight
    fused = forge_megatron.fuse([model])
    reasons = {item.name: item.reason for item in fused.left}
    assert reasons["decoder.layers.0.mlp.linear_fc1.weight"].startswith("frozen")
    assert reasons["decoder.layers.0.mlp.linear_fc2.weight"].startswith("shared by 2 modules")
    assert len(fused.layers) == 6
    fused.remove()


@scenario(1, 2)
def a_loss_per_token_follows_stock(_: Path) -> None:
    for schedule in ("auto", "deferred", "accumulate"):
        follow(Case(per_token=True, schedule=schedule, micro_batches=3))
    run = follow(Case(per_token=True, clip_grad=0.5, micro_batches=2, loss_scale=8.0))
    assert run.fused.engine.factor == 1.0, "it is the next step's as well"


@scenario(1)
def unsupported_settings_are_refused_by_name(_: Path) -> None:
    for name, case in {
        "calculate_per_token_loss": Case(per_token=True, schedule="immediate"),
        "cannot clip": Case(schedule="immediate", clip_grad=1.0),
        "micro_batches=4": Case(schedule="immediate", micro_batches=4),
        "weight_format": Case(weight_format="bf16+16"),
        "rule='shampoo'": Case(rule="shampoo"),
    }.items():
        with pytest.raises(ValueError, match=name):
            Run(case)
    run = Run(Case())
    with pytest.raises(ValueError, match="called before"):
        run.fused.chain(run.optimizer.stock)
    with pytest.raises(ValueError, match="fused already"):
        forge_megatron.fuse([run.model])
    stock = Run(Case(forge=False))
    late = forge_megatron.fuse([stock.model])
    with pytest.raises(ValueError, match="before the model is wrapped"):
        late.chain(stock.optimizer)
    late.remove()


@scenario(2)
def interleaved_pipeline_stages_follow_stock(_: Path) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    try:
        for schedule in ("deferred", "accumulate"):
            case = Case(schedule=schedule, clip_grad=1.0, micro_batches=4, chunks=2, layers=4)
            virtual = {"virtual_pipeline_model_parallel_size": 2}
            run = follow(replace(case, model=virtual))
            stage = parallel_state.get_pipeline_model_parallel_rank()
            names = [layer.name for layer in run.fused.layers if "linear_fc1" in layer.name]
            places = [f"decoder.layers.{layer}" for layer in (stage, 2 + stage)]
            assert names == [f"{place}.mlp.linear_fc1.weight" for place in places]
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)


@scenario(2)
def pipeline_stages_follow_stock(_: Path) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    try:
        run = follow(Case(clip_grad=1.0, micro_batches=4))
        stage = parallel_state.get_pipeline_model_parallel_rank()
        name = f"decoder.layers.{stage}.mlp.linear_fc1.weight"
        assert name in [layer.name for layer in run.fused.layers]
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
