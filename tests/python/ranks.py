"""Runs a function of a test module in several processes that share a process group."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__)


def device() -> torch.device:
    """A rank's own: a GPU in a group of NCCL's, else the CPU."""
    import torch.distributed as dist

    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if nccl else torch.device("cpu")


def on_ranks(
    work: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 240.0,
    backend: str = "gloo",
) -> list[Any]:
    """What ``work(*arguments)`` returns on each rank of a new group.

    Args:
        work: a function at the top of its module, which ranks import by path.
        ranks: processes.
        arguments: pickled.
        timeout: seconds, of all and of every collective.
        backend: ``gloo``, or ``nccl`` with a GPU for each rank.

    Raises:
        AssertionError: a rank failed; the message has what it printed.
    """
    done = run_ranks(work, ranks, *arguments, timeout=timeout, backend=backend)
    texts = [text for _, text, _ in done]
    for rank, (code, text, _) in enumerate(done):
        assert code == 0, f"rank {rank} of {ranks}:\n{text}\n-- the others:\n{texts}"
    return [result for _, _, result in done]


def run_ranks(
    work: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 240.0,
    wait_for: Sequence[int] | None = None,
    backend: str = "gloo",
) -> list[tuple[int, str, Any]]:
    """As :func:`on_ranks`: of each rank its exit code, what it printed, and what it returned.

    Of the ranks in ``wait_for`` alone, where they are named; the others are killed.
    """
    module = sys.modules[work.__module__].__file__
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((str(module), work.__name__, arguments, timeout, backend)))
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        running = [
            subprocess.Popen(
                [sys.executable, str(_HERE), folder, str(rank), str(ranks)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for rank in range(ranks)
        ]
        try:
            wanted = range(ranks) if wait_for is None else wait_for
            return [_finish(running[rank], Path(folder), rank, 5 * timeout) for rank in wanted]
        finally:
            for process in running:
                process.kill()


def _finish(
    process: subprocess.Popen[str], folder: Path, rank: int, timeout: float
) -> tuple[int, str, Any]:
    text, _ = process.communicate(timeout=timeout)
    out = folder / f"out{rank}"
    return process.returncode, text, pickle.loads(out.read_bytes()) if out.exists() else None


def _named(module: str, name: str) -> Callable[..., Any]:
    path = Path(module)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return getattr(made, name)


def _main(arguments: Sequence[str]) -> None:
    folder, rank, ranks = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    sys.path.insert(0, str(_HERE.parent))
    import conftest  # noqa: F401  (finds the library)
    import torch.distributed as dist

    module, name, given, timeout, backend = pickle.loads((folder / "call").read_bytes())
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    result = _named(module, name)(*given)
    (folder / f"out{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    # Threads of torch that are still there when the interpreter ends may abort the process.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1:])
