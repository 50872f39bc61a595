"""What a job with ``--forge`` writes to TensorBoard and W&B, beside a stock job."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("megatron.training is not installed", allow_module_level=True)
event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="tensorboard is not installed: scripts/setup.sh --dev installs it",
)

from test_launch import HERE, launch  # noqa: E402  (needs megatron.training)

pytestmark = pytest.mark.distributed

_EVERYTHING = (
    "--log-throughput",
    "--log-timers-to-tensorboard",
    "--log-memory-to-tensorboard",
    "--timing-log-level=2",
)
_OURS = {
    "skipped-iterations",
    "tokens-per-second",
    "forge/nonfinite-layers",
    "forge/nonfinite-tiles",
    "forge/weights-and-states-bytes",
    "forge/factors-bytes",
    "forge/accumulators-bytes",
}
_LAYER = "decoder.layers.0.self_attention.linear_qkv.weight"
_WANDB = '''
"""Writes down what it is told."""

import json, os

config = {}


def _line(*row):
    with open(os.environ["FAKE_WANDB"], "a", encoding="utf-8") as file:
        print(json.dumps(row), file=file)


def init(**options):
    _line("init", options["project"], options["name"])


def log(scalars, step):
    _line("log", step, {name: float(value) for name, value in scalars.items()})


def alert(title, text):
    _line("alert", title, text)


def finish():
    _line("finish")
'''


class Board:
    """A job's TensorBoard directory."""

    def __init__(self, folder: Path, ranks: int, *flags: str, script: str = "pretrain_tiny.py"):
        code, text = launch(ranks, f"--tensorboard-dir={folder}", *flags, script=str(HERE / script))
        assert code == 0, text[-6000:]
        self.output = text
        self._events = event_accumulator.EventAccumulator(str(folder))
        self._events.Reload()
        self.tags = set(self._events.Tags()["scalars"])

    def steps(self, tag: str) -> list[int]:
        return [event.step for event in self._events.Scalars(tag)]

    def values(self, tag: str) -> list[float]:
        return [event.value for event in self._events.Scalars(tag)]

    def texts(self, tag: str) -> list[tuple[int, str]]:
        name = f"{tag}/text_summary"
        if name not in self._events.Tags()["tensors"]:
            return []
        events = self._events.Tensors(name)
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_stocks_tags_with_stocks_values_and_ours_beside(tmp_path: Path) -> None:
    flags = ("--use-distributed-optimizer", *_EVERYTHING)
    stock = Board(tmp_path / "stock", 2, *flags)
    forge = Board(tmp_path / "forge", 2, "--forge", *flags)
    timers = {"forge-dgrad-time", "forge-norm-time", "forge-update-time"}
    assert forge.tags - stock.tags == _OURS | timers | {"forge-communication-time"}
    assert stock.tags <= forge.tags
    for tag, tolerance in (
        ("lm loss", 1e-4),
        ("lm loss vs samples", 1e-4),
        ("grad-norm", 1e-4),
        ("learning-rate", 0.0),
        ("batch-size", 0.0),
    ):
        assert forge.values(tag) == pytest.approx(stock.values(tag), rel=tolerance), tag
        assert forge.steps(tag) == stock.steps(tag)
    for tag in _OURS:
        assert forge.steps(tag) == [1, 2, 3, 4], tag
    for tag in ("skipped-iterations", "forge/nonfinite-layers", "forge/nonfinite-tiles"):
        assert forge.values(tag) == [0.0] * 4
    assert not forge.texts("forge/nonfinite-layers")

    # 8 sequences of 32 tokens a step; from the second on, of which both are written.
    rates = forge.values("tokens-per-second")[1:]
    seconds = forge.values("iteration-time")
    assert rates == pytest.approx([8 * 32 / each for each in seconds], rel=0.2)
    # A part of a step takes no longer than the whole.
    for whole, parts in (
        ("backward-compute-time", ["forge-dgrad-time"]),
        ("optimizer-time", ["forge-norm-time", "forge-update-time"]),
    ):
        for step, span in enumerate(forge.values(whole)):
            spans = [forge.values(part)[step] for part in parts]
            assert min(spans) > 0.0 and max(spans) <= span
    # In place of gradients, in each step the same.
    for tag in ("forge/factors-bytes", "forge/accumulators-bytes"):
        (held,) = set(forge.values(tag))
        assert held > 0


@pytest.mark.parametrize(
    ("schedule", "ranks", "flags"),
    [
        # The layer is on the first rank, and the last one logs.
        ("deferred", 2, ["--pipeline-model-parallel-size=2"]),
        ("immediate", 1, ["--clip-grad=0", "--rerun-mode=disabled", "--global-batch-size=2"]),
    ],
)
def test_wandb_hears_the_same_and_of_the_layer_that_was_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, ranks: int, flags: list[str]
) -> None:
    (tmp_path / "wandb.py").write_text(_WANDB, encoding="utf-8")
    told = tmp_path / "told.jsonl"
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("FAKE_WANDB", str(told))
    forge = Board(
        tmp_path / "board",
        ranks,
        "--forge",
        f"--forge-schedule={schedule}",
        "--no-check-for-nan-in-loss-and-grad",  # which would end the job
        *flags,
        "--tensorboard-log-interval=2",
        "--wandb-project=tiny",
        "--wandb-exp-name=inf",
        f"--wandb-save-dir={tmp_path / 'wandb'}",
        script="pretrain_inf.py",
    )
    assert forge.steps("forge/nonfinite-layers") == [2, 4]
    assert forge.values("forge/nonfinite-layers") == [0, 1]
    assert forge.values("skipped-iterations") == [0, 1]  # the embedding's is not finite either
    # Only updates count tiles, and those inside the backward come before the step is skipped.
    first, last = forge.values("forge/nonfinite-tiles")
    assert first == 0 and (last >= 1 if schedule == "immediate" else last == 0)
    assert forge.texts("forge/nonfinite-layers") == [(4, f"- {_LAYER}")]
    assert f"inf or nan in the weight gradient of {_LAYER}" in forge.output
    # Without --timing-log-level 2 nothing is timed, and without their flags nothing measured.
    assert not {tag for tag in forge.tags if tag.startswith("forge") and "nonfinite" not in tag}

    rows = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["init", "tiny", "inf"] and rows[-1] == ["finish"]
    heard: dict[str, list[tuple[int, float]]] = {}
    for _, step, scalars in (row for row in rows if row[0] == "log"):
        for tag, value in scalars.items():
            heard.setdefault(tag, []).append((step, value))
    for tag in ("forge/nonfinite-layers", "forge/nonfinite-tiles", "skipped-iterations"):
        assert heard[tag] == list(zip(forge.steps(tag), forge.values(tag), strict=True))
    assert [step for step, _ in heard["lm loss"]] == [2, 4]
    alerts = [row[1:] for row in rows if row[0] == "alert"]
    assert alerts == [["inf or nan in a weight gradient", f"until iteration 4, in {_LAYER}"]]
