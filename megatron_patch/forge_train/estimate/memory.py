"""Bytes that are alive, by what they are for, and the most that ever were."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Block:
    """Memory of one tensor; freed with its last reference.

    Attributes:
        bytes: of it.
        category: what it is for.
        references: who holds it.
        view: whether the tensor is a view of it, which autograd never adds to in place.
    """

    bytes: int
    category: str
    references: int = 1
    view: bool = False


@dataclass
class Memory:
    """What an allocator would count.

    Attributes:
        live: bytes by category.
        total: of all categories.
        phase: what the step is doing now.
        peak: the largest total.
        peak_phase: when that was.
        at_peak: ``live`` then.
        most: the most that each category held at any time.
        saved: what the first forward left for its backward.
    """

    live: dict[str, int] = field(default_factory=dict)
    total: int = 0
    phase: str = "start"
    peak: int = 0
    peak_phase: str = "start"
    at_peak: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    saved: int = 0

    def allocate(self, size: int, category: str) -> Block:
        """Take memory with one reference."""
        self._count(size, category)
        if self.total > self.peak:
            self.peak, self.peak_phase = self.total, self.phase
            self.at_peak = dict(self.live)
        return Block(size, category)

    def scratch(self, size: int, category: str) -> None:
        """Take memory and give it back."""
        if size:
            self.release(self.allocate(size, category))

    def retain(self, block: Block) -> Block:
        """One more reference."""
        block.references += 1
        return block

    def release(self, block: Block | None) -> None:
        """One reference less; None is nothing."""
        if block is None:
            return
        block.references -= 1
        if block.references == 0:
            self._count(-block.bytes, block.category)

    def move(self, block: Block, category: str) -> None:
        """Count a block that is alive as something else from now on."""
        self._count(-block.bytes, block.category)
        block.category = category
        self._count(block.bytes, category)

    def _count(self, size: int, category: str) -> None:
        self.total += size
        held = self.live.get(category, 0) + size
        self.live[category] = held
        if held > self.most.get(category, 0):
            self.most[category] = held
