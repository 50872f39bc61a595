"""``Y = X Wᵀ (+ b)`` for autograd, with a backward that leaves no weight gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from . import linear_op  # noqa: F401  (registers torch.ops.forge)
from .linear_passes import backward_pass, forward_pass, sharded_autocast
from .weights import FusedWeight, Use

Gather = Callable[[torch.Tensor], torch.Tensor]


class _FusedLinear(torch.autograd.Function):
    """Saves X; hands dY and X to the engine; gives autograd dX and dbias but no dW."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        parameter: torch.Tensor,
        bias: torch.Tensor | None,
        weight: FusedWeight,
        use: Use,
        gather: Gather | None,
    ) -> torch.Tensor:
        # Only X is saved: the backward reads W from the storage, as it is before the update. Under
        # sequence parallelism X is this rank's shard, and the library gathers it again.
        ctx.save_for_backward(x)
        ctx.weight, ctx.use = weight, use
        full = gather(x) if gather is not None else x
        return forward_pass(full, parameter, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        result = backward_pass(
            ctx.weight,
            ctx.use,
            dy,
            x,
            need_dx=ctx.needs_input_grad[0],
            need_dbias=ctx.needs_input_grad[2],
        )
        return result.dx, None, result.dbias, None, None, None


def fused_linear(
    x: torch.Tensor,
    weight: FusedWeight,
    bias: torch.Tensor | None = None,
    gather: Gather | None = None,
) -> torch.Tensor:
    """The linear of a fused weight.

    Args:
        x: ``[..., in_local]`` of the weight's dtype; under ``torch.autocast`` of any float dtype.
        weight: its ``parameter`` is the W of the product; its engine decides when to update.
        bias: ``[out_local]``; it gets an ordinary gradient.
        gather: under sequence parallelism, the forward's all-gather of ``x`` along its first
            dimension. The backward's collectives are the library's.

    Returns:
        ``[..., out_local]``, under ``torch.autocast`` of its dtype.

    Raises:
        RuntimeError: a second use that the schedule cannot take, autocast to another dtype than
            bf16, another dtype or device of ``x`` than the weight's, or no engine.
    """
    parameter = weight.parameter
    if not torch.is_grad_enabled() or not parameter.requires_grad:
        if weight.engine is not None:
            weight.engine.settle()
        full = gather(x) if gather is not None else x
        return functional.linear(full, parameter, bias)
    if x.device != parameter.device:
        raise RuntimeError(
            f"{weight.name} is on {parameter.device}, but its input is on {x.device}: "
            f"x.to({str(parameter.device)!r})"
        )
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x, bias = _cast(x, bias, weight, torch.get_autocast_dtype(device_type))
    elif x.dtype != parameter.dtype:
        raise RuntimeError(
            f"{weight.name} is {parameter.dtype}, but its input is {x.dtype}. Cast the input: "
            f"x.to({parameter.dtype}), or train under torch.autocast."
        )
    if torch.compiler.is_compiling() and gather is None:
        y: torch.Tensor = torch.ops.forge.linear(x, parameter, bias, weight.key)[0]
        return y
    engine = weight.engine
    if engine is None:
        raise RuntimeError(f"{weight.name} is in no engine: call engine.add([weight]) first")
    weight.graph_uses.sweep()
    use = engine.begin_use(weight)
    y = _FusedLinear.apply(x, parameter, bias, weight, use, gather)
    weight.uses.add(use)
    return y


def _cast(
    x: torch.Tensor, bias: torch.Tensor | None, weight: FusedWeight, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Input and bias as autocast has them; W is cast for the product alone."""
    if dtype != torch.bfloat16:
        raise RuntimeError(
            f"{weight.name}: torch.autocast({dtype}) is not supported in training: its loss scale "
            "needs gradients that FORGE does not make. Use torch.autocast(dtype=torch.bfloat16), "
            "or convert the model (model.bfloat16()) before fuse()."
        )
    if weight.parameter.dtype != dtype and weight.linear.comm.size > 1:
        raise RuntimeError(sharded_autocast(weight.name))
    return x.to(dtype), bias.to(dtype) if bias is not None else None


class FusedTorchLinear(torch.nn.Linear):
    """The class that a fused ``torch.nn.Linear`` has until ``Fused.remove()``.

    A copy or an unpickled one carries no fused weight and is an ordinary linear.
    """

    _forge: FusedWeight | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (torch's own name)
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self._forge is None:
            return super().forward(input)
        return fused_linear(input, self._forge, self.bias)
