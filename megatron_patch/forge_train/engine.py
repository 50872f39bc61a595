"""When a weight is updated: the schedules, one step at a time.

Under ``immediate`` the update happens inside the backward. Under ``deferred`` a backward keeps its
factors, and the step takes the global norm without any gradient, decides (clip, skip) and updates
over all micro-batches at once. Under ``accumulate`` all micro-batches but the last go into an fp32
buffer. ``auto`` asks the library per layer. ``docs/architecture.md`` has the reasons.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ._types import SCHEDULES, BackwardResult, choice
from .data_parallel import Replicas, agree
from .decision import Decision, clip_coefficient, decide, number
from .dense import DenseWeight
from .misuse import recomputed, reused, second_backward
from .reports import Norms, Reports
from .scalars import ScalarTable
from .step import StepResult
from .update import update_pending
from .weights import FusedWeight, Use, Weight

__all__ = [
    "DenseWeight",
    "Engine",
    "FusedWeight",
    "StepResult",
    "Use",
    "Weight",
    "clip_coefficient",
]

_log = logging.getLogger("forge_train")


class Engine:
    """The weights of one model and the state of the step in progress.

    Args:
        schedule: ``auto``, ``immediate``, ``deferred`` or ``accumulate``.
        micro_batches: backwards of each weight per step, for ``auto`` and for the checks of
            ``immediate``.
        needs_norm: whether steps clip by the global norm; ``immediate`` cannot.
        check_finite: whether a deferred step looks for inf and nan and skips as a whole. Without
            it and without clipping the norm pass is saved, and only the tiles concerned are
            skipped.
        seed: key of the stochastic rounding, the same on every rank.
        capturable: whether every update reads its numbers from the backend's memory, so that steps
            can be captured in a CUDA graph.
        replicas: the data-parallel ranks, over which gradients are averaged; None: no others.
        apart: the ranks with copies of the weights that are ``apart``, such as experts, which the
            tokens of all ``replicas`` reach; None: there are no copies.

    Raises:
        ValueError: the options exclude each other.
    """

    def __init__(
        self,
        *,
        schedule: str = "auto",
        micro_batches: int = 1,
        needs_norm: bool = False,
        check_finite: bool = True,
        seed: int = 0,
        capturable: bool = False,
        replicas: Replicas | None = None,
        apart: Replicas | None = None,
    ) -> None:
        """Start with no weights."""
        choice(SCHEDULES, "schedule", schedule)
        if micro_batches < 1:
            raise ValueError(f"micro_batches={micro_batches} must be at least 1")
        if schedule == "immediate" and needs_norm:
            raise ValueError(
                "schedule='immediate' updates before the global norm is known, so max_norm cannot "
                "clip; use schedule='deferred' or max_norm=None"
            )
        if schedule == "immediate" and micro_batches > 1:
            raise ValueError(
                f"schedule='immediate' updates at every backward, micro_batches={micro_batches} "
                "would be as many steps; use schedule='deferred' or 'accumulate'"
            )
        self.schedule, self.micro_batches, self.needs_norm = schedule, micro_batches, needs_norm
        self.check_finite, self.seed = check_finite, seed
        self.weights: list[Weight] = []
        self.reports = Reports(self.weights)
        self.norms = Norms(self.weights)
        self.scalars = ScalarTable(self.weights, in_memory=capturable)
        self.steps = 0
        self.replicas, self.apart = replicas, apart
        # What the library sums over ranks is averaged.
        self.share = 1.0 if replicas is None else 1.0 / replicas.size
        # What this step's gradients are multiplied with, known after its backwards; 1 for the next.
        self.factor: float | torch.Tensor = 1.0
        self._gathering = False
        self._summed = False
        self._dense: tuple[tuple[bool, ...], torch.Tensor] | None = None

    @property
    def skipped_steps(self) -> int:
        """Steps skipped as a whole for inf or nan; waits as ``Weight.step`` does."""
        return self.scalars.skipped

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self.scalars.skipped = count

    @property
    def fused(self) -> list[FusedWeight]:
        """The weights that have no gradient."""
        return [weight for weight in self.weights if isinstance(weight, FusedWeight)]

    def add(self, weights: Iterable[Weight]) -> None:
        """Let steps cover these weights, too.

        Raises:
            ValueError: the weights are on several devices; none was added.
        """
        weights = list(weights)
        first: dict[torch.device, str] = {}
        for weight in [*self.weights, *weights]:
            first.setdefault(weight.linear.device, weight.name)
        if len(first) > 1:
            places = ", ".join(f"{name} on {device}" for device, name in first.items())
            raise ValueError(
                f"one step covers weights of one device, but {places}. Move the model to one "
                "device before fuse(), or leave the parameters of the others out of it."
            )
        self.scalars.replace()
        for weight in weights:
            self.weights.append(weight)
            weight.engine = self

    # -- a forward ----------------------------------------------------------------------------

    def begin_use(self, weight: FusedWeight) -> Use:
        """Note a forward with gradients enabled, before it runs; its autograd node keeps the use.

        Raises:
            RuntimeError: the weight would be updated twice in one step.
        """
        self.settle()
        task = torch._C._current_graph_task_id()
        # A forward inside a backward pass is activation recomputation: it repeats a use that was
        # counted (or, under reentrant checkpointing, could not be), so only uses of the same pass
        # count against it.
        uses = weight.uses
        if len(uses) and any(not use.done and use.task == task for use in uses):
            if self.schedule == "immediate":
                raise RuntimeError(reused(weight.name))
            weight.reused = True
        if weight.updated and task != -1:
            raise RuntimeError(recomputed(weight.name))
        return Use(weight.version, task)

    def settle(self) -> None:
        """Let reads of weights come after their rows were gathered from data-parallel ranks.

        Raises:
            ForgeCommunicationError: a rank was lost.
        """
        if self._gathering:
            self._gathering = False
            for replicas in (self.replicas, self.apart):
                if replicas is not None:
                    replicas.wait()

    # -- a backward ---------------------------------------------------------------------------

    def backward(
        self,
        weight: FusedWeight,
        use: Use,
        dy: torch.Tensor,
        x: torch.Tensor,
        *,
        need_dx: bool = True,
        need_dbias: bool = False,
    ) -> BackwardResult:
        """Compute dX and dbias now, update the weight by its schedule.

        Args:
            weight: the layer's.
            use: from :meth:`begin_use`.
            dy: ``[..., out]``.
            x: ``[..., in]``, as saved by the forward.
            need_dx: whether to compute dX.
            need_dbias: whether to compute dbias.

        Raises:
            RuntimeError: the weight was updated since the forward, or already in this step.
            ValueError: data-parallel ranks have different numbers of tokens; nothing was computed.
        """
        if weight.updated:
            raise RuntimeError(second_backward(weight.name))
        if use.version != weight.version:
            raise RuntimeError(
                f"{weight.name}: the weight was updated after this graph's forward, so its "
                "gradient no longer exists. Run the forward again after optimizer.step()."
            )
        use.done = True
        tokens = weight.linear.tokens_of(dy, x)
        self._compare_tokens(weight, tokens)
        schedule = self.schedule
        if schedule == "auto":
            schedule = self._schedule_of(weight, tokens)
        if schedule == "immediate":
            scalars = self.scalars.give(weight, self.seed, self.share)
            result = weight.linear.backward(
                dy, x, weight.storage, mode="update",
                need_dx=need_dx, need_dbias=need_dbias,
                scalars=scalars, report=self.reports.row(weight),
            )  # fmt: skip
            weight.updated, weight.version = True, weight.version + 1
            self._gathering = True
            return result
        local = weight.linear.reduces_panels(tokens)
        first = not weight.pending and not local
        norm = self.norms.row(weight) if first and self._normed_at_once(weight, schedule) else None
        result = weight.linear.backward(
            dy, x, weight.storage, mode="keep", need_dx=need_dx, need_dbias=need_dbias, norm=norm
        )
        if result.segment is None:
            raise RuntimeError(f"{weight.name}: the backward kept no factors")
        keep = weight.keep_local if local else weight.keep
        keep(result.segment, accumulate=schedule == "accumulate")
        self.norms.taken(weight, norm is not None)
        weight.kept_more = weight.kept_more or not (first or local)
        return result

    def _compare_tokens(self, weight: FusedWeight, tokens: int) -> None:
        """Have data-parallel ranks tell each other the tokens that sums and schedules depend on.

        In the first two steps: later it would cost a GPU's host more than it finds.
        """
        shared = weight.linear.data_parallel is not None and not weight.apart
        if shared and self.steps < 2 and self.replicas is not None:
            agree(self.replicas.group, {f"tokens of {weight.name}": tokens}, "backward")

    def _normed_at_once(self, weight: FusedWeight, schedule: str) -> bool:
        """Whether the step will want the norm of these factors, and they will be all.

        Then the GPU has something to do while the host is still in the backward.
        """
        alone = schedule == "deferred" and self.micro_batches == 1 and not weight.kept_more
        return alone and (self.needs_norm or (self.check_finite and self.schedule == "deferred"))

    def _schedule_of(self, weight: FusedWeight, tokens: int) -> str:
        """This step's schedule for a weight under ``auto``, by its first backward of the step."""
        if weight.fixed is not None:
            return weight.fixed
        if weight.schedule is None:
            plan = weight.plans.get(tokens)
            if plan is None:
                plan = weight.linear.plan(
                    tokens=tokens, micro_batches=self.micro_batches, needs_norm=self.needs_norm
                )
                weight.plans[tokens] = plan
                _log.info("%s: schedule %s, %s", weight.name, plan.schedule, plan.reason)
            weight.plan, weight.schedule = plan, plan.schedule
            if weight.reused and plan.schedule == "immediate":
                weight.schedule = "deferred"
        return weight.schedule

    # -- a step -------------------------------------------------------------------------------

    def pending(self) -> list[Weight]:
        """The weights that wait for the step."""
        return [weight for weight in self.weights if weight.pending]

    def sum_of_squares(self) -> tuple[float, tuple[str, ...]]:
        """``Σ dW²`` of everything pending in this process, and the names where it is not finite.

        Collective over data-parallel ranks, of which each has the rows that it updates.
        """
        total, nonfinite = 0.0, []
        pending = self.pending()
        self._reduce(pending)
        for weight, norm in zip(pending, self.norms.read(pending), strict=True):
            total += norm.sum_of_squares
            if norm.nonfinite or not math.isfinite(norm.sum_of_squares):
                nonfinite.append(weight.name)
        return (math.inf if nonfinite else total), tuple(nonfinite)

    def finish_step(
        self,
        *,
        max_norm: float | None = None,
        grad_scale: float = 1.0,
        extra_sum_of_squares: float | torch.Tensor = 0.0,
        reduce: Callable[[float], float] | None = None,
    ) -> StepResult:
        """Norm, decision and update: the whole of ``optimizer.step()``.

        On a GPU the host waits for nothing, but for the sum where there is a ``reduce``.

        Args:
            max_norm: clip the global norm to this; None or 0: no clipping.
            grad_scale: what every gradient is multiplied with, such as one over the loss scale.
            extra_sum_of_squares: of other parameters that are clipped together with these,
                unscaled; a number, or fp64 ``[]`` beside the weights. Multiply their gradients with
                the result's ``coefficient``.
            reduce: sums the sum of squares over ranks, so that all ranks decide the same.

        Raises:
            RuntimeError: ``max_norm`` although weights were updated inside the backward; pending
                factors were overwritten. No weight has changed.
            ValueError: a param group's options do not fit; no weight has changed.
        """
        grad_scale = float(grad_scale) * self.share
        updated = [weight for weight in self.fused if weight.updated]
        if max_norm and updated:
            raise RuntimeError(
                "max_norm clips by a norm that is known after the backward, but weights were "
                "updated inside it; use schedule='deferred'"
            )
        pending = self.pending()
        for weight in pending:
            weight.check()
        self.scalars.prepare(pending, self.seed, grad_scale)
        self._sum_gradients(pending)
        self._reduce(pending)
        decision, sums = None, None
        # Under `reduce` every rank has to take part, whatever `auto` chose for its own layers.
        together = not updated or (reduce is not None and self.schedule == "auto")
        if max_norm or (self.check_finite and together):
            sums = self._over_replicas(pending, self.norms.sums(pending, self.scalars.device))
            total = sums.sum() + extra_sum_of_squares
            if reduce is not None:
                total = torch.full_like(total, reduce(number(total)))
            decision = decide(total, grad_scale, max_norm)
        names = tuple(weight.name for weight in pending)
        if decision is not None and self._refused(decision, reduce is not None):
            rows = self._rows_of(updated)
            result = StepResult(grad_scale, decision, sums, names, self.reports, rows, len(rows))
            self.skip()
            return result
        coefficient = grad_scale if decision is None else decision.coefficient
        update_pending(pending, coefficient, self.scalars, self.reports)
        self._gathering = True
        self.settle()
        changed = [*updated, *pending]
        rows = self._rows_of(changed)
        result = StepResult(grad_scale, decision, sums, names, self.reports, rows, len(updated))
        self.scalars.advance(changed, None if decision is None else decision.taken)
        self._end_step()
        return result

    def _sum_gradients(self, pending: Sequence[Weight]) -> None:
        """Sum what autograd left over data-parallel ranks; fused weights have no gradient."""
        if self.replicas is None or self._summed:
            return
        if self.steps < 2 or self.scalars.device.type != "cuda":
            # Later a GPU's host would wait for it; what differs does so from the start.
            common = [w for w in pending if not (isinstance(w, FusedWeight) and w.apart)]
            names = {"what waits for the step": [weight.name for weight in common]}
            agree(self.replicas.group, names, "step")
        dense = [weight.parameter for weight in pending if isinstance(weight, DenseWeight)]
        self.replicas.sum_gradients(dense)
        # A step that fails and is tried again must not sum them again.
        self._summed = True

    def _reduce(self, pending: Sequence[Weight]) -> None:
        """Sum over data-parallel ranks what was not exchanged."""
        for weight in pending:
            if isinstance(weight, FusedWeight):
                weight.reduce()

    def _over_replicas(self, weights: Sequence[Weight], sums: torch.Tensor) -> torch.Tensor:
        """Sums of squares of whole gradients.

        A rank has those of the rows that it owns, and of what is not fused all, which counts once.
        """
        if self.replicas is None or not len(sums):
            return sums
        sums = sums.clone()
        if self.replicas.rank > 0:
            dense = tuple(isinstance(weight, DenseWeight) for weight in weights)
            if self._dense is None or self._dense[0] != dense:
                # Kept: to make it the host waits for its copy.
                self._dense = dense, torch.tensor(dense, device=sums.device)
            sums.masked_fill_(self._dense[1], 0.0)
        return self.replicas.sum(sums)

    def _refused(self, decision: Decision, known: bool) -> bool:
        """Whether the step is skipped, where the host knows without waiting."""
        return (known or not decision.taken.is_cuda) and not bool(decision.taken)

    def _rows_of(self, weights: Iterable[Weight]) -> dict[str, int]:
        return {weight.name: self.reports.place(weight) for weight in weights}

    def skip(self) -> None:
        """End the step without any update but those that the backward has made."""
        self.scalars.skip([weight for weight in self.fused if weight.updated])
        for weight in self.weights:
            weight.clear()
        self._end_step()

    def discard(self) -> None:
        """Forget what is pending, as ``zero_grad`` does.

        Raises:
            RuntimeError: an ``immediate`` update has already used it.
        """
        for fused in self.fused:
            if fused.updated:
                raise RuntimeError(
                    f"{fused.name}: zero_grad() between backward() and step() cannot take an "
                    "update back that schedule='immediate' made inside the backward; use "
                    "schedule='deferred'"
                )
        for weight in self.weights:
            weight.clear()
        self._summed = False
        self.factor = 1.0
        self.norms.clear()
        self.scalars.discard()

    def _end_step(self) -> None:
        self.steps += 1
        self._summed = False
        self.factor = 1.0
        self.settle()
        self.norms.clear()
        for weight in self.fused:
            weight.updated = False
            weight.schedule = None

    # -- CUDA graphs --------------------------------------------------------------------------

    def replayed(self, steps: int) -> None:
        """Note that a graph has made steps: graphs of autograd from before are out of date."""
        self.steps += steps
        self.scalars.replayed(steps)
        self.reports.replayed()
        for weight in self.weights:
            weight.version += 1

    def abandon(self, steps: int) -> None:
        """Forget what a capture has left: pending work, and steps that it counted but did not run.

        Those that a later replay makes are counted by :meth:`replayed`.
        """
        self.steps -= steps
        self.scalars.replayed(-steps)
        for weight in self.fused:
            weight.updated = False
            weight.clear()
        self.norms.clear()

    def memory(self) -> dict[str, Any]:
        """Bytes held now: ``weights_and_states``, ``factors``, ``accumulators``."""
        fused = self.fused
        return {
            "weights_and_states": sum(weight.storage.bytes for weight in self.weights),
            "factors": sum(weight.factor_bytes for weight in fused),
            "accumulators": sum(
                weight.accumulator.nbytes for weight in fused if weight.accumulator is not None
            ),
        }
