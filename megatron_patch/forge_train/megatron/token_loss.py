"""``--calculate-per-token-loss``: a gradient is divided by the tokens of the whole batch.

Their number is known after the last micro-batch, when Megatron scales the gradients in the buffers
of its DDP. A gradient that exists as factors is scaled by the step that consumes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from .patch import LAYER_ATTRIBUTE

_METHOD = "scale_gradients"
_MARKER = "__forge_token_loss__"


def _scaling(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def scale_gradients(self: torch.nn.Module, scaling_factor: Any) -> None:
        original(self, scaling_factor)
        for module in self.modules():
            layer = vars(module).get(LAYER_ATTRIBUTE)
            if layer is not None:
                # Of one engine are all layers; another chunk of the model says the same again.
                layer.engine.factor = scaling_factor
                return

    setattr(scale_gradients, _MARKER, True)
    return scale_gradients


def install() -> None:
    """Have fused weights scaled with the others. Calling it again changes nothing."""
    original = getattr(DistributedDataParallel, _METHOD)
    if not hasattr(original, _MARKER):
        setattr(DistributedDataParallel, _METHOD, _scaling(original))


def uninstall() -> None:
    """Put Megatron's own method back. Calling it again changes nothing."""
    current = getattr(DistributedDataParallel, _METHOD)
    if hasattr(current, _MARKER):
        setattr(DistributedDataParallel, _METHOD, current.__wrapped__)
