"""Megatron's four linears (column and row parallel, with and without sequence parallelism).

Who communicates is the only difference between them:

| | forward | FORGE's backward |
|---|---|---|
| column | Megatron (copy to the group) | all-reduces dX |
| column + SP | this file gathers X | gathers X again, reduce-scatters dX |
| row, row + SP | Megatron's ``mappings``, after it | nothing: ``mappings`` comes before it |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data_parallel import Replicas
from ..engine import Engine, FusedWeight, Use
from ..native import Comm, Context, Linear, LinearSpec, comm_of, default_context
from ..rules import Rule
from .choose import Chosen

_WEIGHT_DTYPES = {"fp32": torch.float32}


class Comms:
    """One communicator per tensor-parallel group, shared by all layers on it."""

    def __init__(self, context: Context | None = None) -> None:
        self._context = context or default_context()
        self._by_group: dict[int, Comm] = {}

    def of(self, group: torch.distributed.ProcessGroup | None) -> Comm:
        """The communicator of a process group; one rank alone needs none of its collectives."""
        alone = group is None or group.size() == 1
        key = 0 if alone else id(group)
        if key not in self._by_group:
            self._by_group[key] = Comm(self._context) if alone else comm_of(self._context, group)
        return self._by_group[key]


def linear_spec(
    chosen: Chosen,
    *,
    rule: Rule,
    weight_format: str,
    state_format: str | Sequence[str],
    weight_rounding: str,
    state_rounding: str,
) -> LinearSpec:
    """What FORGE has to know of a Megatron linear; global shapes, this module's parallelism.

    Raises:
        ValueError: the weight's dtype does not go with the weight format.
    """
    module, weight = chosen.module, chosen.weight
    expected = _WEIGHT_DTYPES.get(weight_format, torch.bfloat16)
    if weight.dtype != expected:
        raise ValueError(
            f"{chosen.name} is {weight.dtype}, but weight_format={weight_format!r} needs "
            f"{expected}: use weight_format='fp32' for fp32 models and 'bf16', 'bf16+16' or "
            "'bf16+fp32' for bf16 models."
        )
    column = not chosen.row_parallel
    # A mixture's dispatcher communicates for its experts, and so may who overlaps shared ones.
    own_comm = column and not getattr(module, "explicit_expert_comm", False)
    return LinearSpec(
        out_features=module.output_size,
        in_features=module.input_size,
        rule=rule,
        factor_dtype=weight.dtype,
        weight_format=weight_format,
        state_formats=state_format,
        weight_rounding=weight_rounding,
        state_rounding=state_rounding,
        parallel="column" if column else "row",
        sequence_parallel=own_comm and bool(module.sequence_parallel),
        reduce_dgrad=own_comm and bool(module.allreduce_dgrad),
        parameter_id=chosen.parameter_id,
    )


class FusedLinear:
    """One fused weight: its forward, and its states as fp32 for checkpoints.

    Attributes:
        name: global parameter name.
        weight: Megatron's own parameter, ``[out_local, in_local]``; updated in place.
        expert: whether it is of an expert, which is on other ranks and sees other tokens.
        fused: the engine's side of it (storage, what is pending, step count).
    """

    def __init__(
        self,
        chosen: Chosen,
        spec: LinearSpec,
        engine: Engine,
        comm: Comm,
        replicas: Replicas | None = None,
    ) -> None:
        """Allocate the states. The module is not touched."""
        self._replicas = replicas
        self.name, self.module, self.engine = chosen.name, chosen.module, engine
        self.expert = chosen.expert
        self.weight = chosen.weight
        self.group = None if comm.size == 1 else chosen.module.tp_group
        self.fused = FusedWeight(
            chosen.name,
            self.weight,
            Linear(
                spec,
                name=chosen.name,
                comm=comm,
                device=self.weight.device,
                data_parallel=None if replicas is None else replicas.comm(comm.context),
                reduction="auto" if replicas is None else replicas.reduction,
                micro_batches=engine.micro_batches,
            ),
        )
        self.fused.apart = chosen.expert

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a fused module is a plain module: states belong to one weight only."""
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A pickled fused module is a plain module; the optimizer saves the states."""
        return type(None), ()

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002  (Megatron passes it by this keyword)
        weight: torch.Tensor,
        *args: Any,
        bias: torch.Tensor | None = None,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``Y[s,b,out_local] = X Wᵀ (+ bias)``, X ``[s,b,in_local]`` or its rows under SP.

        Takes the keywords of ``_forward_impl``; those it does not name only tell Megatron how to
        form and store the weight gradient.

        Raises:
            RuntimeError: Megatron asks for a parallelism, or passes a weight, other than at fuse.
        """
        spec = self.fused.linear.spec
        asked = (bool(sequence_parallel), bool(allreduce_dgrad))
        if (
            weight is not self.weight
            or args
            or asked != (spec.sequence_parallel, spec.reduce_dgrad)
        ):
            raise RuntimeError(
                f"{self.name}: Megatron calls this layer with another weight or parallelism "
                f"(sequence_parallel, allreduce_dgrad = {asked}) than it was fused with; exclude "
                "it from fuse()."
            )
        use = self.engine.begin_use(self.fused)
        output: torch.Tensor = _Product.apply(input, weight, bias, self, use)
        if output.requires_grad:
            self.fused.uses.add(use)
        return output

    # -- the states, for checkpoints ----------------------------------------------------------

    @property
    def state_names(self) -> tuple[str, ...]:
        """As torch's optimizers call them, such as ``exp_avg``."""
        return self.fused.linear.rule.state_names

    # Of data-parallel ranks each has the states of its own rows, so they take part together.

    def export_state(self, index: int) -> torch.Tensor:
        """A state as fp32 ``[out_local, in_local]`` on the CPU."""
        return self._whole(self.fused.linear.export_state(self.fused.storage, index))

    def import_state(self, index: int, values: torch.Tensor) -> None:
        """Write a state in place from fp32 ``[out_local, in_local]``."""
        linear = self.fused.linear
        linear.import_state(self.fused.storage, index, values[linear.owned])

    def export_weight(self) -> torch.Tensor:
        """The exact weight (the master, where there is one) as fp32 on the CPU."""
        return self._whole(self.fused.linear.export_weight(self.fused.storage))

    def import_weight(self, values: torch.Tensor) -> None:
        """Write weight and master in place from fp32 ``[out_local, in_local]``."""
        linear, storage = self.fused.linear, self.fused.storage
        linear.import_weight(storage, values[linear.owned])
        if self._replicas is not None:
            linear.gather_weight(storage)
            self._replicas.wait()

    def _whole(self, owned: torch.Tensor) -> torch.Tensor:
        return owned.cpu() if self._replicas is None else self._replicas.whole(owned, 0)

    def raw(self) -> dict[str, torch.Tensor]:
        """Everything but the model weight, as stored: states, scales, master or low half.

        Of data-parallel ranks each has that of its own rows.
        """
        storage = self.fused.storage
        tensors: dict[str, torch.Tensor | None] = {"weight_extra": storage.weight_extra}
        for index, name in enumerate(self.state_names):
            tensors[name] = storage.states[index]
            tensors[f"{name}.scales"] = storage.scales[index]
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class _Product(torch.autograd.Function):
    """Megatron's matrix product; the backward is one call into the library."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: FusedLinear,
        use: Use,
    ) -> torch.Tensor:
        # The weight is an argument so that Y is differentiable even where X is not (first layer
        # behind a frozen embedding). It is not saved: the library reads it through its own pointer,
        # and autograd's version counter must not object to the update.
        gathered = x
        if layer.fused.linear.spec.sequence_parallel:
            x = x.contiguous()  # a collective sends it, here and in the backward
            shape = (x.shape[0] * layer.fused.linear.comm.size, *x.shape[1:])
            gathered = torch.empty(shape, dtype=x.dtype, device=x.device)
            torch.distributed.all_gather_into_tensor(gathered, x, group=layer.group)
        ctx.save_for_backward(x)
        ctx.layer, ctx.use = layer, use
        y = torch.matmul(gathered, weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: FusedLinear = ctx.layer
        result = layer.engine.backward(
            layer.fused,
            ctx.use,
            dy,
            x,
            need_dx=ctx.needs_input_grad[0],
            need_dbias=ctx.needs_input_grad[2],
        )
        return result.dx, None, result.dbias, None, None
