"""``benchmarks/megatron_8b.py`` tiny on the CPU; its search and its targets without a model.

No time is asserted anywhere: what is measured on a busy CPU says nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("megatron.training is not installed", allow_module_level=True)
# Last, for some of the benchmarks' modules have names that others may have, too.
sys.path.append(str(BENCHMARKS))

import megatron_8b  # noqa: E402
import megatron_8b_job as job  # noqa: E402
import megatron_8b_process as process  # noqa: E402
import megatron_8b_targets as targets  # noqa: E402
from micro_batches import largest, next_size, settled  # noqa: E402

EXACT, SMALL = "forge:bf16+16/fp32", "forge:bf16+16/q8"


def _environment() -> dict[str, str]:
    made = dict(
        os.environ,
        FORGE_MEGATRON_CPU="1",
        OMP_NUM_THREADS="1",
        TORCHDYNAMO_DISABLE="1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    if "FORGE_LIBRARY" in made or importlib.util.find_spec("forge_train") is None:
        made.setdefault("FORGE_LIBRARY", str(ROOT / "target" / "release" / "libforge.so"))
        paths = [str(ROOT / "megatron_patch"), made.get("PYTHONPATH", "")]
        made["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return made


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=_environment(), capture_output=True, text=True, timeout=300
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    return text


def _benchmark(out: Path, methods: str, *more: str) -> dict:
    tiny = ["--model=tiny", "--device=cpu", "--steps=2", "--warm-up=1", f"--out={out}"]
    _run(str(BENCHMARKS / "megatron_8b.py"), *tiny, f"--methods={methods}", *more)
    return json.loads(out.read_text())


# -- the whole benchmark ------------------------------------------------------------------------


@pytest.mark.distributed
def test_the_search_goes_up_to_its_end_and_a_resumed_run_adds_what_is_missing(
    tmp_path: Path,
) -> None:
    out = tmp_path / "rows.json"
    _benchmark(out, "stock", "--tp=1")
    result = _benchmark(out, f"stock,{EXACT}", "--tp=1", "--resume")
    rows = {(row["name"], row["micro_batch"]): row for row in result["rows"]}
    # FORGE begins with stock's largest.
    assert list(rows) == [("stock", 1), ("stock", 2), (EXACT, 2)]
    assert [row["run"] == result["date"] for row in rows.values()] == [False, False, True]
    assert all(row["fits"] and "problem" not in row for row in rows.values())


@pytest.mark.distributed
def test_stock_and_forge_train_the_same_model(tmp_path: Path) -> None:
    tp, methods = 2, ("stock", EXACT, SMALL, "stock:bf16-grads")
    result = _benchmark(
        tmp_path / "rows.json", ",".join(methods), f"--tp={tp}", "--micro-batches=1,2"
    )
    rows = {(row["name"], row["micro_batch"]): row for row in result["rows"]}
    assert list(rows) == [(name, size) for name in methods for size in (1, 2)]
    for (_, size), row in rows.items():
        assert row["fits"] and "problem" not in row, row
        assert row["tokens_per_s"] > 0 and row["tp"] == tp and row["layers"] == 2
        assert row["adam"] == "AdamW, fused"
        stock = rows["stock", size]
        assert row["loss_first"] == pytest.approx(stock["loss_first"], abs=5e-3)
        assert row["loss_last"] == pytest.approx(stock["loss_last"], abs=5e-3)
        assert row["loss_last"] < row["loss_first"]
    # bf16 weights; fp32 gradients, masters and two moments.
    elements = rows["stock", 1]["params_per_gpu"]
    assert rows["stock", 1]["optimizer_bytes_per_param"] == pytest.approx(16, abs=0.01)
    assert rows["stock:bf16-grads", 1]["optimizer_bytes_per_param"] == pytest.approx(14, abs=0.01)
    # FORGE's linears: the low halves and two moments. The rest is stock's.
    model = job.MODELS["tiny"]
    rest = model.vocabulary * model.hidden // tp + model.hidden * (2 * model.layers + 1)
    expected = (10 * (elements - rest) + 16 * rest) / elements
    held = rows[EXACT, 1]["optimizer_bytes_per_param"]
    assert held == pytest.approx(expected, abs=0.01)
    assert rows[SMALL, 1]["optimizer_bytes_per_param"] < held
    assert rows[EXACT, 1]["schedule"] == "immediate" and rows["stock", 1]["schedule"] == "step"


@pytest.mark.distributed
def test_the_script_trains_with_and_without_forge() -> None:
    losses = []
    for method in ("stock", EXACT):
        options = megatron_8b.parse(["--model=tiny", "--device=cpu", "--tp=1"])
        flags = megatron_8b.stock_flags(options, method)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        text = _run(
            "-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={port}",
            "-m", "forge_train.megatron", str(BENCHMARKS / "megatron_pretrain.py"),
            *flags, "--train-iters=3", "--eval-interval=1000",
        )  # fmt: skip
        assert ("FORGE trains 9 weights" in text) == (method == EXACT)
        losses.append([float(loss) for loss in re.findall(r"lm loss: (\S+)", text)])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)


def test_a_process_that_dies_is_a_row(tmp_path: Path) -> None:
    flags = "--more-flags=--no-such-flag"
    result = _benchmark(tmp_path / "rows.json", "stock", "--tp=1", flags)
    (row,) = result["rows"]
    assert row["fits"] is None and "ended with status" in row["problem"]
    assert not targets.check(tmp_path / "rows.json")


# -- running out of memory ----------------------------------------------------------------------


class _Training:
    """Stands in for Megatron: peaks grow linearly, and above the limit allocations fail."""

    def __init__(self, *_: object) -> None:
        self.cleared = 0
        _made.append(self)

    def clear(self) -> None:
        self.cleared += 1

    def grown(self) -> bool:
        return False


_made: list[_Training] = []


def _search(
    monkeypatch: pytest.MonkeyPatch, rows: Path, base: float, slope: float, tp: int
) -> list[int]:
    """Exit statuses of the processes that a search takes."""
    _made.clear()

    def measure(_training: _Training, size: int, options: Namespace) -> dict:
        peak = base + slope * size
        if peak > options.memory_limit_gb:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return {"fits": True, "peak_gb": peak}

    monkeypatch.setattr(process, "Training", _Training)
    monkeypatch.setattr(process, "measure", measure)
    rows.touch()

    def write(row: dict) -> None:
        with rows.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    options = Namespace(
        rows=rows, method="stock", micro_batches=[], search=True, memory_limit_gb=80.0, most=64,
        tp=tp,
    )  # fmt: skip
    statuses = [process.run(options, write)]
    while statuses[-1] == process.OUT_OF_MEMORY and len(statuses) < 20:
        left = next_size(
            process.found_of(process.read_rows(rows)), [], search=True, limit=80.0, most=64
        )
        if left is None:
            break
        statuses.append(process.run(options, write))
    return statuses


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("base", "slope", "fits"), [(72, 4.4, 1), (50, 4.4, 6), (20, 1.9, 31), (79, 4.4, 0)]
)
def test_the_largest_that_fits_is_found_in_few_tries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: float, slope: float, fits: int, tp: int
) -> None:
    statuses = _search(monkeypatch, tmp_path / "rows", base, slope, tp)
    rows = process.read_rows(tmp_path / "rows")
    found = process.found_of(rows)
    assert largest(found) == fits and settled(found, 64)
    failed = [row for row in rows if not row["fits"]]
    assert all("out of memory" in row["message"] and "problem" not in row for row in failed)
    assert len(failed) <= 2 and len(rows) <= 8
    if tp == 1:
        # One process alone clears up and goes on.
        assert statuses == [0] and _made[0].cleared == len(failed)
    else:
        assert statuses.count(process.OUT_OF_MEMORY) == len(failed)


# Layer 2 was recomputed and, by FORGE, updated; layer 1 is being recomputed.
_FAILING = """
import sys
sys.path.insert(0, {benchmarks!r})
from forge_train.megatron import cpu
cpu.enable()
import torch
import megatron_8b_process
from megatron_layers import CausalAttention

whole, calls = CausalAttention.forward, []

def forward(self, query, *rest, **more):
    calls.append(query.shape[1])
    if query.shape[1] == 3 and calls.count(3) == 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return whole(self, query, *rest, **more)

CausalAttention.forward = forward
megatron_8b_process.main()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["stock", EXACT])
def test_one_process_goes_on_after_a_backward_that_ran_out_of_memory(
    tmp_path: Path, method: str
) -> None:
    script, lines = tmp_path / "failing.py", tmp_path / "rows"
    script.write_text(_FAILING.format(benchmarks=str(BENCHMARKS)))
    lines.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _run(
        "-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={port}",
        str(script), str(lines), f"--method={method}", "--model=tiny", "--layers=2",
        "--device=cpu", "--tp=1", "--clip-grad=0", "--memory-limit-gb=80",
        "--micro-batches=1,3", "--search", "--most=4", "--steps=2", "--warm-up=1",
    )  # fmt: skip
    rows = process.read_rows(lines)
    assert [(row["micro_batch"], row["fits"]) for row in rows] == [(1, True), (3, False), (2, True)]
    assert "OutOfMemoryError: CUDA out of memory" in rows[1]["message"]
    assert "problem" not in rows[2] and rows[2]["loss_last"] < rows[2]["loss_first"]


def test_another_error_is_a_problem_and_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise ValueError("no such layer")

    monkeypatch.setattr(process, "Training", Broken)
    (tmp_path / "rows").touch()
    options = Namespace(
        rows=tmp_path / "rows", method="stock", micro_batches=[1], search=True,
        memory_limit_gb=80.0, most=4, tp=1,
    )  # fmt: skip
    written: list[dict] = []
    assert process.run(options, written.append) == 1
    assert [row["problem"] for row in written] == ["ValueError: no such layer"]


@pytest.mark.parametrize("lie", [0.25, 1.0])
def test_the_search_ends_where_the_peak_is_not_linear(lie: float) -> None:
    """The peak that was seen leads astray; what fits decides."""
    for truth in range(1, 40):
        found: dict[int, float | None] = {}
        for _ in range(16):
            size = next_size(found, [2], search=True, limit=80.0, most=64)
            if size is None:
                break
            found[size] = 80.0 * lie * size / truth if size <= truth else None
        assert largest(found) == truth and settled(found, 64), (truth, found)


def test_wanted_sizes_come_first_and_none_above_one_that_does_not_fit() -> None:
    assert next_size({}, [4, 2], search=False, limit=80.0, most=64) == 2
    assert next_size({2: 60.0}, [4, 2], search=False, limit=80.0, most=64) == 4
    assert next_size({2: None}, [4, 2], search=False, limit=80.0, most=64) is None
    assert not settled({2: 60.0, 4: None}, 64)


# -- targets -----------------------------------------------------------------------------------


def _result(speed: float, memory: float) -> dict:
    rows = []
    for name, fits in (("stock", 1), (EXACT, 6), (SMALL, 8), ("forge:bf16/q8", 10)):
        forge = name != "stock"
        for size in (1, fits, fits + 1):
            row = {"name": name, "micro_batch": size, "run": "A", "fits": size <= fits}
            row["peak_gb"] = 70.0 if row["fits"] else None
            row["tokens_per_s"] = 1000.0 * (speed if forge else 1.0)
            row["optimizer_bytes_per_param"] = 16.0 * (memory if forge else 1.0)
            rows.append(row)
    return {"conditions": {"most": 64}, "rows": rows}


def test_targets_are_ratios_to_stock() -> None:
    def passed(result: dict) -> list[bool | None]:
        return [verdict.passed for verdict in targets.verdicts(result)]

    assert passed(_result(1.3, 0.4)) == [True] * 12
    # Fast enough at equal micro-batches alone; q8's bound on memory missed.
    assert passed(_result(1.2, 0.5)) == [True, False, True, True] + [True, False, True, False] * 2
    unsettled = _result(1.3, 0.4)
    unsettled["rows"] = [row for row in unsettled["rows"] if row["fits"]]
    assert passed(unsettled) == [None] * 12


def test_a_row_with_a_problem_passes_nothing(tmp_path: Path) -> None:
    result = _result(1.3, 0.4)
    for row in result["rows"]:
        if row["name"] == EXACT:
            row["problem"] = "the loss rose"
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert [verdict.passed for verdict in targets.verdicts(result)][:4] == [None] * 4
    assert not targets.check(tmp_path / "r.json")


# -- the rest ----------------------------------------------------------------------------------


def test_llama_3_8b_has_its_parameters() -> None:
    options = megatron_8b.parse(["--tp=2"])
    flags = megatron_8b.stock_flags(options)
    assert options.search and options.layers == 32
    assert "--sequence-parallel" in flags and "--distributed-backend=nccl" in flags
    model = job.MODELS["llama-3-8b"]
    head = model.hidden // model.heads
    attention = 2 * model.hidden * model.hidden + 2 * model.hidden * model.groups * head
    layer = attention + 3 * model.hidden * model.ffn + 2 * model.hidden
    total = model.layers * layer + 2 * model.vocabulary * model.hidden + model.hidden
    assert total == 8_030_261_248


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--methods=forge:bf16"], "'forge:bf16' is no method"),
        (["--methods=stock:q8"], "'stock:q8' is no method"),
        (["--memory-limit-gb=0"], "--memory-limit-gb is 0"),
        (["--steps=0"], "--steps is 0"),
        (["--micro-batches=1,0"], "each must be at least 1"),
        (["--device=cpu"], "needs a GPU; --model tiny runs on a CPU"),
    ],
)
def test_bad_input_is_refused(
    capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        megatron_8b.parse(given)
    assert words in capsys.readouterr().err


def test_the_attention_is_causal_and_grouped() -> None:
    import megatron_layers
    from megatron.core.transformer.enums import AttnMaskType

    config = Namespace(attention_dropout=0.0, context_parallel_size=1, window_size=None)
    attention = megatron_layers.CausalAttention(config, 1, AttnMaskType.causal, "self")
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, heads, 8) for heads in (4, 2, 2))
    got = attention(q, k, v, None, attn_mask_type=None, attention_bias=None)
    assert got.shape == (5, 2, 32)
    for head in range(4):
        scores = torch.einsum("sbd,tbd->bst", q[:, :, head], k[:, :, head // 2]) / 8**0.5
        scores.masked_fill_(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        mixed = torch.einsum("bst,tbd->sbd", scores.softmax(-1), v[:, :, head // 2])
        assert torch.allclose(got[:, :, 8 * head : 8 * head + 8], mixed, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask=None"):
        attention(q, k, v, torch.ones(1))
    with pytest.raises(ValueError, match="cross attention"):
        megatron_layers.CausalAttention(config, 1, AttnMaskType.causal, "cross")
