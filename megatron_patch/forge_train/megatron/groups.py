"""Parameter groups for fused weights, as Megatron would have grouped them.

Megatron's schedulers, logging and checkpoints find ``lr``, ``weight_decay``, ``wd_mult`` and the
rest in ``param_groups``. A fused weight never reaches the optimizer that builds those groups, so
the same public matching (``ParamKey``) is asked here for the overrides it would have received.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import (
    combine_param_group_overrides,
    param_group_override_to_tuple,
)

Override = tuple[tuple[str, Any], ...]


def _override(weight: torch.nn.Parameter, name: str, overrides: Mapping[Any, Any]) -> Override:
    found = [override for key, override in overrides.items() if key.matches(weight, name)]
    return param_group_override_to_tuple(combine_param_group_overrides(found)) or ()


def _everywhere(keys: list[Override]) -> list[Override]:
    """The union of all ranks' keys in one order: a checkpoint needs equal groups on every rank."""
    if torch.distributed.is_initialized():
        gathered: list[list[Override]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, keys)
        keys = [key for rank_keys in gathered for key in rank_keys]
    return sorted(set(keys))


def param_groups(
    weights: Sequence[tuple[str, torch.nn.Parameter]],
    config: Any,
    config_overrides: Mapping[Any, Any] | None = None,
) -> list[dict[str, Any]]:
    """Group fused weights the way ``get_megatron_optimizer`` groups parameters.

    Args:
        weights: ``(name, weight)`` in model order, ``name`` as in the wrapped model chunk.
        config: the ``OptimizerConfig`` (``lr``, ``min_lr``, ``weight_decay``, ``decoupled_lr``).
        config_overrides: what was passed to ``get_megatron_optimizer``; None for its default.

    Returns:
        Groups with ``params`` and every field that ``OptimizerParamScheduler`` and Megatron's
        logging read; equal on all ranks but for ``params``.
    """
    if config_overrides is None:
        config_overrides = get_standard_config_overrides(config)
    members: dict[Override, list[torch.nn.Parameter]] = {}
    for name, weight in weights:
        members.setdefault(_override(weight, name, config_overrides), []).append(weight)
    groups = []
    for key in _everywhere(list(members)):
        override = dict(key)
        group = {
            "params": members.get(key, []),
            "is_expert_parallel": False,
            "default_config": not any("lr" in field for field in override),
            "wd_mult": 1.0,
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            "max_lr": config.lr,
            "min_lr": config.min_lr,
            **override,
        }
        group["lr"] = group["max_lr"]
        group["weight_decay"] = (config.weight_decay or 0.0) * group["wd_mult"]
        groups.append(group)
    return groups


_IDENTITY = (
    "max_lr",
    "min_lr",
    "start_wd",
    "end_wd",
    "wd_mult",
    "lr_mult",
    "optimizer",
    "is_expert_parallel",
    "is_decoupled_lr",
)


def identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two groups the same group in a checkpoint, whatever their order.

    A superset of Megatron's ``param_group_identifier_keys`` of every supported version.
    """
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _IDENTITY)


def merge_groups(
    groups: list[dict[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> dict[int, int]:
    """Add our groups to stock's sharded ``groups`` (in place) where none has their identity.

    Args:
        groups: of the stock optimizer's sharded state dict.
        ours: FORGE's groups.
        defaults: the stock optimizer's, for the fields of a group that is added.

    Returns:
        The id of each fused weight and the place of its group.
    """
    places = {identity(group): place for place, group in enumerate(groups)}
    by_weight: dict[int, int] = {}
    for group in ours:
        place = places.setdefault(identity(group), len(groups))
        if place == len(groups):
            fields = {key: value for key, value in group.items() if key != "params"}
            groups.append({**defaults, **fields, "params": LocalNonpersistentObject([])})
        by_weight.update((id(weight), place) for weight in group["params"])
    return by_weight


def split_groups(
    groups: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups that the stock optimizer has, in its order, with its parameter numbers.

    Raises:
        ValueError: the checkpoint has no group with such settings.
    """
    saved = {identity(group): group for group in groups}
    number, result = 0, []
    for group in wanted:
        found = saved.get(identity(group))
        if found is None:
            settings = dict(zip(_IDENTITY, identity(group), strict=True))
            raise ValueError(
                f"The checkpoint has no parameter group with {settings}; "
                "load it with the learning-rate and weight-decay settings it was saved with."
            )
        count = len(group["params"])
        result.append({**found, "params": list(range(number, number + count))})
        number += count
    return result


def read_groups(ours: Sequence[dict[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Take lr, weight decay and the like into our groups from the saved ones like them."""
    saved = {identity(group): group for group in groups}
    for group in ours:
        found = saved.get(identity(group), {})
        group.update({k: v for k, v in found.items() if k in group and k != "params"})
