"""What updates and norms found: at hand at once on the CPU, after one read of all on a GPU.

To wait for every layer would leave the GPU idle between layers. So each update leaves its report in
a row of one tensor in the GPU's memory, and the step reads that tensor once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._structs import DeviceStructs, norm_of, report_of
from ._types import Norm
from .weights import Weight


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

    def row(self, weight: Weight) -> torch.Tensor | None:
        """Where the next update of a weight leaves its report; None: the update returns it."""
        context = weight.linear.context
        if not context.asynchronous:
            return None
        if self._structs is None or id(weight) not in self._rows:
            self.read()
            self._rows = {id(each): row for row, each in enumerate(self._weights)}
            self._structs = DeviceStructs("forge_report", len(self._weights), context.device)
        self._unread[id(weight)] = weight
        return self._structs.rows[self._rows[id(weight)]]

    def read(self) -> None:
        """Give every weight that was updated since the last read its ``report``."""
        if self._structs is None or not self._unread:
            return
        reports = self._structs.read(report_of)
        for key, weight in self._unread.items():
            weight.report = reports[self._rows[key]]
        self._unread.clear()


def norms_of(weights: Sequence[Weight]) -> list[Norm]:
    """``Σ dW²`` of what is pending for each weight, all of one engine."""
    if not weights or not weights[0].linear.context.asynchronous:
        return [norm for weight in weights if (norm := weight.norm()) is not None]
    structs = DeviceStructs("forge_norm", len(weights), weights[0].linear.device)
    for weight, row in zip(weights, structs.rows.unbind(), strict=True):
        weight.norm(row)
    return structs.read(norm_of)
