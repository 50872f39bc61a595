"""The updates of a step, those of small weights together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._context import Context
from ._linear import update_together
from ._types import Scalars
from .reports import Reports
from .scalars import ScalarTable
from .weights import Weight

Work = tuple[Weight, Scalars | torch.Tensor, torch.Tensor]
"""A weight, the scalars of its update, and the row of ``DeviceStructs`` that takes the report."""

MOST_WAITING = 64 << 20
"""Elements of weights that are collected for a call. Small weights share its launches; work enough
for a while goes to the GPU before all structs are made."""


def update_pending(
    pending: Sequence[Weight],
    coefficient: float | torch.Tensor,
    scalars: ScalarTable,
    reports: Reports,
) -> None:
    """Update weights with ``g = coefficient · dW``; the step is not counted yet.

    Args:
        pending: each has something pending, which is then gone.
        coefficient: a number; or fp64 ``[]`` beside the weights, where a NaN lets a GPU leave every
            tile as it was.
        scalars: prepared for these weights.
        reports: take what the updates tell.
    """
    known = None if isinstance(coefficient, torch.Tensor) else coefficient
    if known is None:
        scalars.scale(coefficient)
    together: dict[Context, list[Work]] = {}
    waiting = 0
    done: list[Weight] = []
    try:
        for weight in pending:
            numbers, report = scalars.take(weight, known), reports.row(weight)
            if weight.linear.context.asynchronous:
                together.setdefault(weight.linear.context, []).append((weight, numbers, report))
                waiting += weight.parameter.numel()
                if waiting >= MOST_WAITING:
                    done += apply_all(together)
                    waiting = 0
            else:
                weight.apply(numbers, report)
                done.append(weight)
        apply_all(together)
    except BaseException:
        # A user's rule failed: the weights before it have made their step.
        scalars.advance(done)
        raise


def apply_all(together: dict[Context, list[Work]]) -> list[Weight]:
    """Make the updates of each context in one call; returns the weights, and forgets them."""
    done = []
    for work in together.values():
        apply_together(work)
        done += [weight for weight, _, _ in work]
    together.clear()
    return done


def apply_together(work: Sequence[Work]) -> None:
    """Update weights of one context in one call, which lets small ones share launches."""
    calls, pointed_to = [], []
    for weight, scalars, report in work:
        call, kept = weight.linear.update_struct(
            weight.segments, weight.storage, scalars, weight.accumulated_gradient()
        )
        call.device_report = weight.linear.place(report, "forge_report")
        calls.append(call)
        pointed_to.append(kept)
    update_together([weight.linear for weight, _, _ in work], calls)
    for weight, _, _ in work:
        weight.applied()
