"""The training loop's pieces, as Megatron's own ``pretrain`` puts them together.

Model, DDP, optimizer chain, learning-rate scheduler, schedule of passes: all megatron-core's.
FORGE appears in two lines (:mod:`forge_train.demo.forge_hook`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from forge_train.demo import forge_hook
from forge_train.demo.config import RunConfig
from forge_train.demo.data import Batch
from forge_train.demo.model import build_model

#: The learning rate falls along a cosine to this fraction of its peak.
FINAL_LR_FRACTION = 0.1


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reported."""

    loss: float  # nats per byte, mean over the step's tokens, before the update
    grad_norm: float | None  # global L2 norm before clipping; None where nothing computed it
    skipped: bool  # a non-finite gradient: nothing was updated


def seed_everything(seed: int) -> None:
    """The same start on every rank; Megatron's tracker gives each TP rank its own stream."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """Megatron's optimizer for what FORGE does not fuse, and for everything in a stock run.

    It has no Lion: beside FORGE's Lion, embeddings and norms train with AdamW at the same rate.
    """
    return OptimizerConfig(
        optimizer="sgd" if run.rule == "sgd" else "adam",
        decoupled_weight_decay=run.rule != "adam",
        lr=run.lr,
        min_lr=run.lr * FINAL_LR_FRACTION,
        weight_decay=run.weight_decay,
        adam_eps=run.adam_eps,
        clip_grad=run.clip_grad,
        bf16=run.bf16,
        params_dtype=torch.bfloat16 if run.bf16 else torch.float32,
    )


class Trainer:
    """One rank's model, optimizer and scheduler; :meth:`step` advances all three by one step."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        seed_everything(run.seed)
        self.module = build_model(run)
        self.fused = forge_hook.fuse(run, [self.module])
        self.model = DistributedDataParallel(
            config=self.module.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=False
            ),
            module=self.module,
        )
        self.optimizer: MegatronOptimizer = forge_hook.chain(
            self.fused, get_megatron_optimizer(optimizer_config(run), [self.model])
        )
        self.scheduler = self._scheduler()
        config = self.module.config
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.model.no_sync
        config.grad_scale_func = self.optimizer.scale_loss
        self._forward_backward = get_forward_backward_func()
        self._positions = torch.arange(run.sequence).unsqueeze(0).to(self.device)
        self.steps_done = 0

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        return next(self.module.parameters()).device

    @property
    def lr(self) -> float:
        """The learning rate that the next step uses."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _scheduler(self) -> OptimizerParamScheduler:
        run = self.run
        return OptimizerParamScheduler(
            self.optimizer,
            # Not 0, which would make the first step do nothing.
            init_lr=run.lr / (run.warmup_steps + 1),
            max_lr=run.lr,
            min_lr=run.lr * FINAL_LR_FRACTION,
            lr_warmup_steps=run.warmup_steps,
            lr_decay_steps=run.steps,
            lr_decay_style="cosine",
            start_wd=run.weight_decay,
            end_wd=run.weight_decay,
            wd_incr_steps=run.steps,
            wd_incr_style="constant",
            # The schedule follows this run's flags, only the position comes from a checkpoint:
            # a resumed run may be given more steps.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    def _forward_step(
        self, batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Any]:
        batch = {key: value.to(self.device) for key, value in next(batches).items()}
        # No attention mask: Megatron's causal softmax makes its own.
        token_loss = model(batch["tokens"], self._positions, None, labels=batch["labels"])
        return token_loss, partial(_mean_loss, batch["loss_mask"])

    def _run_schedule(
        self, batches: Iterator[Batch], micro_batches: int, forward_only: bool
    ) -> float:
        """Megatron's forward(-backward) over some micro-batches; the mean loss, in nats."""
        results = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=micro_batches,
            seq_length=self.run.sequence,
            micro_batch_size=self.run.micro_batch_size,
            forward_only=forward_only,
        )
        return sum(float(result["loss"]) for result in results) / len(results)

    def step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step over ``micro_batches`` micro-batches."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._run_schedule(batches, self.run.micro_batches, forward_only=False)
        updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=1)
        self.steps_done += 1
        return StepResult(
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            skipped=not updated,
        )

    def validate(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Mean loss over some validation micro-batches, in nats per byte."""
        self.model.eval()
        with torch.no_grad():
            loss = self._run_schedule(batches, micro_batches, forward_only=True)
        self.model.train()
        return loss


def _mean_loss(
    loss_mask: torch.Tensor, token_loss: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the tokens of one micro-batch; both arguments are ``[batch, sequence]``."""
    loss = (token_loss.float() * loss_mask).sum() / loss_mask.sum()
    return loss, {"loss": loss.detach().clone()}


def initialize_ranks(run: RunConfig, rank: int, store: torch.distributed.Store) -> None:
    """Join the process group (NCCL on a GPU, for Megatron itself; else gloo), split it over TP."""
    gpu = run.device == "cuda"
    if gpu:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend="nccl" if gpu else "gloo", store=store, rank=rank, world_size=run.tp
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=run.tp)
