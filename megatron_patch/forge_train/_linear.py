"""One sharded linear layer of the C ABI with the tensors that it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch

from ._comm import Comm
from ._config import linear_config
from ._context import Context, canonical, default_context
from ._lib import check, ffi, lib, new_struct, text
from ._structs import (
    layout_of,
    norm_of,
    parameter_struct,
    report_of,
    scalars_bytes,
    segment_array,
    step_struct,
    struct_at,
)
from ._tensors import as_factor, fill_buffer, fill_matrix, require_device
from ._types import (
    NORM_METHODS,
    REDUCTIONS,
    SCHEDULES,
    BackwardResult,
    Layout,
    LinearSpec,
    Norm,
    Plan,
    Report,
    Scalars,
    Segment,
    Storage,
    choice,
)
from .rules import hyper_values, rule_flags, rule_info

_NAME_OF_SCHEDULE = {number: name for name, number in SCHEDULES.items()}
_NAME_OF_REDUCTION = {number: name for name, number in REDUCTIONS.items()}
_ALIGNMENT = 256
"""Of what the library leaves in a workspace."""
_KEPT_SHARE = 0.7
"""Of a workspace's bytes: with fewer of use, what is kept is copied out of it."""
_MODES = {
    "update": lib.FORGE_BACKWARD_UPDATE,
    "accumulate": lib.FORGE_BACKWARD_ACCUMULATE,
    "keep": lib.FORGE_BACKWARD_KEEP,
}


class _Known:
    """A ``forge_parameter``, for as long as its tensors are these and where they were."""

    def __init__(self, struct: Any, arrays: Sequence[torch.Tensor | None]) -> None:
        self.struct = struct
        self._were = [None if array is None else ref(array) for array in arrays]
        self._at = [None if array is None else array.data_ptr() for array in arrays]

    def is_of(self, arrays: Sequence[torch.Tensor | None]) -> bool:
        """Whether a struct of these would be the same."""
        for array, was, at in zip(arrays, self._were, self._at, strict=True):
            if array is None or was is None:
                if array is not was:
                    return False
            elif was() is not array or array.data_ptr() != at:
                return False
        return True


class Linear:
    """Owns a ``forge_linear``; knows nothing of autograd or modules.

    Args:
        spec: shapes, formats, rule, shard.
        name: leads every error message.
        context: the backend; that of ``comm``, else the process' own of ``device``, where None.
        comm: the tensor-parallel group; one rank alone where None.
        device: where its tensors are; the context's where None.
        data_parallel: the ranks that have the same W and other tokens; None: no others. This rank
            then updates the rows that it owns over the tokens of all.
        reduction: one of :data:`REDUCTIONS`: how dW is summed over them.
        micro_batches: backwards in a step, for ``auto``: factors are exchanged in each, panels may
            be reduced once.

    Attributes:
        device: where every tensor of every call must be.
        owned: the rows of the weight that this rank updates, as a slice.

    Raises:
        ForgeArgumentError: a combination that the library does not support, or shards that do not
            divide.
        ForgeBackendError: see :class:`Context`.
        ValueError: an unknown format, rounding or dtype, or a context of another device.
    """

    def __init__(
        self,
        spec: LinearSpec,
        *,
        name: str = "",
        context: Context | None = None,
        comm: Comm | None = None,
        device: torch.device | str | None = None,
        data_parallel: Comm | None = None,
        reduction: str = "auto",
        micro_batches: int = 1,
    ) -> None:
        """Make the layer; no tensor is allocated."""
        self.spec, self.name = spec, name
        if context is None:
            context = comm.context if comm is not None else default_context(device or "cpu")
        self.context, self.device = context, context.device
        if device is not None and canonical(device) != self.device:
            raise ValueError(
                f"{name} is on {device}, but its context computes on {self.device}; pass a context "
                "of the same device, or none"
            )
        # The library wants the communicator to outlive its linears: hold on to it.
        self.comm = comm if comm is not None else Comm(self.context)
        self.flags = rule_flags(spec.rule.name, spec.rule.options)
        self.rule = rule_info(spec.rule.name, self.flags)
        config, _rule_name = linear_config(spec, name)
        out = ffi.new("forge_linear **")
        self.data_parallel, self.reduction = data_parallel, reduction
        self.micro_batches = micro_batches
        sums = choice(REDUCTIONS, "reduction", reduction), micro_batches
        with self.context.current():
            handles = (self.context.handle, self.comm.handle)
            if data_parallel is None:
                made = lib.forge_linear_new(*handles, config, out)
            else:
                others = data_parallel.handle
                made = lib.forge_linear_new_data_parallel(*handles, others, *sums, config, out)
            check(made, name)
        self.handle = ffi.gc(out[0], lib.forge_linear_free)
        self.state_formats = tuple(spec.formats_of(len(self.rule.state_names)))
        self.layout = self._layout()
        first = self.layout.owned_offset
        self.owned = slice(first, first + self.layout.out_owned)
        # Of the exchanged factors of so many tokens.
        self._plans: dict[int, Plan] = {}
        # Column gathers X, so dY has every token; row gathers dY, so X has.
        gathers = spec.sequence_parallel and self.comm.size > 1
        self._gathers_x = gathers and spec.parallel == "column"
        self._gathers_dy = gathers and spec.parallel == "row"
        self._names = f"{name}: dY", f"{name}: X"
        # Kept from call to call, for a call's own work is a few µs.
        self._last_parameter: _Known | None = None
        self._last_places: dict[str, tuple[torch.Tensor, Any]] = {}
        self._workspace_bytes: dict[tuple[str, int], int] = {}
        self._idle_calls: list[Any] = []

    def _layout(self) -> Layout:
        out = new_struct("forge_layout")
        check(lib.forge_linear_layout(self.handle, out), self.name)
        return layout_of(out)

    def allocate(self, weight: torch.Tensor) -> Storage:
        """Allocate states beside a weight ``[out_local, in_local]``.

        The weight is not copied: updates write into its memory. A master or low half
        (``bf16+fp32``, ``bf16+16``) starts as exactly this weight.

        Raises:
            ValueError: shape, dtype, device or layout of the weight do not fit.
        """
        want, data = self.layout.weight, weight.detach()
        shape = (self.layout.out_local, self.layout.in_local)
        if tuple(data.shape) != shape or data.dtype != want.dtype or not data.is_contiguous():
            raise ValueError(
                f"{self.name}: weight_format={self.spec.weight_format!r} needs a contiguous weight "
                f"{shape} of {want.dtype}, got {tuple(data.shape)} of {data.dtype} with strides "
                f"{data.stride()}"
            )
        require_device(data, self.device, f"{self.name}: weight")
        extra = self.layout.weight_extra
        storage = Storage(
            weight=data,
            weight_extra=extra.zeros(data.device) if extra else None,
            states=[state.zeros(data.device) for state in self.layout.states],
            scales=[scale.zeros(data.device) if scale else None for scale in self.layout.scales],
        )
        if extra is not None:
            self.import_weight(storage, data[self.owned].float())
        return storage

    def tokens_of(self, dy: torch.Tensor, x: torch.Tensor) -> int:
        """Tokens of a backward on this rank, after gathering over tensor-parallel ranks."""
        factor = x if self._gathers_dy else dy
        return factor.numel() // max(factor.shape[-1], 1)

    def reduces_panels(self, tokens: int) -> bool:
        """Whether dW of so many tokens is reduced in panels, so that no factors can be kept."""
        if self.data_parallel is None:
            return False
        if self.reduction != "auto":
            return self.reduction == "panels"
        if tokens not in self._plans:
            if len(self._plans) >= 64:
                self._plans.clear()
            self._plans[tokens] = self.plan(tokens=tokens, micro_batches=1, needs_norm=True)
        return self._plans[tokens].reduction == "panels"

    def gather_weight(self, storage: Storage) -> None:
        """Start to gather W from the ranks that own its rows, as an update does by itself.

        ``data_parallel.wait()`` comes before W is read.
        """
        buffer = ffi.new("forge_buffer *")
        fill_buffer(buffer, storage.weight, self.device, f"{self.name}: weight")
        self._call(lib.forge_linear_gather_weight, buffer[0])

    def scalars(
        self, group: Mapping[str, Any], *, step: int, seed: int, grad_scale: float = 1.0
    ) -> Scalars:
        """One step's numbers from a param group; missing ones are the rule's own options.

        Raises:
            ValueError: the group changed an option that is fixed when the layer is made, or a
                number is out of the rule's range.
        """
        options = {**self.spec.rule.options, **group}
        if rule_flags(self.spec.rule.name, options) != self.flags:
            raise ValueError(
                f"{self.name}: on/off options and whether momentum is 0 are fixed at fuse(); "
                "remove() and fuse() again to change them"
            )
        scalars = Scalars(step, seed, grad_scale, hyper_values(self.rule, options))
        # Here, and not only with the update: by then the layers before have been updated.
        check(lib.forge_linear_check_step(self.handle, step_struct(scalars)), self.name)
        return scalars

    def device_scalars(self, scalars: Scalars) -> torch.Tensor:
        """The same numbers in the backend's memory, for an update whose numbers change later.

        A captured CUDA graph reads them when it runs: copy another step's into the tensor before
        the next replay. :meth:`scalars` has checked them; nobody does when they are read.
        """
        return scalars_bytes(scalars).to(self.device)

    # -- the calls ----------------------------------------------------------------------------

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        storage: Storage,
        *,
        mode: str,
        need_dx: bool = True,
        need_dbias: bool = False,
        accumulator: torch.Tensor | None = None,
        scalars: Scalars | torch.Tensor | None = None,
        report: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
    ) -> BackwardResult:
        """A whole backward in one call: communication, dX, dbias and, by ``mode``, the weight.

        Args:
            dy: ``[..., out_local]``, this rank's rows under row + sequence parallelism.
            x: ``[..., in_local]``, this rank's rows under column + sequence parallelism.
            storage: read for dX; written in place by ``update``.
            mode: ``update`` (needs ``scalars``), ``accumulate`` (adds to ``accumulator``) or
                ``keep`` (hands the factors back as a segment).
            need_dx: whether to compute dX, shaped like ``x``.
            need_dbias: whether to compute dbias ``[out_local]`` of the factor dtype.
            accumulator: fp32 ``[out_owned, in_local]``.
            scalars: the step's numbers, or the tensor that :meth:`device_scalars` made of them.
            report: where ``update`` leaves its report, ``uint8 [sizeof(forge_report)]`` on the
                device; None: the call waits for the update and returns it.
            norm: where ``keep`` leaves ``Σ dW²`` of these factors, ``uint8 [sizeof(forge_norm)]``
                in the backend's memory; None: it is not computed.
        """
        dtype, layout = self.spec.factor_dtype, self.layout
        dy2d = as_factor(dy, layout.out_local, dtype, self.device, self._names[0])
        x2d = as_factor(x, layout.in_local, dtype, self.device, self._names[1])
        gathers_x, gathers_dy = self._gathers_x, self._gathers_dy
        tokens = (x2d if gathers_dy else dy2d).shape[0]
        if gathers_x or self.data_parallel is not None:
            x2d = x2d.contiguous()
        if gathers_dy:
            dy2d = dy2d.contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else None
        dbias = (
            torch.empty(layout.out_local, dtype=dtype, device=self.device) if need_dbias else None
        )
        workspace = self._workspace(mode, tokens)

        # Two threads may be here at once.
        call = self._idle_calls.pop() if self._idle_calls else new_struct("forge_backward")
        host_report = ffi.NULL
        call.mode, call.tokens = _MODES[mode], tokens
        call.dy_stride, call.x_stride = fill_matrix(call.dy, dy2d), fill_matrix(call.x, x2d)
        fill_buffer(call.dx, dx, self.device, "dX")
        fill_buffer(call.dbias, dbias, self.device, "dbias")
        fill_buffer(call.workspace, workspace, self.device, "workspace")
        fill_buffer(call.accumulator, accumulator, self.device, "accumulator")
        call.device_report = ffi.NULL
        call.device_norm = ffi.NULL if norm is None else self.place(norm, "forge_norm")
        if mode == "update":
            host_report = self._report(call, report)
        # The struct holds pointers only: these names keep their targets alive over the call.
        parameter = self._parameter(storage)
        step = self._step(scalars) if scalars is not None else ffi.NULL
        call.parameter, call.step = parameter, step
        with self.context.current():
            stream = self.context.stream()
            status = lib.forge_linear_backward(self.handle, call, host_report, stream)
            self._check(status)
        self._idle_calls.append(call)

        segment = None
        exchanged = self.data_parallel is not None and tokens > 0
        if mode == "keep" and exchanged and not self.reduces_panels(tokens):
            segment = self._exchanged(workspace, tokens)
        elif mode == "keep":
            if gathers_x:
                x2d = self._gathered(workspace, tokens, layout.in_local)
            if gathers_dy:
                dy2d = self._gathered(workspace, tokens, layout.out_local)
            segment = Segment.of(dy2d, x2d)
        return BackwardResult(
            dx=dx,
            dbias=dbias,
            segment=segment,
            report=report_of(host_report) if host_report else None,
        )

    def _check(self, status: int) -> None:
        """Raise a collective's own exception where there was one, else the status'."""
        if status != 0 and self.data_parallel is not None:
            # One of them has the exception; the other knows of none and would tell the status.
            self.data_parallel.raise_own()
        self.comm.check(status, self.name)

    def _report(self, call: Any, report: torch.Tensor | None) -> Any:
        """Have the report left in ``report``, or return the host's struct for it."""
        if report is None:
            return new_struct("forge_report")
        call.device_report = self.place(report, "forge_report")
        return ffi.NULL

    def place(self, row: torch.Tensor, struct: str) -> Any:
        """The address of a struct in the backend's memory; a tensor's memory stays where it is."""
        known, at = self._last_places.get(struct, (None, None))
        if row is not known:
            at = struct_at(row, struct, self.device, f"{self.name}: {struct}")
            self._last_places[struct] = row, at
        return at

    def _step(self, scalars: Scalars | torch.Tensor) -> Any:
        if isinstance(scalars, torch.Tensor):
            require_device(scalars, self.device, f"{self.name}: scalars")
        return step_struct(scalars)

    def _parameter(self, storage: Storage) -> Any:
        """The struct of the last call, while its tensors are the same and where they were."""
        arrays = [storage.weight, storage.weight_extra, *storage.states, *storage.scales]
        before = self._last_parameter
        if before is None or not before.is_of(arrays):
            made = parameter_struct(storage, self.device, self.name)
            self._last_parameter = before = _Known(made, arrays)
        return before.struct

    def _workspace(self, mode: str, tokens: int) -> torch.Tensor | None:
        size = self._workspace_bytes.get((mode, tokens))
        if size is None:
            out = ffi.new("uint64_t *")
            check(lib.forge_linear_workspace(self.handle, _MODES[mode], tokens, out), self.name)
            if len(self._workspace_bytes) >= 64:
                self._workspace_bytes.clear()
            size = self._workspace_bytes[mode, tokens] = out[0]
        return torch.empty(size, dtype=torch.uint8, device=self.device) if size else None

    def _gathered(self, workspace: torch.Tensor | None, tokens: int, cols: int) -> torch.Tensor:
        """The gathered factor that ``keep`` leaves at the start of the workspace."""
        if workspace is None:
            raise RuntimeError(f"{self.name}: the library reports no workspace to gather into")
        dtype = self.spec.factor_dtype
        used = tokens * cols * dtype.itemsize
        factor = workspace[:used].view(dtype).view(tokens, cols)
        # The rest of the workspace was scratch; holding it until the step would be a waste.
        return factor.clone() if workspace.numel() > used else factor

    def _exchanged(self, workspace: torch.Tensor | None, tokens: int) -> Segment:
        """The factors of all data-parallel ranks, which ``keep`` leaves in the workspace."""
        if workspace is None or self.data_parallel is None:
            raise RuntimeError(f"{self.name}: the library reports no workspace to exchange in")
        dtype, layout = self.spec.factor_dtype, self.layout
        rows = tokens * self.data_parallel.size
        x_bytes = rows * layout.in_local * dtype.itemsize
        first = -(-x_bytes // _ALIGNMENT) * _ALIGNMENT
        end = first + rows * layout.out_owned * dtype.itemsize
        x = workspace[:x_bytes].view(dtype).view(rows, layout.in_local)
        dy = workspace[first:end].view(dtype).view(rows, layout.out_owned)
        if workspace.numel() * _KEPT_SHARE > end:
            # The rest was scratch; holding it until the step would be a waste.
            x, dy = x.clone(), dy.clone()
        return Segment.of(dy, x)

    def dgrad(self, dy: torch.Tensor, storage: Storage) -> torch.Tensor:
        """Return dX ``[..., in_local]`` = dY · W, without communication."""
        layout = self.layout
        dtype = self.spec.factor_dtype
        dy2d = as_factor(dy, layout.out_local, dtype, self.device, f"{self.name}: dY")
        dx = torch.empty(dy2d.shape[0], layout.in_local, dtype=dtype, device=self.device)
        dy_buffer, dx_buffer = ffi.new("forge_const_buffer *"), ffi.new("forge_buffer *")
        stride = fill_matrix(dy_buffer, dy2d)
        fill_buffer(dx_buffer, dx, self.device, "dX")
        parameter = self._parameter(storage)
        self._call(
            lib.forge_linear_dgrad, dy2d.shape[0], dy_buffer[0], stride, parameter, dx_buffer[0]
        )
        return dx.view(*dy.shape[:-1], layout.in_local)

    def update(
        self,
        segments: Sequence[Segment],
        storage: Storage,
        scalars: Scalars | torch.Tensor,
        accumulator: torch.Tensor | None = None,
        report: torch.Tensor | None = None,
    ) -> Report | None:
        """Apply the rule with ``g = grad_scale · (accumulator + Σ dYᵀX)`` over all segments.

        Weight and states are written in place; tiles with inf or nan are left alone and counted.

        Args:
            segments: factors, summed in this order.
            storage: the parameter.
            scalars: as in :meth:`backward`.
            accumulator: fp32 ``[out_owned, in_local]``; without segments also of the factor dtype.
            report: as in :meth:`backward`.

        Returns:
            What the update did; None where it is left in ``report``.
        """
        call, _pointed_to = self.update_struct(segments, storage, scalars, accumulator)
        host_report = self._report(call, report)
        self._call(lib.forge_linear_update, call, host_report)
        return report_of(host_report) if host_report else None

    def update_struct(
        self,
        segments: Sequence[Segment],
        storage: Storage,
        scalars: Scalars | torch.Tensor,
        accumulator: torch.Tensor | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """A ``forge_update`` for :meth:`update`, and what it points to: keep both until the call.

        On a GPU the factors may be let go once the call has been made.
        """
        call = new_struct("forge_update")
        array, step = segment_array(segments, self.device, self.name), self._step(scalars)
        parameter = self._parameter(storage)
        call.n_segments, call.segments = len(segments), array
        fill_buffer(call.accumulator, accumulator, self.device, "accumulator")
        call.parameter, call.step = parameter, step
        self._hold(segments)
        return call, (array, step, parameter, accumulator)

    def _call(self, function: Any, *arguments: Any) -> None:
        """Run a function of the library on torch's current stream of this device."""
        with self.context.current():
            self._check(function(self.handle, *arguments, self.context.stream()))

    def _hold(self, segments: Sequence[Segment]) -> None:
        """Factors may have been allocated on another stream, and are let go after the call."""
        for segment in segments:
            self.context.hold(segment.dy, segment.x)

    def accumulate(self, segments: Sequence[Segment], accumulator: torch.Tensor) -> None:
        """Add ``Σ dYᵀX`` to an fp32 accumulator ``[out_owned, in_local]`` in place."""
        buffer = ffi.new("forge_buffer *")
        fill_buffer(buffer, accumulator, self.device, f"{self.name}: accumulator")
        array = segment_array(segments, self.device, self.name)
        self._hold(segments)
        self._call(lib.forge_linear_accumulate, array, len(segments), buffer[0])

    def reduce(self, segments: Sequence[Segment], accumulator: torch.Tensor) -> None:
        """Add ``Σ dYᵀX`` of all data-parallel ranks to an accumulator ``[out_owned, in_local]``.

        Args:
            segments: what ``keep`` has handed back where :meth:`reduces_panels`: of this rank's
                tokens, dY of all its rows.
            accumulator: fp32; written in place.
        """
        buffer, scratch = ffi.new("forge_buffer *"), ffi.new("forge_buffer *")
        fill_buffer(buffer, accumulator, self.device, f"{self.name}: accumulator")
        tokens = max(segment.x.shape[0] for segment in segments)
        workspace = self._workspace("accumulate", tokens)
        fill_buffer(scratch, workspace, self.device, f"{self.name}: workspace")
        array = segment_array(segments, self.device, self.name)
        self._hold(segments)
        self._call(lib.forge_linear_reduce, array, len(segments), buffer[0], scratch[0])

    def norm(
        self,
        segments: Sequence[Segment],
        accumulator: torch.Tensor | None = None,
        method: str = "auto",
        out: torch.Tensor | None = None,
    ) -> Norm | None:
        """``Σ dW²`` of this shard without dW.

        Args:
            segments: factors.
            accumulator: as in :meth:`update`, added to their sum.
            method: ``auto``, ``gram`` or ``tiles``.
            out: where the norm is left, ``uint8 [sizeof(forge_norm)]`` on the device; None: the
                call waits for it and returns it.
        """
        buffer = ffi.new("forge_const_buffer *")
        fill_buffer(buffer, accumulator, self.device, f"{self.name}: accumulator")
        array = segment_array(segments, self.device, self.name)
        arguments = (array, len(segments), buffer[0], choice(NORM_METHODS, "method", method))
        self._hold(segments)
        if out is not None:
            self._call(lib.forge_linear_norm_async, *arguments, self.place(out, "forge_norm"))
            return None
        norm = new_struct("forge_norm")
        self._call(lib.forge_linear_norm, *arguments, norm)
        return norm_of(norm)

    def export_weight(self, storage: Storage) -> torch.Tensor:
        """The exact weight as fp32 ``[out_owned, in_local]``, master or low half included."""
        return self._export(lib.forge_linear_export_weight, storage)

    def export_state(self, storage: Storage, index: int) -> torch.Tensor:
        """State ``index`` as fp32 ``[out_owned, in_local]``."""
        return self._export(lib.forge_linear_export_state, storage, index)

    def import_weight(self, storage: Storage, values: torch.Tensor) -> None:
        """Write fp32 values into the weight's format, rounding to nearest."""
        self._import(lib.forge_linear_import_weight, storage, values)

    def import_state(self, storage: Storage, index: int, values: torch.Tensor) -> None:
        """Write fp32 values into state ``index``, rounding to nearest."""
        self._import(lib.forge_linear_import_state, storage, values, index)

    def _export(self, function: Any, storage: Storage, *index: int) -> torch.Tensor:
        shape = (self.layout.out_owned, self.layout.in_local)
        out = torch.empty(shape, dtype=torch.float32, device=self.device)
        buffer, parameter = ffi.new("forge_buffer *"), self._parameter(storage)
        fill_buffer(buffer, out, self.device, "fp32 values")
        self._call(function, parameter, *index, buffer[0])
        return out

    def _import(self, function: Any, storage: Storage, values: torch.Tensor, *index: int) -> None:
        shape = (self.layout.out_owned, self.layout.in_local)
        if tuple(values.shape) != shape or values.dtype != torch.float32:
            raise ValueError(
                f"{self.name}: expected fp32 values of shape {shape}, got "
                f"{values.dtype} of shape {tuple(values.shape)}"
            )
        buffer, parameter = ffi.new("forge_const_buffer *"), self._parameter(storage)
        # Checkpoints are read on the CPU, whatever the device.
        values = values.detach().to(self.device).contiguous()
        fill_buffer(buffer, values, self.device, "fp32 values")
        self._call(function, parameter, *index, buffer[0])

    def plan(
        self, *, tokens: int, micro_batches: int, needs_norm: bool, schedule: str = "auto"
    ) -> Plan:
        """Ask the library for the schedule that takes the fewest bytes."""
        request, out = new_struct("forge_plan_request"), new_struct("forge_plan")
        request.schedule = choice(SCHEDULES, "schedule", schedule)
        request.tokens_per_micro_batch, request.micro_batches = tokens, micro_batches
        request.needs_norm = needs_norm
        check(lib.forge_linear_plan(self.handle, request, out), self.name)
        return Plan(
            schedule=_NAME_OF_SCHEDULE[out.schedule],
            factor_bytes=out.factor_bytes,
            accumulator_bytes=out.accumulator_bytes,
            gradient_bytes=out.gradient_bytes,
            reason=text(out.reason),
            reduction=_NAME_OF_REDUCTION[out.reduction] if out.reduction else None,
            wire_bytes=out.wire_bytes,
        )


def update_together(linears: Sequence[Linear], calls: Sequence[Any]) -> None:
    """Make the updates of several linears of one context in one call; small ones share launches.

    Args:
        linears: at least one.
        calls: of each its :meth:`Linear.update_struct`, whose second part the caller keeps.
    """
    context = linears[0].context
    handles = ffi.new("forge_linear *[]", [linear.handle for linear in linears])
    updates = ffi.new("forge_update *[]", list(calls))
    with context.current():
        status = lib.forge_linear_update_group(handles, updates, len(calls), context.stream())
        check(status, ", ".join(linear.name for linear in linears[:3]))
