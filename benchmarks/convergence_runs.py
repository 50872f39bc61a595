"""The trainings that ``convergence.py`` compares: who updates, and in which formats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
FP32, MASTER = "adamw:fp32", "adamw:bf16+fp32"
REFERENCES = (MASTER, FP32)
"""What FORGE's losses are compared with: the second in all fp32."""


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        kind: ``adamw``: torch's; ``forge``.
        weight_format: as FORGE names them; torch's ``bf16+fp32`` keeps an fp32 master in fp32.
        state_format: ``fp32``, ``bf16``, ``q8``; torch's follow the weights that it updates.
        rounding: of bf16 weights, and of bf16 and q8 states: ``stochastic`` or ``nearest``.
    """

    kind: str
    weight_format: str
    state_format: str
    rounding: str = "nearest"

    def __str__(self) -> str:
        """``adamw:bf16+fp32``, ``forge:bf16/q8:stochastic``; no rounding where none happens."""
        if self.kind == "adamw":
            return f"adamw:{self.weight_format}"
        formats = f"forge:{self.weight_format}/{self.state_format}"
        return f"{formats}:{self.rounding}" if self.rounds else formats

    @property
    def rounds(self) -> bool:
        """Whether ``rounding`` says anything."""
        return self.weight_format == "bf16" or self.state_format != "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return torch.float32 if self.weight_format == "fp32" else torch.bfloat16


def recipes() -> list[Recipe]:
    """All of them, the references first."""
    states = ("fp32", "bf16", "q8")
    stochastic = [
        Recipe("forge", weight, state, "stochastic")
        for weight in ("bf16", "bf16+16")
        for state in states
    ]
    return [
        Recipe("adamw", "bf16+fp32", "fp32"),
        Recipe("adamw", "fp32", "fp32"),
        *stochastic,
        *(Recipe("forge", "bf16", state, "nearest") for state in states),
        Recipe("adamw", "bf16", "bf16"),
        Recipe("forge", "bf16+16", "q8", "nearest"),
        Recipe("forge", "bf16+fp32", "fp32"),
        Recipe("forge", "fp32", "fp32"),
    ]


def select(patterns: Iterable[str]) -> list[Recipe]:
    """Those that any of the patterns names; ``*`` stands for anything.

    Raises:
        ValueError: a pattern names none; the message lists them.
    """
    found = recipes()
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(str(recipe), pattern) for recipe in found):
            names = ", ".join(map(str, found))
            raise ValueError(f"--recipes: {pattern!r} names none of {names}")
    return [r for r in found if any(fnmatchcase(str(r), pattern) for pattern in patterns)]


class Training:
    """A model that is trained by a recipe, with the global norm clipped to 1.

    Args:
        recipe: as above.
        model: takes ids and labels, returns the loss; of the recipe's dtype, trained in place.
        seed: of stochastic rounding.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, seed: int) -> None:
        self.model, self.recipe = model, recipe
        self._parameters = list(model.parameters())
        options: dict[str, Any] = {"betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
        # What torch steps: fp32 copies that the model's weights are rounded from, or these.
        self._masters = self._parameters
        if recipe.kind == "forge":
            import forge_train

            fused = forge_train.fuse(
                model,
                forge_train.AdamW(**options),
                weight_format=recipe.weight_format,
                state_format=recipe.state_format,
                weight_rounding=recipe.rounding,
                state_rounding=recipe.rounding,
                fp32_products="bf16x3" if recipe.dtype == torch.float32 else "exact",
                schedule="deferred",
                max_norm=MAX_NORM,
                seed=seed,
            )
            self.optimizer: torch.optim.Optimizer = fused.optimizer
            return
        if recipe.weight_format == "bf16+fp32":
            self._masters = [p.detach().float().requires_grad_() for p in self._parameters]
        self.optimizer = torch.optim.AdamW(self._masters, **options, fused=True)

    def step(self, ids: torch.Tensor, labels: torch.Tensor, lr: float) -> torch.Tensor:
        """One step with a learning rate; returns the detached loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.model(ids, labels)
        loss.backward()
        if self.recipe.kind == "adamw":
            self._clip_from_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._masters is not self._parameters:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._masters)
        return loss.detach()

    def _clip_from_gradients(self) -> None:
        if self._masters is not self._parameters:
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                master.grad = parameter.grad.float() if parameter.grad is not None else None
                parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, MAX_NORM)
