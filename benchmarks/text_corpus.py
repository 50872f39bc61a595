"""Real text without a download: Python's own documentation and standard library, byte by byte.

``pydoc_data.topics`` is the language reference that ``help("for")`` prints; the rest are the
library's sources without its tests. Together about 12 MB. They differ a little between Python
versions, so a result names their hash.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

VOCABULARY = 256
VALIDATION_EVERY = 20
"""Every 20th document, in the order of the hashes of their names, is kept for validation."""
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Documents as bytes, each behind a byte 0.

    Attributes:
        train: uint8 ``[bytes]``.
        valid: uint8 ``[bytes]``, of other documents.
        sha256: of both, the first 12 digits.
    """

    train: torch.Tensor
    valid: torch.Tensor
    sha256: str

    def windows(
        self, split: torch.Tensor, count: int, length: int, seed: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows: ids and their successors, int64 ``[count, length]`` each.

        Args:
            split: ``train`` or ``valid``.
            count: windows.
            length: tokens of each.
            seed: the same seed gives the same windows, on every device.
            device: where they go.

        Raises:
            ValueError: the split is shorter than a window.
        """
        if split.numel() <= length:
            raise ValueError(f"length={length} does not fit a split of {split.numel()} bytes")
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(split.numel() - length, (count, 1), generator=generator)
        found = split[starts + torch.arange(length + 1)].to(device, torch.int64)
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def documents() -> dict[str, bytes]:
    """Every document by name."""
    from pydoc_data.topics import topics

    found = {f"topic {name}": text.encode() for name, text in topics.items()}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # The topics themselves are a module of the library, too.
        if not _LEFT_OUT & set(parts) and parts[0] != "pydoc_data":
            found["/".join(parts)] = path.read_bytes()
    return found


def corpus() -> Corpus:
    """All of it, in an order that does not depend on the file system."""
    texts = documents()
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    splits: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
    for rank, name in enumerate(names):
        splits[rank % VALIDATION_EVERY == 0] += b"\0" + texts[name]
    digest = hashlib.sha256(splits[False] + splits[True]).hexdigest()[:12]
    train, valid = (torch.frombuffer(splits[kept], dtype=torch.uint8) for kept in (False, True))
    return Corpus(train, valid, digest)
