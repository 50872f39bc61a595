"""Tests of the CUDA backend. Without a GPU all of them are skipped.

They run against the installed wheel, or against target/release/libforge.so in a working tree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

if "FORGE_LIBRARY" in os.environ or find_spec("forge_train") is None:
    sys.path.insert(0, str(ROOT / "megatron_patch"))
    os.environ.setdefault("FORGE_LIBRARY", str(ROOT / "target" / "release" / "libforge.so"))

# Last, for their own conftest is another one.
sys.path.append(str(ROOT / "tests" / "python"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests of this folder out, unless ``-m`` or FORGE_SLOW_TESTS=1 asks for them.

    First comes what watches the driver's free memory: other work may start on the GPU after it.
    """
    items.sort(key=lambda item: item.path.name != "test_memory.py")
    if config.option.markexpr or os.environ.get("FORGE_SLOW_TESTS") == "1":
        return
    reason = "slow; run with FORGE_SLOW_TESTS=1, or -m slow"
    for item in items:
        here = item.path.is_relative_to(Path(__file__).parent)
        if here and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same numbers in every test, and no memory of one test in the next."""
    torch.manual_seed(1234)
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
