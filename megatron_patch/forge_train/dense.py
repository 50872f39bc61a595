"""Parameters with an ordinary gradient: embeddings, norms, biases."""

from __future__ import annotations

import torch

from ._types import Scalars
from .weights import Weight

_BLOCK = 128  # elements of a q8 block, and columns of a GPU's tiles
_ROWS = 64  # of a GPU's tiles


def shape_of(elements: int) -> tuple[int, int]:
    """The matrix that a parameter of so many elements is to the library.

    Rows of one q8 block each, which fill the tiles of a GPU; one row where that leaves a rest, or
    where there are few. Elements, rounding noise and blocks are in the same order either way.
    """
    whole = elements % _BLOCK == 0 and elements >= _BLOCK * _ROWS
    return (elements // _BLOCK, _BLOCK) if whole else (1, elements)


class DenseWeight(Weight):
    """A parameter with an ordinary gradient, updated by the same rule.

    The parameter is a linear's matrix (:func:`shape_of`), its gradient the accumulator of an update
    without factors, which the library reads as it lies: in fp32, or in the parameter's own type.
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

    def norm(self, out: torch.Tensor) -> None:
        """``Σ g²`` of the gradient."""
        self.linear.norm((), self.accumulated_gradient(), "tiles", out)

    def apply(self, scalars: Scalars | torch.Tensor, report: torch.Tensor | None = None) -> None:
        """Update from the gradient, which stays until ``zero_grad``, as torch's optimizers do."""
        gradient = self.accumulated_gradient()
        self.reported(self.linear.update((), self.storage, scalars, gradient, report))
        self.applied()

    def applied(self) -> None:
        """Note an update."""
        self.version += 1

    def clear(self) -> None:
        """The gradient belongs to the user's ``zero_grad``."""

    def accumulated_gradient(self) -> torch.Tensor:
        """The gradient as the library reads it."""
        grad = self.parameter.grad
        if grad is None:
            raise RuntimeError(f"{self.name} has no gradient")
        layout = self.linear.layout
        matrix = grad.detach().contiguous().view(layout.out_local, layout.in_local)
        return matrix if matrix.dtype == self.linear.spec.factor_dtype else matrix.float()
