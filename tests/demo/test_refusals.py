"""What cannot run is refused before anything is written, with flag, value and way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from demo_cli import environment

from forge_train.demo.cli import main
from forge_train.demo.config import RunConfig

REFUSED = [
    ("--schedule immediate", "--schedule immediate", "--clip-grad 1", "--schedule deferred"),
    (
        "--schedule immediate --clip-grad 0 --micro-batches 4",
        "--schedule immediate",
        "--micro-batches 4",
        "--micro-batches 1",
    ),
    ("--compare --stock", "--compare", "--stock", "leave --stock out"),
    ("--compare --rule lion", "--rule lion", "adamw"),
    ("--stock --rule lion", "--rule lion", "adamw"),
    ("--stock --schedule deferred", "--schedule deferred with --stock", "--compare"),
    ("--stock --schedule auto", "--schedule auto with --stock", "leave --schedule out"),
    ("--stock --state-format q8", "--state-format q8 with --stock", "leave --state-format out"),
    ("--stock --state-format fp32", "--state-format fp32 with --stock", "--compare"),
    ("--stock --resume --schedule auto", "--schedule auto with --stock", "--compare"),
    ("--tp 3", "--tp 3", "--heads 8", "choose another"),
    ("--tp 4 --ffn 1410", "--tp 4", "--ffn 1410", "choose another"),
    ("--tp 2 --sequence 63", "--tp 2", "--sequence 63", "--no-sequence-parallel"),
    ("--tp 3 --heads 3 --hidden 510 --ffn 1410 --sequence 126", "--tp 3", "power of two"),
    ("--tp 1 --heads 7", "--heads 7", "--hidden 512", "choose another --heads"),
    ("--tp 0", "--tp 0", "at least 1"),
    ("--steps 0", "--steps 0", "at least 1"),
    ("--micro-batches 0", "--micro-batches 0", "at least 1"),
    ("--save-interval -1", "--save-interval -1", "at least 0"),
    ("--seed -1", "--seed -1", "at least 0"),
    ("--warmup-steps 10 --steps 10", "--warmup-steps 10", "less than --steps 10"),
    ("--lr nan", "--lr nan", "finite"),
    ("--clip-grad -1", "--clip-grad -1", "0 or more"),
    ("--weight-decay inf", "--weight-decay inf", "finite"),
    ("--name a/b", "--name 'a/b'", "plain folder name"),
    ("--resume", "--resume", "no run in", "leave --resume out"),
]


def _refuse(out: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--out", str(out), *flags.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("train.sh: error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(("flags", "parts"), [(flags, parts) for flags, *parts in REFUSED])
def test_refused(tmp_path: Path, capsys, flags: str, parts: list[str]) -> None:
    message = _refuse(tmp_path / "runs", flags, capsys)
    assert not [part for part in parts if part not in message], message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--rule sgd", ("--rule sgd", "adamw", "leave --rule out", "another --name")),
        ("--clip-grad 0", ("--clip-grad 0", "1.0", "leave --clip-grad out")),
        ("--weight-format bf16", ("--weight-format bf16", "fp32", "leave --weight-format out")),
        ("--hidden 256", ("--hidden 256", "512", "leave --hidden out")),
        ("--steps 39", ("--steps 39", "step-00000040", "--steps 40 or more")),
        ("--tp 3", ("--tp 3", "--heads 8", "choose another")),
    ],
)
def test_refused_on_resume(tmp_path: Path, capsys, flags: str, parts: tuple[str, ...]) -> None:
    run = tmp_path / "demo"
    (run / "checkpoints" / "step-00000040").mkdir(parents=True)
    RunConfig(out=str(tmp_path)).save(run / "config.json")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = _refuse(tmp_path, f"--resume {flags}", capsys)
    assert not [part for part in parts if part not in message], message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("flags", ["--schedule sometimes", "--rule adagrad", "--step 3", "extra"])
def test_unknown_words_are_refused(tmp_path: Path, capsys, flags: str) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["--out", str(tmp_path / "runs"), *flags.split()])
    assert exit_status.value.code == 2
    assert flags.split()[-1] in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_exit_status_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "forge_train.demo", "--out", str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, "--schedule", "immediate"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train.sh: error: --schedule immediate with --clip-grad 1")
    assert not (tmp_path / "runs").exists()
