"""Fuse a Megatron model: the two calls a training script makes.

    fused = fuse(model_chunks, ...)        # before DDP
    model = DDP(...); optimizer = get_megatron_optimizer(...)
    optimizer = fused.chain(optimizer)     # before the parameter scheduler is built

``requires_grad`` at wrap time is the only filter of DDP's gradient buffers and of the stock
optimizer's parameter groups, so the fused weights have it off between the two calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from ..data_parallel import Replicas, agree, engine_facts
from ..engine import Engine
from ..native import Context, default_context
from ..rules import Rule, built_in
from . import patch, token_loss
from .chain import ForgeChainedOptimizer
from .choose import Chosen, Left, choose, expert_replicas, refuse, replicas, unwrap
from .column_row import Comms, FusedLinear, linear_spec
from .groups import param_groups
from .optimizer import ForgeOptimizer
from .summary import summary

# Where an option is not given to fuse(), it is what Megatron's OptimizerConfig says.
_CONFIG_FIELDS = {
    "adam": {"betas": ("adam_beta1", "adam_beta2"), "eps": "adam_eps"},
    "adamw": {"betas": ("adam_beta1", "adam_beta2"), "eps": "adam_eps"},
    "sgd": {"momentum": "sgd_momentum"},
    "lion": {"betas": ("lion_beta1", "lion_beta2")},
}


def _rule(rule: str | Rule, options: Mapping[str, Any]) -> Rule:
    """The rule by name or as given, with options replaced.

    Raises:
        ValueError: unknown rule or option; the message lists the known ones.
    """
    if isinstance(rule, Rule):
        return rule.with_options(**options)
    known = built_in()
    if rule not in known:
        raise ValueError(f"rule={rule!r} is not known; choose one of {', '.join(sorted(known))}")
    # Whether SGD has a momentum buffer is fixed here, and Megatron's SGD has one by default.
    defaults = {"momentum": 0.9} if rule == "sgd" else {}
    try:
        return known[rule](**{**defaults, **options})
    except TypeError as error:
        fields = ", ".join(known[rule].__dataclass_fields__)
        raise ValueError(f"rule {rule!r} takes the options {fields}: {error}") from error


class Fused:
    """What :func:`fuse` did to a model.

    Attributes:
        layers: the fused weights of this rank, in model order.
        left: every other parameter, with the reason.
        engine: schedules and pending factors.
    """

    def __init__(
        self,
        layers: list[FusedLinear],
        left: list[Left],
        engine: Engine,
        rule: Rule,
        explicit: frozenset[str],
        clip_grad: float,
        names: dict[int, str],
    ) -> None:
        self.layers, self.left, self.engine, self.rule = layers, left, engine, rule
        self._explicit, self._clip_grad, self._names = explicit, clip_grad, names
        self.optimizer: ForgeChainedOptimizer | None = None

    def summary(self) -> str:
        """A table of what is fused, in which formats and schedule, and what is not and why."""
        return summary(self.layers, self.left, self.rule)

    def remove(self) -> None:
        """Give the layers back to Megatron, with the weights as they are now.

        The optimizer that :meth:`chain` returned must not be used afterwards.
        """
        for layer in self.layers:
            vars(layer.module).pop(patch.LAYER_ATTRIBUTE, None)
            layer.weight.requires_grad_(True)

    def chain(
        self,
        optimizer: MegatronOptimizer,
        config_overrides: Mapping[Any, Any] | None = None,
    ) -> ForgeChainedOptimizer:
        """Add FORGE to the stock optimizer; hand the result to scheduler and training loop.

        Args:
            optimizer: from ``get_megatron_optimizer``, over the DDP-wrapped model.
            config_overrides: what was passed to ``get_megatron_optimizer``, if anything.

        Raises:
            ValueError: the optimizer's configuration cannot be trained fused, differs from what
                ``fuse`` was told, or DDP and optimizer were built before ``fuse``.
        """
        if self.optimizer is not None:
            raise ValueError("chain() was called before on this model.")
        config = optimizer.config
        self._check(optimizer, config)
        if config.loss_scale not in (None, 0, 1, 1.0):
            # An update inside the backward does not know the loss scale; auto must not choose it.
            self.engine.needs_norm = True
            for layer in self.layers:
                layer.fused.plans.clear()
                if layer.fused.fixed == "immediate":
                    layer.fused.fixed = "deferred"
        weights = [(self._names[id(layer.weight)], layer.weight) for layer in self.layers]
        groups = param_groups(weights, config, config_overrides)
        for group in groups:
            group.update(self._options(config))
        forge = ForgeOptimizer(self.layers, self.engine, self.rule, groups, optimizer)
        for layer in self.layers:
            layer.fused.linear.scalars(layer.fused.group, step=1, seed=self.engine.seed)
        self.engine.add(layer.fused for layer in self.layers)
        self.optimizer = ForgeChainedOptimizer(optimizer, forge)
        for layer in self.layers:
            layer.weight.requires_grad_(True)
        return self.optimizer

    def _options(self, config: Any) -> dict[str, Any]:
        """The rule's numbers for the groups: those given to fuse(), else OptimizerConfig's."""
        options = {k: v for k, v in self.rule.options.items() if k not in ("lr", "weight_decay")}
        for option, field in _CONFIG_FIELDS.get(self.rule.name, {}).items():
            fields = (field,) if isinstance(field, str) else field
            if option in self._explicit or not all(hasattr(config, name) for name in fields):
                continue
            values = tuple(getattr(config, name) for name in fields)
            options[option] = values[0] if isinstance(field, str) else values
        return options

    def _check(self, optimizer: MegatronOptimizer, config: Any) -> None:
        if config.fp16:
            raise ValueError("FORGE cannot be used with fp16: train in bf16 or fp32.")
        if float(config.clip_grad) != self._clip_grad:
            raise ValueError(
                f"fuse(clip_grad={self._clip_grad}) planned for another clipping than "
                f"OptimizerConfig(clip_grad={config.clip_grad}) does; pass the same to both."
            )
        if config.loss_scale not in (None, 0, 1, 1.0) and self.engine.schedule == "immediate":
            raise ValueError(
                "schedule='immediate' updates before the loss scale is divided out; use "
                "schedule='deferred' or no loss_scale."
            )
        if getattr(config, "optimizer_cuda_graph", False):
            raise ValueError("FORGE cannot be used with optimizer_cuda_graph; turn it off.")
        for layer in self.layers:
            if hasattr(layer.weight, "main_grad") or layer.weight.requires_grad:
                raise ValueError(
                    f"{layer.name} has a gradient buffer: call fuse() before the model is wrapped "
                    "in DDP, and leave requires_grad of fused weights alone."
                )
            if layer.weight.data_ptr() != layer.fused.storage.weight.data_ptr():
                raise ValueError(
                    f"{layer.name} moved to other memory after fuse(); call fuse() after the model "
                    "has its final dtype and device, directly before DDP."
                )
        for parameter in optimizer.get_parameters():
            sharded = hasattr(parameter, "_local_tensor") or getattr(
                parameter, "__fsdp_param__", False
            )
            if sharded:
                raise ValueError(
                    "FORGE cannot be used with FSDP; wrap the model in Megatron's DDP."
                )


def fuse(
    model_chunks: Sequence[torch.nn.Module] | torch.nn.Module,
    rule: str | Rule = "adamw",
    *,
    weight_format: str = "fp32",
    state_format: str | Sequence[str] = "fp32",
    schedule: str = "auto",
    clip_grad: float = 0.0,
    micro_batches: int = 1,
    tokens_per_micro_batch: int | None = None,
    seed: int = 0,
    weight_rounding: str = "stochastic",
    state_rounding: str = "stochastic",
    data_parallel_reduction: str = "auto",
    repeatable: bool = False,
    context: Context | None = None,
    **options: Any,
) -> Fused:
    """Let FORGE train the column- and row-parallel linears of a Megatron model.

    Call it after the model has its final dtype and device and before DDP; see the module for the
    whole sequence. Weights that are tied, shared, frozen or of an unsupported kind are left to the
    stock optimizer, with the reason in :meth:`Fused.summary`.

    Args:
        model_chunks: this rank's model chunks, wrapped in ``Float16Module`` or not.
        rule: ``adamw``, ``adam``, ``sgd``, ``lion`` or a :class:`forge_train.rules.Rule`.
        weight_format: ``fp32`` for fp32 models; ``bf16``, ``bf16+16`` or ``bf16+fp32`` for bf16.
        state_format: ``fp32``, ``bf16`` or ``q8``; one for all states or one for each.
        schedule: ``auto``, ``immediate``, ``deferred`` or ``accumulate``.
        clip_grad: as in ``OptimizerConfig``; 0: no clipping.
        micro_batches: per step.
        tokens_per_micro_batch: sequence length times micro-batch size; lets ``auto`` choose (and
            :meth:`Fused.summary` show) schedules now rather than at the first backward.
        seed: key of the stochastic rounding; the same on every rank.
        weight_rounding: ``stochastic`` or ``nearest``, for ``bf16`` weights.
        state_rounding: ``stochastic`` or ``nearest``, for ``bf16`` and ``q8`` states.
        data_parallel_reduction: how dW is summed over data- and context-parallel ranks:
            ``exchange`` of factors, ``panels`` of dW, or ``auto``, for each layer the one that
            moves fewer bytes. States are shared out over these ranks either way.
        repeatable: whether a step may be run again before the optimizer's (``--rerun-mode``), or
            later ones have more micro-batches, so that ``auto`` must not update in the backward.
        context: the backend; None: the process' own of the model's device.
        options: of the rule (``betas``, ``eps``, …), before ``OptimizerConfig``'s.

    Raises:
        ImportError: megatron-core has moved the method that is patched.
        ForgeBackendError: the model is on a GPU that FORGE cannot use; the message says why.
        ValueError: a setting that FORGE cannot honour, or ranks differ in what they fuse; nothing
            has changed then.
    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else list(model_chunks)
    config = unwrap(chunks[0]).config
    refuse(config)
    made = _rule(rule, options)
    # A gradient is divided by the tokens of all micro-batches, which no backward knows.
    per_token = bool(getattr(config, "calculate_per_token_loss", False))
    if per_token and schedule == "immediate":
        raise ValueError(
            "schedule='immediate' updates before the step's tokens are counted, by which "
            "calculate_per_token_loss divides; use schedule='deferred', 'accumulate' or 'auto'"
        )
    others, apart = replicas(data_parallel_reduction), expert_replicas()
    engine = Engine(
        schedule=schedule,
        micro_batches=micro_batches,
        needs_norm=clip_grad > 0.0 or repeatable or per_token,
        check_finite=False,  # the chain decides, over stock's gradients and all ranks
        seed=seed,
        replicas=others,
        apart=apart,
    )
    if per_token:
        engine.share = 1.0  # nor is it averaged over ranks
        token_loss.install()
    patch.install()
    sizes = [1 if ranks is None else ranks.size for ranks in (others, apart)]
    chosen, left = choose(chunks, config, *sizes)
    for item in chosen:
        if hasattr(item.module, patch.LAYER_ATTRIBUTE):
            raise ValueError(f"{item.name} is fused already.")
    if torch.distributed.is_initialized():
        formats = {"weight_format": weight_format, "state_format": state_format}
        roundings = {"weight_rounding": weight_rounding, "state_rounding": state_rounding}
        facts = {"rule": made.name, **made.options, **formats, **roundings, "clip_grad": clip_grad}
        agree(None, {**engine_facts(engine), **facts}, "fuse")
        _agree_on_weights(chosen, others, apart, bool(getattr(config, "num_moe_experts", None)))
    comms = Comms(context or default_context(chosen[0].weight.device if chosen else "cpu"))
    layers = []
    for item in chosen:
        spec = linear_spec(
            item,
            rule=made,
            weight_format=weight_format,
            state_format=state_format,
            weight_rounding=weight_rounding,
            state_rounding=state_rounding,
        )
        copies = apart if item.expert else others
        layers.append(FusedLinear(item, spec, engine, comms.of(item.module.tp_group), copies))
    _fix_experts(layers, engine, config, tokens_per_micro_batch)
    if tokens_per_micro_batch is not None:
        _plan(layers, engine, tokens_per_micro_batch)
    for layer in layers:
        # Past Module.__setattr__: a fused layer is not a submodule and has no state_dict entry.
        vars(layer.module)[patch.LAYER_ATTRIBUTE] = layer
        layer.weight.requires_grad_(False)
    names = {id(p): f"module.{name}" for chunk in chunks for name, p in chunk.named_parameters()}
    explicit = frozenset(options) if isinstance(rule, str) else frozenset(made.options)
    return Fused(layers, left, engine, made, explicit, float(clip_grad), names)


def _agree_on_weights(
    chosen: Sequence[Chosen], others: Replicas | None, apart: Replicas | None, mixture: bool
) -> None:
    """Compare weights and shards within a pipeline stage, and give copies rank 0's values.

    Masters are made from them, and Megatron's own broadcast comes later.
    """
    weights: dict[bool, dict[str, object]] = {False: {}, True: {}}
    for item in chosen:
        what = f"{tuple(item.weight.shape)} of {item.weight.dtype}, fused"
        weights[item.expert][item.name] = what
    if parallel_state.model_parallel_is_initialized():
        agree(parallel_state.get_tensor_model_parallel_group(), weights[False], "tensor_parallel")
        if mixture:
            group = parallel_state.get_expert_tensor_parallel_group()
            agree(group, weights[True], "expert_tensor_parallel")
    if others is not None:
        agree(others.group, weights[False], "data_parallel")
        others.broadcast(item.weight for item in chosen if not item.expert)
    if apart is not None and mixture:
        agree(apart.group, weights[True], "expert_data_parallel")
        apart.broadcast(item.weight for item in chosen if item.expert)


def _fix_experts(
    layers: Sequence[FusedLinear], engine: Engine, config: Any, tokens: int | None
) -> None:
    """Choose the schedule of experts once: their tokens differ from step to step and rank to rank.

    By the tokens that an expert gets when all get as many; where that is not known, by what holds
    least whatever they are. Ranks with copies of an expert must reduce it as often, too.
    """
    ranks = getattr(config, "expert_model_parallel_size", None) or 1
    for layer in layers:
        if not layer.expert:
            continue
        fused, layout = layer.fused, layer.fused.linear.layout
        fused.reduce_every = 1
        if tokens is None:
            at_step = engine.needs_norm or engine.micro_batches > 1
            fused.fixed = "accumulate" if at_step else "immediate"
            continue
        share = max(1, round(tokens * config.moe_router_topk * ranks / config.num_moe_experts))
        fused.plan = fused.linear.plan(
            tokens=share,
            micro_batches=engine.micro_batches,
            needs_norm=engine.needs_norm,
            schedule=engine.schedule,
        )
        fused.fixed = fused.plan.schedule
        factors = share * (layout.out_local + layout.in_local) * layer.weight.itemsize
        accumulator = layout.out_owned * layout.in_local * torch.float32.itemsize
        fused.reduce_every = max(1, accumulator // factors)


def _plan(layers: list[FusedLinear], engine: Engine, tokens: int) -> None:
    """Ask for every layer's schedule now, so that the summary can show it."""
    for layer in layers:
        if layer.fused.plan is not None:
            continue
        layer.fused.plan = layer.fused.plans[tokens] = layer.fused.linear.plan(
            tokens=tokens,
            micro_batches=engine.micro_batches,
            needs_norm=engine.needs_norm,
            schedule=engine.schedule,
        )
