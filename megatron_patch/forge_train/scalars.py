"""The scalars of each weight's next update, in the backend's memory.

A step that is taken or skipped without the host knows its count of steps and its clip coefficient
on the GPU alone, and a captured one gets its learning rate after it was captured. So they are kept
where the updates read them: in rows of one tensor, each a ``forge_step_scalars``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._lib import ffi
from ._types import Scalars
from .rules import Rule, hyper_values, on_gpu, raw_values
from .weights import Weight

# The words of the struct; all of them have eight bytes.
_STEP, _SEED, _SCALE, _HYPER = (
    ffi.offsetof("forge_step_scalars", field) // 8
    for field in ("step", "seed", "grad_scale", "hyper")
)
_WORDS = ffi.sizeof("forge_step_scalars") // 8
_PLAIN = frozenset((int, float, bool, str, type(None)))


@dataclass(frozen=True)
class _Numbers:
    """Seed and options of a row: numbers in the library's order, and tensors in place of None."""

    seed: int
    hyper: tuple[float | None, ...]
    on_gpu: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)


class ScalarTable:
    """A row for all weights that have param group and count of steps in common.

    Weights that share a row can share launches of small updates, and a step moves few rows. A row
    is split when some of its weights make a step that others do not.

    A row's ``step`` is the number of the next update: an update inside the backward reads it before
    the step ends, and a skipped step leaves it.

    Args:
        weights: the engine's list, which may still grow.
        in_memory: whether updates always read a row, as captured ones must. Else they take by value
            what the host knows.

    Attributes:
        layout: counts the changes of who is in which row; a captured graph is bound to one.
    """

    def __init__(self, weights: Sequence[Weight], *, in_memory: bool = False) -> None:
        """Allocate nothing yet."""
        self._weights, self.in_memory = weights, in_memory
        self.layout = 0
        self._words: torch.Tensor | None = None
        self._placed = False
        self._row: dict[int, int] = {}
        self._members: dict[int, list[Weight]] = {}
        # Of each row: what the options say, and what its memory holds.
        self._wanted: dict[int, _Numbers] = {}
        self._written: dict[int, _Numbers] = {}
        # Of each row: what its numbers in `_wanted` were made from.
        self._checked: dict[int, tuple[Any, ...]] = {}
        # Of each row that a graph has copied from: where the tensors of options were.
        self._bound: dict[int, dict[int, int]] = {}
        self._names: dict[int, tuple[Rule, tuple[str, ...]]] = {}
        # Of each row that an update inside the backward has asked for in this step: what it took.
        self._given: dict[int, tuple[Mapping[str, Any], Scalars | torch.Tensor]] = {}
        # Rows that tensors of options have been copied to in this step.
        self._copied: set[int] = set()
        self._scale: float | None = None
        # The host's counts are exact until a step is decided on a GPU; then they are upper bounds.
        self._behind = False
        self._attempts = self._taken = self._skipped_before = 0

    # -- rows ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the rows are: with the weights."""
        return self._weights[0].linear.device if self._weights else torch.device("cpu")

    @property
    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _memory(self) -> torch.Tensor:
        """``int64 [weights + 1, words]``, placed. The last row counts the steps that were taken."""
        if self._placed and self._words is not None:
            return self._words
        if self._capturing:
            raise RuntimeError(
                "a CUDA graph is captured, but weights or their counts of steps are new since the "
                "last step; make a step before the capture"
            )
        self.read()
        count = len(self._weights)
        if self._words is None or self._words.shape[0] != count + 1:
            self._words = torch.zeros(count + 1, _WORDS, dtype=torch.int64, device=self.device)
            self._words[count, _STEP].fill_(self._taken)
        together: dict[Hashable, list[int]] = {}
        for index, weight in enumerate(self._weights):
            rule = weight.linear.spec.rule
            # What the group lacks is the rule's, and may differ between weights.
            own = tuple(hyper_values(weight.linear.rule, rule.options))
            key = (id(weight.group), rule.name, weight.linear.flags, own, weight.counted)
            together.setdefault(key, []).append(index)
        before = self._row
        self._members = {m[0]: [self._weights[i] for i in m] for m in together.values()}
        self._row = {id(w): row for row, members in self._members.items() for w in members}
        self._wanted, self._written, self._checked, self._scale = {}, {}, {}, None
        self._bound = {}
        for row, members in self._members.items():
            self._words[row, _STEP].fill_(members[0].counted + 1)
        self.layout += self._row != before
        self._placed = True
        return self._words

    def _reals(self) -> torch.Tensor:
        return self._memory().view(torch.float64)

    def replace(self) -> None:
        """Find rows anew before the next step: weights were added, or a group was exchanged."""
        self.read()
        self._placed = False
        self._given.clear()

    # -- what an update takes -----------------------------------------------------------------

    def prepare(self, weights: Iterable[Weight], seed: int, grad_scale: float) -> None:
        """Check the options that updates of these weights will read; writes nothing.

        Raises:
            ValueError: a group changed an option that is fixed at ``fuse``, or a number is out of
                the rule's range.
        """
        self._memory()
        rows: dict[int, Weight] = {}
        weights = list(weights)
        for weight in weights:
            first = rows.setdefault(self._row[id(weight)], weight)
            if weight.group is not first.group:
                # A weight was given another group since.
                self.replace()
                return self.prepare(weights, seed, grad_scale)
        for row, weight in rows.items():
            made_from = self._source(weight, seed, grad_scale)
            if made_from is not None and self._checked.get(row) == made_from:
                continue
            self._checked.pop(row, None)
            scalars = weight.linear.scalars(
                weight.group, step=weight.counted + 1, seed=seed, grad_scale=grad_scale
            )
            options = {**weight.linear.spec.rule.options, **weight.group}
            values = enumerate(raw_values(weight.linear.rule, options))
            tensors = {index: value.detach() for index, value in values if on_gpu(value)}
            hyper = (None if i in tensors else value for i, value in enumerate(scalars.hyper))
            self._wanted[row] = _Numbers(seed, tuple(hyper), tensors)
            if made_from is not None:
                self._checked[row] = made_from

    def _source(self, weight: Weight, seed: int, grad_scale: float) -> tuple[Any, ...] | None:
        """What a row's numbers are made from; None: tensors, whose values may have changed."""
        rule, group = weight.linear.spec.rule, weight.group
        known = self._names.get(id(rule))
        if known is None:
            known = self._names[id(rule)] = rule, tuple(rule.options)
        values: list[Any] = [id(group), seed, grad_scale]
        for value in map(group.get, known[1]):
            kind = type(value)
            if kind not in _PLAIN:
                if kind is not tuple and kind is not list:
                    return None
                # A list may change in place.
                value = tuple(value)
                if not _PLAIN.issuperset(map(type, value)):
                    return None
            values.append(value)
        return tuple(values)

    def take(self, weight: Weight, grad_scale: float | None) -> Scalars | torch.Tensor:
        """What the next update of a weight takes, after :meth:`prepare`: by value, or its row.

        Args:
            weight: one of the table's.
            grad_scale: None: :meth:`scale` has set it.

        Raises:
            RuntimeError: a graph is captured, but the numbers are by value or have changed.
        """
        row, capturing = self._row[id(weight)], self._capturing
        wanted = self._wanted[row]
        if capturing and not self.in_memory:
            raise RuntimeError(
                f"{weight.name}: a CUDA graph is captured, which would keep this step's numbers "
                "for good; use fuse(..., capturable=True)"
            )
        if not (self.in_memory or self._behind or grad_scale is None or wanted.on_gpu):
            return Scalars(weight.counted + 1, wanted.seed, grad_scale, wanted.hyper)
        self._write(row, capturing)
        if grad_scale is not None:
            self.scale(grad_scale)
        return self._memory()[row]

    def give(self, weight: Weight, seed: int, grad_scale: float = 1.0) -> Scalars | torch.Tensor:
        """:meth:`prepare` and :meth:`take` for an update inside the backward.

        A row's numbers are those that the first of a step's updates found.
        """
        group, given = self._given.get(self._row.get(id(weight), -1), (None, None))
        if given is None or group is not weight.group:
            self.prepare([weight], seed, grad_scale)
            given = self.take(weight, grad_scale)
            self._given[self._row[id(weight)]] = weight.group, given
        return given

    def discard(self) -> None:
        """Forget what a backward has found: its step will not be."""
        self._given.clear()

    def _write(self, row: int, capturing: bool) -> None:
        """Bring a row's seed and options up to date."""
        wanted, written, reals = self._wanted[row], self._written.get(row), self._reals()[row]
        if written != wanted:
            if capturing:
                raise RuntimeError(
                    f"{self._members[row][0].name}: options of its param group, or the seed, have "
                    "changed since the last step, and a captured copy would hold them for good; "
                    "call optimizer.before_replay() before the capture as well"
                )
            if written is None or written.seed != wanted.seed:
                # The word is unsigned, torch's is not.
                seed = wanted.seed - 2**64 if wanted.seed >= 2**63 else wanted.seed
                self._memory()[row, _SEED].fill_(seed)
            for index, value in enumerate(wanted.hyper):
                if value is not None and (written is None or written.hyper[index] != value):
                    # Each a kernel that carries the number: no memory of the host to wait for.
                    reals[_HYPER + index].fill_(value)
            self._written[row] = wanted
        at = {index: value.data_ptr() for index, value in wanted.on_gpu.items()}
        if capturing and at:
            self._bound[row] = at
        if wanted.on_gpu and row not in self._copied:
            for index, value in wanted.on_gpu.items():
                reals[_HYPER + index].copy_(value.reshape(()))
            self._copied.add(row)

    def write(self, seed: int) -> None:
        """Bring all rows up to date, for a graph that reads them.

        Raises:
            RuntimeError: a graph reads a tensor that is no option any more.
            ValueError: see :meth:`prepare`; nothing was written.
        """
        self.prepare(self._weights, seed, 1.0)
        for row, were in self._bound.items():
            if were != {i: value.data_ptr() for i, value in self._wanted[row].on_gpu.items()}:
                raise RuntimeError(
                    f"{self._members[row][0].name}: an option of its param group that was a tensor "
                    "on the GPU when the step was captured is another one now, or a number, which "
                    "the graph does not read; change the tensor's value (lr.fill_(…)), or capture "
                    "again"
                )
        for row in self._members:
            self._write(row, self._capturing)
        self._copied.clear()

    def scale(self, grad_scale: float | torch.Tensor) -> None:
        """Have all updates from now on multiply gradients by this: a number, or fp64 ``[]``."""
        known = grad_scale if isinstance(grad_scale, float) else None
        # What a graph relies on it must write itself: a replay may come after anything.
        if known is None or known != self._scale or self._capturing:
            column = self._reals()[:, _SCALE]
            if isinstance(grad_scale, torch.Tensor):
                column.copy_(grad_scale)
            else:
                column.fill_(grad_scale)
        self._scale = known

    # -- counts -------------------------------------------------------------------------------

    def advance(self, weights: Sequence[Weight], taken: torch.Tensor | None = None) -> None:
        """End a step of these weights.

        Args:
            weights: that were updated, or would have been.
            taken: ``bool []`` beside the rows: whether they were; None: they were.
        """
        self._count(weights, taken)
        self._words_of_taken().add_(1 if taken is None else taken)
        self._attempts += 1
        self._taken += 1

    def skip(self, updated: Sequence[Weight]) -> None:
        """End a step that was skipped but for these weights, which the backward had updated."""
        self._count(updated, None)
        self._attempts += 1

    def _words_of_taken(self) -> torch.Tensor:
        return self._memory()[len(self._weights), _STEP]

    def _count(self, weights: Sequence[Weight], taken: torch.Tensor | None) -> None:
        self._copied.clear()
        self._given.clear()
        if not weights:
            self._behind = self._behind or taken is not None
            return
        words = self._memory()
        for row in self._apart(weights):
            words[row, _STEP].add_(1 if taken is None else taken)
        for weight in weights:
            weight.counted += 1
        self._behind = self._behind or taken is not None

    def _apart(self, weights: Sequence[Weight]) -> list[int]:
        """The rows of these weights, after which they are of no others."""
        if len(weights) == len(self._weights):
            return list(self._members)
        chosen = {id(weight) for weight in weights}
        rows = []
        for row in dict.fromkeys(self._row[id(weight)] for weight in weights):
            inside = [w for w in self._members[row] if id(w) in chosen]
            outside = [w for w in self._members[row] if id(w) not in chosen]
            rows.append(row)
            if outside:
                moved = outside if self._members[row][0] is inside[0] else inside
                to = self._split(row, moved)
                rows[-1] = row if moved is outside else to
        return rows

    def _split(self, row: int, moved: list[Weight]) -> int:
        """Give some weights of a row a row of their own, with the same numbers."""
        if self._capturing:
            raise RuntimeError(
                f"{moved[0].name}: a CUDA graph is captured in which other weights have gradients "
                "than in the step before; make a step like the captured one first"
            )
        to = next(i for i, weight in enumerate(self._weights) if weight is moved[0])
        words = self._memory()
        words[to].copy_(words[row])
        away = {id(weight) for weight in moved}
        self._members[row] = [w for w in self._members[row] if id(w) not in away]
        self._members[to] = moved
        self._row.update(dict.fromkeys(away, to))
        if row in self._wanted:
            self._wanted[to] = self._wanted[row]
        if row in self._written:
            self._written[to] = self._written[row]
        self.layout += 1
        return to

    def replayed(self, steps: int) -> None:
        """Note that a graph has made steps which the host did not see."""
        self._attempts += steps
        self._taken += steps
        for weight in self._weights:
            # Those that no update is of would fall below none where a capture is taken back.
            weight.counted = max(weight.counted + steps, 0)
        self._scale, self._behind = None, True
        self._copied.clear()
        self._given.clear()

    def read(self) -> None:
        """Wait for the GPU, where it decided on steps, and take its counts over."""
        if not self._behind or self._words is None:
            return
        if self._capturing:
            raise RuntimeError(
                "counts of steps are in the GPU's memory, and cannot be read while a CUDA graph is "
                "captured"
            )
        counts = self._words[:, _STEP].tolist()
        self._behind = False
        self._taken = counts[-1]
        for weight in self._weights:
            if id(weight) in self._row:
                weight.counted = counts[self._row[id(weight)]] - 1

    def set_count(self, weight: Weight, count: int) -> None:
        """Let a weight have made this many steps, as a checkpoint says."""
        self.read()
        if weight.counted != count:
            weight.counted = count
            self._placed = False
            self._given.clear()

    @property
    def skipped(self) -> int:
        """Steps that were skipped as a whole."""
        self.read()
        return self._skipped_before + self._attempts - self._taken

    @skipped.setter
    def skipped(self, count: int) -> None:
        self.read()
        self._skipped_before = count - (self._attempts - self._taken)
