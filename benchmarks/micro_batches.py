"""The search for the largest micro-batch that fits: few tries, and fewer that run out of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_CLOSE = 4


def largest(found: Mapping[int, float | None]) -> int:
    """The largest that is known to fit; 0: none."""
    return max((size for size, peak in found.items() if peak is not None), default=0)


def settled(found: Mapping[int, float | None], most: int) -> bool:
    """Whether one more than :func:`largest` is known not to fit, or is above ``most``."""
    fits = largest(found)
    return fits >= most or found.get(fits + 1, 0.0) is None


def next_size(
    found: Mapping[int, float | None],
    wanted: Iterable[int],
    *,
    search: bool,
    limit: float,
    most: int,
) -> int | None:
    """What to try next; None: nothing is left.

    The peak grows linearly with the micro-batch once activations make it, so two that fit tell
    where the limit is; the neighbours of that size settle it.

    Args:
        found: micro-batch → its peak, or None where it does not fit.
        wanted: sizes to measure in any case, unless a smaller one does not fit.
        search: whether to go on to the largest that fits.
        limit: of the peak, in the unit of ``found``.
        most: the largest to try.
    """
    fails = min((size for size, peak in found.items() if peak is None), default=most + 1)
    for size in sorted(wanted):
        if size not in found and size < fails:
            return size
    fits = largest(found)
    if not search or fits + 1 >= fails:
        return None
    if fits == 0:
        return 1
    guess = 2 * fits
    below = largest({size: peak for size, peak in found.items() if size < fits})
    if below:
        slope = (found[fits] - found[below]) / (fits - below)  # type: ignore[operator]
        if slope > 0:
            guess = min(fits + int((limit - found[fits]) / slope), 4 * fits)  # type: ignore[operator]
    if guess >= fails:
        guess = fails - 1 if fails - fits <= _CLOSE else (fits + fails) // 2
    return max(guess, fits + 1)
