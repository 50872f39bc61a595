"""How far a run is: a bar on a terminal, else a plain line every tenth of the way."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

#: Into a file or a pipe this many lines are written, the last one at the end.
LINES = 10


class Progress:
    """Reports steps to stderr; silent on ranks that do not report.

    Args:
        label: what is in progress.
        done: steps that were there before, from a checkpoint.
        total: steps at the end.
        enabled: False on all ranks but one.
    """

    def __init__(self, label: str, done: int, total: int, enabled: bool) -> None:
        self._label, self._done, self._total = label, done, total
        self._first, self._begin = done, time.perf_counter()
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="step",
            disable=not enabled or self._lines,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self, record: dict[str, Any]) -> None:
        """One step more; ``record`` is its line of the log."""
        numbers = (
            f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tok/s, "
            f"{record['memory_bytes'] / 2**20:.0f} MiB"
        )
        self._bar.update()
        self._bar.set_postfix_str(numbers)
        before = self._done * LINES // self._total
        self._done += 1
        if self._lines and self._done * LINES // self._total > before:
            seconds = time.perf_counter() - self._begin
            left = seconds / (self._done - self._first) * (self._total - self._done)
            print(
                f"{self._label}: step {self._done} of {self._total} "
                f"({100 * self._done // self._total} %), {numbers}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
