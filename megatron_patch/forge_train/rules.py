"""Optimizer rules by torch.optim's argument names.

A dataclass here only names a rule and its options. What the rule computes, which states it has and
in which order its numbers travel is asked of the library by name (``forge_rule_find``), so a rule
that is added there needs one dataclass here and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar

import torch

from ._lib import check, ffi, lib, new_struct, text


@dataclass(frozen=True)
class Rule:
    """Base of all rules: how the options reach the C ABI.

    Boolean options are rule flags, fixed when a linear is made; numbers are hyperparameters, read
    again at every update. Tuples are several of them: ``betas`` are ``beta1``, ``beta2`` and
    ``beta3``.
    """

    name: ClassVar[str]

    @property
    def options(self) -> dict[str, Any]:
        """Every option by name, as a param group of ``torch.optim`` holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_options(self, **options: Any) -> Rule:
        """This rule with other values of its options.

        Raises:
            TypeError: it has no option of that name.
        """
        return replace(self, **options)


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
    """``torch.optim.Adam`` (weight decay added to the gradient).

    States ``exp_avg``, ``exp_avg_sq`` and with ``amsgrad`` ``max_exp_avg_sq``.
    """

    name: ClassVar[str] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class AdamW(Rule):
    """``torch.optim.AdamW`` (decoupled weight decay); states as :class:`Adam`."""

    name: ClassVar[str] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class Adamax(Rule):
    """``torch.optim.Adamax``; states ``exp_avg`` and ``exp_inf``."""

    name: ClassVar[str] = "adamax"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False


@dataclass(frozen=True)
class NAdam(Rule):
    """``torch.optim.NAdam``; states ``exp_avg`` and ``exp_avg_sq``.

    torch's running product of the momenta is computed from the step, which gives the same as long
    as ``betas`` and ``momentum_decay`` do not change.
    """

    name: ClassVar[str] = "nadam"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class RAdam(Rule):
    """``torch.optim.RAdam``; states ``exp_avg`` and ``exp_avg_sq``."""

    name: ClassVar[str] = "radam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class AdEMAMix(Rule):
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137), decoupled weight decay.

    States ``exp_avg``, ``exp_avg_sq`` and ``exp_avg_slow``. In the first ``warmup`` steps ``alpha``
    and ``betas[2]`` grow to their values, as in the paper; 0: they have them from the start.
    """

    name: ClassVar[str] = "ademamix"
    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    alpha: float = 5.0
    warmup: int = 0
    maximize: bool = False


@dataclass(frozen=True)
class RMSprop(Rule):
    """``torch.optim.RMSprop``.

    States ``square_avg``, with ``momentum`` ``momentum_buffer``, with ``centered`` ``grad_avg``.
    """

    name: ClassVar[str] = "rmsprop"
    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class Adagrad(Rule):
    """``torch.optim.Adagrad``; one state, ``sum``."""

    name: ClassVar[str] = "adagrad"
    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    maximize: bool = False


@dataclass(frozen=True)
class Adadelta(Rule):
    """``torch.optim.Adadelta``; states ``square_avg`` and ``acc_delta``."""

    name: ClassVar[str] = "adadelta"
    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    maximize: bool = False


@dataclass(frozen=True)
class Rprop(Rule):
    """``torch.optim.Rprop``, for full batches; states ``prev`` and ``step_size``."""

    name: ClassVar[str] = "rprop"
    lr: float = 1e-2
    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    maximize: bool = False


@dataclass(frozen=True)
class ASGD(Rule):
    """``torch.optim.ASGD``; one state, ``ax``, the average of the weights."""

    name: ClassVar[str] = "asgd"
    lr: float = 1e-2
    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: float = 0.0
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
class Signum(Rule):
    """Signum (Bernstein et al. 2018, arXiv:1802.04434), decoupled weight decay.

    One state, ``momentum_buffer``; with ``momentum=0`` it is signSGD.
    """

    name: ClassVar[str] = "signum"
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    maximize: bool = False


def built_in() -> dict[str, type[Rule]]:
    """The classes above by the names of their rules."""
    return {cls.name: cls for cls in Rule.__subclasses__() if "name" in vars(cls)}


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


# Tuples of torch.optim, and the names of their elements in the C ABI.
_TUPLES = {
    "betas": ("beta1", "beta2", "beta3"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}


def rule_flags(name: str, options: Mapping[str, Any]) -> int:
    """The ``FORGE_RULE_*`` bits of a rule with a param group's options.

    The momentum bit says that the state exists, so it follows ``momentum != 0`` as in torch; rules
    that always have it have no such bit.
    """
    flags = {
        "maximize": lib.FORGE_RULE_MAXIMIZE,
        "nesterov": lib.FORGE_RULE_NESTEROV,
        "momentum": lib.FORGE_RULE_MOMENTUM,
        "amsgrad": lib.FORGE_RULE_AMSGRAD,
        "centered": lib.FORGE_RULE_CENTERED,
        "decoupled_weight_decay": lib.FORGE_RULE_DECOUPLED,
    }
    if not _allowed_flags(name) & lib.FORGE_RULE_MOMENTUM:
        del flags["momentum"]
    return sum(bit for option, bit in flags.items() if options.get(option))


@cache
def _allowed_flags(name: str) -> int:
    info = new_struct("forge_rule_info")
    check(lib.forge_rule_find(ffi.new("char[]", name.encode()), 0, info), f"rule {name!r}")
    return int(info.allowed_flags)


def raw_values(info: RuleInfo, options: Mapping[str, Any]) -> list[Any]:
    """A param group's options in the order in which the library wants them, numbers or tensors.

    Args:
        info: the rule, from :func:`rule_info`.
        options: a param group, or :attr:`Rule.options`; keys that the rule does not know are
            ignored, numbers that are missing take the rule's default.
    """
    named = dict(options)
    for option, names in _TUPLES.items():
        if option in named:
            named.update(zip(names, named[option], strict=False))
    return [
        named.get(name, default)
        for name, default in zip(info.hyper_names, info.hyper_defaults, strict=True)
    ]


def hyper_values(info: RuleInfo, options: Mapping[str, Any]) -> list[float]:
    """:func:`raw_values` as numbers; of a tensor on a GPU the default, for the host must not wait.

    Such a tensor is read on the GPU; see ``ScalarTable``.
    """
    return [
        default if on_gpu(value) else float(value)
        for value, default in zip(raw_values(info, options), info.hyper_defaults, strict=True)
    ]


def on_gpu(value: Any) -> bool:
    """Whether an option is a tensor that the host would have to wait for."""
    return isinstance(value, torch.Tensor) and value.is_cuda
