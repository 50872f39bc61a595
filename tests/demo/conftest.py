"""Runs that several tests look at."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

import demo_cli

if find_spec("forge_train") is None:
    sys.path.insert(0, str(demo_cli.ROOT / "megatron_patch"))


@dataclass(frozen=True)
class Finished:
    """A run that has ended well."""

    out: Path
    directory: Path
    stdout: str
    stderr: str


#: The flags of `compared`, but for --compare.
TP2_SP = (*demo_cli.SMALL, "--tp", "2", "--clip-grad", "1")


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Stock and FORGE in fp32 at TP=2 with sequence parallelism, clipped, run without a break."""
    out = tmp_path_factory.mktemp("compared")
    stdout, stderr = demo_cli.demo(out, "--compare", *TP2_SP)
    return Finished(out, out / "demo", stdout, stderr)
