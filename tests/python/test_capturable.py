"""Steps that the host does not wait for: decisions, counts and options in memory, and capture()."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from conftest import (
    ROOT,
    Transformer,
    assert_same_bits,
    mlp,
    mlp_batches,
    mlp_loss,
    tokens_loss,
)

import forge_train
from forge_train import SGD, AdamW
from forge_train._structs import new_struct
from forge_train.decision import clip_coefficient, decide
from forge_train.engine import Engine
from forge_train.native import Linear
from forge_train.scalars import ScalarTable


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64).view(torch.int64))


def test_the_decision_is_the_librarys():
    g = torch.Generator().manual_seed(3)
    totals = [0.0, 5e-324, 1e-12, 1.0, 1.7e308]
    totals += (10 ** (torch.rand(200, generator=g, dtype=torch.float64) * 40 - 20)).tolist()
    clipped = 0
    for index, total in enumerate(totals):
        for scale in (1.0, -1.0, 0.37, 1 / 65536, 3.0, 1e200):
            for limit in (None, 1.0, 0.1 * (index + 1)):
                norm, coefficient = clip_coefficient(total, scale, limit)
                made = decide(torch.tensor(total, dtype=torch.float64), scale, limit)
                assert bool(made.taken)
                assert _bits(float(made.norm)) == _bits(norm), (total, scale, limit)
                assert _bits(float(made.coefficient)) == _bits(coefficient), (total, scale, limit)
                clipped += coefficient not in (scale, 0.0)
    assert clipped > 1000


@pytest.mark.parametrize("total", [math.inf, math.nan])
def test_a_total_that_is_not_finite_skips(total):
    made = decide(torch.tensor(total, dtype=torch.float64), 1.0, 1.0)
    assert not bool(made.taken) and math.isnan(float(made.coefficient))


def _transformer(dtype: torch.dtype) -> Transformer:
    torch.manual_seed(7)
    return Transformer().to(dtype)


def _tokens(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(0, 40, (2, 17), generator=g) for _ in range(count)]


@pytest.mark.parametrize(
    ("schedule", "max_norm", "dtype", "weight", "state"),
    [
        ("immediate", None, torch.float32, "fp32", "fp32"),
        ("immediate", None, torch.bfloat16, "bf16", "q8"),
        ("deferred", None, torch.bfloat16, "bf16+16", "q8"),
        ("deferred", 0.3, torch.bfloat16, "bf16", "bf16"),
        ("auto", 0.3, torch.float32, "fp32", "fp32"),
    ],
)
def test_numbers_in_memory_give_the_bits_of_numbers_by_value(
    schedule, max_norm, dtype, weight, state
):
    models, results = [], []
    for capturable in (False, True):
        model = _transformer(dtype)
        fused = forge_train.fuse(
            model, AdamW(lr=1e-2), schedule=schedule, max_norm=max_norm, weight_format=weight,
            state_format=state, capturable=capturable, seed=2**63 + 5,
            groups=[
                {"params": model.head.parameters(), "lr": 3e-2, "betas": (0.8, 0.9)},
                {"params": [p for n, p in model.named_parameters() if not n.startswith("head")]},
            ],
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.ExponentialLR(fused.optimizer, 0.7)
        for tokens in _tokens(5):
            fused.optimizer.zero_grad()
            tokens_loss(model, tokens).backward()
            fused.optimizer.step()
            scheduler.step()
        models.append(model)
        results.append(fused.optimizer.last)
        steps = {weight.step for weight in fused.engine.weights}
        assert steps == {5} and fused.optimizer.skipped_steps == 0
        # Two groups: two rows, however many weights.
        assert fused.engine.scalars.layout == 1
    assert_same_bits(*models)
    assert results[0] == results[1]


# -- a device that decides alone ------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """The CPU's engine does not look at the decision, and updates treat NaN as a GPU's do."""
    monkeypatch.setattr(Engine, "_refused", lambda *_: False)
    update = Linear.update

    def with_nan(self, segments, storage, scalars, accumulator=None, report=None):
        if isinstance(scalars, torch.Tensor) and math.isnan(scalars.view(torch.float64)[2]):
            struct = new_struct("forge_report")
            struct.tiles = struct.nonfinite_tiles = 1
            data = bytearray(forge_train._lib.ffi.buffer(struct))
            report.copy_(torch.frombuffer(data, dtype=torch.uint8))
            return None
        return update(self, segments, storage, scalars, accumulator, report)

    monkeypatch.setattr(Linear, "update", with_nan)


def _run(schedule: str = "deferred", **options):
    """Six steps, the third and the fourth with a gradient that is not finite."""
    torch.manual_seed(5)
    model = mlp()
    options = {"max_norm": 0.2, "seed": 3, **options}
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule=schedule, **options)
    results, saved = [], None
    for index, batch in enumerate(mlp_batches(6)):
        fused.optimizer.zero_grad()
        loss = mlp_loss(model, batch)
        (loss * (math.inf if index in (2, 3) else 1.0)).backward()
        fused.optimizer.step()
        results.append(fused.optimizer.last)
        if index == 3:
            saved = copy.deepcopy((model.state_dict(), fused.optimizer.state_dict()))
    return model, fused, results, saved


@pytest.mark.parametrize("schedule", ["deferred", "accumulate"])
def test_a_step_that_is_skipped_on_the_device_is_one_that_the_host_skips(request, schedule):
    want, seen, expected, _ = _run(schedule)
    request.getfixturevalue("alone")
    model, fused, results, saved = _run(schedule)
    assert_same_bits(model, want)
    assert results == expected
    assert [result.ok for result in results] == [True, True, False, False, True, True]
    assert results[2].norm == math.inf and results[2].coefficient == 0.0
    assert "0.weight" in results[2].nonfinite_layers and results[2].nonfinite_tiles == {}
    assert fused.optimizer.skipped_steps == seen.optimizer.skipped_steps == 2
    assert (
        [w.step for w in fused.engine.weights] == [w.step for w in seen.engine.weights] == [4] * 5
    )

    # From a checkpoint behind the skipped steps, the same bits.
    assert saved[1]["forge"]["skipped_steps"] == 2
    assert {int(entry["step"]) for entry in saved[1]["state"].values()} == {2}
    again = mlp()
    resumed = forge_train.fuse(again, AdamW(lr=1e-2), schedule=schedule, max_norm=0.2)
    again.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    for batch in mlp_batches(6)[4:]:
        resumed.optimizer.zero_grad()
        mlp_loss(again, batch).backward()
        resumed.optimizer.step()
    assert_same_bits(again, want)
    assert resumed.optimizer.skipped_steps == 2


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
def test_weights_that_sit_out_steps_keep_counts_of_their_own(capturable):
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(9, 5), torch.nn.Linear(9, 5)

        def forward(self, x, which):
            return sum(getattr(self, name)(x) for name in which)

    model = Branches()
    plain = copy.deepcopy(model)
    fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=1e6, capturable=capturable)
    stock = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for which in ("a", "ab", "b", "ab", "a", "ab"):
        x = torch.randn(4, 9)
        for m, optimizer in ((model, fused.optimizer), (plain, stock)):
            optimizer.zero_grad()
            m(x, which).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    counts = {weight.name: weight.step for weight in fused.engine.weights}
    assert counts == {"a.weight": 5, "a.bias": 5, "b.weight": 4, "b.bias": 4}
    # The first placing and one split.
    assert fused.engine.scalars.layout == 2


def test_an_update_inside_the_backward_counts_at_once():
    model = torch.nn.Linear(9, 5, bias=False)
    fused = forge_train.fuse(model, AdamW(), schedule="immediate", capturable=True)
    (weight,) = fused.engine.weights
    for step in (1, 2):
        model(torch.randn(3, 9)).sum().backward()
        assert weight.step == step
        assert weight.report.tiles == 1
        fused.optimizer.step()
        assert weight.step == step


def test_a_group_that_is_exchanged_is_read():
    model = mlp()
    fused = forge_train.fuse(model, SGD(lr=1e-2), capturable=True, rest=False)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()
    still, moves = fused.engine.fused
    still.group = {**still.group, "lr": 0.0}
    before = [weight.parameter.detach().clone() for weight in (still, moves)]
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()
    assert torch.equal(still.parameter, before[0]) and not torch.equal(moves.parameter, before[1])


# -- while a graph is captured --------------------------------------------------------------------


@pytest.fixture
def during_capture(monkeypatch):
    """Call it: from now on the table believes that a graph is captured."""

    def begin() -> None:
        monkeypatch.setattr(ScalarTable, "_capturing", property(lambda self: True))

    return begin


def _stepped(**options):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="deferred", **options)
    _step(model, fused)
    return model, fused


def _step(model, fused) -> None:
    fused.optimizer.zero_grad()
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()


def test_a_capture_that_would_keep_numbers_is_refused(during_capture):
    model, fused = _stepped()
    during_capture()
    with pytest.raises(RuntimeError, match=r"this step's numbers for good.*capturable=True"):
        _step(model, fused)


def test_a_capture_before_the_first_step_is_refused(during_capture):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred", capturable=True)
    during_capture()
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        _step(model, fused)


def test_a_capture_with_options_that_have_changed_is_refused(during_capture):
    model, fused = _stepped(capturable=True)
    fused.optimizer.param_groups[0]["lr"] = 1e-3
    during_capture()
    with pytest.raises(RuntimeError, match=r"0\.weight: options of its param group.*before_replay"):
        _step(model, fused)


def test_a_capture_after_before_replay_takes_the_new_options(during_capture):
    want, other = _stepped(capturable=True)
    torch.manual_seed(1234)
    model, fused = _stepped(capturable=True)
    for f in (other, fused):
        f.optimizer.param_groups[0]["lr"] = 1e-3
    _step(want, other)
    fused.optimizer.before_replay()
    during_capture()
    _step(model, fused)
    assert_same_bits(model, want)


def test_a_capture_with_other_gradients_is_refused(during_capture):
    model, fused = _stepped(capturable=True)
    during_capture()
    model[0](torch.randn(3, 19)).sum().backward()
    with pytest.raises(RuntimeError, match="other weights have gradients"):
        fused.optimizer.step()


def test_counts_are_not_read_during_a_capture(during_capture):
    _, fused = _stepped(capturable=True, max_norm=1.0)
    during_capture()
    with pytest.raises(RuntimeError, match="cannot be read while a CUDA graph is captured"):
        fused.optimizer.state_dict()


def test_options_out_of_range_are_found_before_a_replay():
    _, fused = _stepped(capturable=True)
    words = fused.engine.scalars._words.clone()
    fused.optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr: -1 is not in"):
        fused.optimizer.before_replay()
    assert torch.equal(fused.engine.scalars._words, words)


def test_replays_are_counted_where_they_ran():
    """What a replay leaves behind: counts on the device that the host has not seen."""
    _, fused = _stepped(capturable=True, max_norm=1.0)
    table, captured = fused.engine.scalars, fused.optimizer.last
    # As a graph of one step would, three times, of which one was skipped.
    table._words[:, 0].add_(2)
    for _ in range(3):
        fused.optimizer.after_replay(captured)
    assert {weight.step for weight in fused.engine.weights} == {3}
    assert fused.optimizer.skipped_steps == 1 and fused.engine.steps == 4
    assert fused.optimizer.last == captured and fused.optimizer.last is not captured


# -- capture() ------------------------------------------------------------------------------------


def _step_of(model, fused):
    def step(x, y):
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        return loss.detach()

    return step


def test_without_a_gpu_a_captured_step_is_the_step():
    losses = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = mlp()
        fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, capturable=True)
        scheduler = torch.optim.lr_scheduler.StepLR(fused.optimizer, 2, 0.5)
        step = _step_of(model, fused)
        if captured:
            step = forge_train.capture(step, fused.optimizer, warmup=1)
        losses.append([])
        for batch in mlp_batches(6):
            losses[-1].append(step(*batch).item())
            scheduler.step()
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


def test_the_recipe_of_the_docs_trains():
    text = (ROOT / "docs" / "cuda-graphs.md").read_text(encoding="utf-8")
    (recipe,) = (
        block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "capture(" in block
    )
    model = Transformer()
    tokens = torch.randint(0, 40, (2, 16))
    names = {"forge_train": forge_train, "torch": torch, "model": model}
    names["loader"] = [(tokens, tokens)] * 40
    before = tokens_loss(model, tokens)
    exec(recipe, names)
    assert {weight.step for weight in names["fused"].engine.weights} == {40}
    assert names["loss"] < before and names["optimizer"].param_groups[0]["lr"] < 1e-3


def test_what_capture_refuses():
    model = mlp()
    fused = forge_train.fuse(model, AdamW())
    step = _step_of(model, fused)
    with pytest.raises(ValueError, match="capturable=True"):
        forge_train.capture(step, fused.optimizer)
    with pytest.raises(TypeError, match="optimizer=SGD"):
        forge_train.capture(step, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    fused.remove()
    fused = forge_train.fuse(model, AdamW(), capturable=True)
    with pytest.raises(ValueError, match="warmup=0"):
        forge_train.capture(step, fused.optimizer, warmup=0)
    captured = forge_train.capture(_step_of(model, fused), fused.optimizer)
    x, y = mlp_batches(1)[0]
    captured(x, y)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"input 1 is torch.float64 \(29, 7\).*float32 \(29, 7\)"):
        captured(x, y.double())
    with pytest.raises(ValueError, match=r"input 0 is torch.float32 \(28, 19\)"):
        captured(x[1:], y)
    with pytest.raises(ValueError, match="1 inputs, but the first call had 2"):
        captured(x)
    with pytest.raises(ValueError, match="input 1 is int"):
        captured(x, 3)
    assert_same_bits(model, before)
