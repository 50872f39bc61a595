"""An estimate: one row for each optimizer, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .._types import STATE_FORMATS
from ..choose import DTYPE_OF_FORMAT
from .architecture import Architecture
from .fused import Forge, Handled
from .memory import Memory
from .methods import CATEGORIES, Method
from .options import DTYPES, Options
from .simulate import simulate
from .stock import stock_methods
from .transformer import Forward, parameters_of

GIB = 2**30
_HEADS = {
    "weights": "weights",
    "master or extra bits": "bits",
    "optimizer states": "states",
    "gradients": "grads",
    "kept factors": "factors",
    "accumulators": "buffers",
    "activations": "activ.",
    "logits and loss": "logits",
    "workspaces": "work",
    "temporary": "temp",
}


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        method: its key, such as ``adamw-fused`` or ``forge``.
        title: for people.
        refused: why it cannot do this; the sizes are 0 then.
        peak: bytes of the largest moment of a step.
        phase: when that is: ``forward``, ``backward`` or ``step``.
        at_peak: bytes then, by what they are for; they add up to ``peak``.
        most: the most bytes of each kind at any time, not all of them at once.
        saved: bytes that one forward leaves for its backward.
        weight_format, state_format, schedule: where a method has several; else empty.
    """

    method: str
    title: str
    refused: str
    peak: int = 0
    phase: str = ""
    at_peak: dict[str, int] | None = None
    most: dict[str, int] | None = None
    saved: int = 0
    weight_format: str = ""
    state_format: str = ""
    schedule: str = ""


@dataclass(frozen=True)
class Group:
    """Weights of one kind, one in each layer, and what FORGE does with them.

    Attributes:
        name: without the layer's number.
        count: how many there are.
        shape: of one, on this rank.
        fused: whether FORGE updates them without a gradient.
        schedule: of fused ones.
        why: the reason of the schedule, or why they are left.
        factor_bytes, accumulator_bytes, gradient_bytes: of one, by the library's plan.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    fused: bool
    schedule: str
    why: str
    factor_bytes: int = 0
    accumulator_bytes: int = 0
    gradient_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` returns.

    Attributes:
        model: its name.
        parameters: of this rank.
        options: that it was made for.
        rows: one for each optimizer.
        groups: what FORGE does with each kind of weight.
    """

    model: str
    parameters: int
    options: Options
    rows: list[Row]
    groups: list[Group]

    def json(self) -> dict[str, Any]:
        """Everything, in bytes; ``peak_gb`` is in 10⁹ bytes, ``peak_gib`` in 2³⁰."""
        rows = []
        for row in self.rows:
            entry = {key: value for key, value in asdict(row).items() if key != "peak"}
            sizes = {"peak": row.peak, "peak_gb": row.peak / 1e9, "peak_gib": row.peak / GIB}
            rows.append({**entry, **(sizes if not row.refused else {})})
        return {
            "model": self.model,
            "parameters": self.parameters,
            "unit": "bytes",
            "options": asdict(self.options),
            "rows": rows,
            "weights": [asdict(group) for group in self.groups],
        }

    def text(self) -> str:
        """Tables for a terminal, in GiB."""
        options = self.options
        many = f", {options.micro_batches} micro-batches" if options.micro_batches > 1 else ""
        ranks = f", a rank of tp={options.tp}" if options.tp > 1 else ""
        ranks += " with sequence parallelism" if options.sp else ""
        how = ", activation checkpointing" if options.checkpointing else ""
        how += ", clipped" if options.clip else ""
        lines = [
            f"{self.model}: {self.parameters / 1e9:.2f} billion {options.dtype} parameters, "
            f"{options.tokens} tokens{many}{ranks}{how}",
            "",
            "GiB at the peak of a step:",
            *self._table(),
            "",
            *self._groups(),
        ]
        return "\n".join(lines)

    def _table(self) -> Iterator[str]:
        shown = [row for row in self.rows if not row.refused]
        used = [
            name
            for name in CATEGORIES
            if any((row.at_peak or {}).get(name, 0) >= GIB / 200 for row in shown)
        ]
        width = max(len(row.title) for row in self.rows)
        heads = "".join(f"{_HEADS[name]:>8}" for name in used)
        yield f"{'':{width}}{heads}{'peak':>9}  in the"
        for row in self.rows:
            if row.refused:
                yield f"{row.title:{width}}  not possible: {row.refused}"
                continue
            at_peak = row.at_peak or {}
            cells = "".join(f"{at_peak.get(name, 0) / GIB:8.2f}" for name in used)
            yield f"{row.title:{width}}{cells}{row.peak / GIB:9.2f}  {row.phase}"

    def _groups(self) -> Iterator[str]:
        if not self.groups:
            return
        yield "What FORGE does with each kind of weight:"
        names = max(len(group.name) for group in self.groups)
        for group in self.groups:
            shape = "x".join(map(str, group.shape))
            does = f"{group.schedule}: {group.why}" if group.fused else f"left: {group.why}"
            yield f"{group.count:5} {group.name:{names}} {shape:>13}  {does}"
        if not any(group.fused for group in self.groups):
            yield "Nothing is fused: FORGE would take the memory of torch's own optimizer or more."


def estimate(found: Architecture, options: Options, *, all_formats: bool = False) -> Estimate:
    """Predict the peak memory of a training step for every optimizer.

    Args:
        found: the model.
        options: the run.
        all_formats: a row of FORGE for every weight and state format that the dtype allows.

    Raises:
        ValueError: options that exclude each other or do not fit the model; the message names the
            option and what it may be.
    """
    options.check()
    parameters = parameters_of(found, options)
    tape = Forward(found, options).build()
    forges = [Forge(found, parameters, each) for each in _formats(options, all_formats)]
    methods: list[Method] = [*stock_methods(parameters, options, all_formats), *forges]
    rows = []
    for method in methods:
        row = Row(
            method.key, method.title, method.refused, weight_format=method.weight_format,
            state_format=method.state_format, schedule=method.schedule,
        )  # fmt: skip
        if not method.refused:
            row = _counted(row, simulate(
                tape, method, micro_batches=options.micro_batches,
                checkpointing=options.checkpointing,
            ))  # fmt: skip
        rows.append(row)
    total = sum(parameter.elements for parameter in parameters)
    return Estimate(found.name, total, options, rows, _grouped(forges[0].handled))


def _formats(options: Options, all_formats: bool) -> list[Options]:
    if not all_formats:
        return [options]
    dtype = DTYPES[options.dtype]
    weights = [name for name, needs in DTYPE_OF_FORMAT.items() if needs == dtype]
    return [
        replace(options, weight_format=weight, state_format=state)
        for weight in weights
        for state in STATE_FORMATS
    ]


def _counted(row: Row, memory: Memory) -> Row:
    return replace(
        row,
        peak=memory.peak,
        phase=memory.peak_phase,
        saved=memory.saved,
        at_peak={name: memory.at_peak.get(name, 0) for name in CATEGORIES},
        most={name: memory.most.get(name, 0) for name in CATEGORIES},
    )


def _grouped(handled: dict[str, Handled]) -> list[Group]:
    groups: dict[tuple[Any, ...], Group] = {}
    for each in handled.values():
        plan = each.plan
        schedule = plan.schedule if plan else ""
        key = (each.group, each.shape, each.fused, schedule, each.why)
        if key in groups:
            groups[key] = replace(groups[key], count=groups[key].count + 1)
            continue
        groups[key] = Group(each.group, 1, each.shape, each.fused, schedule, each.why)
        if plan:
            groups[key] = replace(
                groups[key],
                factor_bytes=plan.factor_bytes,
                accumulator_bytes=plan.accumulator_bytes,
                gradient_bytes=plan.gradient_bytes,
            )
    return list(groups.values())
