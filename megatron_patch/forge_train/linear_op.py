"""The fused linear as operators of torch, so that ``torch.compile`` sees one opaque node.

A compiler may drop, merge, move and repeat what it takes for pure, and use a buffer again that
nothing reads any more. What keeps the update right:

- ``forge::linear`` takes the weight's ``key``, a number that requires a gradient, and
  ``forge::linear_backward`` returns that gradient (zero). So the backward has a result that is
  always asked for, and is never dropped, also where no dX is needed.
- Each ``forge::linear_backward`` has a number of its own, so that no two of them are merged.
- ``forge::linear`` also returns the ``use`` that the backward takes: where the forward is repeated
  for the backward, it is repeated before it. ``Engine`` refuses a repetition after an update.
- W is read and written by way of the key alone in the backward: no graph holds it, or a copy.
- Factors that wait for the step are copies: the compiler's own buffers are used again.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ._types import Segment
from .held import Held
from .linear_passes import backward_pass, forward_pass
from .weight_keys import weight_of
from .weights import Use

_library = torch.library.Library("forge", "DEF")
_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    # Launches with numbers of the host: mode="reduce-overhead" captures what is around it. A torch
    # without the tag captures nothing of a graph that holds a tensor of the CPU, as the key is.
    _TAGS.append(torch.Tag.cudagraph_unsafe)

_numbers = itertools.count(1)


class _Value:
    """An input of linears: the copy that weights hold of it for the step, once for all of them."""

    # Weak, for a name is swept later than the step.
    copy: Callable[[], torch.Tensor | None] = staticmethod(lambda: None)


class _Values(Held):
    """Swept when there are twice as many as after the last sweep, so that a name costs little."""

    limit = 64

    def put(self, number: int, name: torch.Tensor, held: object) -> None:
        if len(self._objects) >= self.limit:
            self.limit = 64 + 2 * self.sweep()
        super().put(number, name, held)


_values = _Values()


# -- forge::linear ---------------------------------------------------------------------------------

_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor key) -> (Tensor, Tensor)", tags=_TAGS
)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y ``[..., out]`` and the use, int64 ``[4]`` on the CPU: number, weight, version, task."""
    owner = int(key.item())
    fused = weight_of(owner)
    if fused.engine is None:
        raise RuntimeError(f"{fused.name} is in no engine: call engine.add([weight]) first")
    fused.graph_uses.sweep()
    use = fused.engine.begin_use(fused)
    number = next(_numbers)
    name = torch.tensor([number, owner, use.version, use.task], device="cpu")
    y = forward_pass(x, weight, bias)
    fused.graph_uses.put(number, name, use)
    fused.uses.add(use)
    return y, name


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty(4, dtype=torch.int64, device="cpu")


# -- forge::value_of -------------------------------------------------------------------------------

_library.define("value_of(Tensor x) -> Tensor", tags=_TAGS)


def _value_of(x: torch.Tensor) -> torch.Tensor:
    """A name for the value of ``x``, int64 ``[1]`` on the CPU.

    Linears with one input (those of query, key and value) then hold one copy of it. Whether two
    inputs are one value only the compiler knows, which merges equal nodes: equal addresses may be
    one buffer with two values in turn.
    """
    number = next(_numbers)
    name = torch.tensor([number], device="cpu")
    _values.put(number, name, _Value())
    return name


def _value_of_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


# -- forge::linear_backward ------------------------------------------------------------------------

_library.define(
    "linear_backward(Tensor dy, Tensor x, Tensor value, Tensor use, bool need_dx, "
    "bool need_dbias, int place) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    value: torch.Tensor,
    use: torch.Tensor,
    need_dx: bool,
    need_dbias: bool,
    place: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dX and dbias, empty where not needed, and the gradient of the key."""
    number, owner, version, task = use.tolist()
    fused = weight_of(owner)
    begun = fused.graph_uses.get(number)
    begun = begun if begun is not None else Use(version, task)
    result = backward_pass(fused, begun, dy, x, need_dx=need_dx, need_dbias=need_dbias)
    # Exchanged factors are the library's own already.
    exchanged = fused.linear.data_parallel is not None
    for kept in (fused.local,) if exchanged else (fused.segments, fused.local):
        if kept and kept[-1] is result.segment:
            _own_last_segment(kept, _values.get(int(value.item())) or _Value())
    nothing = dy.new_empty(0)
    done = torch.zeros(1, dtype=torch.float64, device="cpu")
    return (
        result.dx if result.dx is not None else nothing,
        result.dbias if result.dbias is not None else dy.new_empty(0),
        done,
    )


def _own_last_segment(segments: list[Segment], value: _Value) -> None:
    """Copy the factors that the backward has just kept, for they are the compiler's buffers."""
    kept = segments.pop()
    x = value.copy()
    if x is None:
        x = kept.x.clone(memory_format=torch.contiguous_format)
        value.copy = weakref.ref(x)
    dy = kept.dy.clone(memory_format=torch.contiguous_format)
    segments.append(Segment.of(dy, x))


def _linear_backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    value: torch.Tensor,
    use: torch.Tensor,
    need_dx: bool,
    need_dbias: bool,
    place: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        dy.new_empty(dy.shape[-1] if need_dbias else 0),
        torch.empty(1, dtype=torch.float64, device="cpu"),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (x, *_), (_y, use) = inputs, output
    ctx.save_for_backward(x, use)


def _backward(
    ctx: Any, dy: torch.Tensor, _duse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x, use = ctx.saved_tensors
    need_dx, _, need_dbias, _ = ctx.needs_input_grad
    with torch.no_grad():
        value = torch.ops.forge.value_of(x)
        dx, dbias, done = torch.ops.forge.linear_backward(
            dy, x, value, use, need_dx, need_dbias, next(_numbers)
        )
    return dx if need_dx else None, None, dbias if need_dbias else None, done


for _name, _kernel, _fake in (
    ("linear", _linear, _linear_fake),
    ("value_of", _value_of, _value_of_fake),
    ("linear_backward", _linear_backward, _linear_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"forge::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "forge::linear", _backward, setup_context=_setup_context, lib=_library
)
