"""The estimate against the transformers package's own models, at their published sizes.

On the meta device: sizes, no numbers.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from memory_counter import Counter, flash

from forge_train.estimate import Options, estimate, from_config
from forge_train.estimate.architecture import modules_of
from forge_train.estimate.known_models import KNOWN_MODELS

transformers = pytest.importorskip("transformers")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-3.1-8b", {"tokens": 512}),
    "llama, many tokens": ("llama-3.1-8b", {"tokens": 8192}),
    "llama, fp32": ("llama-3.1-8b", {"tokens": 512, "dtype": "fp32"}),
    "llama, checkpointing": ("llama-3.1-8b", {"tokens": 4096, "checkpointing": True}),
    "llama, eager": ("llama-3.1-8b", {"tokens": 1024, "attention": "eager", "batch": 2}),
    "llama, tied": ("llama-3.2-1b", {"tokens": 512}),
    "qwen2": ("qwen2.5-0.5b", {"tokens": 1024}),
    "qwen3": ("qwen3-8b", {"tokens": 512}),
    "mistral": ("mistral-7b", {"tokens": 512}),
    "gpt2": ("gpt2-xl", {"tokens": 512}),
    "gpt2, checkpointing": ("gpt2", {"tokens": 1024, "checkpointing": True}),
    "gpt_neox": ("pythia-410m", {"tokens": 512}),
    "gpt_neox, checkpointing": ("pythia-2.8b", {"tokens": 1024, "checkpointing": True}),
}


def model_of(config: dict[str, Any], options: Options) -> torch.nn.Module:
    keys = {k: v for k, v in config.items() if k not in ("source", "parameters", "model_type")}
    made = transformers.CONFIG_MAPPING[config["model_type"]](**keys, use_cache=False)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            made, dtype=dtype, attn_implementation=options.attention
        )
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("case", CASES)
def test_a_forward_and_backward(case, monkeypatch):
    name, more = CASES[case]
    # Without a GPU torch multiplies with the mask of a dropout, which a GPU keeps in a byte.
    config = {**KNOWN_MODELS[name]}
    config |= {key: 0.0 for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if key in config}
    options = Options(**more)
    model = model_of(config, options)
    length = options.tokens // options.batch

    def mask(**_inputs: Any) -> torch.Tensor | None:
        # The package's own looks at numbers; sdpa gets none for a batch without padding.
        if options.attention == "sdpa":
            return None
        return torch.zeros(options.batch, 1, length, length, dtype=model.dtype, device="meta")

    module = importlib.import_module(type(model).__module__)
    for function in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(module, function, mask, raising=False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)

    ids = torch.zeros(options.batch, length, dtype=torch.long, device="meta")
    with Counter(model) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        saved = counter.live
        loss.backward()
    found = from_config(config, name)
    (row,) = (row for row in estimate(found, options).rows if row.method == "adamw-fused")
    fixed = sum(row.at_peak[each] for each in ("weights", "optimizer states", "workspaces"))
    assert row.saved == pytest.approx(saved, rel=0.01)
    assert row.peak - fixed == pytest.approx(counter.peak, rel=0.01)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-8b", "gpt2", "pythia-70m"])
def test_names_and_shapes(name):
    config = KNOWN_MODELS[name]
    model = model_of(config, Options(tokens=1))
    found = from_config(config, name)
    predicted = {module.weight: module.shape for module in modules_of(found)}
    predicted |= {f"{m.name}.bias": (m.outputs,) for m in modules_of(found) if m.bias}
    assert predicted == {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = {f"{n}.weight" for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    kinds = {f"{m.name}.weight" for m in modules_of(found) if m.kind == "Linear"}
    assert kinds == linears
