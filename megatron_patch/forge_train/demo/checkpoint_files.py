"""The checkpoint folder of a run: which checkpoint is complete, and how one becomes so.

A checkpoint is complete or it is not there: it is written under a hidden name, flushed to disk and
renamed, and only then does the file ``latest`` (replaced atomically as well) point to it. A process
killed at any moment leaves the checkpoint before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

KEEP = 2  # older checkpoints are deleted


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoint folder, if there is one."""
    pointer = folder / "latest"
    if pointer.is_file():
        found = folder / pointer.read_text().strip()
        if found.is_dir():
            return found
    # Killed between the renames of the very first save, or while a step was being replaced.
    complete = sorted(folder.glob("step-*"))
    return complete[-1] if complete else None


def step_of(checkpoint: Path) -> int:
    """The step that a complete checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def begin(folder: Path, step: int) -> None:
    """Create the hidden folder (:func:`scratch`) to write a step's checkpoint into."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    scratch(folder, step).mkdir()


def scratch(folder: Path, step: int) -> Path:
    """Where a step's checkpoint lies while it is being written."""
    return folder / f".step-{step:08d}.incomplete"


def publish(folder: Path, step: int) -> Path:
    """Make a written checkpoint visible, durably, and drop the ones it replaces."""
    written, target = scratch(folder, step), folder / f"step-{step:08d}"
    for path in [*written.rglob("*"), written]:
        _sync(path)
    if target.is_dir():  # the same step again, by a run that was resumed before it
        _discard(target)
    written.rename(target)
    _sync(folder)
    pointer = folder / ".latest.incomplete"
    pointer.write_text(target.name + "\n")
    _sync(pointer)
    pointer.replace(folder / "latest")
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        if old != target:
            _discard(old)
    return target


def clear(folder: Path) -> None:
    """Delete all checkpoints of a run that starts anew."""
    if folder.is_dir():
        _discard(folder)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, as a half-deleted folder must not look like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.discarded")
    if doomed.is_dir():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
