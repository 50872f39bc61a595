"""``benchmarks/convergence.py`` in tiny form on the CPU: FORGE's losses against AdamW's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import convergence
import convergence_runs
import convergence_targets
import plot_convergence
import pytest
import text_corpus
import torch

CPU = torch.device("cpu")


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


def test_runs_beside_each_other_are_those_in_turn() -> None:
    text = text_corpus.corpus()
    plan = replace(convergence.PLANS["tiny"], steps=3)
    names = ["forge:bf16/q8:stochastic", "adamw:bf16"]
    jobs = [(recipe, seed) for recipe in convergence_runs.select(names) for seed in (0, 1)]
    alone = {(row["name"], row["seed"]): row for row in convergence.in_turn(jobs, text, plan, CPU)}
    beside = list(convergence.together(jobs, 2, text, plan, CPU))
    assert len(beside) == len(alone) == 4
    for row in beside:
        assert row["train_losses"] == alone[row["name"], row["seed"]]["train_losses"]


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
