"""One sharded linear layer of the C ABI with the tensors that it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._comm import Comm
from ._context import Context, default_context
from ._lib import check, ffi, lib, new_struct, text
from ._structs import layout_of, parameter_struct, report_of, segment_array, step_struct
from ._tensors import FORGE_DTYPE, as_factor, fill_buffer, fill_matrix
from ._types import (
    NORM_METHODS,
    PARALLEL,
    ROUNDINGS,
    SCHEDULES,
    STATE_FORMATS,
    WEIGHT_FORMATS,
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
_NAME_OF_NORM = {number: name for name, number in NORM_METHODS.items()}
_MODES = {
    "update": lib.FORGE_BACKWARD_UPDATE,
    "accumulate": lib.FORGE_BACKWARD_ACCUMULATE,
    "keep": lib.FORGE_BACKWARD_KEEP,
}


class Linear:
    """Owns a ``forge_linear``; knows nothing of autograd or modules.

    Args:
        spec: shapes, formats, rule, shard.
        name: leads every error message.
        context: the backend; the process' default where None.
        comm: the tensor-parallel group; one rank alone where None.

    Raises:
        ForgeArgumentError: a combination that the library does not support, or shards that do not
            divide.
        ValueError: an unknown format, rounding or dtype.
    """

    def __init__(
        self,
        spec: LinearSpec,
        *,
        name: str = "",
        context: Context | None = None,
        comm: Comm | None = None,
    ) -> None:
        """Make the layer; no tensor is allocated."""
        self.spec, self.name = spec, name
        self.context = context or (comm.context if comm is not None else default_context())
        # The library wants the communicator to outlive its linears: hold on to it.
        self.comm = comm if comm is not None else Comm(self.context)
        self.flags = rule_flags(spec.rule.options)
        self.rule = rule_info(spec.rule.name, self.flags)
        if spec.factor_dtype not in FORGE_DTYPE:
            raise ValueError(
                f"{name}: factors of {spec.factor_dtype} are not supported; "
                "use torch.float32 or torch.bfloat16"
            )
        formats = spec.formats_of(len(self.rule.state_names))
        rule_name = ffi.new("char[]", spec.rule.name.encode())
        config = new_struct("forge_linear_config")
        config.factor_dtype = FORGE_DTYPE[spec.factor_dtype]
        config.out_features, config.in_features = spec.out_features, spec.in_features
        config.parallel = choice(PARALLEL, "parallel", spec.parallel)
        config.sequence_parallel = spec.sequence_parallel
        config.reduce_dgrad = spec.reduce_dgrad
        config.weight_format = choice(WEIGHT_FORMATS, "weight_format", spec.weight_format)
        config.weight_rounding = choice(ROUNDINGS, "weight_rounding", spec.weight_rounding)
        config.state_rounding = choice(ROUNDINGS, "state_rounding", spec.state_rounding)
        for index, state_format in enumerate(formats):
            config.state_formats[index] = choice(STATE_FORMATS, "state_format", state_format)
        config.rule_flags = self.flags
        config.parameter_id = spec.parameter_id
        config.rule = rule_name
        out = ffi.new("forge_linear **")
        check(lib.forge_linear_new(self.context.handle, self.comm.handle, config, out), name)
        self.handle = ffi.gc(out[0], lib.forge_linear_free)
        self.state_formats = tuple(formats)
        self.layout = self._layout()

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
        extra = self.layout.weight_extra
        storage = Storage(
            weight=data,
            weight_extra=extra.zeros(data.device) if extra else None,
            states=[state.zeros(data.device) for state in self.layout.states],
            scales=[scale.zeros(data.device) if scale else None for scale in self.layout.scales],
        )
        if extra is not None:
            self.import_weight(storage, data.float())
        return storage

    def scalars(
        self, group: Mapping[str, Any], *, step: int, seed: int, grad_scale: float = 1.0
    ) -> Scalars:
        """One step's numbers from a param group; missing ones are the rule's own options.

        Raises:
            ValueError: the group changed an option that is fixed when the layer is made, or a
                number is out of the rule's range.
        """
        options = {**self.spec.rule.options, **group}
        if rule_flags(options) != self.flags:
            raise ValueError(
                f"{self.name}: maximize, nesterov and whether momentum is 0 are fixed at fuse(); "
                "remove() and fuse() again to change them"
            )
        scalars = Scalars(step, seed, grad_scale, hyper_values(self.rule, options))
        # Here, and not only with the update: by then the layers before have been updated.
        check(lib.forge_linear_check_step(self.handle, step_struct(scalars)), self.name)
        return scalars

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
        scalars: Scalars | None = None,
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
            accumulator: fp32 ``[out_local, in_local]``.
            scalars: the step's numbers.
        """
        dtype, layout = self.spec.factor_dtype, self.layout
        dy2d = as_factor(dy, layout.out_local, dtype, f"{self.name}: dY")
        x2d = as_factor(x, layout.in_local, dtype, f"{self.name}: X")
        # Column gathers X, so dY has every token; row gathers dY, so X has.
        gathers = self.spec.sequence_parallel and self.comm.size > 1
        gathers_x, gathers_dy = (gathers and self.spec.parallel == p for p in ("column", "row"))
        tokens = (x2d if gathers_dy else dy2d).shape[0]
        if gathers_x:
            x2d = x2d.contiguous()
        if gathers_dy:
            dy2d = dy2d.contiguous()
        dx = torch.empty(x2d.shape, dtype=dtype) if need_dx else None
        dbias = torch.empty(layout.out_local, dtype=dtype) if need_dbias else None
        workspace = self._workspace(tokens)

        call, report = new_struct("forge_backward"), new_struct("forge_report")
        call.mode, call.tokens = _MODES[mode], tokens
        call.dy_stride, call.x_stride = fill_matrix(call.dy, dy2d), fill_matrix(call.x, x2d)
        fill_buffer(call.dx, dx, "dX")
        fill_buffer(call.dbias, dbias, "dbias")
        fill_buffer(call.workspace, workspace, "workspace")
        fill_buffer(call.accumulator, accumulator, f"{self.name}: accumulator")
        # The struct holds pointers only: these names keep their targets alive over the call.
        parameter = parameter_struct(storage, self.name)
        step = step_struct(scalars) if scalars is not None else ffi.NULL
        call.parameter, call.step = parameter, step
        status = lib.forge_linear_backward(self.handle, call, report, ffi.NULL)
        self.comm.check(status, self.name)

        segment = None
        if mode == "keep":
            if gathers_x:
                x2d = self._gathered(workspace, tokens, layout.in_local)
            if gathers_dy:
                dy2d = self._gathered(workspace, tokens, layout.out_local)
            segment = Segment.of(dy2d, x2d)
        return BackwardResult(
            dx=dx.view(x.shape) if dx is not None else None,
            dbias=dbias,
            segment=segment,
            report=report_of(report) if mode == "update" else None,
        )

    def _workspace(self, tokens: int) -> torch.Tensor | None:
        out = ffi.new("uint64_t *")
        check(lib.forge_linear_workspace(self.handle, tokens, out), self.name)
        return torch.empty(out[0], dtype=torch.uint8) if out[0] else None

    def _gathered(self, workspace: torch.Tensor | None, tokens: int, cols: int) -> torch.Tensor:
        """The gathered factor that ``keep`` leaves at the start of the workspace."""
        if workspace is None:
            raise RuntimeError(f"{self.name}: the library reports no workspace to gather into")
        dtype = self.spec.factor_dtype
        used = tokens * cols * dtype.itemsize
        factor = workspace[:used].view(dtype).view(tokens, cols)
        # The rest of the workspace was scratch; holding it until the step would be a waste.
        return factor.clone() if workspace.numel() > used else factor

    def dgrad(self, dy: torch.Tensor, storage: Storage) -> torch.Tensor:
        """Return dX ``[..., in_local]`` = dY · W, without communication."""
        layout = self.layout
        dy2d = as_factor(dy, layout.out_local, self.spec.factor_dtype, f"{self.name}: dY")
        dx = torch.empty(dy2d.shape[0], layout.in_local, dtype=self.spec.factor_dtype)
        dy_buffer, dx_buffer = ffi.new("forge_const_buffer *"), ffi.new("forge_buffer *")
        stride = fill_matrix(dy_buffer, dy2d)
        fill_buffer(dx_buffer, dx, "dX")
        parameter = parameter_struct(storage, self.name)
        status = lib.forge_linear_dgrad(
            self.handle, dy2d.shape[0], dy_buffer[0], stride, parameter, dx_buffer[0], ffi.NULL
        )
        check(status, self.name)
        return dx.view(*dy.shape[:-1], layout.in_local)

    def update(
        self,
        segments: Sequence[Segment],
        storage: Storage,
        scalars: Scalars,
        accumulator: torch.Tensor | None = None,
    ) -> Report:
        """Apply the rule with ``g = grad_scale · (accumulator + Σ dYᵀX)`` over all segments.

        Weight and states are written in place; tiles with inf or nan are left alone and counted.
        """
        call, report = new_struct("forge_update"), new_struct("forge_report")
        array, step = segment_array(segments), step_struct(scalars)
        parameter = parameter_struct(storage, self.name)
        call.n_segments, call.segments = len(segments), array
        fill_buffer(call.accumulator, accumulator, f"{self.name}: accumulator")
        call.parameter, call.step = parameter, step
        check(lib.forge_linear_update(self.handle, call, report, ffi.NULL), self.name)
        return report_of(report)

    def accumulate(self, segments: Sequence[Segment], accumulator: torch.Tensor) -> None:
        """Add ``Σ dYᵀX`` to an fp32 accumulator ``[out_local, in_local]`` in place."""
        buffer = ffi.new("forge_buffer *")
        fill_buffer(buffer, accumulator, f"{self.name}: accumulator")
        array = segment_array(segments)
        status = lib.forge_linear_accumulate(self.handle, array, len(segments), buffer[0], ffi.NULL)
        check(status, self.name)

    def norm(
        self,
        segments: Sequence[Segment],
        accumulator: torch.Tensor | None = None,
        method: str = "auto",
    ) -> Norm:
        """``Σ dW²`` of this shard without dW; ``method`` is ``auto``, ``gram`` or ``tiles``."""
        out, buffer = new_struct("forge_norm"), ffi.new("forge_const_buffer *")
        fill_buffer(buffer, accumulator, f"{self.name}: accumulator")
        array = segment_array(segments)
        status = lib.forge_linear_norm(
            self.handle,
            array,
            len(segments),
            buffer[0],
            choice(NORM_METHODS, "method", method),
            out,
            ffi.NULL,
        )
        check(status, self.name)
        return Norm(out.sum_of_squares, bool(out.nonfinite), _NAME_OF_NORM[out.method])

    def export_weight(self, storage: Storage) -> torch.Tensor:
        """The exact weight as fp32 ``[out_local, in_local]``, master or low half included."""
        return self._export(lib.forge_linear_export_weight, storage)

    def export_state(self, storage: Storage, index: int) -> torch.Tensor:
        """State ``index`` as fp32 ``[out_local, in_local]``."""
        return self._export(lib.forge_linear_export_state, storage, index)

    def import_weight(self, storage: Storage, values: torch.Tensor) -> None:
        """Write fp32 values into the weight's format, rounding to nearest."""
        self._import(lib.forge_linear_import_weight, storage, values)

    def import_state(self, storage: Storage, index: int, values: torch.Tensor) -> None:
        """Write fp32 values into state ``index``, rounding to nearest."""
        self._import(lib.forge_linear_import_state, storage, values, index)

    def _export(self, function: Any, storage: Storage, *index: int) -> torch.Tensor:
        out = torch.empty(self.layout.out_local, self.layout.in_local, dtype=torch.float32)
        buffer, parameter = ffi.new("forge_buffer *"), parameter_struct(storage, self.name)
        fill_buffer(buffer, out, "fp32 values")
        check(function(self.handle, parameter, *index, buffer[0]), self.name)
        return out

    def _import(self, function: Any, storage: Storage, values: torch.Tensor, *index: int) -> None:
        shape = (self.layout.out_local, self.layout.in_local)
        if tuple(values.shape) != shape or values.dtype != torch.float32:
            raise ValueError(
                f"{self.name}: expected fp32 values of shape {shape}, got "
                f"{values.dtype} of shape {tuple(values.shape)}"
            )
        buffer, parameter = ffi.new("forge_const_buffer *"), parameter_struct(storage, self.name)
        values = values.detach().contiguous()
        fill_buffer(buffer, values, "fp32 values")
        check(function(self.handle, parameter, *index, buffer[0]), self.name)

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
        )
