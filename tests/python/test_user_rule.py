"""Rules of one's own: the documented example, the built-in rules rewritten, and every mistake."""

from __future__ import annotations

import copy
import importlib.util
import itertools

import pytest
import torch
from conftest import ROOT, assert_same_bits, mlp, mlp_batches, mlp_loss

import forge_train
from forge_train import Lion, UserRule

FORMATS = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16+16", "q8")]
_names = (f"rule_{i}" for i in itertools.count())


def example():
    """examples/user_rule.py, whose rule docs/rules.md shows."""
    spec = importlib.util.spec_from_file_location("user_rule", ROOT / "examples" / "user_rule.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lion(g, w, m, *, lr, weight_decay, beta1, beta2, step):
    """src/rule/lion.rs with torch's operations; constants are rounded to fp32 there, too."""
    numbers = (0.9, 1 - 0.9, 0.99, 1 - 0.99, 1 - 1e-2 * 0.1)
    b1, i1, b2, i2, shrink = (torch.tensor(x, dtype=torch.float32) for x in numbers)
    u = b1 * m + i1 * g
    w.mul_(shrink).sub_(lr * u.sign())
    m.copy_(b2 * m + i2 * g)


MY_LION = {"states": ["exp_avg"], "cpu": lion, "lr": 1e-2, "beta1": 0.9, "beta2": 0.99}


def train(rule, weight_format="fp32", state_format="fp32", **fuse_options):
    torch.manual_seed(7)
    model = mlp().to(torch.float32 if weight_format == "fp32" else torch.bfloat16)
    fused = forge_train.fuse(
        model, rule, weight_format=weight_format, state_format=state_format, **fuse_options
    )
    for batch in mlp_batches(6):
        mlp_loss(model, batch).backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
    return model, fused


@pytest.mark.parametrize(("weight_format", "state_format"), FORMATS)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"schedule": "accumulate"}])
def test_a_rewritten_lion_is_lion_bit_for_bit(weight_format, state_format, options):
    rule = UserRule("my_lion", weight_decay=0.1, **MY_LION)
    stock = Lion(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    own, _ = train(rule, weight_format, state_format, **options)
    built_in, _ = train(stock, weight_format, state_format, **options)
    assert_same_bits(own, built_in)


def test_the_documented_rule_trains_and_is_exact():
    """Against the same lines in fp64 with autograd's gradients: fp32's rounding remains."""
    module = example()
    model = mlp()
    reference = copy.deepcopy(model).double()
    states = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    fused = forge_train.fuse(model, module.RULE)
    options = {k: v for k, v in module.RULE.options.items() if k != "maximize"}
    losses = []
    for step, batch in enumerate(mlp_batches(30), start=1):
        loss = mlp_loss(model, batch)
        loss.backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        losses.append(loss.item())
        mlp_loss(reference, batch).backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                module.soft_lion(p.grad, p, states[name], step=step, **options)
                p.grad = None
    assert losses[-1] < 0.8 * losses[0]
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=2e-5)


def test_the_documented_rule_is_shown_as_it_is():
    source = (ROOT / "examples" / "user_rule.py").read_text()
    shown = source.split("[start:rule]\n")[1].split("# fmt: skip")[0]
    text = (ROOT / "docs" / "rules.md").read_text()
    # Formatters disagree about blank lines.
    assert " ".join(shown.split()) in " ".join(text.split())


def test_options_reach_the_function_and_groups_override_them():
    seen = {}

    def note(g, w, *, lr, weight_decay, gamma, step):
        seen.setdefault(step, set()).add((float(lr), float(weight_decay), float(gamma)))
        w.sub_(lr * g)

    rule = UserRule("note", cpu=note, lr=0.25, gamma=2.0)
    seen.clear()
    model = torch.nn.Linear(3, 2, bias=False)
    fused = forge_train.fuse(model, rule)
    for lr in (0.25, 0.5):
        fused.optimizer.param_groups[0]["lr"] = lr
        fused.optimizer.param_groups[0]["gamma"] = 4 * lr
        model(torch.ones(1, 3)).sum().backward()
        fused.optimizer.step()
    assert seen == {1: {(0.25, 0.0, 1.0)}, 2: {(0.5, 0.0, 2.0)}}
    assert rule.with_options(lr=0.5) == UserRule("note", cpu=note, lr=0.5, gamma=2.0) != rule
    with pytest.raises(TypeError, match=r"\['delta'\] are no options of rule 'note'; it has lr"):
        rule.with_options(delta=1)


def test_a_checkpoint_of_ones_own_rule_resumes_bit_for_bit():
    rule = UserRule("my_lion", weight_decay=0.1, **MY_LION)
    model, fused = train(rule)
    saved = copy.deepcopy((model.state_dict(), fused.optimizer.state_dict()))
    assert "exp_avg" in next(iter(saved[1]["state"].values()))
    again = mlp()
    resumed = forge_train.fuse(again, rule)
    again.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    for m, f in ((model, fused), (again, resumed)):
        mlp_loss(m, mlp_batches(1)[0]).backward()
        f.optimizer.step()
    assert_same_bits(model, again)


def test_an_exception_in_the_function_is_the_cause_and_the_tile_is_as_it_was():
    calls = []

    def breaks(g, w, *, step, **_):
        calls.append(step)
        w.zero_()
        if len(calls) > 1:
            raise ArithmeticError("out of luck")

    model = torch.nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    fused = forge_train.fuse(model, UserRule("breaks", cpu=breaks))
    with pytest.raises(forge_train.ForgeRuleError, match=r"rule 'breaks': its CPU function") as e:
        model(torch.ones(2, 4)).sum().backward()
        fused.optimizer.step()
    assert isinstance(e.value.__cause__, ArithmeticError)
    assert torch.equal(model.weight, before)


def descend(g, w, *states, lr, step, **_):
    w.sub_(lr * g)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "adamw"}, ValueError, "'adamw' is a built-in rule"),
        ({"name": "two words"}, ValueError, "'two words' cannot be a name"),
        ({"states": list("abcd")}, ValueError, "n_states: 4; a rule has at most 3"),
        ({"non_negative": ["v"]}, ValueError, r"non_negative=\['v'\] are not among states"),
        ({"cpu": None}, ValueError, "cuda_source, cpu_function: rule .* has neither"),
        ({"gamma": "big"}, TypeError, "gamma='big' is not a number"),
        ({"w": 1.0, "cpu": None, "cuda": "w -= g;"}, ValueError, "hyper_names: 'w' is taken"),
        ({"cpu": lambda g, w: None}, ValueError, "cpu fails on a tile of 8 elements with 0 states"),
        (
            {"states": ["m"], "cpu": lambda g, w, step, lr, weight_decay: None},
            ValueError,
            "1 states",
        ),
        ({"cpu": lambda g, w, **_: w - g}, ValueError, "it returned Tensor; it must update w"),
        ({"cpu": lambda g, w, **_: None}, ValueError, "cpu left w as it was"),
        ({"per_step": {"b": "1.0"}}, ValueError, "per_step_names: they are for cuda_source"),
        ({"cuda": "w -= lr * (g;"}, ValueError, "'\\(' is never closed"),
        ({"cuda": "while (true) w -= g;"}, ValueError, "line 1: 'while': a loop needs a bound"),
        ({"cuda": "w -= g;", "states": ["m"]}, ValueError, "n_states: 1, but cuda_source never"),
        ({"cuda": "w -= b;", "per_step": {"b": "x = 1"}}, ValueError, "not one expression of C"),
    ],
)
def test_a_mistake_is_named_before_anything_is_defined(change, error, message):
    name = next(_names)
    arguments = {"name": name, "cpu": descend, **change}
    with pytest.raises(error, match=message):
        UserRule(**arguments)
    # The name is still free.
    if "name" not in change:
        UserRule(name, cpu=descend)


def test_another_rule_of_the_same_name_is_refused_and_the_same_one_is_not():
    name = next(_names)
    first = UserRule(name, cpu=descend, lr=0.1)
    assert UserRule(name, cpu=descend, lr=0.1) == first
    assert UserRule(name, cpu=descend, lr=0.2) != first
    with pytest.raises(ValueError, match="another rule of this name was defined"):
        UserRule(name, cpu=descend, beta=0.9)


def test_a_rule_for_gpus_is_refused_on_the_cpu():
    name = next(_names)
    rule = UserRule(name, cuda="w -= lr * g;")
    with pytest.raises(ValueError, match=f"'{name}' has CUDA source and no CPU function"):
        forge_train.fuse(torch.nn.Linear(4, 3), rule)
