"""FORGE's training state inside Megatron's checkpoints.

**Layout.** Where the stock part is one ``FP32Optimizer`` or ``Float16OptimizerWithFloat16Params``
(no distributed optimizer, no experts), the checkpoint is laid out exactly as if that stock
optimizer had owned all weights: fp32 tensors ``optimizer.state.<state>.<parameter>`` in model
space, ``optimizer.state.fp32_param.<parameter>`` for bf16 models, common ``param_groups`` and
``common_step``. So stock Megatron loads FORGE's checkpoints, FORGE loads stock's, and both reshard
over TP and PP. Otherwise the stock part and FORGE's part stand side by side, FORGE's with the same
keys.

**What is added** is a small common dictionary ``forge`` (rule, formats, step, seed), which stock
Megatron does not look at. Philox's parameter ids are CRC-32 of the global names and therefore not
stored.

**Formats.** States are exchanged as fp32 whatever they are stored as. For fp32, bf16 and q8 the
way out and back is exact (``forge_linear_export_state`` then ``forge_linear_import_state`` gives
the same bits), so a run resumed at the same TP continues bit for bit; after resharding q8 blocks
may be cut elsewhere and then differ by one quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from .groups import merge_groups, read_groups, split_groups

if TYPE_CHECKING:
    from .chain import ForgeChainedOptimizer
    from .column_row import FusedLinear
    from .optimizer import ForgeOptimizer

VERSION = 1
_MASTER = "fp32_param"
_MASTERS = "fp32_from_fp16_params"


def _plain_member(stock: ChainedOptimizer) -> Any | None:
    """The one stock member whose layout FORGE can join, or None."""
    members = stock.chained_optimizers
    plain = (FP32Optimizer, Float16OptimizerWithFloat16Params)
    if len(members) == 1 and isinstance(members[0], plain) and members[0].optimizer is not None:
        return members[0]
    return None


def _is_half(stock_member: Any) -> bool:
    return isinstance(stock_member, Float16OptimizerWithFloat16Params)


def _tensors(
    forge: ForgeOptimizer, model_state: dict[str, Any], is_loading: bool, master: bool
) -> list[dict[str, Any]]:
    """Per fused weight: state name (and ``fp32_param``) → sharded fp32 tensor of its shape.

    The copies live on the CPU, where a checkpoint is written from.
    """
    layers = forge.layers
    sharded = get_param_id_to_sharded_param_map(model_state, iter([x.weight for x in layers]))
    result = []
    for index, layer in enumerate(layers):
        if index not in sharded:
            raise ValueError(
                f"{layer.name} is not in the model's sharded state dict; call sharded_state_dict "
                "with the model's own (unmodified) sharded state dict."
            )
        names = [*layer.state_names, *([_MASTER] if master else [])]
        result.append(
            {
                name: make_sharded_optimizer_tensor(
                    sharded[index],
                    torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
                    if is_loading
                    else _export(layer, name),
                    prefix=f"optimizer.state.{name}",
                )
                for name in names
            }
        )
    return result


def _export(layer: FusedLinear, name: str) -> torch.Tensor:
    if name == _MASTER:
        return layer.export_weight()
    return layer.export_state(layer.state_names.index(name))


def _common(forge: ForgeOptimizer) -> dict[str, Any]:
    return {"version": VERSION, **forge.description(), "step": forge.step_count, "seed": forge.seed}


def sharded_state_dict(
    chain: ForgeChainedOptimizer,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """The chain's state for ``dist_checkpointing``, laid out as the module describes.

    Args:
        chain: the optimizer.
        model_sharded_state_dict: of the model, with its own parameters in it (``keep_vars``).
        is_loading: make a template to load into; tensors are allocated, not exported.
        kwargs: handed to the stock members (``metadata``).

    Raises:
        ValueError: a fused weight is missing from ``model_sharded_state_dict``.
    """
    forge, member = chain.forge, _plain_member(chain.stock)
    half = member is not None and _is_half(member)
    needs_master = half or (member is None and forge.has_master)
    tensors = _tensors(forge, model_sharded_state_dict, is_loading, needs_master)
    if member is None:
        stock = chain.stock.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in forge.param_groups]
        return {
            "stock": stock,
            "forge": {**_common(forge), "param_groups": groups, "parameters": tensors},
        }
    state = member.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
    inner = state["optimizer"] if half else state
    first = _stock_parameters(member)
    for index, entry in enumerate(tensors):
        inner["state"][first + index] = {k: v for k, v in entry.items() if k != _MASTER}
    if forge.step_count and "common_step" not in inner["state"]:
        inner["state"]["common_step"] = torch.tensor(float(forge.step_count))
    groups = inner["param_groups"]
    by_weight = merge_groups(groups, forge.param_groups, member.optimizer.defaults)
    where = [by_weight[id(layer.weight)] for layer in forge.layers]
    if half:
        masters = state[_MASTERS]
        masters.extend([] for _ in range(len(groups) - len(masters)))
        for index, entry in enumerate(tensors):
            masters[where[index]].append(entry[_MASTER])
    state["forge"] = _common(forge)
    return state


def _stock_parameters(member: Any) -> int:
    """How many parameters the stock member numbers; FORGE's numbers follow."""
    return sum(len(group["params"]) for group in member.optimizer.param_groups)


def load_state_dict(chain: ForgeChainedOptimizer, state: dict[str, Any]) -> None:
    """Load a state that any of the layouts describes, ``state_dict``'s included.

    Raises:
        ValueError: FORGE's part is missing, or was written for another rule.
    """
    forge, member = chain.forge, _plain_member(chain.stock)
    if not isinstance(state, dict):
        raise ValueError(
            "This optimizer state is a list of stock members without FORGE's part. Convert it by "
            "saving with --ckpt-format torch_dist, which FORGE and stock Megatron share."
        )
    if "stock" in state and "forge" in state:
        _check(forge, state["forge"])
        chain.stock.load_state_dict(state["stock"])
        if "raw" in state["forge"]:
            forge.load_state_dict(state["forge"])
            return
        saved = state["forge"]
        read_groups(forge.param_groups, saved["param_groups"])
        _import(forge, saved["parameters"])
        forge.resume(saved["step"], saved["seed"])
        return
    if member is None:
        raise ValueError(
            "The checkpoint was written without a distributed optimizer and without experts, but "
            "this run has one of them: FORGE cannot convert between the two layouts."
        )
    if 0 in state and 1 in state:
        raise ValueError(
            "The checkpoint's optimizer state is a stock one's that keeps experts apart, as expert "
            "parallelism makes it; FORGE cannot read it. Go on from the weights: --no-load-optim."
        )
    _load_unified(forge, member, state)


def _load_unified(forge: ForgeOptimizer, member: Any, state: dict[str, Any]) -> None:
    half = _is_half(member)
    inner = state["optimizer"] if half else state
    saved = state.pop("forge", None)
    if saved is not None:
        _check(forge, saved)
    groups, states = inner["param_groups"], inner["state"]
    step = saved["step"] if saved is not None else _stock_step(inner)
    first = _stock_parameters(member)
    entries = [dict(states.pop(first + index, {})) for index in range(len(forge.layers))]
    read_groups(forge.param_groups, groups)
    mine = split_groups(groups, member.param_groups)
    if half:
        _split_masters(state, member, forge, entries)
    _import(forge, entries)
    inner["param_groups"] = mine
    member.load_state_dict(state)
    forge.resume(step, saved["seed"] if saved is not None else forge.seed)


def _stock_step(inner: dict[str, Any]) -> int:
    """Applied steps according to stock: one number for all parameters, or one per group (TE)."""
    step = inner["state"].get("common_step")
    if step is None:
        step = next((group["step"] for group in inner["param_groups"] if "step" in group), 0)
    return int(step)


def _split_masters(
    state: dict[str, Any], member: Any, forge: ForgeOptimizer, entries: list[dict[str, Any]]
) -> None:
    """Move FORGE's masters out of stock's lists of fp32 parameters, where they follow stock's."""
    own = member.fp32_from_float16_groups
    # The lists have the order of the template, so the template's groups say whose they are.
    template = [dict(group) for group in member.optimizer.param_groups]
    by_weight = merge_groups(template, forge.param_groups, {})
    lists = [_as_list(values) for values in _as_list(state[_MASTERS])]
    counts = [len(own[place]) if place < len(own) else 0 for place in range(len(lists))]
    queues = [iter(values[count:]) for values, count in zip(lists, counts, strict=True)]
    for layer, entry in zip(forge.layers, entries, strict=True):
        entry[_MASTER] = next(queues[by_weight[id(layer.weight)]])
    state[_MASTERS] = [lists[place][: counts[place]] for place in range(len(own))]


def _as_list(values: Any) -> list[Any]:
    """A loaded list; where dist_checkpointing filtered one it comes back as index → value."""
    return [values[key] for key in sorted(values)] if isinstance(values, dict) else list(values)


def _import(forge: ForgeOptimizer, entries: list[dict[str, Any]] | dict[int, Any]) -> None:
    entries = _as_list(entries)
    for layer, entry in zip(forge.layers, entries, strict=True):
        missing = [name for name in layer.state_names if name not in entry]
        if missing:
            raise ValueError(
                f"The checkpoint has no {', '.join(missing)} for {layer.name}: it was written with "
                "another rule. Load it without optimizer state, or train with that rule."
            )
    for layer, entry in zip(forge.layers, entries, strict=True):
        for index, name in enumerate(layer.state_names):
            layer.import_state(index, entry[name])
        if _MASTER in entry:
            layer.import_weight(entry[_MASTER])


def _check(forge: ForgeOptimizer, saved: dict[str, Any]) -> None:
    if saved.get("version", 0) > VERSION:
        raise ValueError(
            f"The checkpoint's FORGE part is version {saved['version']}, newer than this "
            f"forge_train reads ({VERSION}); update forge_train."
        )
    rule = forge.description()["rule"]
    if saved["rule"] != rule:
        raise ValueError(
            f"The checkpoint was written with rule {saved['rule']!r}, this run uses {rule!r}."
        )
