"""FORGE's own row: what ``fuse`` would do with the model, and the bytes that the library names.

Nothing of it is decided here. :func:`forge_train.choose.choose` says which weights are fused, the
library's layouts say what they take, and its plans say when they are updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from .._comm import Place
from .._context import Context
from .._lib import check, ffi, lib
from .._linear import Linear
from .._types import Layout, LinearSpec, Plan
from ..choose import AUTO_FORMAT, DTYPE_OF_FORMAT, choose
from ..dense import shape_of
from ..engine import Engine
from ..rules import AdamW
from .architecture import Architecture, Module, modules_of
from .memory import Block, Memory
from .methods import (
    ACCUMULATORS,
    EXTRA,
    FACTORS,
    GRADIENTS,
    STATES,
    WORKSPACES,
    Method,
    Parameter,
)
from .options import DTYPES, Options
from .skeleton import skeleton
from .transformer import local_bias, local_shape

CONTEXT_WORKSPACE_BYTES = 60 << 20
"""The bound that ``forge_context_workspace_bytes`` promises for a GPU, which need not be here."""

_FP32 = 4


@dataclass(frozen=True)
class Handled:
    """What becomes of one weight.

    Attributes:
        name: of the parameter.
        group: the name that its module shares with those of other layers.
        shape: of this rank's part.
        fused: whether no gradient exists for it.
        why: the reason that it is left; for a fused one, why it has this schedule.
        layout: of weight and states.
        plan: of a fused weight.
        gathers: whether its factor X is gathered over the ranks, and kept so.
        workspace: bytes that each backward of it needs.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    fused: bool
    why: str
    layout: Layout
    plan: Plan | None = None
    gathers: bool = False
    workspace: int = 0


class Forge(Method):
    """FORGE in one weight format and one state format.

    Args:
        found: the model.
        parameters: as for :class:`Method`.
        options: of the run.

    Raises:
        ValueError: a format that the model's dtype does not fit, or a shard that does not divide.
    """

    def __init__(
        self, found: Architecture, parameters: Sequence[Parameter], options: Options
    ) -> None:
        self.options = options
        self.weight_format, self.state_format = _weight_format(options), options.state_format
        self.schedule = options.schedule
        # Tensor parallelism is Megatron-core's, whose own optimizer steps what is not fused.
        self.under_megatron = options.tp > 1
        title = f"FORGE {self.weight_format}/{options.state_format} {options.schedule}"
        super().__init__("forge", title, parameters, options.clip, options.micro_batches)
        # Factors of every micro-batch are kept.
        self.distinct_micro_batches = options.micro_batches
        self.segments: dict[str, list[tuple[Block, Block]]] = {}
        self.handled: dict[str, Handled] = {}
        try:
            Engine(
                schedule=options.schedule,
                micro_batches=options.micro_batches,
                needs_norm=options.clip,
            )
        except ValueError as error:
            self.refused = str(error)
            return
        if options.dp > 1:
            self.refused = "FORGE has no data parallelism yet"
            return
        self.handled = _handled(found, options)

    def persistent(self) -> dict[str, int]:
        """Weights, states and workspaces; buffers that an earlier step has made."""
        sizes = super().persistent()
        sizes.update(dict.fromkeys((EXTRA, STATES, ACCUMULATORS, GRADIENTS), 0))
        sizes[WORKSPACES] += CONTEXT_WORKSPACE_BYTES
        by_torch = self.options.rest == "torch" and not self.under_megatron
        for each in self.handled.values():
            layout = each.layout
            if by_torch and not each.fused:
                sizes[STATES] += 2 * layout.weight.bytes
                continue
            if self.under_megatron and not each.fused:
                elements = layout.out_local * layout.in_local
                sizes[EXTRA] += _FP32 * elements if self.options.dtype != "fp32" else 0
                sizes[STATES] += 2 * _FP32 * elements
                sizes[GRADIENTS] += _FP32 * elements
                continue
            sizes[EXTRA] += layout.weight_extra.bytes if layout.weight_extra else 0
            arrays = (*layout.states, *layout.scales)
            sizes[STATES] += sum(array.bytes for array in arrays if array is not None)
            sizes[ACCUMULATORS] += each.plan.accumulator_bytes if each.plan else 0
        return sizes

    def fuses(self, name: str) -> bool:
        """Whether a weight has no gradient."""
        return self.handled[name].fused

    def weight_gradient(
        self, memory: Memory, name: str, size: int, dy: Block, x: Block | None
    ) -> Block | None:
        """Nothing of a fused weight but, by its schedule, its factors."""
        each = self.handled[name]
        if not each.fused or each.plan is None or x is None:
            return super().weight_gradient(memory, name, size, dy, x)
        memory.scratch(each.workspace, WORKSPACES)
        if each.plan.schedule == "immediate":
            return None
        segments = self.segments.setdefault(name, [])
        accumulate = each.plan.schedule == "accumulate"
        # As weights.FusedWeight.keep does: the last micro-batch stays, unless it is too large.
        if accumulate and segments:
            self._fold(memory, name)
        segments.append((_kept(memory, dy), self._x(memory, each, x)))
        held = sum(block.bytes for segment in segments for block in segment)
        if accumulate and held > each.layout.out_local * each.layout.in_local * _FP32:
            self._fold(memory, name)
        return None

    def accumulate(self, memory: Memory, name: str, gradient: Block) -> None:
        """A gradient of what is left; Megatron adds it to a buffer."""
        if self.under_megatron:
            memory.release(gradient)
        else:
            super().accumulate(memory, name, gradient)

    def _x(self, memory: Memory, each: Handled, x: Block) -> Block:
        if each.gathers:
            full = self.options.tokens * each.layout.in_local * self.options.element
            return memory.allocate(full, FACTORS)
        return _kept(memory, x)

    def _fold(self, memory: Memory, name: str) -> None:
        for segment in self.segments.pop(name):
            for block in segment:
                memory.release(block)
        self.segments[name] = []


def _kept(memory: Memory, block: Block) -> Block:
    memory.move(block, FACTORS)
    return memory.retain(block)


def _handled(found: Architecture, options: Options) -> dict[str, Handled]:
    """Ask for every parameter what ``fuse`` would do with it."""
    if options.weight_format != "auto" and options.weight_format in DTYPE_OF_FORMAT:
        want = DTYPE_OF_FORMAT[options.weight_format]
        if want != DTYPES[options.dtype]:
            fits = next(name for name, dtype in DTYPES.items() if dtype == want)
            raise ValueError(
                f"--weight-format {options.weight_format} is of {fits} parameters; --dtype is "
                f"{options.dtype}. Choose --dtype {fits}, or another format"
            )
    modules = modules_of(found)
    by_weight = {module.weight: module for module in reversed(modules)}
    by_bias = {f"{module.name}.bias": module for module in modules if module.bias}
    dtype = DTYPES[options.dtype]
    weight_format = _weight_format(options)
    fused = LinearSpec(1, 1, AdamW(), dtype, weight_format, options.state_format)
    left = replace(fused, state_formats=options.rest_state_format)
    model = skeleton(modules, dtype)
    handled = {}
    for choice in choose(model, set(model.parameters()), (), options.weight_format):
        module = by_weight.get(choice.name)
        if module is not None and choice.module is not None:
            handled[choice.name] = _fused(choice.name, fused, module, options)
            continue
        if module is not None:
            shape, group = local_shape(module, options.tp), module.group
        else:
            owner = by_bias[choice.name]
            shape, group = local_bias(owner, options.tp), f"{owner.group}.bias"
        rows, cols = shape_of(prod(shape))
        spec = replace(left, out_features=rows, in_features=cols)
        layout, _plan, _workspace = _asked(spec, 1, 1, 1, False, "auto")
        handled[choice.name] = Handled(choice.name, group, shape, False, choice.why, layout)
    return handled


def _weight_format(options: Options) -> str:
    """The one that ``fuse`` takes."""
    if options.weight_format == "auto":
        return AUTO_FORMAT[DTYPES[options.dtype]]
    return options.weight_format


def _fused(name: str, spec: LinearSpec, module: Module, options: Options) -> Handled:
    """One weight that is fused."""
    shape = local_shape(module, options.tp)
    parallel = module.parallel if options.tp > 1 else "none"
    spec = replace(
        spec,
        # A vocabulary may have been padded.
        out_features=shape[0] * (options.tp if parallel == "column" else 1),
        in_features=module.shape[1],
        parallel=parallel,
        # Around a row-parallel linear Megatron's own code communicates.
        sequence_parallel=options.sp and parallel == "column",
    )
    layout, plan, workspace = _asked(
        spec, options.tp, options.tokens, options.micro_batches, options.clip, options.schedule
    )
    gathers = spec.sequence_parallel
    return Handled(name, module.group, shape, True, plan.reason, layout, plan, gathers, workspace)


@cache
def _context() -> Context:
    return Context(threads=1)


@cache
def _asked(
    spec: LinearSpec, ranks: int, tokens: int, micro_batches: int, clip: bool, schedule: str
) -> tuple[Layout, Plan, int]:
    """The library's layout, plan and workspace of a linear."""
    comm = Place(_context(), 0, ranks) if spec.parallel != "none" else None
    linear = Linear(spec, name="estimate", context=_context(), comm=comm)
    plan = linear.plan(
        tokens=tokens, micro_batches=micro_batches, needs_norm=clip, schedule=schedule
    )
    size = ffi.new("uint64_t *")
    check(
        lib.forge_linear_workspace(linear.handle, lib.FORGE_BACKWARD_UPDATE, tokens, size),
        "estimate",
    )
    return linear.layout, plan, int(size[0])
