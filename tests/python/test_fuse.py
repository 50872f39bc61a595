"""What ``fuse`` takes, what it leaves and says, errors, and ``remove``."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import Transformer, assert_same_bits, mlp, mlp_batches, mlp_loss

import forge_train
from forge_train import SGD, AdamW, Lion, parameter_ids


class Mixed(torch.nn.Module):
    """One of everything that is left to ordinary gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.tied = torch.nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embedding.weight
        self.frozen = torch.nn.Linear(8, 8)
        self.frozen.weight.requires_grad_(False)
        self.plain = torch.nn.Linear(8, 8)
        self.excluded = torch.nn.Linear(8, 8)
        self.hooked = torch.nn.Linear(8, 8)
        self.hooked.weight.register_hook(lambda grad: grad)
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in (self.frozen, self.plain, self.excluded, self.hooked, self.normed):
            x = x + torch.tanh(layer(x))
        x = x + self.attention(x, x, x)[0]
        return self.tied(self.norm(x))


def test_the_summary_says_what_was_left_and_why():
    model = Mixed()
    fused = forge_train.fuse(model, AdamW(), exclude=("excluded",))
    why = {row.name: row.note for row in fused.rows}
    assert [row.name for row in fused.rows if row.fused] == ["plain.weight"]
    assert why["plain.weight"] == "fused, fp32 weight"
    assert "tied: one parameter under embedding.weight, tied.weight" in why["embedding.weight"]
    assert "frozen" in why["frozen.weight"]
    assert "excluded" in why["excluded.weight"]
    assert "hook" in why["hooked.weight"]
    assert "bias" in why["plain.bias"]
    assert "NonDynamicallyQuantizableLinear" in why["attention.out_proj.weight"]
    assert "MultiheadAttention" in why["attention.in_proj_weight"]
    assert "LayerNorm" in why["norm.weight"]
    assert any("ParametrizationList" in note for note in why.values())
    assert len(fused.rows) == len(list(model.parameters()))
    for row in fused.rows:
        assert row.name in str(fused)


def test_the_rest_is_trained_by_the_same_rule():
    stock_model = Mixed()
    model = copy.deepcopy(stock_model)
    # Not Adam: the gradient of the keys' bias is zero but for rounding, which Adam blows up.
    rule = SGD(lr=0.05, momentum=0.9)
    fused = forge_train.fuse(model, rule, exclude=("excluded",), max_norm=1.0)
    trained = [p for p in stock_model.parameters() if p.requires_grad]
    stock = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    for _ in range(10):
        tokens = torch.randint(0, 11, (5, 3))
        for net, optimizer in ((stock_model, stock), (model, fused.optimizer)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                net(tokens).flatten(0, 1), tokens.flatten()
            ).backward()
            if optimizer is stock:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    for a, b in zip(model.parameters(), stock_model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_lion_trains_everything():
    model = Transformer()
    fused = forge_train.fuse(model, Lion(lr=1e-3))
    before = copy.deepcopy(model)
    model(torch.randint(0, 40, (2, 5))).square().mean().backward()
    fused.optimizer.step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert (new - old).abs().max() <= 1.01e-3, name
        assert not torch.equal(new, old), name


def test_rest_false_leaves_it_to_the_user():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=0.1), rest=False)
    before = copy.deepcopy(model)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()
    assert torch.equal(model[0].bias, before[0].bias)
    assert model[0].bias.grad is not None
    assert not torch.equal(model[0].weight, before[0].weight)


def test_no_fused_weight_ever_has_a_gradient():
    model = mlp()
    fused = forge_train.fuse(model, AdamW())
    mlp_loss(model, mlp_batches(1)[0]).backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None
    fused.optimizer.step()


def test_remove_restores_the_model():
    model = mlp()
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.remove()
    for name, module in model.named_modules():
        assert set(vars(module)) == set(state[name])
        assert type(module).__module__.startswith("torch.nn")
    for parameter in model.parameters():
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)
    assert not model._load_state_dict_post_hooks
    mlp_loss(model, mlp_batches(1)[0]).backward()
    assert model[0].weight.grad is not None
    with pytest.raises(RuntimeError, match="remove"):
        fused.optimizer.step()
    fused.remove()
    model.zero_grad()
    again = forge_train.fuse(copy.deepcopy(model), AdamW())
    assert len(again.engine.fused) == 2


def test_fusing_twice_fuses_nothing_the_second_time():
    model = mlp()
    forge_train.fuse(model, AdamW())
    with pytest.raises(ValueError, match="already fused"):
        forge_train.fuse(model, AdamW())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_plain_models(copier):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=0.1))
    other = copier(model)
    assert len(forge_train.fuse(copier(model), AdamW()).engine.fused) == 2
    before = copy.deepcopy(other)
    mlp_loss(other, mlp_batches(1)[0]).backward()
    assert other[0].weight.grad is not None
    fused.optimizer.step()
    assert_same_bits(model, before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    mlp().load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": "later"}, ValueError, "schedule='later'.*immediate"),
        ({"weight_format": "fp8"}, ValueError, r"weight_format='fp8'.*bf16\+16"),
        ({"state_format": "q4"}, ValueError, "state_format='q4'.*q8"),
        ({"rest_state_format": "q4"}, ValueError, "rest_state_format='q4'.*q8"),
        ({"state_format": ("fp32",)}, ValueError, "rule .adamw. has 2 states"),
        ({"weight_rounding": "up"}, ValueError, "weight_rounding='up'.*stochastic"),
        ({"fp32_products": "tf32"}, ValueError, "fp32_products='tf32'.*bf16x3"),
        ({"exclude": ("nothing",)}, ValueError, "exclude='nothing'"),
        ({"micro_batches": 0}, ValueError, "micro_batches=0"),
        ({"schedule": "immediate", "max_norm": 1.0}, ValueError, "immediate.*deferred"),
        ({"schedule": "immediate", "micro_batches": 2}, ValueError, "immediate.*deferred"),
        ({"max_norm": -1.0}, ValueError, "max_norm=-1.0"),
        ({"groups": [{}]}, ValueError, r"groups\[0\] has no 'params'"),
        ({"groups": [{"params": [], "momentum": 1}]}, ValueError, r"momentum.*AdamW"),
        ({"groups": [{"params": [torch.zeros(3)]}]}, ValueError, "not in the model"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(arguments, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        forge_train.fuse(model, AdamW(), **arguments)
    assert type(model[0]) is torch.nn.Linear
    assert not model._load_state_dict_post_hooks


def test_rules_refuse_what_torch_refuses():
    with pytest.raises(ValueError, match="nesterov"):
        SGD(nesterov=True)
    with pytest.raises(TypeError, match=r"forge_train\.AdamW"):
        forge_train.fuse(mlp(), torch.optim.AdamW)


def test_unsupported_dtypes_are_left_or_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3).half())
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float16"):
        forge_train.fuse(model, AdamW())
    fused = forge_train.fuse(model, AdamW(), rest=False)
    assert not any(row.fused for row in fused.rows)


@pytest.mark.parametrize("lr", [float("nan"), -1.0, 1e300])
def test_bad_hyperparameters_fail_before_any_update(lr):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    before = copy.deepcopy(model)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr"):
        fused.optimizer.step()
    assert_same_bits(model, before)


def test_fixed_options_cannot_change_later():
    model = mlp()
    fused = forge_train.fuse(model, SGD(momentum=0.9), schedule="deferred")
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="fixed at fuse"):
        fused.optimizer.step()


def test_the_optimizer_refuses_what_it_cannot_do():
    fused = forge_train.fuse(mlp(), AdamW())
    with pytest.raises(NotImplementedError, match="closure"):
        fused.optimizer.step(lambda: 0.0)
    with pytest.raises(NotImplementedError, match="groups="):
        fused.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(fused.optimizer)


def test_wrong_input_dtype_and_width_are_clear():
    model = mlp().bfloat16()
    forge_train.fuse(model, AdamW())
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 19))


def test_sparse_gradients_are_refused():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4, sparse=True), torch.nn.Linear(4, 2))
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a sparse gradient"):
        fused.optimizer.step()


def test_auto_says_what_it_chose(caplog):
    model = mlp()
    with caplog.at_level("INFO", logger="forge_train"):
        forge_train.fuse(model, AdamW(), schedule="auto", max_norm=1.0)
        mlp_loss(model, mlp_batches(1)[0]).backward()
    assert any("0.weight: schedule" in message for message in caplog.messages)


def test_weights_that_would_draw_the_same_noise_are_refused():
    # "plumless" and "buckeroo" are the textbook pair of words with one CRC-32.
    parameter_ids.check_distinct(["plumless", "plumless"])
    with pytest.raises(ValueError, match="buckeroo and plumless have the same parameter id"):
        parameter_ids.check_distinct(["plumless", "buckeroo"])


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "q8"])
def test_the_rest_has_states_of_its_own_format(state_format):
    model = Transformer(vocabulary=200, width=24)
    fused = forge_train.fuse(model, AdamW(lr=1e-3), rest_state_format=state_format)
    tokens = torch.randint(0, 200, (2, 9))
    for _ in range(3):
        model(tokens).square().mean().backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
    storage = fused.optimizer.storage_of(model.embedding.weight)
    held = storage.bytes - storage.weight.nbytes
    bytes_each = {"fp32": 8, "bf16": 4, "q8": 2 + 2 * 4 / 128}[state_format]
    assert held == pytest.approx(bytes_each * model.embedding.weight.numel(), rel=0.01)
    fp32 = fused.optimizer.storage_of(model.blocks[0].up.weight)
    assert fp32.bytes - fp32.weight.nbytes == 8 * model.blocks[0].up.weight.numel()
    resumed = copy.deepcopy(model)
    again = forge_train.fuse(resumed, AdamW(lr=1e-3), rest_state_format=state_format)
    again.optimizer.load_state_dict(copy.deepcopy(fused.optimizer.state_dict()))
    for net, each in ((model, fused), (resumed, again)):
        net(tokens).square().mean().backward()
        each.optimizer.step()
    assert_same_bits(model, resumed)
