"""What updates and norms found: rows in the backend's memory, which the host reads when asked.

To wait for every layer would leave a GPU idle between layers. So each update leaves its report in
a row of one tensor beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._lib import ffi
from ._structs import DeviceStructs, norm_of, report_of
from ._types import Norm, Report
from .weights import Weight

_REPORT_WORDS = ffi.sizeof("forge_report") // 8


class _Rows:
    """A struct for each weight, in one tensor beside the weights.

    Args:
        name: the struct's C type.
        weights: the engine's list, which may still grow.
    """

    def __init__(self, name: str, weights: Sequence[Weight]) -> None:
        """Allocate nothing yet."""
        self._name, self._weights = name, weights
        self._rows: dict[int, int] = {}
        self._structs: DeviceStructs | None = None
        self._tensors: tuple[torch.Tensor, ...] = ()

    def _at(self, weight: Weight) -> torch.Tensor:
        """A weight's row; where it has none yet, all rows are made anew."""
        if id(weight) not in self._rows:
            self._renew()
            self._rows = {id(each): row for row, each in enumerate(self._weights)}
            self._structs = DeviceStructs(self._name, len(self._weights), weight.linear.device)
            self._tensors = self._structs.rows.unbind()
        return self._tensors[self._rows[id(weight)]]

    def _renew(self) -> None:
        """Let go of the rows there are: new ones will be made."""


class Reports(_Rows):
    """The reports of the updates since the last :meth:`read`."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        """Allocate nothing yet."""
        super().__init__("forge_report", weights)
        self._unread: dict[int, Weight] = {}
        self._known: dict[int, Weight] = {}

    def row(self, weight: Weight) -> torch.Tensor:
        """Where the next update of a weight leaves its report."""
        row = self._at(weight)
        self._unread[id(weight)] = self._known[id(weight)] = weight
        return row

    def _renew(self) -> None:
        self.read()
        self._known.clear()

    def place(self, weight: Weight) -> int:
        """The number of a weight's row; it has one."""
        return self._rows[id(weight)]

    def replayed(self) -> None:
        """Note that a graph may have written any row: the next :meth:`read` reads them again."""
        self._unread.update(self._known)

    def words(self) -> torch.Tensor:
        """All rows as ``int64 [n]``, for :func:`report_in`; some row was asked for."""
        assert self._structs is not None
        return self._structs.rows.view(torch.int64).flatten()

    def read(self) -> None:
        """Give every weight that was updated since the last read its ``report``."""
        if self._structs is None or not self._unread:
            return
        reports = self._structs.read(report_of)
        for key, weight in self._unread.items():
            weight.reported(reports[self._rows[key]])
        self._unread.clear()


def report_in(words: torch.Tensor, row: int) -> Report:
    """One report of :meth:`Reports.words`, which are on the host."""
    own = words[_REPORT_WORDS * row : _REPORT_WORDS * (row + 1)].contiguous()
    return report_of(ffi.cast("forge_report *", own.data_ptr())[0])


class Norms(_Rows):
    """``Σ dW²`` of what is pending.

    A norm may be taken by the backward that keeps the factors, where the step is expected to have
    no others of that weight; else by the step.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        """Allocate nothing yet."""
        super().__init__("forge_norm", weights)
        # Weights whose row is of what they hold.
        self._taken: set[int] = set()
        self._picked: tuple[tuple[int, ...], torch.Tensor] | None = None

    def row(self, weight: Weight) -> torch.Tensor:
        """Where the norm of a weight goes."""
        return self._at(weight)

    def _renew(self) -> None:
        self._taken.clear()
        self._picked = None

    def taken(self, weight: Weight, known: bool) -> None:
        """Say whether the row is of all that the weight holds."""
        (self._taken.add if known else self._taken.discard)(id(weight))

    def clear(self) -> None:
        """Forget what was taken: nothing is pending any more."""
        self._taken.clear()

    def sums(self, weights: Sequence[Weight], device: torch.device) -> torch.Tensor:
        """Those of some weights, fp64 ``[n]`` on ``device``, where they are; nobody waits.

        A gradient that is not finite has a sum that is not finite. The next step overwrites them.
        """
        if not weights:
            return torch.zeros(0, dtype=torch.float64, device=device)
        self._complete(weights)
        assert self._structs is not None
        at = ffi.offsetof("forge_norm", "sum_of_squares") // 8
        sums = self._structs.rows.view(torch.float64)[:, at]
        rows = tuple(self._rows[id(weight)] for weight in weights)
        return sums if rows == tuple(range(len(sums))) else sums[self._index(rows)]

    def read(self, weights: Sequence[Weight]) -> list[Norm]:
        """Those of some weights; waits for them."""
        if not weights:
            return []
        self._complete(weights)
        assert self._structs is not None
        return self._structs.read(norm_of, [self._rows[id(weight)] for weight in weights])

    def _complete(self, weights: Sequence[Weight]) -> None:
        """Take what no backward has taken."""
        # One that is new moves the others, too.
        for weight in weights:
            self.row(weight)
        for weight in weights:
            if id(weight) not in self._taken:
                weight.norm(self.row(weight))

    def _index(self, rows: tuple[int, ...]) -> torch.Tensor:
        """As a tensor beside them. The last one is kept: to make it the host waits for its copy."""
        assert self._structs is not None
        if self._picked is None or self._picked[0] != rows:
            self._picked = rows, torch.tensor(rows, device=self._structs.rows.device)
        return self._picked[1]
