"""Fuse the ``torch.nn.Linear`` layers of a model with their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ._context import Context, default_context
from ._linear import Linear
from ._types import STATE_FORMATS, LinearSpec
from ._types import choice as number_of
from .choose import AUTO_FORMAT, DTYPE_OF_FORMAT, Choice, choose
from .data_parallel import Replicas, agree, facts_of, replicas_of
from .dense import DenseWeight, shape_of
from .engine import Engine
from .linear_function import FusedTorchLinear
from .misuse import is_out_of_memory, no_memory
from .optimizer import FusedOptimizer, param_groups_of
from .ownership import claim
from .parameter_ids import check_distinct, parameter_id
from .rules import Rule
from .state import whole_rows
from .weights import FusedWeight, Weight


@dataclass(frozen=True)
class Row:
    """One parameter in the summary: ``bytes`` are the weight's, ``note`` says format or reason."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    fused: bool
    note: str


def _nothing(_module: torch.nn.Module, _keys: Any) -> None:
    """A hook that does nothing."""


def _keep_nothing() -> Callable[[torch.nn.Module, Any], None]:
    """What :class:`_RefreshMasters` becomes in a copy of the model."""
    return _nothing


class _RefreshMasters:
    """Lets masters follow when the model's own ``load_state_dict`` has written new weights."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, _module: torch.nn.Module, _keys: Any) -> None:
        for weight in self.engine.weights:
            weight.clear()
            linear, storage = weight.linear, weight.storage
            if storage.weight_extra is not None:
                linear.import_weight(storage, storage.weight[linear.owned].float())

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _keep_nothing, ()


class Fused:
    """A model whose linears are updated without weight gradients, until :meth:`remove`.

    Attributes:
        optimizer: a ``torch.optim.Optimizer`` over the fused weights and the rest.
        engine: the schedule's state.
        rows: one :class:`Row` for each parameter; ``print(fused)`` shows them.
    """

    def __init__(
        self, model: torch.nn.Module, engine: Engine, optimizer: FusedOptimizer, rows: list[Row]
    ) -> None:
        """Hold what :func:`fuse` made."""
        self.model, self.engine, self.optimizer, self.rows = model, engine, optimizer, rows
        self._modules: list[torch.nn.Linear] = []
        self._handles: list[Any] = [
            model.register_load_state_dict_post_hook(_RefreshMasters(engine))
        ]

    def _attach(self, module: torch.nn.Linear, weight: FusedWeight) -> None:
        """Send a linear's forward through FORGE."""
        # The class and not the instance's forward changes, so that copies and pickles of the
        # model do not refer to this one.
        module.__class__ = FusedTorchLinear
        module._forge = weight  # type: ignore[assignment]
        self._modules.append(module)

        name = weight.name  # not the weight: parameter and hook would keep each other

        def refuse(parameter: torch.Tensor) -> None:
            # Autograd calls this after fused_linear's own "no gradient", too.
            if parameter.grad is None:
                return
            parameter.grad = None
            raise RuntimeError(
                f"{name} got an ordinary gradient: it is used outside its torch.nn.Linear, "
                f"where FORGE cannot see it. Exclude it: fuse(..., exclude=({name!r},))."
            )

        self._handles.append(weight.parameter.register_post_accumulate_grad_hook(refuse))

    def remove(self) -> None:
        """Give the model back as it was: plain linears, no hooks. Weights keep their values.

        The optimizer steps no more afterwards; its ``state_dict`` can still be taken, and loaded
        into torch's own optimizer where the states are fp32.
        """
        for module in self._modules:
            module.__class__ = torch.nn.Linear
            del module._forge
        for handle in self._handles:
            handle.remove()
        self._modules.clear()
        self._handles.clear()
        for weight in self.engine.weights:
            weight.clear()
        self.optimizer.close()

    def export_weights(self) -> dict[str, torch.Tensor]:
        """The exact fp32 weights by name, masters and low halves included.

        With ``data_parallel`` every rank calls this at the same time, and the tensors of fused
        weights are on the CPU.
        """
        exported = {}
        for weight in self.engine.weights:
            values = whole_rows(weight, weight.linear.export_weight(weight.storage))
            exported[weight.name] = values.view(weight.parameter.shape)
        return exported

    def __str__(self) -> str:
        """A table of what was fused and what was not, and why."""
        width = max([len(row.name) for row in self.rows] + [9])
        lines = [f"{'parameter':<{width}}  {'shape':>14}  {'MiB':>9}  handled as"]
        for row in self.rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            lines.append(f"{row.name:<{width}}  {shape:>14}  {row.bytes / 2**20:>9.2f}  {row.note}")
        fused = [row for row in self.rows if row.fused]
        total = sum(row.bytes for row in self.rows) or 1
        lines.append(
            f"{len(fused)} of {len(self.rows)} parameters are fused, "
            f"{100 * sum(row.bytes for row in fused) / total:.1f} % of all bytes"
        )
        return "\n".join(lines)


def fuse(
    model: torch.nn.Module,
    rule: Rule,
    *,
    groups: Iterable[dict[str, Any]] | None = None,
    weight_format: str = "auto",
    state_format: str | Sequence[str] = "fp32",
    weight_rounding: str = "stochastic",
    state_rounding: str = "stochastic",
    fp32_products: str = "exact",
    schedule: str = "auto",
    max_norm: float | None = None,
    micro_batches: int = 1,
    check_finite: bool = True,
    exclude: Iterable[str] = (),
    rest: bool = True,
    rest_state_format: str | Sequence[str] = "fp32",
    seed: int = 0,
    capturable: bool = False,
    data_parallel: bool | dist.ProcessGroup = False,
    data_parallel_reduction: str = "auto",
    context: Context | None = None,
) -> Fused:
    """Fuse the optimizer into the backward of every ``torch.nn.Linear`` that allows it.

    No gradient is allocated for a fused weight. Everything else keeps its ordinary gradient and is
    updated by the same rule. Nothing changes if this raises.

    Args:
        model: in fp32 or bf16, on the CPU or on one NVIDIA GPU, where it stays.
        rule: ``AdamW``, ``SGD`` or another :class:`Rule`, with torch.optim's arguments.
        groups: param groups as torch.optim takes them, each with options that override the
            rule's; None: one group of all parameters.
        weight_format: ``fp32``, ``bf16``, ``bf16+fp32``, ``bf16+16`` or ``auto``: fp32 for fp32
            parameters, bf16+16 for bf16 ones.
        state_format: ``fp32``, ``bf16`` or ``q8``, or one for each state.
        weight_rounding: of the ``bf16`` weight format: ``stochastic`` or ``nearest``.
        state_rounding: of ``bf16`` states.
        fp32_products: how a GPU multiplies the factors of fp32 weights: ``exact``, the bits of the
            CPU, or ``bf16x3`` on tensor cores, which leaves out at most 3·2⁻¹⁶ of a product.
        schedule: ``auto``, ``immediate``, ``deferred`` or ``accumulate``.
        max_norm: clip the global gradient norm, as ``clip_grad_norm_`` before each step would.
        micro_batches: backwards per step.
        check_finite: skip a deferred step as a whole if a gradient holds inf or nan.
        exclude: names of modules or parameters to leave alone; a module's name covers what is
            below it.
        rest: whether the returned optimizer also steps what was not fused. With False those
            parameters are yours to step, and ``max_norm`` does not see them.
        rest_state_format: as ``state_format``, of what is not fused. Norms and biases are small and
            deserve fp32; a large embedding may not.
        seed: of stochastic rounding.
        capturable: whether steps can be captured in a CUDA graph; see :func:`forge_train.capture`.
        data_parallel: a process group whose ranks train copies of this model on different tokens,
            as many each; True: the default group. Gradients are averaged over them, weights start
            as rank 0's, and states are shared out. In place of ``DistributedDataParallel``.
        data_parallel_reduction: how dW is summed over ranks: ``exchange`` of factors, ``panels`` of
            dW, or ``auto``, for each layer the one that moves fewer bytes.
        context: the backend; the process' own of the model's device where None.

    Returns:
        A handle with ``optimizer``, a summary for ``print`` and ``remove()``.

    Raises:
        ForgeBackendError: the model is on a GPU that FORGE cannot use; the message says why.
        torch.OutOfMemoryError: there is no memory for the states.
        ValueError: an argument is not known, excludes another one, or names nothing; parameters to
            step are on several devices, or another fused optimizer steps them; data-parallel ranks
            differ in what they fuse.
        RuntimeError: ``data_parallel`` without ``torch.distributed``.
        TypeError: the model is wrapped for data parallelism, or ``rule`` is no rule.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model is wrapped in DistributedDataParallel, which reduces gradients that FORGE does "
            "not allocate. Fuse the module inside it, with fuse(..., data_parallel=True)."
        )
    if not isinstance(rule, Rule):
        raise TypeError(f"rule={rule!r} must be a rule, such as forge_train.AdamW(lr=1e-3)")
    for name in (rest_state_format,) if isinstance(rest_state_format, str) else rest_state_format:
        number_of(STATE_FORMATS, "rest_state_format", name)
    replicas = replicas_of(data_parallel, data_parallel_reduction)
    if replicas is not None and capturable:
        raise ValueError(
            "capturable=True with data_parallel: a CUDA graph of its collectives is not supported "
            "yet; leave one of them out"
        )
    if replicas is not None and not rest:
        raise ValueError(
            "rest=False with data_parallel: the gradients of those parameters would not be "
            "averaged over the ranks; let FORGE step them"
        )
    engine = Engine(
        schedule=schedule,
        micro_batches=micro_batches,
        needs_norm=bool(max_norm),
        check_finite=check_finite,
        seed=seed,
        capturable=capturable,
        replicas=replicas,
    )
    param_groups = param_groups_of(model, rule, groups)
    group_of = {parameter: group for group in param_groups for parameter in group["params"]}
    base = LinearSpec(
        out_features=1,
        in_features=1,
        rule=rule,
        state_formats=state_format,
        weight_rounding=weight_rounding,
        state_rounding=state_rounding,
        fp32_products=fp32_products,
    )
    rows: list[Row] = []
    made: list[tuple[Choice, Weight]] = []
    choices = choose(model, group_of, exclude, weight_format, replicas.size if replicas else 1)
    if replicas is not None:
        for choice in choices:
            if choice.parameter.requires_grad and choice.parameter not in group_of:
                raise ValueError(
                    f"{choice.name} is trained but in no param group: with data_parallel its "
                    "gradient would not be averaged over the ranks. Put it into groups=[…], or "
                    "freeze it."
                )
        formats = (weight_format, max_norm, rest_state_format)
        facts = facts_of(choices, engine, param_groups, base, *formats)
        agree(replicas.group, facts, "data_parallel")
        replicas.broadcast([*model.parameters(), *model.buffers()])
    for choice in choices:
        group = group_of.get(choice.parameter)
        note = f"left: {choice.why}"
        if group is not None and (choice.module is not None or rest):
            spec = _spec(base, choice, group, weight_format, rest_state_format)
            weight = _weight(spec, choice, group, context, replicas, micro_batches)
            made.append((choice, weight))
            note = f"fused, {spec.weight_format} weight" if choice.module else f"rest: {choice.why}"
        parameter, fused = choice.parameter, choice.module is not None
        rows.append(Row(choice.name, tuple(parameter.shape), parameter.nbytes, fused, note))

    check_distinct(choice.name for choice, _weight in made)
    engine.add(weight for _choice, weight in made)
    handled = [choice.parameter for choice, _weight in made]
    optimizer = FusedOptimizer(param_groups, rule, engine, handled, max_norm=max_norm)
    claim(optimizer, {choice.parameter: choice.name for choice, _weight in made})
    handle = Fused(model, engine, optimizer, rows)
    for choice, weight in made:
        if choice.module is not None and isinstance(weight, FusedWeight):
            handle._attach(choice.module, weight)
    return handle


def _spec(
    base: LinearSpec,
    choice: Choice,
    group: dict[str, Any],
    weight_format: str,
    rest_state_format: str | Sequence[str],
) -> LinearSpec:
    """The linear of a parameter: ``[out, in]`` if fused, that of ``DenseWeight`` if not.

    Raises:
        ValueError: a parameter that no rule of FORGE can step.
    """
    parameter, fused = choice.parameter, choice.module is not None
    if parameter.dtype not in AUTO_FORMAT or not parameter.is_contiguous():
        raise ValueError(
            f"{choice.name} is {parameter.dtype} with strides {parameter.stride()}; FORGE steps "
            "contiguous fp32 and bf16 parameters. Convert it, freeze it, or pass rest=False and "
            "step it with your own optimizer."
        )
    if DTYPE_OF_FORMAT.get(weight_format) != parameter.dtype:
        weight_format = AUTO_FORMAT[parameter.dtype]
    options = {name: group[name] for name in base.rule.options}
    rows, cols = parameter.shape if fused else shape_of(parameter.numel())
    return replace(
        base,
        rule=base.rule.with_options(**options),
        out_features=rows,
        in_features=cols,
        factor_dtype=parameter.dtype,
        weight_format=weight_format,
        fp32_products=base.fp32_products if fused and parameter.dtype == torch.float32 else "exact",
        state_formats=base.state_formats if fused else rest_state_format,
        parameter_id=parameter_id(choice.name),
    )


def _weight(
    spec: LinearSpec,
    choice: Choice,
    group: dict[str, Any],
    context: Context | None,
    replicas: Replicas | None,
    micro_batches: int,
) -> Weight:
    device = choice.parameter.device
    others, reduction = None, "auto"
    if replicas is not None and choice.module is not None:
        if context is None:
            context = default_context(device)
        others, reduction = replicas.comm(context), replicas.reduction
    linear = Linear(
        spec,
        name=choice.name,
        context=context,
        device=device,
        data_parallel=others,
        reduction=reduction,
        micro_batches=micro_batches,
    )
    kind = FusedWeight if choice.module is not None else DenseWeight
    try:
        return kind(choice.name, choice.parameter, linear, group)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        arrays = (*linear.layout.states, linear.layout.weight_extra, *linear.layout.scales)
        needed = sum(array.bytes for array in arrays if array is not None)
        raise torch.OutOfMemoryError(no_memory(choice.name, needed, device)) from error
