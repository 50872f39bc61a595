"""``scripts/slurm``: jobs of two nodes under a real SLURM, ended, killed, stopped and cancelled.

The daemons run on this machine, as whoever runs the tests. Without SLURM the tests are skipped:
``apt-get install slurm-wlm`` brings it, and ``munge`` with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster import Cluster, free_ports, missing, wait_until

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if missing():
    pytest.skip(
        f"SLURM is not installed ({', '.join(missing())}): apt-get install slurm-wlm",
        allow_module_level=True,
    )
if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("megatron.training is not installed", allow_module_level=True)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, INTERVAL = 12, 6
# Over those of llama3_8b.flags, which stay in force otherwise: bf16, recomputation, the optimizer.
_SMALL = f"""
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2
--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4
--train-iters {STEPS} --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --no-bias-dropout-fusion
--no-bias-swiglu-fusion --tokenizer-type NullTokenizer --vocab-size 127
--make-vocab-size-divisible-by 64 --log-interval 1 --eval-iters 0 --num-workers 0
"""


@dataclass
class Job:
    """One submission of the repository's own script, with a folder of its own."""

    cluster: Cluster
    folder: Path
    number: str

    @property
    def log(self) -> str:
        path = self.folder / "job.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def rank_logs(self, rank: int) -> list[str]:
        """What the rank of node ``rank`` printed, start by start."""
        paths = (self.folder / "run" / "logs").glob(
            f"{self.number}.*/node-{rank}/*/attempt_0/0/stdout.log"
        )
        by_start = sorted((int(path.parts[-6].split(".")[1]), path) for path in paths)
        return [path.read_text() for _, path in by_start]

    def losses(self, rank: int) -> list[list[tuple[int, str]]]:
        """``(step, loss to the bit)`` of every micro-batch, start by start."""
        return [
            [(int(w[1]), w[2]) for w in map(str.split, text.splitlines()) if w[:1] == ["exact"]]
            for text in self.rank_logs(rank)
        ]

    def ends(self, state: str, seconds: float = 240) -> None:
        """Wait for the job's end, in that state.

        Raises:
            AssertionError: it is another, or none in time; the message has the logs.
        """
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        with contextlib.suppress(TimeoutError):
            wait_until("the job's end", lambda: self.cluster.state(self.number) in over, seconds)
        found = self.cluster.state(self.number)
        assert found == state, f"{found}:\n{self.log[-8000:]}\n{self.cluster.logs()}"

    def reaches(self, words: str, seconds: float = 240) -> None:
        """Wait for words in the job's log.

        Raises:
            AssertionError: they do not come; the message has the logs.
        """
        try:
            wait_until(words, lambda: words in self.log, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.log[-8000:]}\n{self.cluster.logs()}") from None

    def tracker(self) -> str:
        path = self.folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
        return path.read_text()

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor of the last checkpoint: weights, their low bits, both moments."""
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        file = self.folder / "weights.pt"
        dcp_to_torch_save(self.folder / "run" / "checkpoints" / f"iter_{STEPS:07d}", file)
        held = torch.load(file, weights_only=False)
        return {k: v for k, v in held.items() if isinstance(v, torch.Tensor)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's own folder: a socket's path has 107 characters at most.
    with (
        tempfile.TemporaryDirectory(prefix="forge-slurm-") as folder,
        Cluster(Path(folder)) as made,
    ):
        yield made


def submit(
    cluster: Cluster,
    folder: Path,
    *options: str,
    nodes: int = 2,
    pace: float = 0.0,
    **variables: str,
) -> Job:
    """Submit one of the repository's scripts; ``variables`` are ``JOB_``'s."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "pretrain_8b" if nodes > 1 else "pretrain_single_node"
    environment = {
        "JOB_SCRIPT": str(HERE / "pretrain_exact.py"),
        "JOB_DATA": "none",
        "JOB_DEVICE": "cpu",
        "JOB_RANKS_PER_NODE": str(2 // nodes),
        "JOB_VENV": sys.prefix,
        "JOB_RUN_DIR": str(folder / "run"),
        "JOB_SAVE_INTERVAL": str(INTERVAL),
        "JOB_MASTER_ADDR": "127.0.0.1",
        "JOB_MASTER_PORT": str(free_ports(1)[0]),
        "JOB_INTERFACE": "lo",
        "JOB_FLAGS": " ".join(_SMALL.split()),
        "EXACT_PACE": str(pace),
        **variables,
    }
    if "FORGE_LIBRARY" in os.environ or importlib.util.find_spec("forge_train") is None:
        library = ROOT / "target" / "release" / "libforge.so"
        environment["FORGE_LIBRARY"] = os.environ.get("FORGE_LIBRARY", str(library))
        environment["PYTHONPATH"] = str(ROOT / "megatron_patch")
    command = [
        "sbatch",
        "--parsable",
        f"--nodes={nodes}",
        "--gpus-per-node=0",
        "--time=10",
        *options,
    ]
    command += [f"--output={folder / 'job.out'}", f"{ROOT}/scripts/slurm/{name}.sbatch"]
    return Job(cluster, folder, cluster.run(*command, JOB_ROOT=str(ROOT), **environment))


def rank_process(cluster: Cluster, job: Job, rank: int) -> int:
    """The process of a rank; its agent has no RANK of its own."""
    wanted = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={job.number}".encode()}
    for process in cluster.processes():
        with contextlib.suppress(OSError):
            if wanted <= set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0")):
                return process
    raise AssertionError(f"rank {rank} has no process:\n{job.log[-4000:]}")


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nobody disturbed."""
    job = submit(cluster, tmp_path_factory.mktemp("whole"))
    job.ends("COMPLETED")
    return job


def assert_same_as(whole: Job, job: Job, resumed_at: int) -> None:
    """Two starts, the second from step ``resumed_at``, and in both every loss as undisturbed."""
    for rank in (0, 1):
        (expected,) = whole.losses(rank)
        first, second = job.losses(rank)
        assert first == expected[: len(first)] and first[-1][0] >= resumed_at
        assert second[0][0] == resumed_at + 1
        assert second == [(step, loss) for step, loss in expected if step > resumed_at]
    ours, theirs = job.weights(), whole.weights()
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def test_a_job_of_two_nodes_runs_to_its_end(whole: Job) -> None:
    for rank in (0, 1):
        (losses,) = whole.losses(rank)
        assert [step for step, _ in losses] == [s for s in range(1, STEPS + 1) for _ in range(2)]
    assert whole.tracker() == str(STEPS)
    assert "no kernels to compile: the job runs on CPUs" in whole.log
    assert "start 0 on n[1-2] from iteration 0" in whole.log
    assert f"finished at iteration {STEPS}" in whole.log
    assert "output_layer.weight" in whole.log  # FORGE's table of what is fused


def test_a_killed_rank_requeues_the_job_which_ends_as_if_undisturbed(
    cluster: Cluster, whole: Job, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, pace=0.25)
    job.reaches(f"iteration {INTERVAL + 1:8d}/")
    os.kill(rank_process(cluster, job, 1), signal.SIGKILL)
    job.reaches(f"requeued, to go on from iteration {INTERVAL}")
    # srun's status is the highest of its tasks': 1, or 143 of the node that it told to end.
    assert re.search(r"the ranks failed with status \d+; requeued", job.log)
    # As if the kill had hit a save: half a checkpoint, and a tracker that was only truncated.
    tracker = job.folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    debris = tracker.parent / f"iter_{2 * INTERVAL:07d}"
    debris.mkdir()
    (debris / "__0_0.distcp").write_bytes(b"half")
    tracker.write_text("")
    job.ends("COMPLETED")
    assert "says '', which is no whole checkpoint; going on from" in job.log
    assert f"start 1 on n[1-2] from iteration {INTERVAL}" in job.log
    assert_same_as(whole, job, INTERVAL)


def test_sigusr1_saves_and_requeues(cluster: Cluster, whole: Job, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, pace=0.25)
    job.reaches("iteration        1/")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.reaches("the ranks stopped as told; requeued, to go on from iteration")
    at = int(job.tracker())
    assert 0 < at < INTERVAL  # saved for the signal, not by the interval
    job.ends("COMPLETED")
    assert_same_as(whole, job, at)


def test_scancel_is_final(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, nodes=1, pace=0.25)
    job.reaches("iteration        2/")
    cluster.run("scancel", job.number)
    job.ends("CANCELLED")
    assert "requeued, to go on" not in job.log
    assert cluster.run("squeue", "--noheader", "--jobs", job.number, check=False) == ""


def test_ranks_that_hang_are_ended_and_starts_that_get_nowhere_are_counted(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, time\n"
        "print('began', flush=True)\n"
        "if not os.environ.get('SLURM_RESTART_COUNT'):\n"
        "    time.sleep(600)\n"
        "raise SystemExit('this can never work')\n"
    )
    job = submit(
        cluster,
        tmp_path,
        nodes=1,
        JOB_SCRIPT=str(script),
        JOB_STOP_SECONDS="1",
        JOB_MAX_ATTEMPTS="2",
    )
    job.reaches("began")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.reaches("the ranks did not stop within 1 s (JOB_STOP_SECONDS)")
    job.ends("FAILED")
    assert job.log.count("requeued, to go on from iteration 0") == 1
    assert "not requeued: 2 starts in a row ended without a checkpoint newer" in job.log


def test_kernels_are_compiled_once_and_the_ranks_run_in_the_container(
    cluster: Cluster, tmp_path: Path
) -> None:
    if not os.environ.get("FORGE_NVRTC") and importlib.util.find_spec("nvidia") is None:
        pytest.skip("no NVRTC: set FORGE_NVRTC, or install a CUDA build of torch")
    # Stands for apptainer: writes down how it was called and runs the command here.
    fake = tmp_path / "bin" / "apptainer"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/called\nshift 5\nexec "$@"\n')
    fake.chmod(0o755)
    script = tmp_path / "trained.py"
    script.write_text("import sys\nprint('trained with', *sys.argv[1:3])\n")
    model = tmp_path / "model.flags"  # in fp32, which needs few kernels
    model.write_text("--hidden-size 64 --num-attention-heads 4 --seq-length 32\n")
    job = submit(
        cluster,
        tmp_path,
        JOB_SCRIPT=str(script),
        JOB_MODEL=str(model),
        JOB_FLAGS="",
        JOB_DEVICE="cuda",
        JOB_WARM_ARCH="sm_80",
        JOB_CACHE_DIR=str(tmp_path / "cache"),
        JOB_CONTAINER="image.sif",
        JOB_CONTAINER_RUNTIME="apptainer",
        JOB_CONTAINER_PYTHON=sys.executable,
        PATH=f"{fake.parent}:{cluster.environment['PATH']}",
    )
    job.ends("COMPLETED")
    assert f"kernels are in {tmp_path / 'cache'} after" in job.log
    assert job.log.count("python -m forge_train warm --arch sm_80") == 1
    assert len(list((tmp_path / "cache").rglob("*"))) > 5
    assert [text.split()[:2] for rank in (0, 1) for text in job.rank_logs(rank)] == [
        ["trained", "with"]
    ] * 2
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 3  # one to compile, two nodes
    mounts = f"{ROOT}:{ROOT},{tmp_path / 'run'}:{tmp_path / 'run'}"
    assert all(line.startswith(f"exec --nv --bind {mounts}") for line in called)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JOB_SCRIPT": "/nowhere.py"}, "JOB_SCRIPT=/nowhere.py is no file"),
        ({"JOB_TP": "4"}, "2 ranks (2 nodes, JOB_RANKS_PER_NODE=1) are no multiple of JOB_TP=4"),
        ({"JOB_DEVICE": "tpu"}, "JOB_DEVICE=tpu is unknown; use one of: cuda cpu"),
        ({"JOB_FLAGS": "--load=/x"}, "--load=/x in JOB_FLAGS: use JOB_LOAD"),
    ],
)
def test_bad_variables_end_the_job_at_once(
    cluster: Cluster, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    job = submit(cluster, tmp_path, **variables)
    job.ends("FAILED")
    assert words in job.log and "requeued, to go on" not in job.log


def test_nothing_is_left_running() -> None:
    with tempfile.TemporaryDirectory(prefix="forge-slurm-") as folder:
        with Cluster(Path(folder)) as made:
            made.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 100")
            wait_until("the job", lambda: "R" in made.run("squeue", "-h", "-o", "%t"), 90)
            assert len(made.processes()) >= 6
        assert made.processes() == []
