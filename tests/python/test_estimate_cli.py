"""``python -m forge_train estimate``: the command, its messages, its guide, its benchmark."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from forge_train.cli import main
from forge_train.estimate import Options, architecture, estimate, from_config
from forge_train.estimate.fused import CONTEXT_WORKSPACE_BYTES
from forge_train.estimate.known_models import KNOWN_MODELS


def run(capsys, *arguments: str) -> str:
    assert main(["estimate", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_prints_a_row_for_each_method(capsys):
    out = run(
        capsys, "--model", "llama-3.1-8b", "--tokens", "512", "--weight-format", "bf16",
        "--state-format", "q8", "--schedule", "deferred", "--tp", "1",
    )  # fmt: skip
    for title in ("for-loop AdamW", "fused AdamW", "FlashOptim", "Megatron", "FORGE bf16/q8"):
        assert re.search(rf"^{re.escape(title)}.* \d+\.\d\d ", out, re.M), title
    assert re.search(r"^ +32 mlp\.down_proj +4096x14336 +deferred: as asked$", out, re.M)
    assert re.search(r"left: embedding", out)


def test_json_has_the_same_numbers(capsys):
    arguments = ("--model", "pythia-160m", "--tokens", "256", "--all")
    found = json.loads(run(capsys, *arguments, "--json"))
    out = run(capsys, *arguments)
    assert found["parameters"] == 162_322_944
    forges = [row for row in found["rows"] if row["method"] == "forge"]
    assert len({(row["weight_format"], row["state_format"]) for row in forges}) == 9
    for row in found["rows"]:
        assert row["peak"] == sum(row["at_peak"].values())
        assert row["peak_gb"] == row["peak"] / 1e9
        assert re.search(
            rf"^{re.escape(row['title'])} .*{row['peak_gib']:.2f}  {row['phase']}$", out, re.M
        )


def test_linears_by_hand(capsys):
    out = json.loads(
        run(capsys, "--linear", "512x256*3", "--linear", "256x512", "--tokens", "64", "--json")
    )
    assert out["parameters"] == 4 * 512 * 256
    assert [group["count"] for group in out["weights"]] == [3, 1]


def test_a_config_of_hugging_face(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KNOWN_MODELS["qwen3-8b"]))
    by_path = json.loads(run(capsys, "--model", str(path), "--tokens", "64", "--json"))
    by_folder = json.loads(run(capsys, "--model", str(tmp_path), "--tokens", "64", "--json"))
    by_name = json.loads(run(capsys, "--model", "Qwen3-8B", "--tokens", "64", "--json"))
    assert by_path["rows"] == by_folder["rows"] == by_name["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-3.1-8"], "neither a file nor a known name; did you mean llama-3.1-8b"),
        (["--linear", "512"], "--linear '512' is not OUTxIN\\*COUNT"),
        (["--linear", "512x0"], "--linear '512x0'"),
        (["--model", "gpt2", "--weight-format", "fp32"], "--dtype fp32"),
        (["--model", "gpt2", "--dtype", "fp32", "--weight-format", "bf16"], "--dtype bf16"),
        (["--model", "gpt2", "--batch", "3"], "--tokens 64 does not divide by --batch 3"),
        (["--model", "gpt2", "--sp"], "--sp .* give --tp"),
        (
            ["--model", "gpt2", "--tp", "5"],
            "--tp 5 does not divide transformer.h.0.attn.c_attn, 768x2304",
        ),
        (["--model", "gpt2", "--rest", "torch", "--clip"], "--rest torch .* choose --rest forge"),
    ],
)
def test_what_is_wrong_is_named(arguments, message, capsys):
    assert main(["estimate", "--tokens", "64", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known; known are llama.*--linear"),
        ({}, "model_type=None is not known.*hidden_size, intermediate_size"),
        ({"model_type": "llama", "hidden_size": 8}, "num_attention_heads is None"),
        ({"model_type": "gpt2", "n_embd": True}, "n_embd is True, a positive number is needed"),
        ({**KNOWN_MODELS["llama-3.2-1b"], "num_key_value_heads": 7}, "num_key_value_heads=7"),
        ({**KNOWN_MODELS["mistral-7b"], "num_local_experts": 8}, "experts are not known"),
    ],
)
def test_a_config_that_is_not_enough(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config, "config.json")


def test_what_a_method_cannot_do_is_said(capsys):
    out = run(
        capsys, "--model", "pythia-70m", "--tokens", "64", "--clip", "--schedule", "immediate"
    )
    refused = dict(re.findall(r"^(.*?) +not possible: (.*)$", out, re.M))
    assert "norm is known" in refused["fused AdamW in hooks"]
    assert "deferred" in refused["FORGE bf16+16/fp32 immediate"]
    assert "fused AdamW" not in refused


def test_the_header_promises_the_bound_of_the_workspace():
    header = (ROOT / "include" / "forge.h").read_text()
    (bound,) = re.findall(r"forge_context_set_workspace wants: .*below (\d+) MiB on CUDA", header)
    assert int(bound) << 20 == CONTEXT_WORKSPACE_BYTES


# -- documents and benchmarks -------------------------------------------------------------------


def test_the_example_in_the_guide_is_what_the_command_prints(capsys):
    guide = (ROOT / "docs" / "estimate.md").read_text()
    (example,) = re.findall(r"^<!-- example: (.*) -->\n```text\n(.*?)```$", guide, re.M | re.S)
    assert run(capsys, *example[0].split()) == example[1]


def test_the_rows_of_the_benchmark_are_compared(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import estimate_error

    options = Options(tokens=512, norm="fused", schedule="deferred", clip=True)
    found = estimate(architecture("llama-3.2-1b"), options, all_formats=True).rows
    peaks = {(row.method, row.weight_format, row.state_format): row.peak / 1e9 for row in found}

    def row(method: str, key: str, weight: str, state: str, schedule: str, factor: float) -> dict:
        place = (key, weight, state) if schedule == "deferred" else (key, "", "")
        return {
            "method": method, "tokens": 512, "weight_format": weight, "state_format": state,
            "schedule": schedule, "clip": True, "rest": "forge", "peak_gb": peaks[place] * factor,
        }  # fmt: skip

    rows = [
        row("forge", "forge", "bf16+16", "q8", "deferred", 1.04),
        row("adamw_fused", "adamw-fused", "bf16", "bf16", "step", 0.96),
        {**row("adamw", "adamw-loop", "bf16", "bf16", "step", 1.0), "peak_gb": None},
    ]
    result = {"conditions": {"model": "llama-3.2-1b"}, "rows": rows}
    assert estimate_error.check(result) == 0
    assert "2 rows" in capsys.readouterr().out
    rows[0]["peak_gb"] *= 1.1
    rows[1]["method"] = "unknown"
    assert estimate_error.check(result) == 2
    assert len(re.findall("FAIL$", capsys.readouterr().out, re.M)) == 2
    assert estimate_error.check({**result, "rows": rows[2:]}) == 1  # nothing was compared
