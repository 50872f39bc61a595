"""A whole training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

from .optimizer import FusedOptimizer
from .step import StepResult

T = TypeVar("T")


class CapturedStep(Generic[T]):
    """What :func:`capture` returns: call it once for each training step.

    Attributes:
        graph: None until it is captured, and on a CPU.
    """

    def __init__(
        self,
        step: Callable[..., T],
        optimizer: FusedOptimizer,
        *,
        warmup: int = 3,
        pool: Any = None,
    ) -> None:
        """Check the arguments; see :func:`capture`."""
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"optimizer={type(optimizer).__name__} must be what fuse(...).optimizer is"
            )
        if not optimizer.engine.scalars.in_memory:
            raise ValueError(
                "the optimizer's updates take numbers from the host, which a CUDA graph would keep "
                "for good; use fuse(..., capturable=True)"
            )
        if warmup < 1:
            raise ValueError(
                f"warmup={warmup} must be at least 1: kernels are compiled and memory is allocated "
                "by the first steps"
            )
        self._step, self._optimizer, self._engine = step, optimizer, optimizer.engine
        self._left, self._pool = warmup, pool
        self._device = optimizer.engine.scalars.device
        self._inputs: list[torch.Tensor] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._output: T | None = None
        self._result: StepResult | None = None
        self._steps = self._layout = 0

    def __call__(self, *inputs: torch.Tensor) -> T:
        """Make one training step.

        Args:
            inputs: tensors, of the same shapes and dtypes at each call; copied to where the graph
                reads them. From pinned memory of the host without waiting.

        Returns:
            What the function returned. Once the graph is captured its tensors are the same at each
            call and the next call overwrites them: read them before, or keep a ``clone()``.

        Raises:
            RuntimeError: the function cannot be captured, or the graph does not fit the
                optimizer's state any more; no weight has changed.
            ValueError: inputs of another number, shape or dtype than before; an option of a param
                group is out of its range. No weight has changed.
        """
        static = self._copied(inputs)
        if self._device.type != "cuda":
            return self._step(*static)
        with torch.cuda.device(self._device):
            if self._left > 0:
                self._left -= 1
                return self._eager(static)
            if self.graph is None:
                self._capture(static)
            else:
                self._optimizer.before_replay()
                self._check_layout()
            return self._replay()

    def _copied(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The inputs in memory of their own, which stays."""
        for index, value in enumerate(inputs):
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"input {index} is {type(value).__name__}, but inputs of a captured step are "
                    "tensors; what is no tensor is fixed at the capture, so let the function close "
                    "over it"
                )
            if value.requires_grad:
                raise ValueError(
                    f"input {index} requires a gradient, which would be that of the copy that the "
                    "graph reads; pass input.detach(), or make it a parameter"
                )
        if self._inputs is None:
            self._inputs = [
                torch.empty_like(value, device=self._device, requires_grad=False)
                for value in inputs
            ]
        if len(inputs) != len(self._inputs):
            raise ValueError(f"{len(inputs)} inputs, but the first call had {len(self._inputs)}")
        for index, (static, value) in enumerate(zip(self._inputs, inputs, strict=True)):
            if (static.shape, static.dtype) != (value.shape, value.dtype):
                raise ValueError(
                    f"input {index} is {value.dtype} {tuple(value.shape)}, the first call's was "
                    f"{static.dtype} {tuple(static.shape)}; a graph has one shape: pad the batch, "
                    "or call the function itself for this one"
                )
        with torch.no_grad():
            for static, value in zip(self._inputs, inputs, strict=True):
                static.copy_(value, non_blocking=True)
        return self._inputs

    def _eager(self, static: list[torch.Tensor]) -> T:
        """A step as it is, on the stream of the capture: some of torch's objects remember it."""
        current = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._step(*static)
        current.wait_stream(self._stream)
        for tensor in _tensors_in(output):
            if tensor.is_cuda:
                tensor.record_stream(current)
        return output

    def _capture(self, static: list[torch.Tensor]) -> None:
        engine, optimizer = self._engine, self._optimizer
        optimizer.before_replay()
        graph, before, last = torch.cuda.CUDAGraph(), engine.steps, optimizer.last
        try:
            # Threads that load data may call CUDA meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                self._output = self._step(*static)
        except Exception as error:
            engine.abandon(engine.steps - before)
            optimizer.zero_grad()  # gradients in memory of a graph that is none
            optimizer.last = last
            # Where the function failed, the end of the capture fails as well.
            first = error.__context__ or error
            raise RuntimeError(
                f"the step could not be captured in a CUDA graph: {first}. What waits for the GPU "
                "cannot be in it: .item(), printing or comparing a tensor of the GPU, copies from "
                "pageable memory, other optimizers without capturable=True"
            ) from error
        self._steps, self._layout = engine.steps - before, engine.scalars.layout
        # The capture has counted steps that have yet to run.
        engine.abandon(self._steps)
        self._result, optimizer.last = optimizer.last, last
        if self._steps == 0:
            raise RuntimeError(
                "the function made no step: it must call optimizer.step(), of the optimizer that "
                "capture() was given"
            )
        self.graph = graph

    def _check_layout(self) -> None:
        if self._layout != self._engine.scalars.layout:
            raise RuntimeError(
                "weights that the captured step counts together have made different numbers of "
                "steps since (a checkpoint, or a step in which some had no gradient); capture "
                "again: forge_train.capture(...)"
            )

    def _replay(self) -> T:
        assert self.graph is not None and self._result is not None
        for context in {weight.linear.context for weight in self._engine.weights}:
            context.stream()  # the workspace goes over to this stream
        self.graph.replay()
        self._optimizer.after_replay(self._result, self._steps)
        return self._output  # type: ignore[return-value]


def capture(
    step: Callable[..., T], optimizer: FusedOptimizer, *, warmup: int = 3, pool: Any = None
) -> CapturedStep[T]:
    """Make a training step one CUDA graph: no launches between its kernels, no work of the host.

    The first ``warmup`` calls run the function as it is and are steps like any other; the next one
    captures it, and from then on a call replays. So calls of the result are steps of the function,
    with the same bits. Whatever is read on the host is fixed at the capture. Options of param
    groups are not: they are brought to the GPU before each replay, so LR schedulers work.

    On a CPU there are no graphs, and each call runs the function.

    Args:
        step: forward, backward, ``optimizer.step()`` and ``optimizer.zero_grad()``; takes tensors,
            returns tensors. It must not wait for the GPU.
        optimizer: of ``fuse(..., capturable=True)``.
        warmup: calls before the capture, at least 1.
        pool: of the graph's memory, from ``torch.cuda.graph_pool_handle()``, to share it between
            graphs that are never replayed at the same time; None: its own.

    Raises:
        TypeError: ``optimizer`` is another one.
        ValueError: it is not capturable; ``warmup`` is 0.

    Example::

        def step(tokens, targets):
            loss = cross_entropy(model(tokens), targets)
            loss.backward()
            fused.optimizer.step()
            fused.optimizer.zero_grad()
            return loss.detach()

        step = forge_train.capture(step, fused.optimizer)
        for tokens, targets in loader:
            loss = step(tokens, targets)
            scheduler.step()
    """
    return CapturedStep(step, optimizer, warmup=warmup, pool=pool)


def _tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a function's result, in lists, tuples and dicts as well."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors_in(value)
