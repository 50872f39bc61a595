"""``torch.compile`` around a fused model: one graph, with the bits and the counting of eager."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import Transformer, assert_same_bits, mlp, mlp_batches, mlp_loss, tokens_loss, worst
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import forge_train
from forge_train import SGD, AdamW, linear_op

SCHEDULES = {"immediate": 1, "deferred": 2, "accumulate": 2, "auto": 1}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of one test in the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def train(make, run, loss, batches, rule=None, **options):
    """A model from ``make`` after training; ``run`` compiles it or does not."""
    torch.manual_seed(7)
    model = make()
    fused = forge_train.fuse(model, rule or AdamW(lr=1e-2), **options)
    net = run(model)
    for micro_batches in batches:
        for batch in micro_batches:
            loss(net, batch).backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
    assert all(weight.key.numel() == 1 and not weight.pending for weight in fused.engine.fused)
    return model


def token_batches(steps, micro_batches):
    """Each step has sequences of another length."""
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randint(0, 40, (2, 8 + step), generator=generator) for _ in range(micro_batches)]
        for step in range(steps)
    ]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bits_of_eager(backend, schedule):
    micro_batches = SCHEDULES[schedule]
    options = {"schedule": schedule, "micro_batches": micro_batches}
    options["max_norm"] = None if schedule == "immediate" else 1.0
    batches = token_batches(3, micro_batches)
    after = [
        train(Transformer, run, tokens_loss, batches, **options)
        for run in (lambda model: model, partial(compiled, backend=backend))
    ]
    assert_same_bits(*after)


@pytest.mark.parametrize("schedule", ["immediate", "deferred"])
def test_inductor_neither_drops_nor_repeats_an_update(schedule):
    # Linears alone: nothing is left to generate code for, so this is quick. The first needs no dX.
    def make():
        return torch.nn.Sequential(*(torch.nn.Linear(12, 12, bias=i > 1) for i in range(4)))

    def loss(net, x):
        return net(x).square().mean()

    batches = [[torch.randn(tokens, 12)] for tokens in (5, 9, 6)]
    after = [
        train(make, run, loss, batches, schedule=schedule)
        for run in (lambda model: model, partial(compiled, backend="inductor"))
    ]
    assert_same_bits(*after)


class Residual(torch.nn.Module):
    """dY of a layer is what dX is added to: a compiler does so in dY's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(torch.sin(x))
        return x


def test_factors_survive_the_compilers_reuse_of_buffers(monkeypatch):
    batches = [[torch.randn(8, 16) for _ in range(2)] for _ in range(2)]

    def after(run):
        options = {"rule": SGD(lr=0.1), "schedule": "deferred", "micro_batches": 2}
        return train(Residual, run, lambda net, x: net(x).square().mean(), batches, **options)

    expected = after(lambda model: model)
    assert worst(after(partial(compiled, backend="inductor")), expected) < 1e-6
    # What the copies are for: without them this model goes wrong.
    monkeypatch.setattr(linear_op, "_own_last_segment", lambda weight, value: None)
    assert worst(after(partial(compiled, backend="inductor")), expected) > 1e-3


@pytest.mark.parametrize("reduction", ["exchange", "panels"])
def test_factors_of_replicas_survive_it_as_well(reduction):
    """Panels keep this rank's own factors, which are the compiler's buffers, too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        batches = [[torch.randn(8, 16) for _ in range(2)] for _ in range(2)]

        def after(run):
            options = {"rule": SGD(lr=0.1), "schedule": "deferred", "micro_batches": 2}
            options |= {"data_parallel": True, "data_parallel_reduction": reduction}
            return train(Residual, run, lambda net, x: net(x).square().mean(), batches, **options)

        expected = after(lambda model: model)
        assert worst(after(partial(compiled, backend="inductor")), expected) < 1e-6
    finally:
        dist.destroy_process_group()


def test_linears_of_one_input_hold_one_copy_of_it():
    class Projections(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(x)
            return self.q(x) * self.k(x) + self.v(x)

    model = Projections()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    compiled(model)(torch.randn(5, 8, requires_grad=True)).sum().backward()
    held = {weight.segments[0].x.data_ptr() for weight in fused.engine.fused}
    assert len(fused.engine.fused) == 3 and len(held) == 1


def test_equal_uses_are_not_merged():
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.linear(x)

    after = [
        train(
            Doubled, run, lambda net, x: net(x).square().mean(), [[torch.ones(3, 6)]],
            rule=SGD(lr=0.1), schedule="deferred",
        )
        for run in (lambda model: model, compiled, partial(compiled, backend="inductor"))
    ]  # fmt: skip
    assert worst(after[1], after[0]) < 1e-6
    assert worst(after[2], after[0]) < 1e-6


class Checkpointed(torch.nn.Module):
    """Checkpoints with work of their own after the linears; the last uses both factors."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.c = (torch.nn.Linear(9, 9) for _ in range(3))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x)) * self.b(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.gated, x, use_reentrant=self.reentrant)
        return checkpoint(lambda y: torch.tanh(self.c(y)), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("schedule", ["immediate", "deferred"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, schedule, backend):
    if backend == "inductor" and (reentrant or schedule == "deferred"):
        pytest.skip("one case of generated code is enough")
    x = [[torch.randn(5, 9, requires_grad=True)] for _ in range(3)]
    after = [
        train(
            lambda: Checkpointed(reentrant), run, lambda net, x: net(x).square().sum(), x,
            rule=SGD(lr=0.05), schedule=schedule,
        )
        for run in (lambda model: model, partial(compiled, backend=backend))
    ]  # fmt: skip
    assert worst(after[1], after[0]) < 1e-6


def test_immediate_refuses_a_second_forward_before_any_update():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    net, (first, second) = compiled(model), mlp_batches(2)
    pending = mlp_loss(net, first)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is used a second time.*deferred"):
        mlp_loss(net, second)
    assert_same_bits(model, before)
    pending.backward()
    fused.optimizer.step()
    # An abandoned graph counts no longer, neither in eager mode nor compiled.
    for run in (model, net):
        mlp_loss(net, second)
        gc.collect()
        loss = mlp_loss(run, first)
        loss.backward()
        fused.optimizer.step()
        del loss
    with torch.no_grad():
        mlp_loss(net, second)


def test_auto_sees_a_second_forward():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="auto")
    net, batches = compiled(model), mlp_batches(2)
    sum(mlp_loss(net, batch) for batch in batches).backward()
    assert all(weight.schedule == "deferred" for weight in fused.engine.fused)
    assert all(len(weight.segments) == 2 for weight in fused.engine.fused)


def test_a_second_backward_and_an_old_graph_are_refused():
    first, second = mlp_batches(2)
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    net = compiled(model)
    mlp_loss(net, first).backward()
    with pytest.raises(RuntimeError, match=r"second backward before optimizer\.step\(\)"):
        mlp_loss(net, second).backward()
    fused.optimizer.step()
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    net = compiled(model)
    stale = mlp_loss(net, first)
    mlp_loss(net, second).backward()
    fused.optimizer.step()
    with pytest.raises(RuntimeError, match="updated after this graph's forward"):
        stale.backward()


def test_retain_graph_and_double_backward():
    def after(run):
        torch.manual_seed(7)
        model = mlp()
        fused = forge_train.fuse(model, SGD(lr=0.05), schedule="deferred")
        loss = mlp_loss(run(model), mlp_batches(1)[0])
        loss.backward(retain_graph=True)
        loss.backward()
        fused.optimizer.step()
        return model

    assert_same_bits(after(lambda model: model), after(compiled))
    model = mlp()
    forge_train.fuse(model, AdamW(), schedule="deferred")
    x = torch.randn(3, 19, requires_grad=True)
    y = compiled(model)(x).sum()
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        torch.autograd.grad(y, x, create_graph=True)[0].square().sum().backward()


def test_layers_of_one_shape_share_a_graph():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(12)))
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model:
        layer.compile(backend=counter, fullgraph=True)
    model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1
    assert all(len(weight.segments) == 1 for weight in fused.engine.fused)


def test_tokens_are_dynamic():
    def graphs(model):
        counter = CompileCounterWithBackend("aot_eager")
        net = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for tokens in (3, 8, 21, 5):
            net(torch.randn(tokens, 19)).sum().backward()
        torch._dynamo.reset()
        return counter.frame_count

    plain, model = mlp(), mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    assert graphs(model) == graphs(plain) < 4
    assert [segment.x.shape[0] for segment in fused.engine.fused[0].segments] == [3, 8, 21, 5]


def test_a_graph_outlives_remove_and_says_so():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    net, batch = compiled(model), mlp_batches(1)[0]
    mlp_loss(net, batch).backward()
    fused.remove()
    mlp_loss(net, batch).backward()
    assert model[0].weight.grad is not None
    key = torch.tensor([float(2**40)], dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no longer exists"):
        torch.ops.forge.linear(torch.randn(2, 3), torch.randn(4, 3), None, key)


def test_the_operators_are_declared_as_they_behave():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    weight = fused.engine.fused[0]
    x = torch.randn(4, 19, requires_grad=True)
    arguments = (x, model[0].weight.detach(), model[0].bias.detach(), weight.key)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.forge.linear.default, arguments, test_utils=checks)
    use = torch.ops.forge.linear(*arguments)[1]
    value = torch.ops.forge.value_of(x)
    arguments = (torch.randn(4, 33), x.detach(), value, use, True, True, 0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.forge.linear_backward.default, arguments, test_utils=checks)


def test_copies_of_a_compiled_model_are_plain():
    model = mlp()
    forge_train.fuse(model, AdamW(), schedule="deferred")
    net, batch = compiled(model), mlp_batches(1)[0]
    mlp_loss(net, batch).backward()
    other = copy.deepcopy(model)
    mlp_loss(compiled(other), batch).backward()
    assert other[0].weight.grad is not None
