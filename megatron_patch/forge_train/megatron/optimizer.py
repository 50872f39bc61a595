"""FORGE as a member of Megatron's optimizer chain.

The member has the whole interface that ``ChainedOptimizer`` and Megatron's training loop use of a
member, though most of it has little to do: there are no gradients to copy, unscale, clip or count.
A step is (1) ``prepare_grads``: the norm and the finiteness of gradients that exist only as
factors; (2) the chain adds stock's part to the norm; (3) ``step_with_ready_grads``: one update with
the clip coefficient of the total.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from ..engine import Engine, clip_coefficient
from ..rules import Rule
from .column_row import FusedLinear

_log = logging.getLogger("forge_train")


class _Inner:
    """What Megatron reaches as ``member.optimizer``: groups, and states by parameter."""

    def __init__(self, layers: Sequence[FusedLinear], groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.state = {layer.weight: layer.raw() for layer in layers}
        self.defaults: dict[str, Any] = {}


class ForgeOptimizer(MegatronOptimizer):
    """The member that trains the fused weights.

    Args:
        layers: this rank's fused weights, in model order.
        engine: what schedules their updates.
        rule: the rule they were made with.
        groups: from :func:`forge_train.megatron.groups.param_groups`; Megatron's scheduler writes
            ``lr`` and ``weight_decay`` there, updates read them there.
        stock: the chain this member joins, for its config, loss scale and process group.

    Attributes:
        total_norm: gradient norm over stock's and FORGE's weights, set by the chain before
            ``step_with_ready_grads``; None: no clipping.
        nonfinite_layers: weights of any rank whose gradient held inf or nan in the last step.
        nonfinite_tiles: tiles of all ranks that updates inside the backward left alone for that.
    """

    def __init__(
        self,
        layers: Sequence[FusedLinear],
        engine: Engine,
        rule: Rule,
        groups: list[dict[str, Any]],
        stock: MegatronOptimizer,
    ) -> None:
        super().__init__(_Inner(layers, groups), stock.config)
        self.layers, self.engine, self.rule = list(layers), engine, rule
        self.is_stub_optimizer = False
        # Dense weights are reduced over the first member's group; experts may have another one.
        first = getattr(stock, "chained_optimizers", [stock])[0]
        self.grad_stats_parallel_group = first.get_grad_stats_parallel_group()
        self.total_norm: float | None = None
        self.nonfinite_layers: tuple[str, ...] = ()
        self.nonfinite_tiles = 0
        self._stock = stock
        self._norm = 0.0
        by_weight = {id(weight): group for group in groups for weight in group["params"]}
        for layer in self.layers:
            layer.fused.group = by_weight[id(layer.weight)]

    # -- what the chain asks for before a step ------------------------------------------------

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """None that has a gradient: the chain clips and counts over what is listed here."""
        return []

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[torch.Tensor]:
        """None: see :meth:`get_grad_norm`."""
        return []

    # The name of the same method up to megatron-core 0.16.
    get_main_grads_for_grad_norm = get_grads_for_grad_norm

    def get_loss_scale(self) -> torch.Tensor:
        """The stock members' loss scale, which this member's gradients carry as well."""
        return self._stock.get_loss_scale()

    def _grad_scale(self) -> float:
        return float(self.engine.factor) / float(self.get_loss_scale())

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Take the gradient norm over all ranks; True when some rank's gradient is not finite.

        Collective over the gradient-statistics group (TP x PP) and data-parallel ranks.

        Raises:
            RuntimeError: kept factors were overwritten; no weight has changed.
        """
        self.total_norm = None
        for weight in self.engine.pending():
            weight.check()
        squares, nonfinite = self.engine.sum_of_squares()
        # Updates made inside the backward are over, but their norm is still to be reported.
        self.engine.reports.read()
        updated = {x.name: x.fused.report for x in self.layers if x.fused.updated}
        done = {name: report for name, report in updated.items() if report is not None}
        tiles = {name: r.nonfinite_tiles for name, r in done.items() if r.nonfinite_tiles}
        if not nonfinite:
            squares += sum(r.sum_of_squares for name, r in done.items() if name not in tiles)
        if nonfinite or tiles:
            left = [f"{name} ({count} tiles, not updated)" for name, count in tiles.items()]
            what = ", ".join([*nonfinite, *left])
            _log.warning("inf or nan in the weight gradient of %s", what)
        numbers = [0.0 if nonfinite else squares, float(bool(nonfinite)), sum(tiles.values())]
        statistics = torch.tensor(
            numbers,
            dtype=torch.float64,
            device=self.layers[0].weight.device if self.layers else torch.cuda.current_device(),
        )
        if self.engine.replicas is None:
            group = self.get_grad_stats_parallel_group()
        else:
            # Each has the norm of its own rows. The group of a distributed optimizer has these
            # ranks, too, and would count them twice.
            self.engine.replicas.sum(statistics)
            group = parallel_state.get_model_parallel_group()
        torch.distributed.all_reduce(statistics, group=group)
        total, bad_ranks, count = statistics.tolist()
        self.nonfinite_tiles = round(count)
        self.nonfinite_layers = ()
        if bad_ranks or count:  # so it is on every rank
            names = self._names_of_all([*nonfinite, *tiles], group)
            self.nonfinite_layers = tuple(sorted(names))
        self._norm = math.sqrt(total) * self._grad_scale() * self.engine.share
        return bad_ranks > 0

    def _names_of_all(
        self, names: Sequence[str], group: torch.distributed.ProcessGroup
    ) -> set[str]:
        """The names of all ranks over which :meth:`prepare_grads` has summed."""
        known = set(names)
        replicas = self.engine.replicas
        for each in (group,) if replicas is None else (replicas.group, group):
            lists: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size(each))]
            torch.distributed.all_gather_object(lists, sorted(known), group=each)
            known.update(*lists)
        return known

    def get_grad_norm(self) -> float:
        """Norm of the fused weights' unscaled gradients over all ranks, from ``prepare_grads``."""
        return self._norm

    def count_zeros(self) -> float:
        """0: a gradient that is never formed has no zeros to count."""
        return 0.0

    # -- the step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update all pending weights with the clip coefficient of :attr:`total_norm`.

        Raises:
            RuntimeError: clipping is on but a weight was updated inside its backward.
        """
        scale, limit = self._grad_scale(), self.config.clip_grad
        if limit > 0.0 and any(layer.fused.updated for layer in self.layers):
            raise RuntimeError(
                "clip_grad is on, but weights were updated inside the backward before the norm "
                "was known; fuse with clip_grad set, or schedule='deferred'."
            )
        if self.total_norm is not None and limit > 0.0:
            # The norm is of unscaled gradients already, so the coefficient's own scale is 1.
            _, coefficient = clip_coefficient(self.total_norm**2, 1.0, limit)
            scale *= coefficient
        result = self.engine.finish_step(grad_scale=scale)
        if result.nonfinite_tiles:
            _log.warning("tiles with inf or nan were not updated: %s", result.nonfinite_tiles)
        return True

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, None]:
        """A step of this member alone, clipped by its own norm."""
        if self.prepare_grads():
            self.end_step()
            return False, None, None
        self.total_norm = self.get_grad_norm()
        return self.step_with_ready_grads(), self.total_norm, None

    def end_step(self) -> None:
        """Forget what a skipped step left pending. After an applied step: nothing."""
        if self.engine.pending() or any(layer.fused.updated for layer in self.layers):
            self.engine.skip()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget factors that no step has used (an aborted or repeated step).

        Raises:
            RuntimeError: such a step has already updated weights (schedule ``immediate``).
        """
        self.engine.discard()

    # -- weights and states -------------------------------------------------------------------

    def reload_model_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Take masters and low halves afresh from the model weights."""
        for layer in self.layers:
            if layer.fused.storage.weight_extra is not None:
                layer.import_weight(layer.weight.detach().float())

    def offload_to_cpu(self) -> None:
        """Leaves FORGE's states where they are; the library holds no other copy to move."""

    def restore_from_cpu(self) -> None:
        """See :meth:`offload_to_cpu`."""

    @property
    def step_count(self) -> int:
        """Updates applied so far."""
        return max((layer.fused.step for layer in self.layers), default=0)

    @property
    def seed(self) -> int:
        """Key of the stochastic rounding."""
        return self.engine.seed

    @property
    def has_master(self) -> bool:
        """Whether the weights hold more than the model weight."""
        return any(layer.fused.storage.weight_extra is not None for layer in self.layers)

    def resume(self, step: int, seed: int) -> None:
        """Continue the count of updates and the sequence of rounding noise."""
        for layer in self.layers:
            layer.fused.step = int(step)
        self.engine.seed = int(seed)

    def description(self) -> dict[str, Any]:
        """Rule, format and scheme of the parameter ids, as a checkpoint names them."""
        specs = [layer.fused.linear.spec for layer in self.layers[:1]]
        formats = {"weight_format": specs[0].weight_format} if specs else {}
        return {"rule": self.rule.name, **formats, "parameter_ids": "crc32(name)"}

    def state_dict(self) -> dict[str, Any]:
        """This rank's states as stored, bit for bit; valid for the same TP and PP layout.

        Raises:
            NotImplementedError: each data-parallel rank has the states of its own rows, and one
                rank's would be saved.
        """
        if self.engine.replicas is not None:
            raise NotImplementedError(
                "FORGE's states are shared out over data-parallel ranks, which --ckpt-format torch "
                "does not save; use --ckpt-format torch_dist."
            )
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return {
            **self.description(),
            "step": self.step_count,
            "seed": self.seed,
            "param_groups": groups,
            "raw": {layer.name: layer.raw() for layer in self.layers},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy in what :meth:`state_dict` returned.

        Raises:
            ValueError: another layout, rule or format; nothing was copied.
        """
        raw = state_dict["raw"]
        for layer in self.layers:
            own, saved = layer.raw(), raw.get(layer.name, {})
            shapes = {name: (t.shape, t.dtype) for name, t in own.items()}
            if {name: (t.shape, t.dtype) for name, t in saved.items()} != shapes:
                raise ValueError(
                    f"The saved states of {layer.name} have another shape, rule or format than "
                    "this run's. Only torch_dist checkpoints convert between layouts."
                )
        for layer in self.layers:
            for name, tensor in layer.raw().items():
                tensor.copy_(raw[layer.name][name])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self.resume(state_dict["step"], state_dict["seed"])

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Not of a member alone: the chain lays FORGE's and stock's states out together."""
        raise NotImplementedError("call sharded_state_dict of the optimizer that chain() returned")
