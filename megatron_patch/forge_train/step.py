"""What a step did, told when somebody asks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .decision import Decision
from .reports import Reports, report_in


@dataclass(frozen=True)
class _Told:
    """The numbers of a step on the host; see :class:`StepResult`."""

    ok: bool
    norm: float | None
    coefficient: float
    nonfinite_layers: tuple[str, ...] = ()
    nonfinite_tiles: dict[str, int] = field(default_factory=dict)


class StepResult:
    """What a step did.

    On a GPU the numbers set out for the host when the step is enqueued. The first look at one waits
    until they are there; :attr:`ready` tells whether it would. Who never looks never waits, and who
    looks at the step before the current one waits for that alone.

    Attributes:
        ok: False when the whole step was skipped for inf or nan; no weight changed then.
        norm: global gradient norm before clipping; None where no norm was taken.
        coefficient: the factor on every gradient: ``grad_scale`` times the clip coefficient.
        nonfinite_layers: weights whose gradient held inf or nan.
        nonfinite_tiles: tiles that were left alone in a step that was not skipped, by weight.
    """

    def __init__(
        self,
        grad_scale: float,
        decision: Decision | None,
        sums: torch.Tensor | None,
        normed: tuple[str, ...],
        reports: Reports,
        updated: dict[str, int],
        always: int,
    ) -> None:
        """Copy what later steps would overwrite.

        Args:
            grad_scale: the coefficient where there is no decision.
            decision: None: none was made, and the step was taken.
            sums: fp64 ``[n]``, sums of squares by weight that the decision is about.
            normed: names of these weights.
            reports: of the step's updates.
            updated: rows of the updated weights in ``reports`` by name; the first ``always`` of
                them were updated inside the backward, whatever was decided.
            always: how many.
        """
        self._grad_scale, self._normed = grad_scale, normed
        self._updated, self._always = updated, always
        self._decided = decision is not None
        parts = [reports.words()] if updated else []
        if decision is not None and sums is not None:
            numbers = (decision.total, decision.norm, decision.coefficient)
            parts = [torch.stack(numbers).view(torch.int64), sums.view(torch.int64), *parts]
        self._told: _Told | None = None
        self._send(torch.cat(parts) if parts else None)

    def _send(self, words: torch.Tensor | None) -> None:
        """Let the numbers set out for the host."""
        self._words, self._host = words, words
        self._arrived: torch.cuda.Event | None = None
        if words is not None and words.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._host = words.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(words.device))

    def of_replay(self) -> StepResult:
        """What the latest replay of the graph did in which this step was captured."""
        copy = object.__new__(StepResult)
        copy.__dict__.update(self.__dict__)
        copy._told = None
        copy._send(self._words.clone() if self._words is not None else None)
        return copy

    @property
    def ready(self) -> bool:
        """Whether the numbers are there, so that nobody waits for them."""
        return self._told is not None or self._arrived is None or self._arrived.query()

    def _numbers(self) -> _Told:
        if self._told is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._told = self._read()
        return self._told

    def _read(self) -> _Told:
        words = self._host.cpu() if self._host is not None else torch.empty(0, dtype=torch.int64)
        ok, norm, coefficient = True, None, self._grad_scale
        bad: tuple[str, ...] = ()
        if self._decided:
            own = 3 + len(self._normed)
            total, norm, coefficient, *sums = words[:own].view(torch.float64).tolist()
            words = words[own:]
            ok = math.isfinite(total)
            if not ok:
                bad = tuple(
                    name
                    for name, square in zip(self._normed, sums, strict=True)
                    if not math.isfinite(square)
                )
                norm, coefficient = (math.inf if bad else total), 0.0
        tiles = {}
        for index, (name, row) in enumerate(self._updated.items()):
            # What an update reports that was told to skip is of no gradient.
            if ok or index < self._always:
                count = report_in(words, row).nonfinite_tiles
                if count:
                    tiles[name] = count
        return _Told(ok, norm, coefficient, tuple(tiles) if ok else bad, tiles)

    @property
    def ok(self) -> bool:
        """See the class."""
        return self._numbers().ok

    @property
    def norm(self) -> float | None:
        """See the class."""
        return self._numbers().norm

    @property
    def coefficient(self) -> float:
        """See the class."""
        return self._numbers().coefficient

    @property
    def nonfinite_layers(self) -> tuple[str, ...]:
        """See the class."""
        return self._numbers().nonfinite_layers

    @property
    def nonfinite_tiles(self) -> dict[str, int]:
        """See the class."""
        return self._numbers().nonfinite_tiles

    def __eq__(self, other: object) -> bool:
        """The same numbers."""
        return isinstance(other, StepResult) and self._numbers() == other._numbers()

    def __repr__(self) -> str:
        """All numbers."""
        return repr(self._numbers()).replace("_Told", "StepResult", 1)
