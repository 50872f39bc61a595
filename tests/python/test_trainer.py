"""``transformers.Trainer`` with a fused model does what it does with torch's AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_same_bits, worst
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import forge_train
from forge_train.integrations.transformers import connect, fuse_for_trainer


def llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
            tie_word_embeddings=False, pad_token_id=0,
        )
    )  # fmt: skip


def data(count=32):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(1, 48, (count, 10), generator=generator)
    # Sequences of several lengths: the Trainer weighs micro-batches by their tokens.
    labels = [row.masked_fill(torch.arange(10) > 4 + i % 6, -100) for i, row in enumerate(rows)]
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def arguments(path, **options):
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3, "weight_decay": 0.1, "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(path), **{**defaults, **options})


def fused_trainer(model, args, callbacks=(), **options):
    fused = fuse_for_trainer(model, args, **options)
    trainer = Trainer(
        model=model, args=args, train_dataset=data(), optimizers=(fused.optimizer, None),
        callbacks=list(callbacks),
    )  # fmt: skip
    connect(trainer, fused)
    return trainer, fused


def test_it_trains_as_with_torchs_adamw(tmp_path):
    model, stock_model = llama(), llama()
    args = arguments(tmp_path / "stock", optim="adamw_torch")
    stock = Trainer(model=stock_model, args=args, train_dataset=data())
    stock.train()
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            reported.append(dict(logs))

    args = arguments(tmp_path / "fused")
    trainer, fused = fused_trainer(model, args, [Reporter()])
    assert fused.optimizer.max_norm == 0.5 and args.max_grad_norm == 0
    trainer.train()
    assert len(fused.engine.fused) == 15
    assert all(weight.parameter.grad is None for weight in fused.engine.fused)
    assert worst(model, stock_model) < 1e-4
    for mine, torchs, told in zip(
        trainer.state.log_history[:6], stock.state.log_history[:6], reported, strict=False
    ):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert mine[key] == pytest.approx(torchs[key], rel=1e-3)
        assert told["grad_norm"] == mine["grad_norm"]
    assert any(entry["grad_norm"] > 0.5 for entry in trainer.state.log_history[:6])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    formats = {"state_format": "q8"}
    whole, first = llama(), llama()
    fused_trainer(whole, arguments(tmp_path / "whole"), **formats)[0].train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    options = {"save_strategy": "steps", "save_steps": 3}
    trainer, _ = fused_trainer(first, arguments(tmp_path / "parts", **options), [Stop()], **formats)
    trainer.train()
    second = llama()
    trainer, fused = fused_trainer(second, arguments(tmp_path / "parts", **options), **formats)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert fused.engine.fused[0].step == 6
    assert_same_bits(second, whole)
    assert worst(first, whole) > 0


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"bf16": True}),
        (torch.bfloat16, {}),
        (torch.float32, {"gradient_checkpointing": True, "max_grad_norm": 0.0}),
        (torch.float32, {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}),
    ],
)
def test_common_arguments(tmp_path, dtype, options):
    model = llama().to(dtype)
    before = copy.deepcopy(model)
    trainer, fused = fused_trainer(model, arguments(tmp_path, **options))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(0 < loss < 5 for loss in losses)
    assert fused.optimizer.skipped_steps == 0
    factors = {weight.linear.spec.factor_dtype for weight in fused.engine.fused}
    assert factors == {torch.bfloat16 if options.get("bf16") else dtype}
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old)


def test_weight_decay_is_the_trainers(tmp_path):
    model = llama()
    fused = fuse_for_trainer(model, arguments(tmp_path))
    decay = {
        name: group["weight_decay"]
        for group in fused.optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    assert decay["model.layers.0.mlp.up_proj.weight"] == 0.1
    assert decay["model.layers.0.input_layernorm.weight"] == decay["model.norm.weight"] == 0.0


def test_what_would_train_something_else_is_refused(tmp_path):
    model = llama()
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"max_norm=1\.0.*max_grad_norm"):
        fuse_for_trainer(model, args, max_norm=1.0)
    with pytest.raises(ValueError, match=r"micro_batches=4.*gradient_accumulation_steps"):
        fuse_for_trainer(model, args, micro_batches=4)
    scaled = arguments(tmp_path)
    scaled.fp16 = True
    with pytest.raises(ValueError, match=r"fp16=True.*bf16"):
        fuse_for_trainer(model, scaled)
    assert type(model.lm_head) is torch.nn.Linear and args.max_grad_norm == 0.5

    fused = forge_train.fuse(model, forge_train.AdamW(), max_norm=1.0)
    pair = (fused.optimizer, None)
    trainer = Trainer(model=model, args=args, train_dataset=data(), optimizers=pair)
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5.*fuse_for_trainer"):
        connect(trainer, fused)
    args.max_grad_norm = 0.0
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2.*micro_batches=1"):
        connect(trainer, fused)
    other = Trainer(model=llama(), args=args, train_dataset=data())
    with pytest.raises(ValueError, match=r"optimizers=\(fused\.optimizer"):
        connect(other, fused)
    args.gradient_accumulation_steps = 1
    connect(trainer, fused)
    args.max_grad_norm = 1.0
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0"):
        trainer.train()
    assert_same_bits(model, before)
