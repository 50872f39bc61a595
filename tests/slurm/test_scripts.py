"""``scripts/slurm`` without SLURM: which checkpoint is taken, flags, what is compiled ahead."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "slurm"
TRACKER = "latest_checkpointed_iteration.txt"


def shell(text: str, *arguments: str) -> tuple[int, str]:
    """Status and output of shell text with the scripts' functions at hand."""
    begin = 'set -uo pipefail\nsay() { echo "$*"; }\nfail() { echo "$*"; exit 2; }\n'
    begin += f"source {SCRIPTS}/checks.sh\nsource {SCRIPTS}/checkpoints.sh\n"
    done = subprocess.run(
        ["bash", "-c", begin + text, "bash", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def checkpoint(folder: Path, iteration: int, whole: bool = True) -> None:
    made = folder / f"iter_{iteration:07d}"
    made.mkdir(parents=True)
    (made / "__0_0.distcp").write_bytes(b"shard")
    if whole:
        (made / ".metadata").write_bytes(b"metadata")
        (made / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))


@pytest.mark.parametrize(
    ("whole", "half", "tracker", "settled"),
    [
        ([], [], None, None),
        ([500], [], "500", "500"),
        ([500, 1000], [1500], "1000", "1000"),  # killed while it wrote 1500
        ([500, 1000], [], "500", "500"),  # before the tracker, or somebody went back
        ([500, 1000], [], "", "1000"),  # while the tracker was written
        ([500], [1000], "1000", "500"),  # the tracker's own is half gone
        ([500], [], None, "500"),  # before the first tracker
        ([9999999, 10000000], [], "", "10000000"),  # eight digits
        ([8, 9], [], "", "9"),  # no octal numbers
        ([], [500], None, None),  # nothing to go on from: from the beginning
    ],
)
def test_a_start_goes_on_from_a_whole_checkpoint(
    tmp_path: Path, whole: list[int], half: list[int], tracker: str | None, settled: str | None
) -> None:
    for iteration in whole:
        checkpoint(tmp_path, iteration)
    for iteration in half:
        checkpoint(tmp_path, iteration, whole=False)
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    code, text = shell('settle_tracker "$1"', str(tmp_path))
    assert code == 0, text
    found = (tmp_path / TRACKER).read_text() if (tmp_path / TRACKER).exists() else None
    assert found == settled
    code, text = shell("checkpoints=$1; latest_iteration", str(tmp_path))
    assert (code, text) == (0, f"{settled or 0}\n")


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    checkpoint(tmp_path, 500, whole=False)
    (tmp_path / TRACKER).write_text("500")
    code, text = shell('settle_tracker "$1"', str(tmp_path))
    assert (
        code == 1 and "no checkpoint in" in text and "Remove it to train from the beginning" in text
    )


def test_starts_without_progress_are_counted_over_requeues(tmp_path: Path) -> None:
    start = (
        "state=$1 checkpoints=$1 SLURM_JOB_ID=7 JOB_MAX_ATTEMPTS=2 attempt=$2; "
        'count_attempt; echo "$started_from $fruitless"'
    )

    def begin(attempt: int) -> tuple[int, str]:
        return shell(start, str(tmp_path), str(attempt))

    assert begin(0) == (0, "0 1\n")
    assert begin(1) == (0, "0 2\n")
    (tmp_path / TRACKER).write_text("500")
    assert begin(2) == (0, "500 1\n")  # it got somewhere
    assert begin(3) == (0, "500 2\n")
    code, text = begin(4)
    assert code == 2 and "2 starts in a row got no further than iteration 500" in text
    assert begin(0) == (0, "500 1\n")  # submitted anew


def test_flags_are_read_without_comments(tmp_path: Path) -> None:
    file = tmp_path / "flags"
    file.write_text("# a comment --x\n--a 1 --b # --c\n\n  --d *")
    assert shell('flags=(); read_flags "$1"; printf "<%s>" "${flags[@]}"', str(file)) == (
        0,
        "<--a><1><--b><--d><*>",
    )


@pytest.fixture(scope="module")
def warm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_warm", SCRIPTS / "warm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parsed(arguments: list[str]) -> argparse.Namespace:
    from forge_train import warm_cli

    parser = argparse.ArgumentParser()
    warm_cli.add_to(parser.add_subparsers())
    return parser.parse_args(arguments)


def test_what_is_compiled_ahead_is_what_the_job_needs(warm: ModuleType, tmp_path: Path) -> None:
    from forge_train.model_shapes import shapes_of

    code, flags = shell(
        'flags=(); read_flags "$1"; echo "${flags[@]}"', str(SCRIPTS / "llama3_8b.flags")
    )
    assert code == 0
    given = ["--ranks", "32", *flags.split(), "--tensor-model-parallel-size", "2"]
    given += ["--forge", "--forge-state-format", "q8", "--vocab-size", "128256"]
    model = tmp_path / "config.json"
    asked = _parsed(warm.warm_arguments(given, "sm_90a", model))
    assert (asked.arch, asked.rule, asked.tp) == ("sm_90a", "adamw", 2)
    assert (asked.weight_format, asked.state_format) == ("bf16+16", "q8")
    assert asked.tokens == [4096]
    assert asked.micro_batches == 512 // 16  # 32 ranks by TP=2 are 16 replicas
    # qkv, proj, fc1 of a gated MLP, fc2, output
    for shape in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
        assert shape in shapes_of(model)


def test_later_flags_win_as_they_do_in_megatron(warm: ModuleType, tmp_path: Path) -> None:
    given = "--hidden-size 64 --num-attention-heads 4 --optimizer adam --micro-batch-size=2"
    given += " --optimizer sgd --sgd-momentum 0.8 --micro-batch-size 4 --seq-length 32"
    asked = _parsed(warm.warm_arguments(given.split(), "sm_80", tmp_path / "config.json"))
    assert (asked.rule, asked.option, asked.weight_format) == ("sgd", ["momentum=0.8"], "fp32")
    assert (asked.tokens, asked.micro_batches) == ([128], 1)
    with pytest.raises(ValueError, match="--hidden-size is missing"):
        warm.warm_arguments(["--num-attention-heads", "4"], "sm_80", tmp_path / "config.json")


def test_the_scripts_need_the_repository(tmp_path: Path) -> None:
    for script in ("pretrain_8b.sbatch", "pretrain_single_node.sbatch"):
        done = subprocess.run(
            ["bash", str(SCRIPTS / script)],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 2
        assert "is not FORGE's repository: submit from its root, or set JOB_ROOT" in done.stderr
