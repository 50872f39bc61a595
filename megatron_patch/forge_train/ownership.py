"""One optimizer for a parameter: a second one that would step it is refused before it does."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

# Weak both ways: a model and its optimizer are freed as if nobody had noted them.
_owners = WeakTensorKeyDictionary()
_hooks: list[Any] = []


def claim(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> None:
    """Note that an optimizer alone steps these parameters, until :func:`release` or its end.

    Raises:
        ValueError: another fused optimizer steps one of them; nothing was noted.
    """
    for parameter, name in names.items():
        if _owner(parameter) is not None:
            raise ValueError(
                f"{name} is stepped by the optimizer of another fuse() call already; call remove() "
                "on what that returned, or fuse() both parts together"
            )
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_second))
    for parameter, name in names.items():
        _owners[parameter] = (weakref.ref(optimizer), name)


def release(parameters: Iterable[torch.Tensor]) -> None:
    """Let any optimizer step these parameters again."""
    for parameter in parameters:
        _owners.pop(parameter, None)
    if not _owners:
        for hook in _hooks:
            hook.remove()
        _hooks.clear()


def _owner(parameter: torch.Tensor) -> tuple[torch.optim.Optimizer, str] | None:
    """The living optimizer that has claimed a parameter, and the parameter's name."""
    reference, name = _owners.get(parameter, (None, ""))
    optimizer = reference() if reference is not None else None
    return (optimizer, name) if optimizer is not None else None


def _refuse_second(optimizer: torch.optim.Optimizer, *_arguments: Any) -> None:
    """Run by torch before every step of every optimizer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = _owner(parameter)
            if owner is None or owner[0] is optimizer:
                continue
            # One that is made around the owner steps by it.
            if not any(value is owner[0] for value in vars(optimizer).values()):
                raise RuntimeError(
                    f"{owner[1]} is stepped by fused.optimizer; this {type(optimizer).__name__} "
                    "holds it, too. It has changed nothing. Give it other parameters only (those "
                    "that print(fused) shows as left), or call fused.remove()."
                )
