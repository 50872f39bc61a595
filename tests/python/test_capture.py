"""``forge_train.capture`` around a graph that is none: what it asks for, and what it counts.

The stand-in keeps CUDA's promises on a CPU. What runs under a capture leaves no trace in memory; a
replay does the same work again and leaves none in Python.
"""

from __future__ import annotations

import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_bits, mlp, mlp_batches

import forge_train
from forge_train import AdamW
from forge_train.capture import CapturedStep
from forge_train.engine import Engine
from forge_train.native import Linear
from forge_train.scalars import ScalarTable

HOST = ("_attempts", "_taken", "_behind", "_scale")


class FakeGraph:
    """Of one step of an engine; ``current`` is the one that captures."""

    capturing = False
    current: FakeGraph
    engine: Engine

    def memory(self) -> list[torch.Tensor]:
        weights = self.engine.weights
        every = [self.engine.scalars._words, *(w.storage.weight for w in weights)]
        return every + [state for w in weights for state in w.storage.states]

    def host(self) -> tuple:
        weights, table = self.engine.weights, self.engine.scalars
        counts = [(w, w.version, w.counted) for w in weights]
        return self.engine.steps, counts, {name: getattr(table, name) for name in HOST}

    def restore_host(self, saved: tuple) -> None:
        self.engine.steps, counts, table = saved
        for weight, version, counted in counts:
            weight.version, weight.counted = version, counted
        for name, value in table.items():
            setattr(self.engine.scalars, name, value)

    def replay(self) -> None:
        saved = self.host()
        FakeGraph.capturing = True
        output = self.step()
        FakeGraph.capturing = False
        # A captured tensor has one place in memory.
        self.output.copy_(output)
        words = self.optimizer.last._words
        self.words.copy_(words)
        self.restore_host(saved)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA as far as ``capture`` uses it; whether a step is taken is known to tensors alone."""

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == (None, "side", "thread_local")
        FakeGraph.current = graph
        before = [tensor.clone() for tensor in graph.memory()]
        FakeGraph.capturing = True
        try:
            yield
        finally:
            FakeGraph.capturing = False
            for tensor, value in zip(graph.memory(), before, strict=True):
                tensor.copy_(value)

    class Stream(str):
        __slots__ = ()

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(ScalarTable, "_capturing", property(lambda self: FakeGraph.capturing))
    monkeypatch.setattr(Engine, "_refused", lambda *_: False)
    update = Linear.update

    def with_nan(self, segments, storage, scalars, accumulator=None, report=None):
        if not math.isnan(scalars.view(torch.float64)[2]):
            return update(self, segments, storage, scalars, accumulator, report)
        return None

    monkeypatch.setattr(Linear, "update", with_nan)
    monkeypatch.setattr(FakeGraph, "capturing", False)


def _captured(step, fused, **options) -> CapturedStep:
    """As on a GPU; the graph is told what it would have recorded."""
    captured = forge_train.capture(step, fused.optimizer, **options)
    captured._device = SimpleNamespace(type="cuda")
    copied = CapturedStep._copied

    def to_the_cpu(self, inputs):
        self._device = torch.device("cpu")
        try:
            return copied(self, inputs)
        finally:
            self._device = SimpleNamespace(type="cuda")

    captured._copied = to_the_cpu.__get__(captured)
    FakeGraph.engine, FakeGraph.optimizer = fused.engine, fused.optimizer
    FakeGraph.step = staticmethod(lambda: step(*captured._inputs))
    capture = captured._capture

    def recorded(static):
        capture(static)
        captured.graph.output, captured.graph.words = captured._output, captured._result._words

    captured._capture = recorded
    return captured


def _training(model, fused):
    def step(x, y, scale):
        loss = torch.nn.functional.mse_loss(model(x), y)
        (loss * scale).backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("schedule", "max_norm"), [("immediate", None), ("deferred", 0.1)])
def test_calls_are_steps(schedule, max_norm):
    bad = () if schedule == "immediate" else (1, 5)
    made = []
    for captured in (False, True):
        torch.manual_seed(3)
        model = mlp()
        fused = forge_train.fuse(
            model, AdamW(lr=1e-2), schedule=schedule, max_norm=max_norm, capturable=True, seed=4
        )
        scheduler = torch.optim.lr_scheduler.StepLR(fused.optimizer, 2, 0.5)
        plain = step = _training(model, fused)
        if captured:
            step = _captured(plain, fused, warmup=2)
        losses, results = [], []
        for index, (x, y) in enumerate(mlp_batches(8)):
            call = plain if index == 6 else step  # an eager step between replays
            losses.append(call(x, y, torch.tensor(math.inf if index in bad else 1.0)).clone())
            results.append(fused.optimizer.last)
            scheduler.step()
        made.append((model, fused, losses, results))
    (want, eager, losses, results), (model, fused, captured_losses, captured_results) = made
    assert captured_losses == losses and len({loss.item() for loss in losses}) == 8
    assert_same_bits(model, want)
    assert captured_results == results
    assert [result.ok for result in results] == [index not in bad for index in range(8)]
    assert fused.optimizer.skipped_steps == eager.optimizer.skipped_steps == len(bad)
    assert fused.engine.steps == 8
    assert {weight.step for weight in fused.engine.weights} == {8 - len(bad)}
    mine, theirs = fused.optimizer.state_dict(), eager.optimizer.state_dict()
    assert mine["forge"] == theirs["forge"]
    for a, b in zip(mine["state"].values(), theirs["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("graphs")
def test_a_checkpoint_between_replays_needs_no_new_graph():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, capturable=True)
    step = _captured(_training(model, fused), fused, warmup=1)
    one, batches = torch.tensor(1.0), mlp_batches(6)
    for x, y in batches[:3]:
        step(x, y, one)
    saved = copy.deepcopy((model.state_dict(), fused.optimizer.state_dict()))
    graph = step.graph
    for x, y in batches[3:]:
        step(x, y, one)
    want = copy.deepcopy(model)
    model.load_state_dict(saved[0])
    fused.optimizer.load_state_dict(saved[1])
    for x, y in batches[3:]:
        step(x, y, one)
    assert step.graph is graph
    assert_same_bits(model, want)
    assert {weight.step for weight in fused.engine.weights} == {6}

    # Counts that drift apart are another matter.
    fused.optimizer.state_dict()
    fused.engine.weights[0].step = 4
    with pytest.raises(RuntimeError, match=r"different numbers of steps.*capture again"):
        step(*batches[0], one)
    assert_same_bits(model, want)


@pytest.mark.usefixtures("graphs")
def test_a_capture_that_fails_leaves_nothing_behind():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, capturable=True)
    fail = []

    def plain(x, y):
        torch.nn.functional.mse_loss(model(x), y).backward()
        if fail:
            raise ArithmeticError("waited for the GPU")
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        return x

    step = _captured(plain, fused, warmup=1)
    batch = mlp_batches(1)[0]
    step(*batch)
    before, last = copy.deepcopy(model), fused.optimizer.last
    fail.append(True)
    with pytest.raises(RuntimeError, match=r"could not be captured.*waited for the GPU.*\.item"):
        step(*batch)
    assert_same_bits(model, before)
    assert not fused.engine.pending() and step.graph is None
    assert fused.engine.steps == 1 and fused.optimizer.last is last
    fail.clear()
    step(*batch)
    assert step.graph is not None
    assert {weight.step for weight in fused.engine.weights} == {2} and fused.engine.steps == 2


@pytest.mark.usefixtures("graphs")
def test_a_function_without_a_step_is_refused():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, capturable=True)
    stepping = [True]
    plain = _training(model, fused)
    step = _captured(lambda *batch: plain(*batch) if stepping else None, fused, warmup=1)
    batch = (*mlp_batches(1)[0], torch.tensor(1.0))
    step(*batch)
    stepping.clear()
    with pytest.raises(RuntimeError, match=r"made no step: it must call optimizer\.step"):
        step(*batch)
    assert fused.engine.steps == 1 and {w.step for w in fused.engine.weights} == {1}
