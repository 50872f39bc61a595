"""Objects of Python that live as long as a tensor which a compiled graph holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Held:
    """Objects by number, each of which lives as long as the memory of a tensor that names it."""

    def __init__(self) -> None:
        self._objects: dict[int, tuple[StorageWeakRef, Any]] = {}

    def put(self, number: int, name: torch.Tensor, held: object) -> None:
        """Hold an object until the memory of ``name``, which carries the number, is freed."""
        self._objects[number] = (StorageWeakRef(name.untyped_storage()), held)

    def get(self, number: int) -> Any:
        """The object; None where something copied the name and let go of the first."""
        return self._objects.get(number, (None, None))[1]

    def sweep(self) -> int:
        """Let go of what nobody names any more; returns how many are left."""
        if not self._objects:
            return 0
        for number in [n for n, (owner, _) in self._objects.items() if owner.expired()]:
            del self._objects[number]
        return len(self._objects)
