"""A step without the host: nothing waits, and a captured step has the bits of an eager one."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from gpu_cases import (
    DEVICE,
    Case,
    assert_same_bits,
    factors,
    ids,
    initial,
    linear_on,
    needs_gpu,
    to_gpu,
)
from torch.nn import functional

import forge_train
from forge_train import AdamW
from forge_train._structs import DeviceStructs, report_of
from forge_train.native import update_together

pytestmark = needs_gpu
VOCABULARY, WIDTH, HIDDEN, HEADS = 512, 256, 384, 4


class Norm(torch.nn.Module):
    """RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (WIDTH,), self.weight)


class Layer(torch.nn.Module):
    """Attention from plain products, whose backward has one order of sums; gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(mask, -math.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(torch.nn.Module):
    """Two layers and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.Sequential(Layer(), Layer())
        self.norm = Norm()
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens))))


@dataclass(frozen=True)
class Run:
    """What is trained; ``str`` is the test's id."""

    schedule: str
    max_norm: float | None
    weight: str
    state: str
    micro_batches: int = 1
    capturable: bool = True

    def __str__(self) -> str:
        clip = "clip" if self.max_norm else "noclip"
        return f"{self.schedule}-{clip}-{self.weight}-{self.state}-{self.micro_batches}"

    def fuse(self, model: torch.nn.Module, rule: AdamW | None = None) -> forge_train.Fused:
        """Stochastic rounding, two param groups."""
        slow = [p for n, p in model.named_parameters() if "norm" in n]
        fast = [p for n, p in model.named_parameters() if "norm" not in n]
        return forge_train.fuse(
            model, rule or AdamW(lr=1e-2), schedule=self.schedule, max_norm=self.max_norm,
            weight_format=self.weight, state_format=self.state, seed=11,
            micro_batches=self.micro_batches, capturable=self.capturable,
            groups=[{"params": fast}, {"params": slow, "lr": 1e-3, "weight_decay": 0.0}],
        )  # fmt: skip

    def step(self, model: torch.nn.Module, fused: forge_train.Fused):
        """A training step of ``tokens`` and a factor on its loss."""

        def step(tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            losses = []
            for part in tokens.chunk(self.micro_batches):
                logits = model(part[:, :-1]).float()
                loss = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
                (loss * scale).backward()
                losses.append(loss.detach())
            fused.optimizer.step()
            fused.optimizer.zero_grad()
            return torch.stack(losses)

        return step


RUNS = [
    Run("immediate", None, "bf16", "bf16"),
    Run("immediate", None, "bf16", "q8"),
    Run("deferred", None, "bf16+16", "q8"),
    Run("deferred", 0.5, "bf16", "bf16"),
    Run("deferred", 0.5, "bf16", "q8", micro_batches=2),
    Run("accumulate", 0.5, "bf16", "bf16", micro_batches=2),
]


def _model() -> Llama:
    torch.manual_seed(9)
    return Llama().to(DEVICE, torch.bfloat16)


def _batches(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCABULARY, (4, 65), generator=g).to(DEVICE) for _ in range(count)]


def _scales(count: int, bad: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return [torch.tensor(math.inf if i in bad else 1.0, device=DEVICE) for i in range(count)]


def _assert_same(ours: forge_train.Fused, theirs: forge_train.Fused) -> None:
    for a, b in zip(ours.engine.weights, theirs.engine.weights, strict=True):
        assert_same_bits(a.storage, b.storage, a.name)
        assert a.step == b.step, a.name


@pytest.mark.parametrize("run", RUNS, ids=ids(RUNS))
def test_captured_steps_have_the_bits_of_eager_ones(run):
    """Across changes of the learning rate, and steps whose gradient is not finite."""
    count, bad = 9, (5, 7)
    batches, scales = _batches(count), _scales(count, bad)
    made = []
    for captured in (False, True):
        model = _model()
        fused = run.fuse(model)
        scheduler = torch.optim.lr_scheduler.StepLR(fused.optimizer, 2, 0.5)
        step = run.step(model, fused)
        if captured:
            step = forge_train.capture(step, fused.optimizer, warmup=2)
        losses, results = [], []
        for tokens, scale in zip(batches, scales, strict=True):
            losses.append(step(tokens, scale).clone())
            results.append(fused.optimizer.last)
            scheduler.step()
        assert captured == (getattr(step, "graph", None) is not None)
        made.append((fused, torch.stack(losses), results))
    (eager, losses, results), (graph, captured_losses, captured_results) = made
    assert torch.equal(losses.view(torch.int32), captured_losses.view(torch.int32))
    assert torch.isfinite(losses).all() and losses.unique().numel() == losses.numel()
    assert len(graph.engine.fused) == 11
    _assert_same(graph, eager)
    assert captured_results == results
    skips = run.schedule != "immediate"
    assert [r.ok for r in results] == [not (skips and i in bad) for i in range(count)]
    assert graph.optimizer.skipped_steps == eager.optimizer.skipped_steps == 2 * skips
    assert {w.step for w in graph.engine.fused} == {count - 2 * skips}
    if run.max_norm:
        assert results[0].norm > 0 and results[0].coefficient != 1.0
    if not skips:
        assert results[bad[0]].nonfinite_tiles and not results[0].nonfinite_tiles


def test_a_replayed_run_continues_from_its_checkpoint_and_through_eager_steps():
    run = Run("deferred", 0.5, "bf16", "q8")
    batches, scales = _batches(10), _scales(10, bad=(4,))
    model = _model()
    want = run.fuse(model)
    step = run.step(model, want)
    for tokens, scale in zip(batches, scales, strict=True):
        step(tokens, scale)

    model = _model()
    fused = run.fuse(model)
    plain = run.step(model, fused)
    step = forge_train.capture(plain, fused.optimizer, warmup=2)
    for index in range(5):
        step(batches[index], scales[index])
    saved = copy.deepcopy((model.state_dict(), fused.optimizer.state_dict()))
    plain(batches[5], scales[5])  # between replays, and of the same bits
    for index in range(6, 10):
        step(batches[index], scales[index])
    _assert_same(fused, want)

    model = _model()
    resumed = run.fuse(model)
    model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    assert {weight.step for weight in resumed.engine.weights} == {4}
    step = forge_train.capture(run.step(model, resumed), resumed.optimizer, warmup=1)
    for index in range(5, 10):
        step(batches[index], scales[index])
    _assert_same(resumed, want)
    assert resumed.optimizer.skipped_steps == want.optimizer.skipped_steps == 1


def test_a_learning_rate_in_the_gpus_memory_is_read_by_each_replay():
    run = Run("deferred", 0.5, "bf16", "bf16")
    batches, scales = _batches(6), _scales(6)
    # Numbers that fp32 has exactly.
    rates = [2.0**-i for i in range(7, 13)]
    made = []
    for captured in (False, True):
        model = _model()
        fused = run.fuse(model)
        groups = fused.optimizer.param_groups
        if captured:
            for group in groups:
                group["lr"] = torch.tensor(rates[0], device=DEVICE)
        step = run.step(model, fused)
        if captured:
            step = forge_train.capture(step, fused.optimizer, warmup=2)
        for rate, tokens, scale in zip(rates, batches, scales, strict=True):
            for group in groups:
                if captured:
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            step(tokens, scale)
        made.append(fused)
    _assert_same(*made)


@pytest.mark.parametrize("capturable", [False, True], ids=["by-value", "capturable"])
@pytest.mark.parametrize("run", RUNS, ids=ids(RUNS))
def test_forward_backward_and_step_never_wait(run, capturable):
    """By torch's own watch, and behind a kernel that runs longer than the host needs."""
    model = _model()
    fused = replace(run, capturable=capturable).fuse(model)
    step = run.step(model, fused)
    batches, scales = _batches(6), _scales(6, bad=(4,))
    for tokens, scale in zip(batches[:3], scales, strict=False):
        step(tokens, scale)
    torch.cuda.synchronize()
    for group in fused.optimizer.param_groups:
        group["lr"] *= 0.5
    asleep = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_500_000_000)  # most of a second
        asleep.record()
        losses = step(batches[4], scales[4])
        waited = asleep.query()
        result = fused.optimizer.last
        ready = result.ready
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited and not ready
    assert torch.isfinite(losses).all()
    assert result.ok == (run.schedule == "immediate") and result.ready


SKIPPED = [
    (Case("adamw", "bf16", "bf16"), (512, 768), ""),
    (Case("adamw", "bf16", "q8"), (512, 768), ""),
    (Case("adamw", "bf16+16", "q8"), (512, 768), "sm80"),
    (Case("adamw", "bf16+fp32", "bf16"), (512, 768), ""),
    (Case("adamw", "bf16", "q8"), (512, 768), "panel"),
    (Case("adamw", "fp32", "fp32"), (77, 130), ""),
    (Case("sgd", "bf16", "fp32"), (512, 768), ""),
]


@pytest.mark.parametrize(
    ("case", "shape", "mainloop"), SKIPPED, ids=[f"{c}-{m or 'own'}" for c, _, m in SKIPPED]
)
@pytest.mark.parametrize("source", ["factors", "both", "accumulator", "group"])
def test_a_nan_for_grad_scale_leaves_everything_as_it_was(
    monkeypatch, case, shape, mainloop, source
):
    """How a step is skipped that the host does not know to be skipped."""
    if mainloop:
        monkeypatch.setenv("FORGE_MAINLOOP", mainloop)
    linear = linear_on(DEVICE, case.spec(*shape))
    storage = initial(linear)
    before = copy.deepcopy(storage)
    scalars = linear.scalars({}, step=2, seed=3)
    numbers = linear.device_scalars(replace(scalars, grad_scale=math.nan))
    segments = to_gpu([factors(128, *shape, case.factor_dtype)])
    accumulator = torch.zeros(shape, device=DEVICE)
    reports = DeviceStructs("forge_report", 2, linear.device)
    if source == "group":
        second = linear_on(DEVICE, case.spec(*shape, parameter_id=78))
        other = initial(second, seed=6)
        others = copy.deepcopy(other)
        pairs = ((linear, storage), (second, other))
        calls, kept = zip(*(a.update_struct(segments, s, numbers) for a, s in pairs), strict=True)
        update_together([linear, second], calls)
        assert kept
        assert_same_bits(other, others)
    else:
        linear.update(
            [] if source == "accumulator" else segments, storage, numbers,
            None if source == "factors" else accumulator, report=reports.rows[0],
        )  # fmt: skip
        report = reports.read(report_of)[0]
        assert report.nonfinite_tiles == report.tiles > 0
    assert_same_bits(storage, before)
    # And the same update with a number moves it.
    linear.update(segments, storage, linear.device_scalars(scalars), report=reports.rows[1])
    assert not torch.equal(storage.weight, before.weight)


def test_a_capture_by_hand():
    """The calls of the optimizer that ``forge_train.capture`` makes, as the docs list them."""
    run = Run("deferred", 0.5, "bf16", "bf16")
    batches, scales = _batches(6), _scales(6, bad=(4,))
    made = []
    for captured in (False, True):
        model = _model()
        fused = run.fuse(model)
        optimizer, plain = fused.optimizer, run.step(model, fused)
        norms = []
        static = batches[0].clone(), scales[0].clone()
        side, graph, template = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None
        for index, inputs in enumerate(zip(batches, scales, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
            for buffer, value in zip(static, inputs, strict=True):
                buffer.copy_(value)
            if not captured or index < 2:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    plain(*static)
                torch.cuda.current_stream().wait_stream(side)
            else:
                optimizer.before_replay()
                if template is None:
                    with torch.cuda.graph(graph, stream=side):
                        plain(*static)
                    template = optimizer.last
                    graph.replay()
                else:
                    graph.replay()
                    optimizer.after_replay(template)
            norms.append(optimizer.last.norm)
        assert optimizer.skipped_steps == 1 and fused.engine.steps == 6
        made.append((fused, norms))
    assert made[0][1] == made[1][1]
    _assert_same(made[0][0], made[1][0])


def test_the_recipe_of_the_docs_is_captured():
    page = Path(__file__).resolve().parents[2] / "docs" / "cuda-graphs.md"
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (recipe,) = (block for block in blocks if "capture(" in block)
    tokens = torch.randint(0, VOCABULARY, (2, 64))
    names = {"forge_train": forge_train, "torch": torch, "model": _model()}
    names["loader"] = [(tokens, tokens)] * 20
    exec(recipe, names)
    assert names["step"].graph is not None
    assert {weight.step for weight in names["fused"].engine.weights} == {20}
    assert names["optimizer"].last.norm > 0 and names["loss"].isfinite()


def test_who_captures_without_capturable_is_told():
    run = Run("immediate", None, "bf16", "bf16", capturable=False)
    model = _model()
    fused = run.fuse(model)
    with pytest.raises(ValueError, match="capturable=True"):
        forge_train.capture(run.step(model, fused), fused.optimizer)
