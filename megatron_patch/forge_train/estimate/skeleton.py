"""A model without memory, so that the code that fuses real ones decides here as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .architecture import Module


class Conv1D(torch.nn.Module):
    """Stands for the transformers package's, which is no ``torch.nn.Linear``."""


class RMSNorm(torch.nn.Module):
    """Stands for a model's own norm."""


class LayerNorm(torch.nn.Module):
    """Stands for ``torch.nn.LayerNorm``."""


_OTHERS = {"Conv1D": Conv1D, "RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def skeleton(modules: Sequence[Module], dtype: torch.dtype) -> torch.nn.Module:
    """A module tree with parameters of these shapes that take no memory.

    Args:
        modules: in any order, tied ones after those that they are tied to.
        dtype: of every parameter.
    """
    root = torch.nn.Module()
    with FakeTensorMode():
        for module in modules:
            parent, _, local = module.name.rpartition(".")
            _parent(root, parent).add_module(local, _made(root, module, dtype))
    return root


def _made(root: torch.nn.Module, module: Module, dtype: torch.dtype) -> torch.nn.Module:
    if module.kind == "Linear":
        made: torch.nn.Module = torch.nn.Linear(module.shape[1], module.shape[0], bias=False)
    elif module.kind == "Embedding":
        made = torch.nn.Embedding(*module.shape)
    else:
        made = _OTHERS[module.kind]()
    if module.tied_to:
        weight = root.get_submodule(module.tied_to).weight
    else:
        weight = torch.nn.Parameter(torch.empty(module.shape, dtype=dtype))
    made.register_parameter("weight", weight)  # type: ignore[arg-type]
    if module.bias:
        bias = torch.nn.Parameter(torch.empty(module.outputs, dtype=dtype))
        made.register_parameter("bias", bias)
    return made


def _parent(root: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a dotted path, made on the way."""
    for part in filter(None, path.split(".")):
        child = root._modules.get(part)
        if child is None:
            child = torch.nn.Module()
            root.add_module(part, child)
        root = child
    return root
