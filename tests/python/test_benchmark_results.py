"""What is made of the benchmarks' results: comparisons with targets, bounds, pictures, the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import llama
import llama_targets
import page
import plot_llama_step
import pytest
import speed_of_light
from benchmark_rows import h200_rows, result_of


@pytest.mark.parametrize(("forge_ms", "missed"), [(61.0, 0), (63.0, 1), (95.0, 5)])
def test_times_are_compared_within_a_run(forge_ms: float, missed: int) -> None:
    # A slow reference of another run must not make anything pass.
    other = [{**row, "run": "A", "step_ms": 1000.0} for row in h200_rows(forge_ms)]
    peers = [row for row in other if row["method"] != "forge"]
    verdicts = llama_targets.verdicts([*peers, *h200_rows(forge_ms)])
    times = [verdict for verdict in verdicts if "time/" in verdict.what]
    assert len(times) == 5
    assert sum(verdict.passed is False for verdict in times) == missed


def test_memory_is_compared_in_both_units() -> None:
    verdicts = {verdict.what: verdict for verdict in llama_targets.verdicts(h200_rows(50.0))}
    name = "1. 512 tokens, bf16/bf16 immediate: peak, "
    assert verdicts[name + "GiB"].passed is True
    assert verdicts[name + "GB"].passed is False


def test_a_row_with_a_problem_passes_nothing(tmp_path: Path) -> None:
    rows = [{**row, "problem": "the loss rose"} for row in h200_rows(50.0)]
    assert all(verdict.passed is None for verdict in llama_targets.verdicts(rows))
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result_of(rows)))
    assert not llama_targets.check(path)


def test_the_bound_is_what_one_linear_needs() -> None:
    device = speed_of_light.Device(flops=1e12, bandwidth=1e9)
    config = llama.LlamaConfig(1000, 10, 1, 0, 1, 1)
    head, norm = 1000 * 10, 10
    # At one token all is traffic: W twice, factors three times, update of weight and two states.
    update = 2 * (2 + 2 * 2)
    traffic = 2 * 2 * head + 3 * 2 * 1010 + update * head + update * (head + norm)
    found = speed_of_light.limit_ms(device, config, 1, "bf16", "bf16", False)
    assert found == pytest.approx(1e3 * traffic / 1e9)
    # With many tokens all of the head's is arithmetic.
    many = speed_of_light.limit_ms(
        replace(device, bandwidth=1e30), config, 10**4, "bf16", "bf16", False
    )
    assert many == pytest.approx(1e3 * 6 * head * 10**4 / 1e12)


def test_the_bound_grows_with_bytes_and_clipping() -> None:
    device = speed_of_light.device_of("NVIDIA H200")
    assert device is not None and speed_of_light.device_of("CPU") is None

    def limit(weight: str, state: str, clip: bool = False) -> float:
        return speed_of_light.limit_ms(device, llama.LLAMA_3_1_8B, 512, weight, state, clip)

    ordered = [limit("bf16", "q8"), limit("bf16", "bf16"), limit("bf16", "fp32")]
    assert ordered == sorted(ordered) and len(set(ordered)) == 3
    assert limit("bf16", "bf16", clip=True) > limit("bf16", "bf16")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    result = result_of(h200_rows(60.0))
    rows = plot_llama_step.measured(result["rows"])
    plot_llama_step.save(plot_llama_step.memory(result, rows), tmp_path / "memory")
    plot_llama_step.save(plot_llama_step.times(result, rows), tmp_path / "time")
    names = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 1000}
    assert names == {"memory.svg", "memory.png", "time.svg", "time.png"}


# -- the page ---------------------------------------------------------------------------------


def test_the_page_is_what_the_committed_results_say() -> None:
    text = page.PAGE.read_text()
    assert page.filled(text, page.RESULTS) == text, "run python benchmarks/page.py"


def test_the_page_follows_a_result(tmp_path: Path) -> None:
    for path in page.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("llama_step", "convergence"):
        (tmp_path / f"{name}.json").unlink(missing_ok=True)
    text = page.PAGE.read_text()
    assert "`python benchmarks/llama_step.py`" in page.filled(text, tmp_path)
    rows = h200_rows(63.0)
    rows[0] = {**rows[0], "step_ms": 123.4, "step_ms_spread": 0.0}
    (tmp_path / "llama_step.json").write_text(json.dumps(result_of(rows)))
    conditions = {"parameters": 1, "steps": 2, "batch": 3, "length": 4, "text": "words"}
    run = {"name": "adamw:bf16+fp32", "kind": "adamw", "seed": 0, "valid_loss": 1.25}
    losses = {**result_of([run]), "conditions": conditions}
    (tmp_path / "convergence.json").write_text(json.dumps(losses))
    found = page.filled(text, tmp_path)
    assert "| torch AdamW, fused | 50.0 | 123.4; 1.00;" in found
    assert "Not measured yet" not in found
    assert "| `adamw:bf16+fp32` | 1 | 1.2500 | 0.00 | – |  |" in found


def test_marks_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="marks of"):
        page.filled("<!-- begin: nothing -->\n<!-- end: nothing -->", page.RESULTS)
