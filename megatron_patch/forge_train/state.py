"""Optimizer states in torch.optim's layout, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .weights import Weight

_EXTRA = "weight_extra"
_MOST_STEPS = 2**32 - 1
"""The library counts steps in 32 bits."""


def whole_rows(weight: Weight, owned: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """An array of all rows of a weight, of which data-parallel ranks have parts; collective."""
    if weight.linear.data_parallel is None or weight.engine is None:
        return owned
    replicas = weight.engine.replicas
    return owned if replicas is None else replicas.whole(owned, dim)


def state_of(weight: Weight) -> dict[str, torch.Tensor]:
    """One parameter's entry in a ``state_dict``; see ``FusedOptimizer.state_dict``."""
    shape, storage = weight.parameter.shape, weight.storage
    entry = {"step": torch.tensor(float(weight.step))}
    for name, state, scale in zip(
        weight.linear.rule.state_names, storage.states, storage.scales, strict=True
    ):
        state = whole_rows(weight, state)
        entry[name] = state.view(shape) if state.numel() == shape.numel() else state
        if scale is not None:
            entry[f"{name}_scale"] = whole_rows(weight, scale, 1)
    if storage.weight_extra is not None:
        entry[_EXTRA] = whole_rows(weight, storage.weight_extra).view(shape)
    return entry


def load_state(weight: Weight, entry: Mapping[str, Any]) -> Callable[[], None]:
    """Check one parameter's saved entry against its weight.

    A state of the weight's own format is taken bit for bit; an fp32 one is rounded into the format.

    Args:
        weight: not changed before the returned function runs.
        entry: what :func:`state_of` or a torch optimizer saved; empty: a parameter that was never
            stepped.

    Returns:
        A function that writes the entry into the weight.

    Raises:
        ValueError: a state is missing, is no tensor, or its shape or format does not fit.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{weight.name}: the saved entry is {type(entry).__name__}, not a dict")
    storage, linear = weight.storage, weight.linear
    names = linear.rule.state_names
    actions: list[Callable[[], object]] = []
    if entry:
        # torch saves momentum_buffer=None for a parameter whose buffer does not exist yet.
        fresh = all(entry.get(name) is None for name in names)
        # torch's SGD counts no steps; any count above 0 says that the buffer is in use.
        step = _step(weight, entry.get("step", 0 if fresh else 1))
    else:
        fresh, step = True, 0
    for index, name in enumerate(names):
        if fresh:
            actions.append(storage.states[index].zero_)
            continue
        saved = entry.get(name)
        if saved is None:
            raise ValueError(
                f"{weight.name}: the saved state has no {name!r}, "
                f"rule {linear.rule.name!r} needs it"
            )
        actions.append(_load_array(weight, index, name, saved, entry.get(f"{name}_scale")))
    for scale in storage.scales:
        if fresh and scale is not None:
            actions.append(scale.zero_)
    extra, saved_extra = storage.weight_extra, entry.get(_EXTRA)
    if extra is not None and saved_extra is not None:
        _require_tensor(weight, _EXTRA, saved_extra)
        if saved_extra.dtype != extra.dtype or saved_extra.numel() != storage.weight.numel():
            raise ValueError(
                f"{weight.name}: the saved master is {saved_extra.dtype} of shape "
                f"{tuple(saved_extra.shape)}, weight_format="
                f"{linear.spec.weight_format!r} needs {extra.dtype}; fuse() with the saved format"
            )
        mine = saved_extra.reshape(storage.weight.shape)[linear.owned]
        actions.append(partial(extra.copy_, mine))

    def commit() -> None:
        for action in actions:
            action()
        weight.step = step
        weight.version += 1
        weight.clear()

    return commit


def _check_scale(weight: Weight, name: str, saved: Any, scale: torch.Tensor) -> None:
    """Refuse scales that no state has: they would be copied, or broadcast, without a word."""
    _require_tensor(weight, name, saved)
    shape = (scale.shape[0], weight.linear.layout.out_local)
    if saved.dtype != scale.dtype or saved.shape != shape:
        raise ValueError(
            f"{weight.name}: {name!r} was saved as {saved.dtype} of shape {tuple(saved.shape)}, "
            f"{scale.dtype} of shape {shape} is needed"
        )
    if not bool(((saved >= 0) & saved.isfinite()).all()):
        raise ValueError(f"{weight.name}: {name!r} holds what is no scale: it is corrupted")


def _step(weight: Weight, saved: object) -> int:
    """The saved count of steps: a number, or a tensor of one as torch saves it."""
    if isinstance(saved, torch.Tensor) and saved.numel() == 1 and not saved.is_meta:
        saved = saved.item()
    if isinstance(saved, (int, float)) and 0 <= saved <= _MOST_STEPS and saved == int(saved):
        return int(saved)
    raise ValueError(f"{weight.name}: the saved step is {saved!r}, not a count of steps")


def _require_tensor(weight: Weight, name: str, saved: object) -> None:
    """Refuse what cannot be copied from: before anything is written."""
    if not isinstance(saved, torch.Tensor):
        raise ValueError(f"{weight.name}: the saved {name!r} is {type(saved).__name__}, no tensor")
    if saved.layout != torch.strided or saved.is_meta:
        raise ValueError(f"{weight.name}: the saved {name!r} is {saved.layout} on {saved.device}")


def _load_array(
    weight: Weight, index: int, name: str, saved: torch.Tensor, saved_scale: torch.Tensor | None
) -> Callable[[], None]:
    """Write one state: as stored, or from fp32."""
    state, scale = weight.storage.states[index], weight.storage.scales[index]
    _require_tensor(weight, name, saved)
    whole, owned = weight.storage.weight.shape, weight.linear.owned
    same = saved.dtype == state.dtype and saved.shape in (whole, weight.parameter.shape)
    if same and (scale is None) == (saved_scale is None):
        if scale is not None:
            _check_scale(weight, f"{name}_scale", saved_scale, scale)

        def copy() -> None:
            state.copy_(saved.reshape(whole)[owned])
            if scale is not None and saved_scale is not None:
                scale.copy_(saved_scale[:, owned])

        return copy
    if saved.dtype == torch.float32 and saved.shape == weight.parameter.shape:
        values = saved.reshape(whole)[owned]
        return lambda: weight.linear.import_state(weight.storage, index, values)
    raise ValueError(
        f"{weight.name}: {name!r} was saved as {saved.dtype} of shape {tuple(saved.shape)}, which "
        f"does not load into state_format={weight.linear.state_formats[index]!r} of shape "
        f"{tuple(weight.parameter.shape)}; fuse() with the saved format, or load fp32 states"
    )
