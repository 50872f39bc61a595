"""What a step did, and the clip coefficient it used."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._lib import check, ffi, lib


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        ok: False when the whole step was skipped for inf or nan; no weight changed then.
        norm: global gradient norm before clipping; None where no norm was taken.
        coefficient: the factor on every gradient: ``grad_scale`` times the clip coefficient.
        nonfinite_layers: weights whose gradient held inf or nan.
        nonfinite_tiles: tiles that ``immediate`` left alone, by weight.
    """

    ok: bool
    norm: float | None
    coefficient: float
    nonfinite_layers: tuple[str, ...] = ()
    nonfinite_tiles: dict[str, int] = field(default_factory=dict)


def clip_coefficient(
    sum_of_squares: float, grad_scale: float, max_norm: float | None
) -> tuple[float, float]:
    """The library's ``(norm, coefficient)``: ``min(1, max_norm / (norm + 1e-6)) * grad_scale``.

    Args:
        sum_of_squares: of the unscaled gradient, over everything clipped together.
        grad_scale: what the gradient is multiplied with, such as one over the loss scale.
        max_norm: None: no clipping.
    """
    norm, coefficient = ffi.new("double *"), ffi.new("double *")
    limit = 0.0 if max_norm is None else max_norm
    check(lib.forge_clip_coefficient(sum_of_squares, grad_scale, limit, norm, coefficient))
    return norm[0], coefficient[0]
