"""The benchmarks of whole trainings, in tiny form on the CPU, and the page that is made of results.

No time is asserted anywhere: what is measured on a busy CPU says nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import forge_train

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import convergence  # noqa: E402
import convergence_runs  # noqa: E402
import convergence_targets  # noqa: E402
import llama  # noqa: E402
import llama_step  # noqa: E402
import llama_targets  # noqa: E402
import page  # noqa: E402
import plot_convergence  # noqa: E402
import plot_llama_step  # noqa: E402
import speed_of_light  # noqa: E402
import step_process  # noqa: E402
import text_corpus  # noqa: E402
import training_methods  # noqa: E402

CPU = torch.device("cpu")
CPU_METHODS = [
    method
    for method in training_methods.all_methods()
    if method.kind != "flashoptim_release"
    # FORGE's captured step runs as it is where there are no graphs; torch's needs a GPU.
    and (not method.graph or (method.kind == "forge" and hasattr(forge_train, "capture")))
]


# -- llama_step -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every method that a CPU can run, through the function that a method's process runs."""
    lines = tmp_path_factory.mktemp("rows") / "lines"
    for method in CPU_METHODS:
        options = argparse.Namespace(
            device="cpu", model="tiny", tokens=[16], steps=4, warm_up=2, lines=lines
        )
        step_process.run(method, options)
    return [json.loads(line) for line in lines.read_text().splitlines()]


def test_every_method_trains(rows: list[dict]) -> None:
    assert [row["name"] for row in rows] == [str(method) for method in CPU_METHODS]
    for row in rows:
        assert "unsupported" not in row and "problem" not in row, row
        assert row["loss_last"] < row["loss_first"], row
        assert len(row["times_ms"]) == 4 and min(row["times_ms"]) > 0


def test_every_method_starts_from_the_same_model_and_data(rows: list[dict]) -> None:
    assert len({row["loss_first"] for row in rows}) == 1


def test_methods_come_close_to_each_other(rows: list[dict]) -> None:
    """They are one algorithm; what differs is rounding."""
    fallen = {row["name"]: row["loss_first"] - row["loss_last"] for row in rows}
    for name, distance in fallen.items():
        assert distance == pytest.approx(fallen["adamw"], rel=0.1), name


def test_a_refusal_is_a_row(tmp_path: Path) -> None:
    method = replace(CPU_METHODS[0], kind="forge", state_format="q7", schedule="deferred")
    options = argparse.Namespace(
        device="cpu", model="tiny", tokens=[8, 16], steps=1, warm_up=1,
        lines=tmp_path / "lines",
    )  # fmt: skip
    step_process.run(method, options)
    found = [json.loads(line) for line in options.lines.read_text().splitlines()]
    assert [row["tokens"] for row in found] == [8, 16]
    assert all("q7" in row["unsupported"] and "times_ms" not in row for row in found)


def test_a_method_that_does_not_train_is_found_out() -> None:
    """An optimizer that was collected, say, or that refers to other weights."""
    model = llama.build(llama.TINY, device=CPU)
    training = training_methods.Training(CPU_METHODS[0], model, lr=0.0)
    _, ids, labels = next(training_methods.batches([16], 256, CPU))
    row = step_process.measure(training, ids, labels, argparse.Namespace(steps=2, warm_up=1))
    assert "the loss went from" in row["problem"]


def test_torch_may_step_the_rest(tmp_path: Path) -> None:
    (method,) = training_methods.select(["forge:bf16/bf16:immediate:rest-torch"])
    model = llama.build(llama.TINY, device=CPU)
    training = training_methods.Training(method, model, 1e-3)
    before = model.model.embed_tokens.weight.detach().clone()
    _, ids, labels = next(training_methods.batches([8], 256, CPU))
    training.step(ids, labels)
    assert not torch.equal(model.model.embed_tokens.weight, before)
    clipped = replace(method, schedule="deferred", clip=True)
    with pytest.raises(ValueError, match="left out of the norm"):
        training_methods.Training(clipped, llama.build(llama.TINY, device=CPU), 1e-3)


def test_clipping_inside_the_backward_is_refused() -> None:
    hooks = training_methods.Method("adamw_in_backward", schedule="immediate", clip=True)
    with pytest.raises(ValueError, match="before the norm is known"):
        training_methods.Training(hooks, torch.nn.Linear(2, 2), 1e-3)


def test_a_run_writes_resumes_and_compares(tmp_path: Path) -> None:
    out = tmp_path / "llama_step.json"
    script = str(BENCHMARKS / "llama_step.py")
    command = [sys.executable, script, "--model", "tiny", "--device", "cpu", "--tokens", "8"]
    command += ["--steps", "2", "--methods", "adamw_fused", "--out", str(out)]
    subprocess.run(command, check=True, timeout=300)
    first = json.loads(out.read_text())
    assert {"device", "driver", "torch", "commit", "date", "versions"} <= set(first)
    (row,) = first["rows"]
    wanted = {*llama_step.FIELDS, "peak_gb", "step_ms", "step_ms_spread", "tokens_per_s"}
    assert wanted | {"limit_ms", "share_of_limit"} <= set(row)
    assert row["step_ms"] > 0 and row["tokens_per_s"] == pytest.approx(8e3 / row["step_ms"])
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == first, "a row that exists was measured again"
    assert llama_targets.check(out), "what is not measured does not fail"


def test_a_name_that_is_no_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        llama_step.parse(["--model", "tiny", "--methods", "forge:bf17/*"])
    error = capsys.readouterr().err
    assert "forge:bf17/*" in error and "forge:bf16/q8:immediate" in error
    with pytest.raises(SystemExit):
        llama_step.parse(["--device", "cpu"])
    assert "--model tiny runs on a CPU" in capsys.readouterr().err


def test_rounds_are_pooled_within_a_run(tmp_path: Path) -> None:
    options = argparse.Namespace(
        resume=False, retry=False, model="llama-3.1-8b", warm_up=3, steps=2
    )
    head = {"date": "now", "device": "NVIDIA H200", "commit": "c"}
    result = llama_step.Result(tmp_path / "r.json", head, options)
    row = step_process.row_of(training_methods.Method("adamw_fused"), 512)
    result.add({**row, "times_ms": [100.0, 102.0]})
    result.add({**row, "times_ms": [110.0, 112.0]})
    (pooled,) = result.rows.values()
    assert pooled["times_ms"] == [100.0, 102.0, 110.0, 112.0] and pooled["step_ms"] == 106.0
    assert pooled["share_of_limit"] == pytest.approx(pooled["limit_ms"] / 106.0)


def test_refused_rows_are_kept_until_they_are_retried(tmp_path: Path) -> None:
    head = {"date": "now", "device": "CPU", "commit": "c"}
    options = argparse.Namespace(resume=True, retry=False, model="tiny", warm_up=1, steps=1)
    path, method = tmp_path / "r.json", training_methods.Method("adamw_fused")
    result = llama_step.Result(path, head, options)
    result.add({**step_process.row_of(method, 8), "unsupported": "no reason"})
    result.write()
    assert llama_step.Result(path, head, options).has(method, 8)
    options.retry = True
    assert not llama_step.Result(path, head, options).has(method, 8)
    options.retry = False
    assert not llama_step.Result(path, {**head, "commit": "d"}, options).has(method, 8)


# -- its targets, its bound, its pictures -----------------------------------------------------


def h200_rows(forge_ms: float, run: str = "a") -> list[dict]:
    """Rows as an H200 would write them, with made-up figures."""
    found = []
    for method in training_methods.all_methods():
        for tokens in (512, 4096):
            time_ms = forge_ms if method.kind == "forge" else 100.0
            row = step_process.row_of(method, tokens)
            row |= llama_step.figures(row, [time_ms] * 10, "llama-3.1-8b", "NVIDIA H200")
            peak = 36.0 if method.state_format == "q8" else 50.0
            memory = {"peak_gb": peak, "peak_gib": peak * 1e9 / 2**30}
            found.append({**row, **memory, "run": run})
    return found


def result_of(rows: list[dict]) -> dict:
    conditions = {"model": "llama-3.1-8b", "steps": 10, "warm_up": 3}
    head = {"device": "NVIDIA H200", "driver": "1", "torch": "2", "commit": "c", "date": "2026"}
    return {**head, "conditions": conditions, "rows": rows}


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


# -- the model --------------------------------------------------------------------------------


def test_the_8b_model_has_llama_3_1s_parameters() -> None:
    assert llama.LLAMA_3_1_8B.parameters() == 8_030_261_248
    counted = sum(p.numel() for p in llama.build(llama.TINY, device=CPU).parameters())
    assert counted == llama.TINY.parameters()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_model_is_that_of_transformers(scaled: bool) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = llama.RopeScaling(original_max_position_embeddings=64) if scaled else None
    config = replace(llama.TINY, rope_scaling=scaling)
    rope = {"rope_type": "default"}
    if scaling:
        rope = {"rope_type": "llama3", **asdict(scaling)}
    sizes = {key: value for key, value in asdict(config).items() if not key.startswith("rope")}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    ours = llama.build(config, device=CPU, dtype=torch.float32, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(256, (2, 200), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), theirs(ids, labels=ids).loss)


# -- convergence ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, dict]:
    text = text_corpus.corpus()
    names = [
        "adamw:*",
        "forge:bf16/bf16:*",
        "forge:bf16+16/fp32",
        "forge:bf16/q8:stochastic",
    ]
    plan = convergence.PLANS["tiny"]
    found = [
        convergence.train(recipe, 0, text, plan, CPU) for recipe in convergence_runs.select(names)
    ]
    return {row["name"]: row for row in found}


def test_forge_converges_as_adamw_does(trained: dict[str, dict]) -> None:
    rows = list(trained.values())
    verdicts = list(convergence_targets.verdicts(rows))
    assert len(verdicts) == 6
    assert all(verdict.passed for verdict in verdicts), [str(v) for v in verdicts]
    for row in rows:
        assert row["valid_losses"][-1][1] < row["valid_losses"][0][1] - 1.0


def test_stochastic_rounding_buys_something(trained: dict[str, dict]) -> None:
    """Updates below half a unit of a bf16 weight are lost to nearest rounding."""
    rows = list(trained.values())
    stochastic, nearest, torchs = (
        convergence_targets.above(rows, name, convergence_runs.MASTER)
        for name in ("forge:bf16/bf16:stochastic", "forge:bf16/bf16:nearest", "adamw:bf16")
    )
    assert nearest > stochastic + 0.2
    assert torchs > stochastic + 0.2


def test_broken_or_single_seeds_do_not_pass(trained: dict[str, dict], tmp_path: Path) -> None:
    path = tmp_path / "convergence.json"
    rows = list(trained.values())
    path.write_text(json.dumps({"rows": rows}))
    assert not convergence_targets.check(path), "one seed is not enough"
    twice = [*rows, *({**row, "seed": 1} for row in rows)]
    path.write_text(json.dumps({"rows": twice}))
    assert convergence_targets.check(path)
    broken = {**rows[0], "seed": 2, "valid_loss": None, "problem": "the final loss is nan"}
    path.write_text(json.dumps({"rows": [*twice, broken]}))
    assert not convergence_targets.check(path)


def test_the_text_is_split_by_document_and_windows_are_seeded() -> None:
    text = text_corpus.corpus()
    assert text.train.numel() > 5e6 and text.valid.numel() > 1e5
    assert b'The "for" statement' in bytes(text.train.numpy()) + bytes(text.valid.numpy())
    ids, labels = text.windows(text.train, 3, 20, 5, CPU)
    assert ids.shape == labels.shape == (3, 20) and ids.dtype == torch.int64
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert torch.equal(ids, text.windows(text.train, 3, 20, 5, CPU)[0])
    assert not torch.equal(ids, text.windows(text.train, 3, 20, 6, CPU)[0])
    with pytest.raises(ValueError, match="length=9"):
        text.windows(text.train[:9], 1, 9, 0, CPU)


def test_convergence_is_drawn(trained: dict[str, dict], tmp_path: Path) -> None:
    head = {"device": "CPU", "torch": "2", "commit": "c"}
    conditions = {"parameters": 10**6, "steps": 40, "batch": 4, "length": 32}
    result = {**head, "conditions": conditions, "rows": list(trained.values())}
    plot_convergence.draw(result).savefig(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


# -- the page ---------------------------------------------------------------------------------


def test_the_page_is_what_the_committed_results_say() -> None:
    text = page.PAGE.read_text()
    assert page.filled(text, page.RESULTS) == text, "run python benchmarks/page.py"


def test_the_page_follows_a_result(tmp_path: Path, trained: dict[str, dict]) -> None:
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
    losses = {**result_of(list(trained.values())), "conditions": conditions}
    (tmp_path / "convergence.json").write_text(json.dumps(losses))
    found = page.filled(text, tmp_path)
    assert "| torch AdamW, fused | 50.0 | 123.4; 1.00;" in found
    assert "Not measured yet" not in found
    assert "`forge:bf16/bf16:nearest`" in found


def test_marks_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="marks of"):
        page.filled("<!-- begin: nothing -->\n<!-- end: nothing -->", page.RESULTS)
