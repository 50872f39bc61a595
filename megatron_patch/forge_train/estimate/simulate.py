"""Run a tape: the forward, the backward and the step of one optimizer, with memory counted.

Autograd runs a node when all gradients of its output are there, the latest first, which is the
reverse of the forward's order. A saved tensor is freed when its node has run.
"""

from __future__ import annotations

from collections.abc import Sequence

from .memory import Block, Memory
from .methods import TEMPORARY, Method
from .tape import Operation, Tape, Value


class _Pass:
    """One forward and backward.

    Args:
        tape: of the model.
        memory: counts.
        method: what becomes of the weights' gradients.
        checkpointing: whether a block's activations are computed again in the backward.
    """

    def __init__(self, tape: Tape, memory: Memory, method: Method, checkpointing: bool) -> None:
        self.memory, self.method, self.checkpointing = memory, method, checkpointing
        self.operations = tape.operations
        self.blocks: dict[int, Block] = {}
        self.saved: dict[int, list[Block]] = {}
        self.gradients: dict[int, Block] = {}
        self.weights: dict[str, Block] = {}
        self.uses: dict[str, int] = {}
        self.inputs: dict[int, dict[int, Block]] = {}
        for operation in self.operations:
            for name, _size in operation.parameters:
                self.uses[name] = self.uses.get(name, 0) + 1

    def run(self) -> None:
        self.memory.phase = "forward"
        before = self.memory.total
        self._forward(range(len(self.operations)))
        self.memory.saved = self.memory.saved or self.memory.total - before
        self.memory.phase = "backward"
        end = self.operations[-1].output
        if end is not None:
            self.gradients[end.index] = self.memory.allocate(end.bytes, TEMPORARY)
        index = len(self.operations) - 1
        while index >= 0:
            block = self.operations[index].block
            if self.checkpointing and block >= 0:
                first = index
                while first > 0 and self.operations[first - 1].block == block:
                    first -= 1
                self._again(range(first, index + 1))
                for each in range(index, first - 1, -1):
                    self._backward(each)
                for kept in self.saved.pop(-1 - block, ()):
                    self.memory.release(kept)
                index = first - 1
            else:
                self._backward(index)
                index -= 1
        for left in self.gradients.values():
            self.memory.release(left)

    # -- forward ------------------------------------------------------------------------------

    def _forward(self, indices: Sequence[int], again: bool = False) -> None:
        """Run operations; ``again``: inside the backward, their inputs from outside are there."""
        last = self._last_use(indices)
        inside: dict[int, Block] = {}
        for index in indices:
            operation = self.operations[index]
            keep = again or not (self.checkpointing and operation.block >= 0)
            if not again and self.checkpointing and operation.block >= 0:
                self._keep_inputs(index)
            self.memory.scratch(operation.forward_bytes, TEMPORARY)
            output = operation.output
            if output is not None:
                held = self.blocks.get(output.storage)
                if held is None:
                    block = self.memory.allocate(output.bytes, operation.category)
                    self.blocks[output.storage] = block
                    inside[output.storage] = block
            if keep and operation.saves:
                self.saved[index] = [
                    self.memory.retain(self.blocks[value.storage]) for value in operation.saves
                ]
            for storage in last.get(index, ()):
                if not again or storage in inside:
                    self.memory.release(self.blocks.pop(storage, None))

    def _last_use(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """The storages that no later operation reads, by the operation that reads them last."""
        last: dict[int, int] = {}
        for index in indices:
            operation = self.operations[index]
            for value in (*operation.inputs, *operation.reads, *operation.saves):
                last[value.storage] = index
            if operation.output is not None:
                last[operation.output.storage] = index
        ends: dict[int, list[int]] = {}
        for storage, index in last.items():
            ends.setdefault(index, []).append(storage)
        return ends

    def _keep_inputs(self, index: int) -> None:
        """Checkpointing saves what a block reads from outside it."""
        block = self.operations[index].block
        if index and self.operations[index - 1].block == block:
            return
        read = sorted(self._read_by(index))
        kept = [self.memory.retain(self.blocks[storage]) for storage in read]
        self.saved[-1 - block] = kept
        self.inputs[block] = dict(zip(read, kept, strict=True))

    def _read_by(self, first: int) -> set[int]:
        block, made, read = self.operations[first].block, set(), set()
        for operation in self.operations[first:]:
            if operation.block != block:
                break
            for value in (*operation.inputs, *operation.reads):
                if value.storage not in made:
                    read.add(value.storage)
            if operation.output is not None:
                made.add(operation.output.storage)
        return read & set(self.blocks)

    def _again(self, indices: Sequence[int]) -> None:
        """Run a block's forward again, with everything saved."""
        block = self.operations[indices[0]].block
        self.blocks.update(self.inputs[block])
        outside = set(self.inputs[block])
        self._forward(indices, again=True)
        for storage in outside:
            self.blocks.pop(storage, None)

    # -- backward -----------------------------------------------------------------------------

    def _backward(self, index: int) -> None:
        operation = self.operations[index]
        output = operation.output
        gradient = self.gradients.pop(output.index, None) if output is not None else None
        if gradient is None or output is None:
            self._free(index)
            return
        memory = self.memory
        made: list[tuple[Value, Block]] = []
        for value in operation.inputs:
            if operation.passes and value.bytes == output.bytes:
                made.append((value, memory.retain(gradient)))
            else:
                # Of a view of a part: a gradient of the whole, zeros around the part.
                block = memory.allocate(value.bytes, _category(operation))
                block.view = operation.linear
                made.append((value, block))
        # A fused linear gathers into a workspace of its own.
        if not (operation.linear and self.method.fuses(operation.parameters[0][0])):
            memory.scratch(operation.backward_bytes, _category(operation))
        x = self.saved.get(index, [None])[0] if operation.linear else None
        weights = [
            (name, self.method.weight_gradient(memory, name, size, gradient, x))
            for name, size in operation.parameters
        ]
        self._free(index)
        memory.release(gradient)
        for value, block in made:
            self._deposit(value, block)
        for name, weight in weights:
            self._weight(name, weight, operation.linear)

    def _free(self, index: int) -> None:
        for block in self.saved.pop(index, ()):
            self.memory.release(block)

    def _deposit(self, value: Value, block: Block) -> None:
        """Hand a gradient to the node that made the value, adding to what is there."""
        held = self.gradients.get(value.index)
        if held is None:
            self.gradients[value.index] = block
            return
        self.gradients[value.index] = self._sum(held, block)

    def _sum(self, held: Block, block: Block) -> Block:
        """In place only where autograd alone holds the first one, and as it was made."""
        if held.references > 1 or held.view:
            total = self.memory.allocate(held.bytes, held.category)
            self.memory.release(held)
            held = total
        self.memory.release(block)
        return held

    def _weight(self, name: str, block: Block | None, linear: bool) -> None:
        """Autograd adds up the gradients of a weight's uses before it hands them on."""
        held = self.weights.pop(name, None)
        if block is not None:
            block.view = linear
            self.weights[name] = block if held is None else self._sum(held, block)
        self.uses[name] -= 1
        if self.uses[name] == 0 and (done := self.weights.pop(name, None)) is not None:
            self.method.accumulate(self.memory, name, done)


def _category(operation: Operation) -> str:
    """Gradients of activations are temporary; those of logits are told apart."""
    return TEMPORARY if operation.category == "activations" else operation.category


def simulate(tape: Tape, method: Method, *, micro_batches: int, checkpointing: bool) -> Memory:
    """One step in the steady state: its states exist, its gradients do not.

    Args:
        tape: of one micro-batch.
        method: what holds weights, states and gradients.
        micro_batches: forwards and backwards before the step.
        checkpointing: of every block.
    """
    memory = Memory()
    for category, size in method.persistent().items():
        if size:
            memory.allocate(size, category)
    for _ in range(min(micro_batches, method.distinct_micro_batches)):
        _Pass(tape, memory, method, checkpointing).run()
        method.end_of_backward(memory)
    memory.phase = "step"
    method.step(memory)
    return memory
