"""Send Megatron's column- and row-parallel linears through FORGE.

Both ``ColumnParallelLinear`` and ``RowParallelLinear`` call ``self._forward_impl(input=…, weight=…,
…)`` for the matrix product and nothing else. :func:`install` replaces that method on the two
classes, so it does not matter who imported them before or which model is built from them. A layer
that :func:`forge_train.megatron.fuse` did not choose keeps running Megatron's own method.

What this does not reach: Transformer Engine's linears, and subclasses that bring a
``_forward_impl`` of their own. ``fuse`` reports both as left to the stock optimizer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_MODULE = "megatron.core.tensor_parallel.layers"
_CLASSES = ("ColumnParallelLinear", "RowParallelLinear")
_METHOD = "_forward_impl"
_MARKER = "__forge_patch__"

LAYER_ATTRIBUTE = "_forge_layer"
"""A fused module carries its :class:`~forge_train.megatron.column_row.FusedLinear` here."""


def _megatron_version() -> str:
    """The installed megatron-core version, or why it cannot be told."""
    try:
        return str(importlib.import_module("megatron.core").__version__)
    except (ImportError, AttributeError) as error:
        return f"of unknown version ({error})"


def linear_classes() -> tuple[type[torch.nn.Module], type[torch.nn.Module]]:
    """Megatron's ``(ColumnParallelLinear, RowParallelLinear)``.

    Raises:
        ImportError: a class or its ``_forward_impl`` is not where FORGE expects it; the message
            names the version found and the symbol that has moved.
    """
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(
            f"FORGE patches {_MODULE}, which cannot be imported ({error}). "
            "Install megatron-core (0.16.1 or 0.19.2 are tested)."
        ) from error
    found = []
    for name in _CLASSES:
        owner = getattr(module, name, None)
        if owner is None or not callable(getattr(owner, _METHOD, None)):
            symbol = f"{_MODULE}.{name}" + ("" if owner is None else f".{_METHOD}")
            raise ImportError(
                f"megatron-core {_megatron_version()} has no {symbol}, which FORGE patches. "
                "The symbol has moved: use a tested megatron-core (0.16.1 or 0.19.2) or a newer "
                "forge_train."
            )
        found.append(owner)
    return found[0], found[1]


def _route(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``_forward_impl`` that takes FORGE's way for fused layers and ``original`` for the rest."""

    @functools.wraps(original)
    def _forward_impl(
        self: torch.nn.Module,
        input: torch.Tensor,  # noqa: A002  (Megatron passes it by this keyword)
        weight: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        layer = getattr(self, LAYER_ATTRIBUTE, None)
        if layer is not None:
            layer.engine.settle()
        # Without autograd (evaluation, the first pass of activation recomputation) the product is
        # the same and nothing is to be remembered, so Megatron's own code is the simplest answer.
        if layer is None or not torch.is_grad_enabled():
            return original(self, input, weight, *args, **kwargs)
        return layer.forward(input, weight, *args, **kwargs)

    setattr(_forward_impl, _MARKER, True)
    return _forward_impl


def installed() -> bool:
    """Whether both classes carry FORGE's patch now."""
    return all(hasattr(getattr(owner, _METHOD), _MARKER) for owner in linear_classes())


def is_patched(module: torch.nn.Module) -> bool:
    """Whether this module's own forward goes through the patch (a subclass may override it)."""
    return hasattr(getattr(type(module), _METHOD, None), _MARKER)


def install() -> None:
    """Patch both classes. Calling it again changes nothing.

    Raises:
        ImportError: see :func:`linear_classes`; nothing is patched then.
    """
    for owner in linear_classes():
        original = getattr(owner, _METHOD)
        if not hasattr(original, _MARKER):
            setattr(owner, _METHOD, _route(original))


def uninstall() -> None:
    """Put Megatron's own methods back. Calling it again changes nothing.

    Fused models must have been given back before (``Fused.remove``): without the patch Megatron
    would form their weight gradients, and no optimizer would use them.

    Raises:
        RuntimeError: somebody wrapped FORGE's patch in turn; unwrapping it would lose their change.
    """
    for owner in linear_classes():
        current = getattr(owner, _METHOD)
        if _MARKER in vars(current) and getattr(current, "__wrapped__", None) is not None:
            if hasattr(current.__wrapped__, _MARKER):
                raise RuntimeError(
                    f"{owner.__name__}.{_METHOD} was patched again on top of FORGE's patch; "
                    "undo that patch first."
                )
            setattr(owner, _METHOD, current.__wrapped__)
