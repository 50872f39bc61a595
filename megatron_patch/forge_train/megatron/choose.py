"""Which weights of a Megatron model FORGE takes, which it leaves to the stock optimizer, and why.

Everything that FORGE cannot train exactly as Megatron would is either *left* (the layer keeps
running and training as before; the summary says why) or *refused* (an error before anything has
changed, when leaving single layers would not help).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from ..data_parallel import Replicas
from ..parameter_ids import check_distinct, parameter_id
from .patch import is_patched, linear_classes

_LAYER = re.compile(r"(?P<stack>.*\blayers)\.\d+$")
_EXPERT = re.compile(r"(?P<stack>.*\blocal_experts)\.(?P<index>\d+)$")


@dataclass(frozen=True)
class Chosen:
    """A weight that FORGE trains. ``name`` is global: the same on every TP, PP and EP layout."""

    name: str
    module: torch.nn.Module
    row_parallel: bool
    parameter_id: int
    expert: bool = False

    @property
    def weight(self) -> torch.nn.Parameter:
        """The local shard, ``[out_local, in_local]``."""
        return self.module.weight


@dataclass(frozen=True)
class Left:
    """A parameter that stays with the stock optimizer, the reason, and whether it is a linear's."""

    name: str
    reason: str
    elements: int
    linear: bool = False


def refuse(config: Any) -> None:
    """Raise for settings under which no fused weight could be trained as Megatron would.

    Args:
        config: the model's ``TransformerConfig``.

    Raises:
        ValueError: names the setting and the way out.
    """
    reasons = {
        "defer_embedding_wgrad_compute": "it keeps the output layer's weight gradient for later, "
        "which FORGE never forms; turn it off",
        "fp16": "fp16 weights need dynamic loss scaling; train in bf16 or fp32",
        "fp8": "fp8 weights are not among FORGE's formats; turn it off",
        "fp4": "fp4 weights are not among FORGE's formats; turn it off",
        "cpu_offloading": "offloaded activations are not there when FORGE needs them; turn it off",
    }
    for setting, reason in reasons.items():
        if getattr(config, setting, None):
            raise ValueError(f"FORGE cannot be used with {setting}: {reason}.")


def replicas(reduction: str) -> Replicas | None:
    """The ranks that have the same weights: data-parallel times context-parallel ones."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return Replicas(group, reduction) if group.size() > 1 else None


def expert_replicas() -> Replicas | None:
    """The ranks that have the same experts.

    Each has tokens of its own number, for which panels are the reduction.
    """
    if not parallel_state.model_parallel_is_initialized():
        return None
    group = parallel_state.get_expert_data_parallel_group()
    return Replicas(group, "panels") if group.size() > 1 else None


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside Megatron's wrappers (``Float16Module``, DDP)."""
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    return chunk


def global_names(chunk: torch.nn.Module) -> dict[str, str]:
    """Module name in ``chunk`` → name in the whole model.

    Pipeline stages number their layers from zero; ``layer_number`` (from one) is the global number.
    Ranks of expert parallelism number their experts from zero, as many each.
    """
    renamed: dict[str, str] = {"": ""}
    for name, module in chunk.named_modules():
        if not name:
            continue
        parent, _, leaf = name.rpartition(".")
        whole = f"{renamed[parent]}.{leaf}".lstrip(".")
        number = getattr(module, "layer_number", None)
        match = _LAYER.match(whole)
        if match and isinstance(number, int):
            whole = f"{match['stack']}.{number - 1}"
        match = _EXPERT.match(whole)
        if match and parallel_state.model_parallel_is_initialized():
            experts = len(chunk.get_submodule(parent))
            first = parallel_state.get_expert_model_parallel_rank() * experts
            whole = f"{match['stack']}.{first + int(match['index'])}"
        renamed[name] = whole
    return renamed


def _reason(name: str, module: torch.nn.Module, owners: int, frozen: bool) -> str | None:
    """Why this module's ``weight`` is left, or None when FORGE takes it."""
    weight = module.weight
    if frozen:
        return "frozen: it does not train"
    if owners > 1:
        return f"shared by {owners} modules: a weight used twice in a step is not fused"
    if getattr(weight, "shared_embedding", False) or getattr(weight, "shared", False):
        return "tied to the embedding: a weight used twice in a step is not fused"
    if not isinstance(module, linear_classes()):
        if isinstance(module, VocabParallelEmbedding):
            return "embedding: its gradient is no matrix product"
        if weight.dim() < 2:
            return "not a matrix"
        if type(module).__module__.startswith(("megatron.core.extensions", "transformer_engine")):
            return "Transformer Engine layer: build the model with the local layer spec to fuse it"
        return "not a column- or row-parallel linear"
    if not is_patched(module):
        return f"{type(module).__name__} brings a _forward_impl of its own"
    if getattr(module, "gtp_remat_size", 1) > 1:
        return "sharded for rematerialisation (gtp_remat)"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{str(weight.dtype).removeprefix('torch.')} is not among FORGE's weight formats"
    if "mtp" in name.split("."):
        return "multi-token prediction: its gradients are clipped by a norm of their own"
    return None


def _used_twice(config: Any, name: str) -> str | None:
    """Multi-token prediction calls the main output layer once per predicted token."""
    if getattr(config, "mtp_num_layers", None) and name.endswith("output_layer"):
        return "used again by multi-token prediction: a weight used twice in a step is not fused"
    return None


def _modules(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    for chunk in chunks:
        model = unwrap(chunk)
        names = global_names(model)
        for name, module in model.named_modules(remove_duplicate=False):
            yield names.get(name, name), module


def choose(
    chunks: list[torch.nn.Module], config: Any, ranks: int = 1, expert_ranks: int = 1
) -> tuple[list[Chosen], list[Left]]:
    """Divide the parameters of ``chunks`` between FORGE and the stock optimizer.

    Args:
        chunks: the model chunks of this rank, before DDP, all weights as they will train.
        config: the model's ``TransformerConfig``.
        ranks: that have the same weights.
        expert_ranks: that have the same experts.

    Returns:
        The chosen weights in model order, and everything else with its reason.

    Raises:
        ValueError: two chosen weights have the same parameter id.
    """
    entries = list(_modules(chunks))
    owners = Counter(
        id(parameter)
        for _, module in entries
        for parameter in module.parameters(recurse=False)
        if parameter is not None
    )
    chosen: list[Chosen] = []
    left: list[Left] = []
    seen: set[int] = set()
    for name, module in entries:
        if isinstance(module, linear_classes()) and module.weight is None:
            left.append(Left(f"{name}.weight", "tied to the embedding: no weight of its own", 0))
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            reason: str | None = "not a matrix" if parameter.dim() < 2 else "not a linear's weight"
            if not parameter.requires_grad:
                reason = "frozen: it does not train"
            if key == "weight":
                frozen = not parameter.requires_grad
                reason = _reason(name, module, owners[id(parameter)], frozen)
                reason = reason or _used_twice(config, name)
                copies = expert_ranks if getattr(module, "is_expert", False) else ranks
                if reason is None and parameter.shape[0] % copies:
                    rows = parameter.shape[0]
                    reason = f"{rows} rows here do not divide by {copies} data-parallel ranks"
            full = f"{name}.{key}"
            if reason is None:
                row = isinstance(module, linear_classes()[1])
                expert = bool(getattr(module, "is_expert", False))
                chosen.append(Chosen(full, module, row, parameter_id(full), expert))
            else:
                linear = key == "weight" and isinstance(module, linear_classes())
                left.append(Left(full, reason, parameter.numel(), linear))
    check_distinct(item.name for item in chosen)
    return chosen, left
