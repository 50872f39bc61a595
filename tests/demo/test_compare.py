"""``--compare``: equal losses, honest memory bars, pictures that show something."""

from __future__ import annotations

import re

import numpy
import pytest
from conftest import Finished
from demo_cli import SMALL, STEPS, demo, log, read_json
from matplotlib import image

HIDDEN, LAYERS, VOCABULARY, TP = 256, 2, 256, 2
FP32 = 4

#: Of one rank at TP=2: half the embedding, and every norm.
UNFUSED = VOCABULARY * HIDDEN // TP + (2 * LAYERS + 1) * HIDDEN


@pytest.mark.distributed
def test_losses_are_those_of_stock(compared: Finished) -> None:
    result = read_json(compared.directory / "compare.json")
    forge, stock = log(compared.directory), log(compared.directory / "stock")
    assert [record["step"] for record in forge] == list(range(1, STEPS + 1))
    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(forge, stock, strict=True))
    assert result["max_abs_loss_difference"] == largest <= 1e-4
    # Equal, and not because nothing happened: it learnt, and most steps were clipped.
    assert forge[-1]["loss"] < forge[0]["loss"] - 1.0
    assert sum(record["grad_norm"] > 1.0 for record in forge) > STEPS // 2
    assert f"{largest:.2e} nats" in compared.stdout


@pytest.mark.distributed
def test_no_gradient_is_held_for_fused_weights(compared: Finished) -> None:
    forge = read_json(compared.directory / "summary.json")
    stock = read_json(compared.directory / "stock" / "summary.json")
    fused = forge["parameters_per_rank"] - UNFUSED
    assert read_json(compared.directory / "config.json")["schedule"] == "deferred"
    assert forge["fused_gradient_bytes"] == 0
    assert forge["memory"]["gradients"] == FP32 * UNFUSED
    assert stock["memory"]["gradients"] == FP32 * (UNFUSED + fused)
    # Not merely booked elsewhere: the measured peak is lower by most of that.
    saved = sum(stock["memory"].values()) - sum(forge["memory"].values())
    assert saved > 0.7 * FP32 * fused


@pytest.mark.parametrize(
    ("flags", "schedule", "buffers"),
    [
        (("--clip-grad", "0"), "immediate", 0),
        (("--micro-batches", "2", "--schedule", "accumulate"), "accumulate", 1),
    ],
)
def test_gradient_bytes_by_schedule(tmp_path, flags, schedule, buffers) -> None:
    stdout, _ = demo(tmp_path, *SMALL, "--steps", "3", "--save-interval", "0", "--tp", "1", *flags)
    run = tmp_path / "demo"
    assert read_json(run / "config.json")["schedule"] == schedule
    assert f"schedule {schedule}" in stdout
    summary = read_json(run / "summary.json")
    unfused = VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    fused = summary["parameters_per_rank"] - unfused
    # The second case shows that the measurement sees a buffer where there is one.
    assert summary["fused_gradient_bytes"] == buffers * FP32 * fused
    assert summary["memory"]["gradients"] == FP32 * (unfused + buffers * fused)
    assert (summary["memory"]["factors"] > 0) == (schedule != "immediate")
    assert not (run / "checkpoints").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["loss.png", "memory.png"])
def test_pictures_are_not_empty(compared: Finished, name: str) -> None:
    pixels = image.imread(compared.directory / name)[..., :3]
    height, width, _ = pixels.shape
    assert height >= 400 and width >= 600
    colours, counts = numpy.unique(
        (pixels * 255).round().astype(numpy.uint8).reshape(-1, 3), axis=0, return_counts=True
    )
    # Something is drawn in colour, beside white paper and grey or black text.
    coloured = counts[colours.max(axis=1) - colours.min(axis=1).astype(int) > 40].sum()
    assert coloured > (0.05 if name == "memory.png" else 0.001) * height * width


@pytest.mark.distributed
def test_progress_without_a_terminal_is_plain_lines(compared: Finished) -> None:
    assert "\r" not in compared.stderr
    for label in ("stock", "forge"):
        steps = re.findall(rf"^{label}: step (\d+) of {STEPS} .*loss", compared.stderr, re.M)
        assert [int(step) for step in steps] == list(range(2, STEPS + 1, 2))
