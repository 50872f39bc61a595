"""A small Llama-style GPT built by megatron-core, trained on made-up tokens: what the tests run.

Everything here is stock Megatron. ``fuse`` and ``chain`` are the only FORGE calls, made where a
user would make them.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

import forge_train.megatron as forge_megatron

VOCAB, SEQUENCE, HIDDEN, LAYERS, MICRO_BATCH = 64, 16, 64, 2, 2


class Norm(torch.nn.Module):
    """RMSNorm that marks its weight as sequence parallel, which Megatron's local norm refuses."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


@dataclass(frozen=True)
class Case:
    """One training run."""

    forge: bool = True
    sequence_parallel: bool = False
    bf16: bool = False
    clip_grad: float = 0.0
    micro_batches: int = 1
    chunks: int = 1
    layers: int = LAYERS
    steps: int = 4
    tied: bool = False
    per_token: bool = False
    swiglu: bool = True
    loss_scale: float | None = None
    rule: str = "adamw"
    weight_format: str = "fp32"
    state_format: str = "fp32"
    schedule: str = "auto"
    reduction: str = "auto"
    model: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def stock(self) -> Case:
        """The same run without FORGE."""
        return replace(self, forge=False)


class Run:
    """Model, optimizer and scheduler of one case; :meth:`train` advances them."""

    def __init__(self, case: Case, seed: int = 7) -> None:
        self.case = case
        tp = parallel_state.get_tensor_model_parallel_world_size()
        pp = parallel_state.get_pipeline_model_parallel_world_size()
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        self.config = TransformerConfig(
            num_layers=case.layers,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            num_query_groups=2,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
            expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
            sequence_parallel=case.sequence_parallel,
            use_cpu_initialization=True,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=case.bf16,
            add_bias_linear=False,
            gated_linear_unit=case.swiglu,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            attention_softmax_in_fp32=True,
            calculate_per_token_loss=case.per_token,
            **{"ffn_hidden_size": 96, **case.model},
        )
        mixture = {"num_experts": case.model.get("num_moe_experts"), "moe_grouped_gemm": False}
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **mixture)
        spec.submodules.input_layernorm = Norm
        spec.submodules.pre_mlp_layernorm = Norm
        parts = [self._chunk(spec, index, pp) for index in range(case.chunks)]
        self.model = parts[0] if case.chunks == 1 else torch.nn.ModuleList(parts)
        wrapped = [Float16Module(self.config, part) if case.bf16 else part for part in parts]
        self.fused = None
        if case.forge:
            self.fused = forge_megatron.fuse(
                wrapped,
                rule=case.rule,
                weight_format=case.weight_format,
                state_format=case.state_format,
                schedule=case.schedule,
                clip_grad=case.clip_grad,
                micro_batches=case.micro_batches,
                tokens_per_micro_batch=SEQUENCE * MICRO_BATCH,
                seed=11,
                data_parallel_reduction=case.reduction,
            )
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **case.ddp)
        self.chunks = [
            DistributedDataParallel(config=self.config, ddp_config=ddp_config, module=part)
            for part in wrapped
        ]
        settings: dict[str, Any] = {
            "optimizer": "adam",
            "lr": 3e-3,
            "min_lr": 3e-4,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "bf16": case.bf16,
            "params_dtype": dtype,
            "clip_grad": case.clip_grad,
            "loss_scale": case.loss_scale,
        }
        optimizer_config = OptimizerConfig(**{**settings, **case.optimizer})
        self.optimizer = get_megatron_optimizer(optimizer_config, self.chunks)
        if self.fused is not None:
            self.optimizer = self.fused.chain(self.optimizer)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=3e-3,
            min_lr=3e-4,
            lr_warmup_steps=2,
            lr_decay_steps=20,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = no_sync[0] if case.chunks == 1 else no_sync
        self.config.finalize_model_grads_func = finalize_model_grads
        self.step = 0

    def _chunk(self, spec: Any, index: int, stages: int) -> GPTModel:
        """One of this stage's model chunks, which the interleaved schedule runs in turns."""
        case, virtual = self.case, self.case.chunks > 1
        place: dict[str, Any] = {}
        if virtual:
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
            if "vp_stage" in inspect.signature(GPTModel).parameters:
                place["vp_stage"] = index
        asked = {"ignore_virtual": False, "vp_stage": index} if virtual else {}
        layers = TransformerBlockSubmodules(
            layer_specs=[spec] * (case.layers // (stages * case.chunks)), layer_norm=Norm
        )
        return GPTModel(
            config=self.config,
            transformer_layer_spec=layers,
            pre_process=parallel_state.is_pipeline_first_stage(**asked),
            post_process=parallel_state.is_pipeline_last_stage(**asked),
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=case.tied,
            **place,
        )

    def _batch(self, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        rank = parallel_state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(10**6 * rank + 1000 * self.step + micro_batch)
        tokens = torch.randint(0, VOCAB, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        # Half of the targets are predictable, so that the loss moves within a few steps.
        tokens[:, 1::2] = (tokens[:, 0::2][:, : tokens[:, 1::2].shape[1]] + 1) % VOCAB
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def train(self, steps: int | None = None) -> tuple[list[float], list[float | None]]:
        """Train some steps; returns the mean loss and the gradient norm of each."""
        losses: list[float] = []
        norms: list[float | None] = []
        for _ in range(self.case.steps if steps is None else steps):
            loss = self._forward_backward()
            success, norm, _zeros = self.optimizer.step()
            assert success
            self.scheduler.step(1)
            self.step += 1
            losses.append(loss)
            norms.append(None if norm is None else float(norm))
        return losses, norms

    def attempt(self) -> bool:
        """One step that may be skipped; returns whether it was applied."""
        self._forward_backward()
        return bool(self.optimizer.step()[0])

    def _forward_backward(self) -> float:
        """All micro-batches of a step; returns their mean loss."""
        position = torch.arange(SEQUENCE).unsqueeze(0).expand(MICRO_BATCH, -1)
        mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), diagonal=1)

        def loss_func(kept: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
            if self.case.per_token:
                total = (output.float() * kept).sum()
                mean = total.detach() / kept.sum()
                return total, kept.sum().to(torch.int), {"loss": mean}
            loss = output.float().mean()
            return loss, {"loss": loss.detach().clone()}

        def forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            tokens, labels = next(batches)
            # So many that micro-batches and ranks have different numbers.
            kept = (labels % 3 != 0).float()
            return model(tokens, position, mask, labels=labels), partial(loss_func, kept)

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [self._batch(m) for m in range(self.case.micro_batches)]
        data = [iter(batches) for _ in self.chunks]
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if self.case.chunks > 1 else data[0],
            model=self.chunks,
            num_microbatches=self.case.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        # Only the last pipeline stage has losses.
        return sum(float(r["loss"]) for r in reduced) / max(len(reduced), 1)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter of the local model, by name, copied."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def gradient_buffer_elements(self) -> int:
        """Elements in DDP's gradient buffers."""
        kinds = [(chunk.buffers, chunk.expert_parallel_buffers) for chunk in self.chunks]
        buffers = [buffer for kind in kinds for found in kind for buffer in found]
        return sum(buffer.grad_data.numel() for buffer in buffers)


def start(rank: int, world: int, port: int, tp: int, pp: int = 1) -> None:
    """Join a gloo world and divide it into tensor- and pipeline-parallel groups."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
