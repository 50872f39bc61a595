"""All that the demo knows of FORGE: the two calls a training script makes, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from forge_train.demo.config import RunConfig


class Fused(Protocol):
    """What ``forge_train.megatron.fuse`` returns, as far as the demo uses it."""

    def chain(self, optimizer: Any) -> Any:
        """Megatron's optimizer plus FORGE's member."""

    def summary(self) -> str:
        """A table of what is fused, and of what is not and why."""


def fuse(run: RunConfig, model_chunks: list[torch.nn.Module]) -> Fused | None:
    """Take the weights of all parallel linears out of DDP and the stock optimizer, unless `stock`.

    Call before the model is wrapped in DDP; hand the stock optimizer to ``chain`` afterwards.
    """
    if run.stock:
        return None
    import forge_train.megatron as forge_megatron

    return forge_megatron.fuse(
        model_chunks,
        rule=run.rule,
        weight_format=run.weight_format,
        state_format=run.state_format,
        schedule=run.schedule,
        clip_grad=run.clip_grad,
        micro_batches=run.micro_batches,
        tokens_per_micro_batch=run.micro_batch_size * run.sequence,
        seed=run.seed,
    )


def chain(fused: Fused | None, optimizer: Any) -> Any:
    """The optimizer to train with: the stock one, or both."""
    return optimizer if fused is None else fused.chain(optimizer)


def hint(fused: Any) -> str:
    """A line for runs whose kept factors outweigh the gradients that they replace, else empty.

    Only where another schedule would hold less.
    """
    run = fused.engine
    factors = held = gradients = automatic = 0
    for layer in fused.layers:
        plan = layer.fused.plan
        (tokens,) = layer.fused.plans
        auto = layer.fused.linear.plan(
            tokens=tokens, micro_batches=run.micro_batches, needs_norm=run.needs_norm
        )
        factors += plan.factor_bytes
        held += plan.factor_bytes + plan.accumulator_bytes
        automatic += auto.factor_bytes + auto.accumulator_bytes
        gradients += plan.gradient_bytes
    if factors <= gradients or automatic >= held:
        return ""
    return (
        f"hint: schedule {run.schedule} keeps factors of {factors / 2**20:.1f} MiB for a step, the "
        f"gradients they replace would take {gradients / 2**20:.1f} MiB; --schedule auto keeps "
        f"{automatic / 2**20:.1f} MiB"
    )


def _layers(optimizer: Any) -> list[Any]:
    """The fused layers of this rank; none in a stock run, whose chain has no FORGE member."""
    forge = getattr(optimizer, "forge", None)
    return [] if forge is None else forge.layers


def weight_extras(optimizer: Any) -> Iterator[torch.Tensor]:
    """Master copies or low halves of the fused weights, by the weight format."""
    for layer in _layers(optimizer):
        if layer.fused.storage.weight_extra is not None:
            yield layer.fused.storage.weight_extra


def accumulators(optimizer: Any) -> Iterator[torch.Tensor]:
    """The fp32 buffers of layers under the schedule ``accumulate``."""
    for layer in _layers(optimizer):
        if layer.fused.accumulator is not None:
            yield layer.fused.accumulator


def gradients(optimizer: Any) -> Iterator[torch.Tensor]:
    """Whatever holds a gradient of a fused weight, FORGE's or Megatron's; deferred: nothing."""
    yield from accumulators(optimizer)
    for layer in _layers(optimizer):
        for name in ("grad", "main_grad"):
            held = getattr(layer.weight, name, None)
            if held is not None:
                yield held


def factor_bytes(optimizer: Any) -> int:
    """Bytes of the factors that wait for the update now."""
    return sum(layer.fused.factor_bytes for layer in _layers(optimizer))
