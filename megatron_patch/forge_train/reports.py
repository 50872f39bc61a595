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


class Reports:
    """The reports of the updates since the last :meth:`read`.

    Args:
        weights: the engine's list, which may still grow.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        """Allocate nothing yet."""
        self._weights = weights
        self._rows: dict[int, int] = {}
        self._structs: DeviceStructs | None = None
        self._unread: dict[int, Weight] = {}
        self._known: dict[int, Weight] = {}

    def row(self, weight: Weight) -> torch.Tensor:
        """Where the next update of a weight leaves its report."""
        if self._structs is None or id(weight) not in self._rows:
            self.read()
            self._known.clear()
            self._rows = {id(each): row for row, each in enumerate(self._weights)}
            self._structs = DeviceStructs("forge_report", len(self._weights), weight.linear.device)
        self._unread[id(weight)] = self._known[id(weight)] = weight
        return self._structs.rows[self._rows[id(weight)]]

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


def sums_of_squares(weights: Sequence[Weight], device: torch.device) -> torch.Tensor:
    """``Σ dW²`` of what is pending for each weight, fp64 ``[n]`` on ``device``, where they are.

    The host does not wait. A gradient that is not finite has a sum that is not finite.
    """
    structs = DeviceStructs("forge_norm", len(weights), device)
    for weight, row in zip(weights, structs.rows.unbind(), strict=True):
        weight.norm(row)
    at = ffi.offsetof("forge_norm", "sum_of_squares") // 8
    return structs.rows.view(torch.float64)[:, at]


def norms_of(weights: Sequence[Weight]) -> list[Norm]:
    """``Σ dW²`` of what is pending for each weight, all of one engine."""
    if not weights or not weights[0].linear.context.asynchronous:
        return [norm for weight in weights if (norm := weight.norm()) is not None]
    structs = DeviceStructs("forge_norm", len(weights), weights[0].linear.device)
    for weight, row in zip(weights, structs.rows.unbind(), strict=True):
        weight.norm(row)
    return structs.read(norm_of)
