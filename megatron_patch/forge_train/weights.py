"""One trainable weight: its storage, what is pending for it, and who uses it.

A :class:`FusedWeight` is updated from factors and has no gradient. What autograd leaves a gradient
for is a ``DenseWeight`` (dense.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from ._linear import Linear
from ._types import Plan, Report, Scalars, Segment
from .held import Held
from .weight_keys import key_of

if TYPE_CHECKING:
    from .engine import Engine


class Use:
    """One forward that has not been differentiated yet. Autograd's node holds it, nobody else.

    Attributes:
        version: of the weight when the forward ran.
        task: the running backward pass if the forward is a recomputation inside one, else -1.
        done: whether its backward has run.
    """

    def __init__(self, version: int, task: int) -> None:
        """Note the state of the weight at the forward."""
        self.version, self.task, self.done = version, task, False


class Weight:
    """What both kinds share: a parameter, its linear of the C ABI, storage and step count.

    Args:
        name: the parameter's name in the model; error messages and reports carry it.
        parameter: the weight; updated in place through its memory.
        linear: made for its shape, rule and formats.
        group: the param group that is read for hyperparameters at every update; options that it
            lacks are the rule's own.

    Attributes:
        segments: factors that wait for the step.
        storage: weight and states.
        engine: decides when it is updated; set by ``Engine.add``.
        counted: updates applied so far, as far as the host knows; see :attr:`step`.
    """

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        linear: Linear,
        group: Mapping[str, Any] | None = None,
    ) -> None:
        """Allocate the states."""
        self.name, self.parameter, self.linear = name, parameter, linear
        self.segments: list[Segment] = []
        self.group: Mapping[str, Any] = group if group is not None else {}
        layout = linear.layout
        matrix = parameter.detach().view(layout.out_local, layout.in_local)
        self.storage = linear.allocate(matrix)
        self.engine: Engine | None = None
        self.counted = 0
        self.version = 0
        self._report: Report | None = None

    @property
    def step(self) -> int:
        """Updates applied so far. Waits where steps were decided on a GPU since the last look."""
        if self.engine is not None:
            self.engine.scalars.read()
        return self.counted

    @step.setter
    def step(self, count: int) -> None:
        if self.engine is not None:
            self.engine.scalars.set_count(self, count)
        self.counted = count

    @property
    def report(self) -> Report | None:
        """Of the last update; waits for it on a GPU.

        An update that a GPU was told to skip reports every tile as not finite.
        """
        if self.engine is not None:
            self.engine.reports.read()
        return self._report

    def reported(self, report: Report | None) -> None:
        """Take the report of the last update."""
        self._report = report

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a fused module is a plain module: states belong to one weight only."""
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A pickled fused module is a plain module; see ``state_dict`` for the states."""
        return type(None), ()

    @property
    def pending(self) -> bool:
        """Whether something waits for the optimizer step."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise if what is pending can no longer be trusted."""

    def norm(self, out: torch.Tensor) -> None:
        """Leave ``Σ dW²`` of what is pending in ``out``; see ``Linear.norm``."""
        raise NotImplementedError

    def apply(self, scalars: Scalars | torch.Tensor, report: torch.Tensor | None = None) -> None:
        """Update with everything pending, which is then gone; see ``Linear.update``.

        The engine counts the step.
        """
        raise NotImplementedError

    def applied(self) -> None:
        """Note an update with everything pending."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget what is pending."""
        raise NotImplementedError

    def accumulated_gradient(self) -> torch.Tensor | None:
        """What is pending beside the factors, ``[out, in]``."""
        raise NotImplementedError


class FusedWeight(Weight):
    """A linear's weight that no gradient exists for.

    Attributes:
        accumulator: fp32, of the rows that are updated here; the first step that needs it
            allocates it.
        accumulated: whether the accumulator holds micro-batches of this step.
        local: factors of this rank's own tokens, whose dW is to be reduced over data-parallel
            ranks before the step.
        updated: whether this step's update has happened inside the backward.
        plan: why ``auto`` chose its schedule.
        uses: forwards whose graphs are alive.
        schedule: of this step, under ``auto``; chosen by its first backward.
        reused: whether several forwards were seen in one step under ``auto``.
        kept_more: whether a step had more than one segment.
        graph_uses: the uses of compiled graphs, which nothing else holds.
        key: what names it in compiled graphs; see ``linear_op``.
        apart: whether its copies are on other ranks than those of the engine's ``replicas``, as an
            expert's are.
        fixed: the schedule under ``auto``, where it must not follow from a backward's tokens.
        reduce_every: micro-batches after which ``accumulate`` reduces what was not exchanged, where
            ranks have different tokens; None: when the factors outgrow the accumulator.
    """

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        linear: Linear,
        group: Mapping[str, Any] | None = None,
    ) -> None:
        """Allocate the states; nothing is pending."""
        super().__init__(name, parameter, linear, group)
        self.accumulator: torch.Tensor | None = None
        self.accumulated = False
        self.local: list[Segment] = []
        self.updated = False
        self.schedule: str | None = None
        self.plan: Plan | None = None
        self.plans: dict[int, Plan] = {}
        self.uses: WeakSet[Use] = WeakSet()
        self.reused = self.kept_more = self.apart = False
        self.fixed: str | None = None
        self.reduce_every: int | None = None
        self.graph_uses = Held()
        self.key = key_of(self)
        self._linears = {linear.spec.factor_dtype: linear}

    @property
    def step(self) -> int:
        """As of every weight; an update inside the backward counts at once."""
        return Weight.step.fget(self) + self.updated  # type: ignore[attr-defined]

    @step.setter
    def step(self, count: int) -> None:
        # The count of a checkpoint, whose weights and states know nothing of this step's update.
        self.updated = False
        Weight.step.fset(self, count)  # type: ignore[attr-defined]

    @property
    def pending(self) -> bool:
        """Whether factors or accumulated micro-batches wait for the optimizer step."""
        return bool(self.segments or self.local) or self.accumulated

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors held for the step."""
        return sum(segment.bytes for segment in (*self.segments, *self.local))

    def take_factors(self, dtype: torch.dtype) -> None:
        """Have the step's factors in this dtype, such as bf16 under autocast.

        Weight, states and rounding noise are the same with each; the products are not.

        Raises:
            RuntimeError: factors of another dtype wait for the step.
        """
        spec = self.linear.spec
        if dtype == spec.factor_dtype:
            return
        if self.pending:
            raise RuntimeError(
                f"{self.name}: a backward with {dtype} activations after one with "
                f"{spec.factor_dtype} in the same step. Run all micro-batches of a step under the "
                "same torch.autocast, or all of them without."
            )
        if dtype not in self._linears:
            products = spec.fp32_products if dtype == torch.float32 else "exact"
            self._linears[dtype] = Linear(
                replace(spec, factor_dtype=dtype, fp32_products=products),
                name=self.name,
                comm=self.linear.comm,
                device=self.linear.device,
                data_parallel=self.linear.data_parallel,
                reduction=self.linear.reduction,
                micro_batches=self.linear.micro_batches,
            )
        self.linear = self._linears[dtype]
        # A plan counts the bytes of factors.
        self.plans.clear()

    def keep(self, segment: Segment, *, accumulate: bool) -> None:
        """Take a micro-batch's factors.

        With ``accumulate``, the ones kept before go into the accumulator first, so that only the
        last micro-batch is held as factors and joins the update's own pass. Factors that are larger
        than the accumulator are not held at all.
        """
        if accumulate and self.segments:
            self._fold()
        self.segments.append(segment)
        layout = self.linear.layout
        accumulator_bytes = layout.out_owned * layout.in_local * torch.float32.itemsize
        if accumulate and self.factor_bytes > accumulator_bytes:
            self._fold()

    def keep_local(self, segment: Segment, *, accumulate: bool) -> None:
        """Take a micro-batch's factors that were not exchanged.

        With ``accumulate`` those before are reduced first where all would be larger than the
        accumulator: so a rank holds no more, and reduces as rarely as that allows.
        """
        if self.reduce_every is None:
            layout = self.linear.layout
            most = layout.out_owned * layout.in_local * torch.float32.itemsize
            full = bool(self.local) and self.factor_bytes + segment.bytes > most
        else:
            full = len(self.local) >= self.reduce_every
        if accumulate and full:
            self.reduce()
        self.local.append(segment)

    def reduce(self) -> None:
        """Sum dW of kept factors, if there are any, over data-parallel ranks; collective."""
        if self.local:
            self.check()
            self.linear.reduce(self.local, self.sum())
            self.accumulated = True
            self.local.clear()

    def _fold(self) -> None:
        """Add all kept factors to the accumulator and let go of them."""
        self.check()
        self.linear.accumulate(self.segments, self.sum())
        self.accumulated = True
        self.segments.clear()

    def sum(self) -> torch.Tensor:
        """The accumulator, zero where it holds nothing of this step; the caller adds to it."""
        if self.accumulator is None:
            layout = self.linear.layout
            shape = (layout.out_owned, layout.in_local)
            self.accumulator = torch.zeros(shape, device=self.linear.device)
        elif not self.accumulated:
            self.accumulator.zero_()
        return self.accumulator

    def check(self) -> None:
        """Raise if somebody wrote into kept factors.

        Raises:
            RuntimeError: an in-place operation changed an activation or its gradient.
        """
        if any(segment.overwritten for segment in (*self.segments, *self.local)):
            raise RuntimeError(
                f"{self.name}: an input or output gradient kept for the optimizer step was changed "
                "in place since the backward. Make that operation out-of-place, or exclude this "
                "layer from fuse()."
            )

    def norm(self, out: torch.Tensor) -> None:
        """``Σ dW²`` over segments and accumulator together."""
        self.linear.norm(self.segments, self.accumulated_gradient(), out=out)

    def apply(self, scalars: Scalars | torch.Tensor, report: torch.Tensor | None = None) -> None:
        """Update over segments and accumulator together."""
        self.reported(
            self.linear.update(
                self.segments, self.storage, scalars, self.accumulated_gradient(), report
            )
        )
        self.applied()

    def applied(self) -> None:
        """Note an update over everything pending, which is gone."""
        self.version += 1
        self.clear()

    def clear(self) -> None:
        """Drop factors; the accumulator's memory stays for the next step."""
        self.segments.clear()
        self.local.clear()
        self.accumulated = False
        self.schedule = None

    def accumulated_gradient(self) -> torch.Tensor | None:
        """The accumulator, where it holds micro-batches of this step."""
        return self.accumulator if self.accumulated else None
