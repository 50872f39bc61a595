"""Numbers by which a compiled graph names fused weights."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from .weights import FusedWeight

_weights: WeakValueDictionary[int, FusedWeight] = WeakValueDictionary()
_numbers = itertools.count(1)


def key_of(weight: FusedWeight) -> torch.Tensor:
    """A new tensor that names the weight: fp64 ``[1]`` on the CPU, which requires a gradient.

    It is a tensor and no number, so that layers of one shape can share a compiled graph.
    ``linear_op`` says what the gradient is for.
    """
    number = next(_numbers)
    _weights[number] = weight
    return torch.tensor([float(number)], dtype=torch.float64, device="cpu", requires_grad=True)


def weight_of(number: int) -> FusedWeight:
    """The weight of a key's number.

    Raises:
        RuntimeError: it no longer exists.
    """
    weight = _weights.get(number)
    if weight is None:
        raise RuntimeError(
            "a compiled graph calls a fused linear that no longer exists: fuse() and compile again"
        )
    return weight
