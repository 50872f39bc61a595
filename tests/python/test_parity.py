"""``fuse`` against torch.optim: rules, schedules, clipping, accumulation, groups, LR schedulers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import (
    Transformer,
    assert_same_bits,
    mlp,
    mlp_batches,
    mlp_loss,
    tokens_loss,
    worst,
)

import forge_train
from forge_train import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdEMAMix,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    Rule,
    Signum,
)

STEPS = 50

CASES: list[tuple[Rule, type[torch.optim.Optimizer]]] = [
    (SGD(lr=0.05), torch.optim.SGD),
    (SGD(lr=0.001, weight_decay=0.1, maximize=True), torch.optim.SGD),
    (SGD(lr=0.02, momentum=0.9), torch.optim.SGD),
    (SGD(lr=0.02, momentum=0.9, dampening=0.3, weight_decay=0.01), torch.optim.SGD),
    (SGD(lr=0.02, momentum=0.8, nesterov=True, weight_decay=0.01), torch.optim.SGD),
    (Adam(lr=2e-3), torch.optim.Adam),
    (Adam(lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1), torch.optim.Adam),
    (AdamW(lr=2e-3), torch.optim.AdamW),
    (AdamW(lr=2e-3, betas=(0.8, 0.95), weight_decay=0.3, maximize=True), torch.optim.AdamW),
    (Adam(lr=2e-3, amsgrad=True, weight_decay=0.1), torch.optim.Adam),
    (AdamW(lr=2e-3, betas=(0.8, 0.9), amsgrad=True), torch.optim.AdamW),
    (Adamax(lr=2e-3, weight_decay=0.01), torch.optim.Adamax),
    (NAdam(lr=2e-3), torch.optim.NAdam),
    (NAdam(lr=2e-3, weight_decay=0.1, momentum_decay=0.5), torch.optim.NAdam),
    (NAdam(weight_decay=0.1, decoupled_weight_decay=True), torch.optim.NAdam),
    (RAdam(lr=2e-3, weight_decay=0.1), torch.optim.RAdam),
    (RAdam(betas=(0.8, 0.95), weight_decay=0.1, decoupled_weight_decay=True), torch.optim.RAdam),
    (RMSprop(lr=1e-3), torch.optim.RMSprop),
    (RMSprop(lr=1e-3, alpha=0.9, momentum=0.8, weight_decay=0.01), torch.optim.RMSprop),
    (RMSprop(lr=1e-3, alpha=0.9, centered=True, maximize=True), torch.optim.RMSprop),
    (RMSprop(lr=1e-3, alpha=0.9, momentum=0.8, centered=True), torch.optim.RMSprop),
    (Adagrad(), torch.optim.Adagrad),
    (
        Adagrad(lr_decay=0.1, weight_decay=0.01, initial_accumulator_value=0.3),
        torch.optim.Adagrad,
    ),
    (Adadelta(), torch.optim.Adadelta),
    (Adadelta(rho=0.8, weight_decay=0.01, maximize=True), torch.optim.Adadelta),
    (Rprop(lr=1e-3), torch.optim.Rprop),
    (Rprop(etas=(0.4, 1.1), step_sizes=(1e-5, 1e-2)), torch.optim.Rprop),
    (ASGD(), torch.optim.ASGD),
    (ASGD(lr=0.02, lambd=0.01, alpha=0.6, t0=10, weight_decay=0.01), torch.optim.ASGD),
]
# Signs decide: over a trajectory of rounded gradients these part.
BY_SIGN = (Rprop,)


def _train_stock(model, optimizer, batches, max_norm=None):
    for batch in batches:
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def _train_fused(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("schedule", ["immediate", "deferred"])
@pytest.mark.parametrize(
    ("rule", "stock"),
    [case for case in CASES if not isinstance(case[0], BY_SIGN)],
    ids=lambda value: str(value)[:60],
)
def test_a_model_follows_torch_in_fp64(rule, stock, schedule):
    exact = mlp().double()
    single, fused_model = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    batches = mlp_batches(STEPS)
    _train_stock(exact, stock(exact.parameters(), **rule.options), batches)
    _train_stock(single, stock(single.parameters(), **rule.options), batches)
    fused = forge_train.fuse(fused_model, rule, schedule=schedule)
    _train_fused(fused_model, fused.optimizer, batches)
    # torch's own fp32 run is the yardstick: the same rounding, elsewhere.
    assert worst(fused_model, exact) < 3 * worst(single, exact) + 2e-6


@pytest.mark.parametrize(("rule", "stock"), CASES, ids=lambda value: str(value)[:60])
def test_a_rule_follows_torch_in_fp64_given_exact_gradients(rule, stock):
    """Factors of small integers: the GEMM is exact, so what differs is the rule's rounding only."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(23, 17, generator=generator)
    exact = torch.nn.Parameter(weight.double())
    reference = stock([exact], **rule.options)
    linear = forge_train.Linear(forge_train.LinearSpec(23, 17, rule))
    storage = linear.allocate(weight)
    for step in range(1, STEPS + 1):
        segment = _integer_factors(generator, 11, 23, 17)
        exact.grad = segment.dy.double().T @ segment.x.double()
        reference.step()
        linear.update([segment], storage, linear.scalars({}, step=step, seed=0))
        scale = exact.abs().max().item()
        assert (weight.double() - exact).abs().max().item() < 1e-6 * scale * math.sqrt(step) + 1e-7


def _integer_factors(generator, tokens, out_features, in_features):
    from forge_train.native import Segment

    dy = torch.randint(-4, 5, (tokens, out_features), generator=generator).float() / 8
    x = torch.randint(-4, 5, (tokens, in_features), generator=generator).float() / 8
    return Segment.of(dy, x)


@pytest.mark.parametrize("rule", [Lion(lr=1e-3, weight_decay=0.1), Lion(maximize=True)], ids=str)
def test_lion_follows_its_definition_in_fp64(rule):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(23, 17, generator=generator)
    exact, moment = weight.double(), torch.zeros(23, 17, dtype=torch.float64)
    linear = forge_train.Linear(forge_train.LinearSpec(23, 17, rule))
    storage = linear.allocate(weight)
    beta1, beta2 = rule.betas
    for step in range(1, STEPS + 1):
        segment = _integer_factors(generator, 11, 23, 17)
        gradient = segment.dy.double().T @ segment.x.double() * (-1 if rule.maximize else 1)
        exact *= 1 - rule.lr * rule.weight_decay
        exact -= rule.lr * torch.sign(beta1 * moment + (1 - beta1) * gradient)
        moment = beta2 * moment + (1 - beta2) * gradient
        linear.update([segment], storage, linear.scalars({}, step=step, seed=0))
    assert (weight.double() - exact).abs().max().item() < 5e-6


@pytest.mark.parametrize(
    "rule", [Signum(lr=1e-3, weight_decay=0.1), Signum(momentum=0.0, maximize=True)], ids=str
)
def test_signum_follows_its_definition_in_fp64(rule):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(23, 17, generator=generator)
    exact, moment = weight.double(), torch.zeros(23, 17, dtype=torch.float64)
    linear = forge_train.Linear(forge_train.LinearSpec(23, 17, rule))
    storage = linear.allocate(weight)
    # Where the average is within rounding of zero, its sign is anybody's.
    clear = torch.ones_like(exact, dtype=torch.bool)
    for step in range(1, STEPS + 1):
        segment = _integer_factors(generator, 11, 23, 17)
        gradient = segment.dy.double().T @ segment.x.double() * (-1 if rule.maximize else 1)
        exact *= 1 - rule.lr * rule.weight_decay
        moment = rule.momentum * moment + (1 - rule.momentum) * gradient
        exact -= rule.lr * torch.sign(moment)
        clear &= (rule.momentum == 0) | (moment.abs() > 1e-5)
        linear.update([segment], storage, linear.scalars({}, step=step, seed=0))
    assert clear.double().mean().item() > 0.9
    # (1 − lr · weight_decay) in fp32, 50 times.
    assert (weight.double() - exact)[clear].abs().max().item() < 1e-5


@pytest.mark.parametrize(
    "rule",
    [
        AdEMAMix(lr=2e-3, weight_decay=0.1),
        AdEMAMix(betas=(0.8, 0.9, 0.99), alpha=3.0, warmup=30, maximize=True),
    ],
    ids=str,
)
def test_ademamix_follows_its_definition_in_fp64(rule):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(23, 17, generator=generator)
    exact = weight.double()
    fast, slow, square = (torch.zeros_like(exact) for _ in range(3))
    linear = forge_train.Linear(forge_train.LinearSpec(23, 17, rule))
    storage = linear.allocate(weight)
    beta1, beta2, beta3_last = rule.betas
    for step in range(1, STEPS + 1):
        segment = _integer_factors(generator, 11, 23, 17)
        gradient = segment.dy.double().T @ segment.x.double() * (-1 if rule.maximize else 1)
        done = min(1.0, step / rule.warmup) if rule.warmup else 1.0
        first, last = math.log(beta1), math.log(beta3_last)
        beta3 = min(math.exp(first * last / ((1 - done) * last + done * first)), beta3_last)
        fast = beta1 * fast + (1 - beta1) * gradient
        slow = beta3 * slow + (1 - beta3) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        above = fast / (1 - beta1**step) + rule.alpha * done * slow
        exact *= 1 - rule.lr * rule.weight_decay
        exact -= rule.lr * above / ((square / (1 - beta2**step)).sqrt() + rule.eps)
        linear.update([segment], storage, linear.scalars({}, step=step, seed=0))
    assert (weight.double() - exact).abs().max().item() < 5e-6


def test_a_transformer_follows_torch():
    stock_model = Transformer()
    model = copy.deepcopy(stock_model)
    fused = forge_train.fuse(model, AdamW(lr=3e-3), max_norm=0.5)
    assert sum(row.fused for row in fused.rows) == 9
    stock = torch.optim.AdamW(stock_model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        tokens = torch.randint(0, 40, (3, 12), generator=generator)
        stock.zero_grad()
        loss = tokens_loss(stock_model, tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stock_model.parameters(), 0.5)
        stock.step()
        fused.optimizer.zero_grad()
        fused_loss = tokens_loss(model, tokens)
        fused_loss.backward()
        fused.optimizer.step()
        assert fused_loss.item() == pytest.approx(loss.item(), abs=1e-4)
        assert fused.optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-3)


@pytest.mark.parametrize("rule", [AdamW(lr=1e-2), SGD(momentum=0.9), Lion()], ids=str)
def test_schedules_agree_bit_for_bit_on_one_micro_batch(rule):
    models = {}
    start = mlp()
    for schedule in ("immediate", "deferred", "accumulate", "auto"):
        model = copy.deepcopy(start)
        fused = forge_train.fuse(model, rule, schedule=schedule)
        _train_fused(model, fused.optimizer, mlp_batches(10))
        models[schedule] = model
    for model in models.values():
        assert_same_bits(model, models["deferred"])


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("schedule", ["deferred", "accumulate", "auto"])
def test_clipping_equals_clip_grad_norm(schedule, max_norm):
    stock_model = mlp()
    model = copy.deepcopy(stock_model)
    rule = SGD(lr=0.1)  # Adam would hide a wrong coefficient: it does not feel the scale.
    fused = forge_train.fuse(model, rule, schedule=schedule, max_norm=max_norm)
    batches = mlp_batches(20)
    _train_stock(stock_model, torch.optim.SGD(stock_model.parameters(), lr=0.1), batches, max_norm)
    _train_fused(model, fused.optimizer, batches)
    assert worst(model, stock_model) < 2e-6
    assert (fused.optimizer.last.coefficient < 1) == (max_norm < 1)


@pytest.mark.parametrize("schedule", ["deferred", "accumulate", "auto"])
def test_gradient_accumulation_equals_torch(schedule):
    stock_model = mlp()
    model = copy.deepcopy(stock_model)
    stock = torch.optim.AdamW(stock_model.parameters(), lr=1e-2)
    fused = forge_train.fuse(
        model, AdamW(lr=1e-2), schedule=schedule, micro_batches=4, max_norm=1.0
    )
    batches = mlp_batches(40)
    for start in range(0, 40, 4):
        for batch in batches[start : start + 4]:
            (mlp_loss(stock_model, batch) / 4).backward()
            (mlp_loss(model, batch) / 4).backward()
        torch.nn.utils.clip_grad_norm_(stock_model.parameters(), 1.0)
        stock.step()
        stock.zero_grad()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
    assert worst(model, stock_model) < 1e-5


def test_lr_schedulers_drive_it():
    stock_model = mlp()
    model = copy.deepcopy(stock_model)
    stock = torch.optim.AdamW(stock_model.parameters(), lr=1e-2)
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="immediate")
    schedulers = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            ],
            milestones=[5],
        )
        for optimizer in (stock, fused.optimizer)
    ]
    for batch in mlp_batches(25):
        _train_stock(stock_model, stock, [batch])
        _train_fused(model, fused.optimizer, [batch])
        for scheduler in schedulers:
            scheduler.step()
        assert fused.optimizer.param_groups[0]["lr"] == stock.param_groups[0]["lr"]
    assert worst(model, stock_model) < 1e-5


def test_param_groups_override_options():
    stock_model = mlp()
    model = copy.deepcopy(stock_model)

    def groups(model):
        decayed = [p for p in model.parameters() if p.dim() > 1]
        other = [p for p in model.parameters() if p.dim() == 1]
        return [
            {"params": decayed, "weight_decay": 0.5},
            {"params": other, "weight_decay": 0.0, "lr": 5e-2, "betas": (0.5, 0.9)},
        ]

    stock = torch.optim.AdamW(groups(stock_model), lr=1e-2)
    fused = forge_train.fuse(model, AdamW(lr=1e-2), groups=groups(model))
    batches = mlp_batches(20)
    _train_stock(stock_model, stock, batches)
    _train_fused(model, fused.optimizer, batches)
    assert worst(model, stock_model) < 2e-5


def test_a_weight_without_gradient_is_left_alone():
    """As torch does for ``grad is None``: no decay, no step count."""
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="deferred")
    before = copy.deepcopy(model)
    fused.optimizer.step()
    assert_same_bits(model, before)
    assert fused.optimizer.state_dict()["state"] == {}


def test_a_nonfinite_gradient_skips_the_deferred_step_as_a_whole():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="deferred")
    before = copy.deepcopy(model)
    x, y = mlp_batches(1)[0]
    x[3, 4] = float("inf")
    (mlp_loss(model, (x, y))).backward()
    fused.optimizer.step()
    assert_same_bits(model, before)
    assert not fused.optimizer.last.ok
    assert "0.weight" in fused.optimizer.last.nonfinite_layers
    assert fused.optimizer.skipped_steps == 1
    fused.optimizer.zero_grad()
    _train_fused(model, fused.optimizer, mlp_batches(1))
    assert fused.optimizer.last.ok


def test_a_nonfinite_tile_never_reaches_a_weight_under_immediate():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="immediate")
    x, y = mlp_batches(1)[0]
    x[3, 4] = float("nan")
    mlp_loss(model, (x, y)).backward()
    fused.optimizer.step()
    assert model[0].weight.isfinite().all()
    assert fused.optimizer.last.nonfinite_tiles["0.weight"] > 0


def test_inputs_of_any_leading_shape_and_stride():
    stock_model = torch.nn.Linear(6, 5)
    model = copy.deepcopy(torch.nn.Sequential(stock_model))
    fused = forge_train.fuse(model, SGD(lr=0.01), schedule="immediate")
    stock = torch.optim.SGD(stock_model.parameters(), lr=0.01)
    wide = torch.randn(4, 3, 12)
    for x in (wide[..., ::2], wide[..., 3:9], wide[..., :6].transpose(0, 1), wide[0, 0, :6]):
        inputs = [x.detach().requires_grad_(), x.detach().requires_grad_()]
        (stock_model(inputs[0])[..., 1:4] ** 2).sum().backward()  # dY is zero-padded
        (model(inputs[1])[..., 1:4] ** 2).sum().backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
        for optimizer in (stock, fused.optimizer):
            optimizer.step()
            optimizer.zero_grad()
        assert worst(model, stock_model) < 2e-6
    model(wide[..., :6]).sum().backward()  # dY is one element, expanded
    fused.optimizer.step()


@pytest.mark.parametrize("need_x", [False, True])
def test_no_token_at_all(need_x):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    fused = forge_train.fuse(model, SGD(lr=0.1), schedule="deferred")
    before = copy.deepcopy(model)
    x = torch.zeros(0, 6, requires_grad=need_x)
    model(x).sum().backward()
    fused.optimizer.step()
    assert_same_bits(model, before)
