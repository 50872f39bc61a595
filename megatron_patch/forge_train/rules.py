"""Optimizer rules by torch.optim's argument names.

A dataclass here only names a rule and its options. What the rule computes, which states it has and
in which order its numbers travel is asked of the library by name (``forge_rule_find``), so a rule
that is added there needs one dataclass here and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

from ._lib import check, ffi, lib, new_struct, text


@dataclass(frozen=True)
class Rule:
    """Base of all rules: how the options reach the C ABI.

    Boolean options are rule flags, fixed when a linear is made; numbers are hyperparameters, read
    again at every update; ``betas`` are the hyperparameters ``beta1`` and ``beta2``.
    """

    name: ClassVar[str]

    @property
    def options(self) -> dict[str, Any]:
        """Every option by name, as a param group of ``torch.optim`` holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class SGD(Rule):
    """``torch.optim.SGD``: one state, ``momentum_buffer``, where ``momentum`` is not 0."""

    name: ClassVar[str] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        """Refuse what torch refuses."""
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError(
                "SGD: nesterov=True needs momentum > 0 and dampening = 0, got "
                f"momentum={self.momentum}, dampening={self.dampening}"
            )


@dataclass(frozen=True)
class Adam(Rule):
    """``torch.optim.Adam`` (weight decay added to the gradient); ``exp_avg``, ``exp_avg_sq``."""

    name: ClassVar[str] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False


@dataclass(frozen=True)
class AdamW(Rule):
    """``torch.optim.AdamW`` (decoupled weight decay); states ``exp_avg`` and ``exp_avg_sq``."""

    name: ClassVar[str] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False


@dataclass(frozen=True)
class Lion(Rule):
    """Lion (Chen et al. 2023, arXiv:2302.06675), decoupled weight decay; one state, ``exp_avg``."""

    name: ClassVar[str] = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    maximize: bool = False


@dataclass(frozen=True)
class RuleInfo:
    """What the library says of a rule under given flags."""

    name: str
    state_names: tuple[str, ...]
    hyper_names: tuple[str, ...]
    hyper_defaults: tuple[float, ...]


@cache
def rule_info(name: str, flags: int = 0) -> RuleInfo:
    """Ask the library for a rule.

    Raises:
        ForgeArgumentError: no rule has this name, or it does not take one of the flags.
    """
    info = new_struct("forge_rule_info")
    encoded = ffi.new("char[]", name.encode())
    check(lib.forge_rule_find(encoded, flags, info), f"rule {name!r}")
    return RuleInfo(
        name=text(info.name),
        state_names=tuple(text(info.state_names[i]) for i in range(info.n_states)),
        hyper_names=tuple(text(info.hyper_names[i]) for i in range(info.n_hyper)),
        hyper_defaults=tuple(info.hyper_defaults[i] for i in range(info.n_hyper)),
    )


def rule_flags(options: Mapping[str, Any]) -> int:
    """The ``FORGE_RULE_*`` bits of a param group's options.

    The momentum bit says that the state exists, so it follows ``momentum != 0`` as in torch.
    """
    flags = 0
    if options.get("maximize"):
        flags |= lib.FORGE_RULE_MAXIMIZE
    if options.get("nesterov"):
        flags |= lib.FORGE_RULE_NESTEROV
    if options.get("momentum"):
        flags |= lib.FORGE_RULE_MOMENTUM
    return flags


def hyper_values(info: RuleInfo, options: Mapping[str, Any]) -> list[float]:
    """Put a param group's numbers into the order in which the library wants them.

    Args:
        info: the rule, from :func:`rule_info`.
        options: a param group, or :attr:`Rule.options`; keys that the rule does not know are
            ignored, numbers that are missing take the rule's default.
    """
    named = dict(options)
    if "betas" in named:
        named["beta1"], named["beta2"] = named["betas"]
    return [
        float(named.get(name, default))
        for name, default in zip(info.hyper_names, info.hyper_defaults, strict=True)
    ]
