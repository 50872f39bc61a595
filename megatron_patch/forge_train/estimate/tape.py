"""A forward as a list of operations, each with what autograd saves for its backward.

The sizes are what memory depends on, so no number is computed: an operation is its inputs, the
bytes of its output, and which tensors live until its backward. :mod:`.simulate` runs the list
forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ACTIVATIONS, LOGITS = "activations", "logits and loss"


@dataclass(frozen=True)
class Value:
    """A tensor of the forward.

    Attributes:
        index: its number.
        storage: the number of the value whose memory it is: its own, but for views.
        bytes: of the tensor.
        needs_grad: whether autograd computes its gradient.
    """

    index: int
    storage: int
    bytes: int
    needs_grad: bool = True


@dataclass(frozen=True)
class Operation:
    """One node of autograd's graph.

    Attributes:
        inputs: tensors that get a gradient.
        reads: further tensors that the forward reads.
        output: its result; None for a mark that only ends the life of ``reads``.
        saves: tensors that live until its backward.
        parameters: name and bytes of the weights whose gradients the backward makes.
        linear: whether it is a linear, whose first parameter may be fused.
        passes: whether its inputs' gradients are its output's gradient itself, as of an addition.
        forward_bytes, backward_bytes: scratch that is gone when it ends.
        category: of its output.
        block: the layer that it belongs to, which activation checkpointing runs again; -1: none.
    """

    inputs: tuple[Value, ...]
    reads: tuple[Value, ...]
    output: Value | None
    saves: tuple[Value, ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    linear: bool = False
    passes: bool = False
    forward_bytes: int = 0
    backward_bytes: int = 0
    category: str = ACTIVATIONS
    block: int = -1


@dataclass
class Tape:
    """Records operations in the order of the forward."""

    operations: list[Operation] = field(default_factory=list)
    values: int = 0
    category: str = ACTIVATIONS
    block: int = -1

    def value(self, size: int, storage: int | None = None, needs_grad: bool = True) -> Value:
        """A tensor of ``size`` bytes, in memory of its own or in that of another."""
        index = self.values
        self.values += 1
        return Value(index, index if storage is None else storage, size, needs_grad)

    def operation(
        self,
        inputs: Sequence[Value],
        size: int,
        *,
        saves: Sequence[Value] = (),
        saves_output: bool = False,
        saved_bytes: int = 0,
        reads: Sequence[Value] = (),
        parameters: Sequence[tuple[str, int]] = (),
        linear: bool = False,
        passes: bool = False,
        view: bool = False,
        forward_bytes: int = 0,
        backward_bytes: int = 0,
    ) -> Value:
        """Add an operation; returns its output.

        Args:
            inputs: as :class:`Operation` has them; those without a gradient are read only.
            size: bytes of the output.
            saves: inputs, or other tensors, that live until the backward.
            saves_output: whether the output does, too.
            saved_bytes: of further tensors that the operation makes for its backward alone.
            reads: see :class:`Operation`.
            parameters: see :class:`Operation`.
            linear: see :class:`Operation`.
            passes: see :class:`Operation`.
            view: whether the output is the first input's memory; its gradient then passes.
            forward_bytes: see :class:`Operation`.
            backward_bytes: see :class:`Operation`.
        """
        if saved_bytes:
            # An operation of its own makes what only the backward reads.
            extra = self.value(saved_bytes, needs_grad=False)
            self._add((), tuple(inputs), extra)
            saves = (*saves, extra)
        grows = any(each.needs_grad for each in inputs) or bool(parameters)
        output = self.value(size, inputs[0].storage if view else None, grows)
        if saves_output:
            saves = (*saves, output)
        self._add(
            tuple(each for each in inputs if each.needs_grad),
            (*(each for each in inputs if not each.needs_grad), *reads),
            output,
            saves=tuple(saves) if grows else (),
            parameters=tuple(parameters),
            linear=linear,
            passes=passes or view,
            forward_bytes=forward_bytes,
            backward_bytes=backward_bytes,
        )
        return output

    def hold(self, *values: Value) -> None:
        """Let tensors live at least until here, as a variable of the forward's code does."""
        self._add((), values, None)

    def _add(
        self,
        inputs: tuple[Value, ...],
        reads: tuple[Value, ...],
        output: Value | None,
        **more: object,
    ) -> None:
        self.operations.append(
            Operation(
                inputs, reads, output, category=self.category, block=self.block,
                **more,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    # -- what every model is made of ----------------------------------------------------------

    def view(self, source: Value, size: int | None = None) -> Value:
        """The same memory, or a part of it, under another shape."""
        return self.operation([source], source.bytes if size is None else size, view=True)

    def cast(self, source: Value, size: int) -> Value:
        """Another dtype; the tensor itself where it has that dtype already."""
        if size == source.bytes:
            return source
        return self.operation([source], size)

    def add(self, left: Value, right: Value) -> Value:
        """A sum, whose gradient goes to both unchanged."""
        return self.operation([left, right], left.bytes, passes=True)

    def multiply(self, left: Value, right: Value, size: int) -> Value:
        """An element-wise product; each factor is saved for the other's gradient."""
        saves = [a for a, b in ((left, right), (right, left)) if b.needs_grad]
        return self.operation([left, right], size, saves=saves)
