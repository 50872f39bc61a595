"""``python -m forge_train.megatron SCRIPT … --forge``: one script with and without the flag."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("megatron.training is not installed", allow_module_level=True)

pytestmark = pytest.mark.distributed

_FLAGS = """
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3
--min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
--transformer-impl local --attention-backend unfused --no-persist-layer-norm
--no-masked-softmax-fusion --no-gradient-accumulation-fusion --no-rope-fusion
--no-bias-gelu-fusion --no-bias-dropout-fusion --attention-dropout 0 --hidden-dropout 0
--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
--position-embedding-type rope --tokenizer-type NullTokenizer --vocab-size 127
--make-vocab-size-divisible-by 64 --distributed-backend gloo --use-cpu-initialization
--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0
"""
_SPEC = ("--spec", "forge_train.megatron.spec", "layer_spec")
_STEP = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) ")


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(
    ranks: int, *flags: str, script: str = str(HERE / "pretrain_tiny.py")
) -> tuple[int, str]:
    """Exit status and output of a job of so many ranks, all of them on this machine's CPU."""
    environment = dict(
        os.environ,
        FORGE_MEGATRON_CPU="1",
        OMP_NUM_THREADS="1",
        TORCHDYNAMO_DISABLE="1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )
    if "FORGE_LIBRARY" in environment or importlib.util.find_spec("forge_train") is None:
        library = ROOT / "target" / "release" / "libforge.so"
        environment.setdefault("FORGE_LIBRARY", str(library))
        paths = [str(ROOT / "megatron_patch"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [
        f"--master-port={_port()}",
        "-m",
        "forge_train.megatron",
        script,
        *_FLAGS.split(),
        *flags,
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout + done.stderr


def steps(ranks: int, *flags: str) -> list[tuple[int, float, float]]:
    """Iteration, loss and gradient norm of every step, as Megatron logs them."""
    code, text = launch(ranks, *flags)
    assert code == 0, text[-6000:]
    found = [match.groups() for match in _STEP.finditer(text)]
    return [(int(step), float(loss), float(norm)) for step, loss, norm in found]


def assert_close(
    ours: list[tuple[int, float, float]], theirs: list[tuple[int, float, float]]
) -> None:
    assert len(ours) == len(theirs) > 0
    for (step, loss, norm), (other, stock_loss, stock_norm) in zip(ours, theirs, strict=True):
        assert step == other
        assert loss == pytest.approx(stock_loss, abs=1e-4)
        assert norm == pytest.approx(stock_norm, rel=2e-3)  # four digits are logged


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (
            1,
            [
                "--recompute-granularity=full",
                "--recompute-method=uniform",
                "--recompute-num-layers=1",
                "--calculate-per-token-loss",
            ],
        ),
        (2, ["--tensor-model-parallel-size=2", "--sequence-parallel", *_SPEC]),
        (2, ["--pipeline-model-parallel-size=2"]),
        (2, ["--use-distributed-optimizer", "--overlap-grad-reduce"]),
        (
            2,
            [
                "--tensor-model-parallel-size=2",
                "--sequence-parallel",
                "--num-experts=4",
                "--expert-model-parallel-size=2",
                "--expert-tensor-parallel-size=1",
                "--moe-router-topk=2",
                "--moe-ffn-hidden-size=48",
                "--moe-layer-freq=2",
                *_SPEC,
            ],
        ),
    ],
    ids=["recompute and per token", "tensor", "pipeline", "data", "experts"],
)
def test_an_unedited_script_trains_as_stock(ranks: int, flags: list[str]) -> None:
    assert_close(steps(ranks, "--forge", *flags), steps(ranks, *flags))


def test_checkpoints_go_on_on_fewer_ranks_and_in_stock(tmp_path: Path) -> None:
    saved = ["--ckpt-format=torch_dist", "--save-interval=2"]
    whole = steps(2, "--forge", f"--save={tmp_path / 'a'}", *saved)
    resumes = [f"--load={tmp_path / 'a'}", "--ckpt-step=2", *saved, f"--save={tmp_path / 'b'}"]
    for ranks, flag in ((2, ["--forge"]), (1, ["--forge"]), (2, [])):
        (step, loss, norm), (_, _, last) = steps(ranks, *flag, *resumes)
        assert_close([(step, loss, norm)], whole[2:3])
        # Of the second step Megatron logs the mean of both losses.
        assert last == pytest.approx(whole[3][2], rel=2e-3)


def test_the_table_says_what_is_fused_and_the_help_what_can_be_asked() -> None:
    code, text = launch(1, "--forge", "--train-iters=1", "--forge-state-format=q8")
    assert code == 0, text[-4000:]
    assert "output_layer.weight" in text and "states q8/q8" in text
    assert "embedding" in text
    code, text = launch(1, "--help")
    assert code == 0, text[-4000:]
    for flag in ("--forge ", "--forge-weight-format", "--forge-schedule", "--train-iters"):
        assert flag in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--transformer-impl=transformer_engine"], "use --transformer-impl local"),
        (["--optimizer=muon"], "use --optimizer adam or sgd or lion"),
        (["--forge-schedule=immediate", "--clip-grad=0"], "use --rerun-mode disabled"),
        (["--forge-weight-format=bf16"], "it is fp32: use fp32"),
        (["--log-num-zeros-in-grad"], "has no zeros to count; leave it out"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused_at_start(flags: list[str], words: str) -> None:
    from forge_train.megatron import arguments

    parser = arguments.add_arguments(argparse.ArgumentParser())
    parser.add_argument("--transformer-impl", default="local")
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--log-num-zeros-in-grad", action="store_true")
    given = parser.parse_args(["--forge", *flags])
    given.bf16, given.rerun_mode = False, "validate_results"
    with pytest.raises(ValueError, match=re.escape(words)):
        arguments.check(given)
    given.forge = False
    arguments.check(given)


def test_without_a_script_the_launcher_says_how_it_is_used() -> None:
    code, text = launch(1, script="nowhere.py")
    assert code != 0 and "no script at nowhere.py" in text
