"""Parameters with an ordinary gradient: embeddings, norms, biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch

from ._comm import Place
from ._linear import Linear
from ._structs import DeviceStructs, norm_of, report_of
from ._types import Norm, Report, Scalars, Storage
from .weights import Weight

MOST_ELEMENTS = 8 << 20
"""Of a gradient that are in fp32 at a time: 32 MiB, which stay in a large L2."""
_BLOCK = 128  # elements of a q8 block, and columns of a GPU's tiles
_ROWS = 64  # of a GPU's tiles


def shape_of(elements: int) -> tuple[int, int]:
    """The matrix that a parameter of so many elements is to the library.

    Rows of one q8 block each, which fill the tiles of a GPU; one row where that leaves a rest, or
    where there are few. Elements, rounding noise and blocks are in the same order either way.
    """
    whole = elements % _BLOCK == 0 and elements >= _BLOCK * _ROWS
    return (elements // _BLOCK, _BLOCK) if whole else (1, elements)


def parts_of(elements: int) -> int:
    """Into how many equal parts of whole q8 blocks a gradient is cut that is not fp32.

    As few as have no more than :data:`MOST_ELEMENTS`; where no number of them up to 4096 divides
    it, the most below.
    """
    fewest = -(-elements // MOST_ELEMENTS)
    numbers = [*range(fewest, 4097), *range(fewest - 1, 0, -1)]
    return next((n for n in numbers if elements % (_BLOCK * n) == 0), 1)


class Part(NamedTuple):
    """Rows ``begin`` to ``end`` of a parameter's matrix, and the linear whose shard they are."""

    linear: Linear
    begin: int
    end: int


class DenseWeight(Weight):
    """A parameter with an ordinary gradient, updated by the same rule.

    The parameter is a linear's matrix (:func:`shape_of`), its gradient the accumulator of an update
    without factors. The library reads accumulators in fp32. A large bf16 gradient is therefore
    taken in parts, so that there is never an fp32 copy of all of it: parts are what ranks would
    have of the rows, and get the same bits as the whole.
    """

    @property
    def pending(self) -> bool:
        """Whether autograd left a gradient."""
        return self.parameter.grad is not None

    def check(self) -> None:
        """Raise if the gradient is of a kind that the library cannot read.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        grad = self.parameter.grad
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"{self.name} has a sparse gradient, which no FORGE rule takes. Build the "
                "embedding with sparse=False, or fuse(..., rest=False) and step it with your own "
                "optimizer."
            )

    def norm(self, out: torch.Tensor | None = None) -> Norm | None:
        """``Σ g²`` of the gradient."""
        parts = self._parts
        if len(parts) == 1:
            return self.linear.norm((), self._gradient().float(), "tiles", out)
        norms = DeviceStructs("forge_norm", len(parts), self.linear.device)
        for part, gradient, row in zip(parts, self._gradients(), norms.rows, strict=True):
            part.linear.norm((), gradient, "tiles", row)
        # Words: size and method; the sum; whether it is not finite.
        words = norms.rows.view(torch.int64)
        total = words[0].clone()
        total[1] = norms.rows.view(torch.float64)[:, 1].sum().view(torch.int64)
        total[2] = words[:, 2].amax()
        if out is None:
            return DeviceStructs.of("forge_norm", total).read(norm_of)[0]
        out.view(torch.int64).copy_(total)
        return None

    def apply(self, scalars: Scalars | torch.Tensor, report: torch.Tensor | None = None) -> None:
        """Update from the gradient, which stays until ``zero_grad``, as torch's optimizers do."""
        parts = self._parts
        if len(parts) == 1:
            gradient = self._gradient().float()
            self.reported(self.linear.update((), self.storage, scalars, gradient, report))
        else:
            self.reported(self._apply_parts(parts, scalars, report))
        self.version += 1

    def _apply_parts(
        self, parts: list[Part], scalars: Scalars | torch.Tensor, report: torch.Tensor | None
    ) -> Report | None:
        reports = DeviceStructs("forge_report", len(parts), self.linear.device)
        for part, gradient, row in zip(parts, self._gradients(), reports.rows, strict=True):
            part.linear.update((), _slice(self.storage, part), scalars, gradient, row)
        # Words: size; tiles; those that are not finite; the sum.
        words = reports.rows.view(torch.int64)
        total = words[0].clone()
        total[1:3] = words[:, 1:3].sum(0)
        total[3] = reports.rows.view(torch.float64)[:, 3].sum().view(torch.int64)
        if report is None:
            return DeviceStructs.of("forge_report", total).read(report_of)[0]
        report.view(torch.int64).copy_(total)
        return None

    def clear(self) -> None:
        """The gradient belongs to the user's ``zero_grad``."""

    @cached_property
    def _parts(self) -> list[Part]:
        """One where the gradient is fp32, which needs no copy."""
        rows = self.linear.layout.out_local
        fp32 = self.parameter.dtype == torch.float32
        count = 1 if fp32 or rows == 1 else parts_of(self.parameter.numel())
        if count == 1:
            return [Part(self.linear, 0, rows)]
        spec, context = replace(self.linear.spec, parallel="column"), self.linear.context
        linears = [
            Linear(spec, name=self.name, context=context, comm=Place(context, rank, count))
            for rank in range(count)
        ]
        each = rows // count
        return [Part(one, rank * each, (rank + 1) * each) for rank, one in enumerate(linears)]

    def _gradients(self) -> Iterator[torch.Tensor]:
        """Of each part in fp32, one after the other."""
        gradient = self._gradient()
        for part in self._parts:
            yield gradient[part.begin : part.end].float()

    def _gradient(self) -> torch.Tensor:
        grad = self.parameter.grad
        if grad is None:
            raise RuntimeError(f"{self.name} has no gradient")
        layout = self.linear.layout
        return grad.detach().contiguous().view(layout.out_local, layout.in_local)


def _slice(storage: Storage, part: Part) -> Storage:
    """A part's rows; scales are one for each, ``[1, rows]``."""
    begin, end = part.begin, part.end
    extra = storage.weight_extra
    return replace(
        storage,
        weight=storage.weight[begin:end],
        weight_extra=None if extra is None else extra[begin:end],
        states=[state[begin:end] for state in storage.states],
        scales=[None if scale is None else scale[:, begin:end] for scale in storage.scales],
    )
