"""Forward and backward of a fused linear, which autograd and the compiler's operator share."""

from __future__ import annotations

import torch
from torch.nn import functional

from ._types import BackwardResult
from .weights import FusedWeight, Use


def sharded_autocast(name: str) -> str:
    """Why a cast W cannot be shared out: dX of a cast W is torch's, which knows no other ranks."""
    return (
        f"{name}: torch.autocast is not supported under tensor parallelism. Convert the model "
        "(model.bfloat16()) before fuse() and choose weight_format='bf16+16', which keeps the fp32 "
        "weights."
    )


def forward_pass(
    x: torch.Tensor, parameter: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``X Wᵀ (+ b)``, ``[..., out]`` in the dtype of ``x``.

    Under ``torch.autocast`` W ``[out, in]`` is fp32 and ``x`` is not: W is cast for the product.
    torch keeps that cast for the region; here it is gone afterwards, for an update may follow.
    """
    weight = parameter if parameter.dtype == x.dtype else parameter.to(x.dtype)
    return functional.linear(x, weight, bias)


def backward_pass(
    weight: FusedWeight,
    use: Use,
    dy: torch.Tensor,
    x: torch.Tensor,
    *,
    need_dx: bool,
    need_dbias: bool,
) -> BackwardResult:
    """Compute dX and dbias where needed; the engine updates the weight or keeps the factors.

    Args:
        weight: the layer's.
        use: of the forward.
        dy: ``[..., out]`` of the dtype of ``x``.
        x: ``[..., in]``; of the weight's dtype or, under autocast, a lower one.
        need_dx: whether to compute dX.
        need_dbias: whether to compute dbias.

    Raises:
        RuntimeError: see ``Engine.backward``; or factors of another dtype wait for the step.
    """
    engine = weight.engine
    if engine is None:
        raise RuntimeError(f"{weight.name} is in no engine: call engine.add([weight]) first")
    weight.take_factors(x.dtype)
    cast = x.dtype != weight.storage.weight.dtype
    if cast and weight.linear.comm.size > 1:
        raise RuntimeError(sharded_autocast(weight.name))
    if not cast or not need_dx:
        return engine.backward(weight, use, dy, x, need_dx=need_dx, need_dbias=need_dbias)
    # W rounded as in the forward, which a matrix product of one dtype then takes; before the
    # update, which writes W.
    dx = torch.matmul(dy, weight.storage.weight.to(x.dtype))
    result = engine.backward(weight, use, dy, x, need_dx=False, need_dbias=need_dbias)
    return result._replace(dx=dx)
