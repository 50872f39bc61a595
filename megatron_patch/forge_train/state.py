"""Optimizer states in torch.optim's layout, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .weights import Weight

_EXTRA = "weight_extra"


def state_of(weight: Weight) -> dict[str, torch.Tensor]:
    """One parameter's entry in a ``state_dict``; see ``FusedOptimizer.state_dict``."""
    shape, storage = weight.parameter.shape, weight.storage
    entry = {"step": torch.tensor(float(weight.step))}
    for name, state, scale in zip(
        weight.linear.rule.state_names, storage.states, storage.scales, strict=True
    ):
        entry[name] = state.view(shape) if state.numel() == shape.numel() else state
        if scale is not None:
            entry[f"{name}_scale"] = scale
    if storage.weight_extra is not None:
        entry[_EXTRA] = storage.weight_extra.view(shape)
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
        ValueError: a state is missing, or its shape or format does not fit.
    """
    storage, linear = weight.storage, weight.linear
    names = linear.rule.state_names
    actions: list[Callable[[], object]] = []
    if entry:
        # torch saves momentum_buffer=None for a parameter whose buffer does not exist yet.
        fresh = all(entry.get(name) is None for name in names)
        # torch's SGD counts no steps; any count above 0 says that the buffer is in use.
        step = int(entry.get("step", 0 if fresh else 1))
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
        if saved_extra.dtype != extra.dtype or saved_extra.numel() != extra.numel():
            raise ValueError(
                f"{weight.name}: the saved master is {saved_extra.dtype} of shape "
                f"{tuple(saved_extra.shape)}, weight_format="
                f"{linear.spec.weight_format!r} needs {extra.dtype}; fuse() with the saved format"
            )
        actions.append(partial(extra.copy_, saved_extra.reshape(extra.shape)))

    def commit() -> None:
        for action in actions:
            action()
        weight.step = step
        weight.version += 1
        weight.clear()

    return commit


def _load_array(
    weight: Weight, index: int, name: str, saved: torch.Tensor, saved_scale: torch.Tensor | None
) -> Callable[[], None]:
    """Write one state: as stored, or from fp32."""
    state, scale = weight.storage.states[index], weight.storage.scales[index]
    same = saved.dtype == state.dtype and saved.numel() == state.numel()
    if same and (scale is None) == (saved_scale is None):

        def copy() -> None:
            state.copy_(saved.reshape(state.shape))
            if scale is not None and saved_scale is not None:
                scale.copy_(saved_scale)

        return copy
    layout = weight.linear.layout
    if saved.dtype == torch.float32 and saved.shape == weight.parameter.shape:
        values = saved.reshape(layout.out_local, layout.in_local)
        return lambda: weight.linear.import_state(weight.storage, index, values)
    raise ValueError(
        f"{weight.name}: {name!r} was saved as {saved.dtype} of shape {tuple(saved.shape)}, which "
        f"does not load into state_format={weight.linear.state_formats[index]!r} of shape "
        f"{tuple(weight.parameter.shape)}; fuse() with the saved format, or load fp32 states"
    )
