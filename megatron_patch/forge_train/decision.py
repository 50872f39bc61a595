"""Whether a step is taken, and its clip coefficient: computed where the gradients' norms are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._lib import check, ffi, lib


@dataclass(frozen=True)
class Decision:
    """What a step decides; each an fp64 ``[]``, but for ``taken``, a bool ``[]``.

    Attributes:
        total: sum of squares of the unscaled gradient, over everything clipped together.
        taken: whether it is finite; else the step is skipped as a whole.
        norm: of the scaled gradient, before clipping.
        coefficient: what every gradient is multiplied with; NaN where the step is skipped, which
            makes an update leave every tile alone.
    """

    total: torch.Tensor
    taken: torch.Tensor
    norm: torch.Tensor
    coefficient: torch.Tensor


def decide(total: torch.Tensor, grad_scale: float, max_norm: float | None) -> Decision:
    """:func:`clip_coefficient`, operation by operation, without waiting for ``total``.

    Args:
        total: fp64 ``[]``; inf or NaN where a gradient is not finite.
        grad_scale: as there; finite.
        max_norm: as there.
    """
    taken = total < math.inf  # false for a NaN as well
    norm = total.sqrt()
    if abs(grad_scale) != 1.0:
        norm = norm * abs(grad_scale)
    if max_norm:
        # A division by a number would be one by its reciprocal, which rounds otherwise.
        ratio = torch.full_like(norm, max_norm) / (norm + 1e-6)
        coefficient = ratio.clamp(max=1.0) * grad_scale
    else:
        coefficient = torch.full_like(norm, grad_scale)
    if abs(grad_scale) > 1.0:
        # The scaled norm of finite gradients may overflow; nothing is left of them then.
        coefficient = coefficient.masked_fill(norm == math.inf, 0.0)
    return Decision(total, taken, norm, coefficient.masked_fill(~taken, math.nan))


def clip_coefficient(
    sum_of_squares: float, grad_scale: float, max_norm: float | None
) -> tuple[float, float]:
    """The library's ``(norm, coefficient)``: ``min(1, max_norm / (norm + 1e-6)) * grad_scale``.

    Args:
        sum_of_squares: of the unscaled gradient, over everything clipped together.
        grad_scale: what the gradient is multiplied with, such as one over the loss scale.
        max_norm: None: no clipping.
    """
    norm, coefficient = ffi.new("double *"), ffi.new("double *")
    limit = 0.0 if max_norm is None else max_norm
    check(lib.forge_clip_coefficient(sum_of_squares, grad_scale, limit, norm, coefficient))
    return norm[0], coefficient[0]


def number(total: torch.Tensor) -> float:
    """A sum of squares for a collective; inf for whatever is not finite."""
    value = float(total)
    return value if math.isfinite(value) else math.inf
