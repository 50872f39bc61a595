"""Start one process per tensor-parallel rank, and end all of them when one fails."""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
from pathlib import Path

import torch
from torch import multiprocessing

from forge_train.demo.config import RunConfig


class RankError(RuntimeError):
    """A rank died; the message holds its traceback, if it left one."""


def launch(run: RunConfig, resume: bool) -> None:
    """Train ``run`` on ``run.tp`` processes. Raises :class:`RankError` when one of them dies.

    The others are ended then: a rank must not wait for ever in a collective for one that is gone.
    They are ended as well when this process is killed, see :func:`_rank_main`.
    """
    threads = max(1, _cpu_count() // run.tp)
    _set_environment(run, threads)
    with tempfile.TemporaryDirectory(prefix="forge-ranks-") as name:
        folder = Path(name)
        ranks = multiprocessing.spawn(
            _rank_main, args=(run, resume, str(folder), threads), nprocs=run.tp, join=False
        )
        try:
            while not ranks.join():
                pass
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
            exits = [process.exitcode for process in ranks.processes]
            raise RankError(_killed(exits) or _first_failure(folder) or str(error)) from None


def _killed(exits: list[int | None]) -> str | None:
    """Which rank a signal ended, if one did: the others' tracebacks are then a consequence.

    SIGTERM is how the remaining ranks are ended.
    """
    for rank, status in enumerate(exits):
        if status is not None and status < 0 and -status != signal.SIGTERM:
            name = signal.Signals(-status).name
            hint = "; did the machine run out of memory?" if name == "SIGKILL" else ""
            return f"rank {rank} was ended by {name}{hint}"
    return None


def _cpu_count() -> int:
    """CPUs that this process may use, where the system tells, else those it has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _set_environment(run: RunConfig, threads: int) -> None:
    """Set what the ranks inherit, unless the user has set it."""
    if run.device == "cpu":
        # megatron-core would otherwise use a GPU that is there, wherever the model is.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Idle OpenMP threads sleep instead of spinning: they would take the cores from FORGE's own
    # threads, from the other ranks and from everything else on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Megatron warns of each optional package that is missing; none of them is used here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    # The memory measurement uses torch's profiler, which complains of the GPU that is not there.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Megatron asserts this before Blackwell under TP: launch order must be execution order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _first_failure(folder: Path) -> str | None:
    """The oldest traceback: the later ones are of ranks that lost their partner."""
    failures = sorted(folder.glob("rank-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return f"{failures[0].stem}:\n{failures[0].read_text()}" if failures else None


def _rank_main(rank: int, run: RunConfig, resume: bool, folder: str, threads: int) -> None:
    # Linux: die with the parent, at once. torch's own choice is SIGINT, after which a rank could
    # still publish a checkpoint while the next run, which resumes this one, has begun.
    multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    try:
        # Imported in the rank only: the parent never needs Megatron.
        from forge_train.demo.train import train_rank

        torch.set_num_threads(threads)
        store = torch.distributed.FileStore(str(Path(folder) / "store"), run.tp)
        train_rank(run, rank, resume, store)
    except Exception:
        Path(folder, f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
