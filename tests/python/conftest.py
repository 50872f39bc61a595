"""Models and helpers shared by the tests of the Python package.

The tests run against the installed wheel, or against target/release/libforge.so in a working tree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No .hypothesis directory in the working tree.
settings.register_profile("no_database", database=None)
settings.load_profile("no_database")

ROOT = Path(__file__).resolve().parents[2]

if "FORGE_LIBRARY" in os.environ or find_spec("forge_train") is None:
    sys.path.insert(0, str(ROOT / "megatron_patch"))
    os.environ.setdefault("FORGE_LIBRARY", str(ROOT / "target" / "release" / "libforge.so"))
# Last, for some of the benchmarks' modules have names that others may have, too.
sys.path.append(str(ROOT / "benchmarks"))


from small_models import (  # noqa: E402, F401  (after the path is known; tests take them from here)
    Block,
    Transformer,
    assert_same_bits,
    mlp,
    mlp_batches,
    mlp_loss,
    tokens_loss,
    worst,
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same initial weights in every test."""
    torch.manual_seed(1234)
    yield


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., str]:
    """Run Python text in a process of its own; returns its stdout, fails on a non-zero exit."""
    import subprocess

    def run(text: str, *arguments: str, timeout: float = 240) -> str:
        script = tmp_path / "script.py"
        script.write_text(text, encoding="utf-8")
        environment = dict(os.environ)
        paths = [str(ROOT / "megatron_patch")] if "FORGE_LIBRARY" in environment else []
        paths += [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
