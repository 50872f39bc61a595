"""FORGE inside megatron-core, against stock megatron-core, in real process groups (gloo, CPU).

FORGE_MEGATRON names a folder with another megatron-core than the installed one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)


def _cases() -> list[tuple[int, str]]:
    """Pairs (world size, scenario) from the source: importing it would import Megatron here."""
    cases = []
    files = sorted(HERE.glob("*_scenarios.py"))
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "scenario":
                cases += [(ast.literal_eval(world), node.name) for world in call.args]
    return sorted(cases, reverse=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Outcome = float | str | list[str]
"""Seconds; what went wrong; why it was skipped."""


def _run(world: int, folder: Path) -> dict[str, Outcome]:
    """Run one world; scenario → what came of it, on the first rank where anything went wrong."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    # The installed wheel, or this working tree with its own library.
    if "FORGE_LIBRARY" in environment or importlib.util.find_spec("forge_train") is None:
        library = ROOT / "target" / "release" / "libforge.so"
        environment.setdefault("FORGE_LIBRARY", str(library))
        paths = [str(ROOT / "megatron_patch"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if other := environment.get("FORGE_MEGATRON"):
        assert (Path(other) / "megatron" / "core").is_dir(), f"FORGE_MEGATRON={other}"
        paths = [other, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    port = str(_free_port())
    logs = [folder / f"{world}-{rank}.log" for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(rank), str(world), port, str(folder)],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in ranks:
            process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in ranks:
            process.kill()
    results: dict[str, Outcome] = {}
    for rank, log in enumerate(logs):
        report = folder / f"{world}-{rank}.json"
        found = json.loads(report.read_text()) if report.is_file() else {}
        for name in (scenario for size, scenario in _cases() if size == world):
            missing = f"rank {rank} did not get here:\n{log.read_text()[-4000:]}"
            outcome = found.get(name, missing)
            if isinstance(outcome, str) or name not in results:
                results[name] = f"rank {rank}: {outcome}" if isinstance(outcome, str) else outcome
    return results


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Outcome]:
    """All scenarios of all world sizes; one rank comes last, and reads the others' checkpoints."""
    folder = tmp_path_factory.mktemp("megatron")
    return {
        (world, name): outcome
        for world in (4, 2, 1)
        for name, outcome in _run(world, folder).items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "name"), _cases())
def test_scenario(world: int, name: str, outcomes: dict[tuple[int, str], Outcome]) -> None:
    outcome = outcomes[world, name]
    if isinstance(outcome, list):
        pytest.skip(outcome[0])
    assert not isinstance(outcome, str), outcome
