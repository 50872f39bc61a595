"""Megatron's ``ChainedOptimizer`` with FORGE as one more member.

Two things need to know about the whole step, so they live here and not in a member: the gradient
norm (stock's and FORGE's parts add in squares, and one clip coefficient serves both) and the
decision to skip (all members, all ranks, or none).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from . import checkpoint
from .optimizer import ForgeOptimizer


class ForgeChainedOptimizer(ChainedOptimizer):
    """The stock members, in their order, and FORGE's member last.

    Everything that Megatron asks of a ``ChainedOptimizer`` it can ask of this one; ``stock`` is the
    chain without FORGE, which still answers for the stock parameters alone.
    """

    def __init__(self, stock: MegatronOptimizer, forge: ForgeOptimizer) -> None:
        if not isinstance(stock, ChainedOptimizer):
            stock = ChainedOptimizer([stock])
        super().__init__([*stock.chained_optimizers, forge])
        self.stock = stock
        self.forge = forge

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The norm over stock's and FORGE's gradients, and the one that both are clipped by."""
        total = math.hypot(float(self.stock.get_grad_norm() or 0.0), self.forge.get_grad_norm())
        self.forge.total_norm = total
        return total

    @torch.no_grad()
    def count_zeros(self) -> float:
        """Zeros among the stock parameters' gradients; FORGE's gradients exist nowhere to count."""
        return self.stock.count_zeros()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step all members, or none when the norm over all of them is not finite."""
        total = self.forge.total_norm
        if total is not None and not math.isfinite(total):
            return False
        return super().step_with_ready_grads()

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """One optimizer step; ``(success, grad_norm, num_zeros)`` as Megatron returns it."""
        try:
            return super().step()
        finally:
            # Whether applied or skipped, this step's factors must not reach the next one.
            self.forge.end_step()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state as it is in memory (for ``--ckpt-format torch``)."""
        return {"stock": self.stock.state_dict(), "forge": self.forge.state_dict()}

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """State for ``dist_checkpointing``; see :mod:`forge_train.megatron.checkpoint`."""
        return checkpoint.sharded_state_dict(self, model_sharded_state_dict, is_loading, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or ``dist_checkpointing.load`` returned.

        Raises:
            ValueError: the checkpoint holds another rule, or FORGE's part is missing.
        """
        checkpoint.load_state_dict(self, state_dict)
