"""Megatron's model, optimizer and training step, driven from outside its training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from megatron_8b_job import Method


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW in its one-kernel form.

    Where there is neither Transformer Engine nor Apex, Megatron takes torch's for-each form, whose
    temporaries of 4 bytes per parameter would be stock's peak.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "fused": True})


class Training:
    """Megatron's model, optimizer and training step, of one method."""

    def __init__(self, method: Method) -> None:
        """Build them on this rank's device, by the flags in ``sys.argv``."""
        self.held: list[int] = []
        self._install(method)
        # Kernels of the shapes at hand, as in a job with one micro-batch size: not general ones.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64
        from megatron.training import training
        from megatron.training.initialize import initialize_megatron
        from megatron_pretrain import ModelType, configuration, forward_step

        container = configuration()
        initialize_megatron()
        stock_adamw, torch.optim.AdamW = torch.optim.AdamW, FusedAdamW  # type: ignore[misc]
        try:
            self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder,
                cfg_container=container,
                pg_collection=training.ProcessGroupCollection.use_mpu_process_groups(),
            )
        finally:
            torch.optim.AdamW = stock_adamw  # type: ignore[misc]
        self._forward_step, self._training = forward_step, training
        # As megatron.training.training.train does.
        self.config = training.get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.timers = training.get_timers()
        if self.config.finalize_model_grads_func is None:
            self.config.finalize_model_grads_func = training.finalize_model_grads
        for chunk in self.model:
            chunk.train()
        self.iteration = 0

    @staticmethod
    def _install(method: Method) -> None:
        """FORGE's flags, or Megatron as it is but for what its wheel cannot do."""
        if method.kind == "forge":
            from forge_train.megatron import install

            install()
            return
        from megatron.core.datasets import utils

        utils.compile_helpers = lambda: None  # the wheel lacks the Makefile

    def _counted_step(self, batches: Iterator[Any], model: torch.nn.Module) -> Any:
        # Here gradients are zeroed and no activation is there yet.
        self.held.append(torch.cuda.memory_allocated())
        return self._forward_step(batches, model)

    def set_micro_batch(self, size: int) -> None:
        """One micro-batch of so many sequences is a step."""
        from megatron.core.num_microbatches_calculator import (
            reconfigure_num_microbatches_calculator,
        )

        args = self._training.get_args()
        args.micro_batch_size = args.global_batch_size = size
        reconfigure_num_microbatches_calculator(
            args.rank, global_batch_size=size, micro_batch_size=size, data_parallel_size=1
        )

    def step(self, tokens: torch.Tensor) -> float:
        """Megatron's training step; the loss before it.

        Raises:
            RuntimeError: Megatron skipped the update.
        """
        losses, skipped, *_ = self._training.train_step(
            self._counted_step,
            iter([{"tokens": tokens}]),
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            self._training.get_forward_backward_func(),
            iteration=self.iteration,
        )
        self.iteration += 1
        if skipped:
            raise RuntimeError("Megatron skipped the step: its gradients are not finite")
        return float(losses["lm loss"])

    def clear(self) -> None:
        """Forget a step that did not come to its end."""
        forge = getattr(self.optimizer, "forge", None)
        if forge is not None:
            forge.end_step()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

        get_rerun_state_machine().state = RerunState.NOT_RUNNING_YET

    def grown(self) -> bool:
        """Whether more is allocated than a step began with: a failed one has left something."""
        return torch.cuda.memory_allocated() > 1.005 * min(self.held, default=0)

    # -- bytes --------------------------------------------------------------------------------

    def weights(self) -> list[torch.Tensor]:
        """This rank's, as the model computes with them."""
        return [weight for chunk in self.model for weight in chunk.parameters()]

    def counted_bytes(self) -> int:
        """Of gradient buffers, masters and states, as tensors."""
        tensors = [
            buffer.grad_data
            for chunk in self.model
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        ]
        for member in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in getattr(member, "fp32_from_float16_groups", []):
                tensors += group
            for state in member.optimizer.state.values():
                tensors += [value for value in state.values() if torch.is_tensor(value)]
        engine = getattr(getattr(self.optimizer, "forge", None), "engine", None)
        extra = 0 if engine is None else engine.memory()["accumulators"]
        return extra + sum({x.data_ptr(): x.nbytes for x in tensors}.values())

    def adam(self) -> str:
        """The optimizer of what Megatron updates itself."""
        members = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        inner = [member.optimizer for member in members]
        torchs = [made for made in inner if isinstance(made, torch.optim.Optimizer)]
        fused = all(group["fused"] for made in torchs for group in made.param_groups)
        names = {
            "AdamW" if isinstance(made, FusedAdamW) else type(made).__name__ for made in torchs
        }
        return "+".join(sorted(names)) + (", fused" if fused else "")

    def schedules(self) -> str:
        """Of FORGE's weights, as they were in the last step."""
        forge = getattr(self.optimizer, "forge", None)
        plans = [layer.fused.plan for layer in forge.layers] if forge is not None else []
        names = {plan.schedule for plan in plans if plan is not None}
        return "+".join(sorted(names)) or "step"
