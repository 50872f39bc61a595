"""What a job with ``--forge`` logs beside what Megatron logs, through Megatron's own writers.

Loss, gradient norm, learning rate, memory and FLOP/s are Megatron's and stay so. Here is what it has
no place for:

| tag | when | |
|---|---|---|
| ``skipped-iterations`` | always | skipped since the job started; stock prints them only |
| ``forge/nonfinite-layers``, ``forge/nonfinite-tiles`` | always | since the last entry, over all ranks; which layers, as text and as a W&B alert |
| ``tokens-per-second`` | as stock's ``throughput`` | of the whole job |
| ``forge/….-bytes`` | ``--log-memory-to-tensorboard`` | of the rank that logs: what takes the gradients' place |

Timers are Megatron's, too, of its level 2. A timer of a GPU waits for it, so below that level none is
there, and nothing of FORGE's is wrapped.
"""  # noqa: E501  (a table)

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from .fuse import Fused

DGRAD, DGRAD_UPDATE = "forge-dgrad", "forge-dgrad-update"
NORM, UPDATE, COMMUNICATION = "forge-norm", "forge-update", "forge-communication"
TIMERS = (DGRAD, DGRAD_UPDATE, NORM, UPDATE, COMMUNICATION)
"""In the order of a step. ``docs/megatron.md`` says what each spans."""

_LEVEL = 2
_OF_THIS_LEVEL = "forward-compute"
"""A timer that Megatron lists among those of a step at level 2 and nowhere else."""


class Metrics:
    """The scalars of a job.

    Args:
        fused: what was fused; its ``chain`` has been called.
        args: Megatron's.
        timers: Megatron's.
    """

    def __init__(self, fused: Fused, args: Any, timers: Any) -> None:
        """Have the kept factors measured, and time the engine, where that was asked for."""
        self._fused, self._args, self._timers = fused, args, timers
        self._skipped = self._tiles = 0
        self._layers: set[str] = set()
        self._bytes: dict[str, int] = {}
        if args.log_memory_to_tensorboard:
            self._measure()
        if args.timing_log_level >= _LEVEL:
            time_engine(fused, timers)
            list_timers(timers)

    def _measure(self) -> None:
        """Note what is held when a step begins: its update lets go of the factors."""
        engine = self._fused.engine
        original = engine.sum_of_squares

        @functools.wraps(original)
        def sum_of_squares() -> tuple[float, tuple[str, ...]]:
            self._bytes = engine.memory()
            return original()

        engine.sum_of_squares = sum_of_squares  # type: ignore[method-assign]

    def log(
        self,
        iteration: int,
        skipped: int,
        iterations: int,
        writer: Any | None,
        wandb: Any | None,
    ) -> None:
        """Count a step, and write what is due.

        Args:
            iteration: the step's number, from one.
            skipped: 1 if it was skipped, else 0.
            iterations: since Megatron's interval timer was reset.
            writer: TensorBoard's, where this rank has it.
            wandb: W&B's module, where this rank has it.
        """
        args, optimizer = self._args, self._fused.optimizer
        assert optimizer is not None
        self._skipped += int(skipped)
        self._tiles += optimizer.forge.nonfinite_tiles
        self._layers.update(optimizer.forge.nonfinite_layers)
        if writer is None and wandb is None:
            return
        scalars: dict[str, float] = {}
        throughput = args.log_throughput and args.log_timers_to_tensorboard
        if throughput and iteration % args.log_interval == 0:
            seconds = self._timers("interval-time").elapsed(reset=False)
            tokens = iterations * get_current_global_batch_size() * args.seq_length
            scalars["tokens-per-second"] = tokens / seconds
        if iteration % args.tensorboard_log_interval == 0:
            scalars["skipped-iterations"] = self._skipped
            scalars["forge/nonfinite-layers"] = len(self._layers)
            scalars["forge/nonfinite-tiles"] = self._tiles
            for name, count in self._bytes.items():
                scalars[f"forge/{name.replace('_', '-')}-bytes"] = count
            if self._layers:
                _name_layers(sorted(self._layers), iteration, writer, wandb)
            self._tiles = 0
            self._layers.clear()
        if writer is not None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
        if wandb is not None and scalars:
            wandb.log(scalars, iteration)


def _name_layers(
    layers: Sequence[str], iteration: int, writer: Any | None, wandb: Any | None
) -> None:
    """Say which weights had a gradient that was not finite."""
    if writer is not None:
        writer.add_text("forge/nonfinite-layers", "\n".join(f"- {x}" for x in layers), iteration)
    if wandb is not None:
        wandb.alert(
            title="inf or nan in a weight gradient",
            text=f"until iteration {iteration}, in {', '.join(layers)}",
        )


def arguments_of(original: Callable[..., Any], given: Sequence[Any], more: Any) -> dict[str, Any]:
    """Those of a call of Megatron's ``training_log``, by name.

    Raises:
        TypeError: they do not fit its signature.
    """
    return inspect.signature(original).bind(*given, **more).arguments


# -- timers ---------------------------------------------------------------------------------------


def time_engine(fused: Fused, timers: Any) -> None:
    """Time the parts of a step; each timer waits for the GPU at both ends, as Megatron's do."""
    engine: Any = fused.engine
    engine.backward = _timed_backward(engine.backward, timers)
    engine.sum_of_squares = _timed(engine.sum_of_squares, timers, NORM)
    engine.finish_step = _timed(engine.finish_step, timers, UPDATE)
    groups: list[Any] = [each for each in (engine.replicas, engine.apart) if each is not None]
    if groups:
        # Panels of dW are multiplied where they are summed.
        engine._reduce = _timed(engine._reduce, timers, COMMUNICATION)
    for replicas in groups:
        replicas.sum = _timed(replicas.sum, timers, COMMUNICATION)
        replicas.wait = _timed(replicas.wait, timers, COMMUNICATION)


def list_timers(timers: Any) -> None:
    """Have ours logged and written wherever Megatron does so with those of a step."""
    for method in ("log", "write"):
        setattr(timers, method, _listing(getattr(timers, method)))


def _listing(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def with_ours(names: Sequence[str], *rest: Any, **more: Any) -> None:
        # All ranks list the same, for Megatron gathers their times.
        ours = TIMERS if _OF_THIS_LEVEL in names else ()
        original([*names, *ours], *rest, **more)

    return with_ours


def _timed(original: Callable[..., Any], timers: Any, name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*given: Any, **more: Any) -> Any:
        timer = timers(name, log_level=_LEVEL)
        timer.start()
        try:
            return original(*given, **more)
        finally:
            timer.stop()

    return call


def _timed_backward(original: Callable[..., Any], timers: Any) -> Callable[..., Any]:
    """As :func:`_timed`; which timer it was is known afterwards, for ``auto`` decides inside."""

    @functools.wraps(original)
    def backward(weight: Any, *given: Any, **more: Any) -> Any:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = original(weight, *given, **more)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        timer = timers(DGRAD_UPDATE if weight.updated else DGRAD, log_level=_LEVEL)
        timer.set_elapsed(timer.elapsed(reset=False) + seconds)
        return result

    return backward
