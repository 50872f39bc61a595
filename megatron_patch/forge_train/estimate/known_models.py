"""Common models by name: the keys of their Hugging Face ``config.json`` that memory depends on.

Each entry says where it is from. ``parameters`` is what the publisher counts, and a test compares
it with what is built from the other keys.
"""

from __future__ import annotations

from typing import Any


def _llama(source: str, parameters: int, hidden: int, wide: int, layers: int, **more: Any) -> Any:
    return {
        "source": f"https://huggingface.co/{source}/blob/main/config.json",
        "parameters": parameters,
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        **more,
    }


def _gpt2(source: str, parameters: int, width: int, layers: int, heads: int) -> Any:
    return {
        "source": f"https://huggingface.co/{source}/blob/main/config.json",
        "parameters": parameters,
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }


def _pythia(
    size: str, parameters: int, hidden: int, layers: int, heads: int, vocabulary: int = 50304
) -> Any:
    return {
        "source": f"https://huggingface.co/EleutherAI/pythia-{size}/blob/main/config.json",
        "parameters": parameters,
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "rotary_pct": 0.25,
    }


KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama(
        "meta-llama/Llama-3.1-8B", 8_030_261_248, 4096, 14336, 32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    ),
    "llama-3.2-1b": _llama(
        "meta-llama/Llama-3.2-1B", 1_235_814_400, 2048, 8192, 16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _llama(
        "meta-llama/Llama-3.2-3B", 3_212_749_824, 3072, 8192, 28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": _llama(
        "Qwen/Qwen2.5-0.5B", 494_032_768, 896, 4864, 24,
        model_type="qwen2", num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": _llama(
        "Qwen/Qwen2.5-1.5B", 1_543_714_304, 1536, 8960, 28,
        model_type="qwen2", num_attention_heads=12, num_key_value_heads=2, vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": _llama(
        "Qwen/Qwen2.5-7B", 7_615_616_512, 3584, 18944, 28,
        model_type="qwen2", num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
    ),
    "qwen3-8b": _llama(
        "Qwen/Qwen3-8B", 8_190_735_360, 4096, 12288, 36,
        model_type="qwen3", num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=151936,
    ),
    "mistral-7b": _llama(
        "mistralai/Mistral-7B-v0.1", 7_241_732_096, 4096, 14336, 32,
        model_type="mistral", num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
    ),
    "gpt2": _gpt2("openai-community/gpt2", 124_439_808, 768, 12, 12),
    "gpt2-medium": _gpt2("openai-community/gpt2-medium", 354_823_168, 1024, 24, 16),
    "gpt2-large": _gpt2("openai-community/gpt2-large", 774_030_080, 1280, 36, 20),
    "gpt2-xl": _gpt2("openai-community/gpt2-xl", 1_557_611_200, 1600, 48, 25),
    "pythia-70m": _pythia("70m", 70_426_624, 512, 6, 8),
    "pythia-160m": _pythia("160m", 162_322_944, 768, 12, 12),
    "pythia-410m": _pythia("410m", 405_334_016, 1024, 24, 16),
    "pythia-1b": _pythia("1b", 1_011_781_632, 2048, 16, 8),
    "pythia-1.4b": _pythia("1.4b", 1_414_647_808, 2048, 24, 16),
    "pythia-2.8b": _pythia("2.8b", 2_775_208_960, 2560, 32, 32),
    "pythia-6.9b": _pythia("6.9b", 6_857_302_016, 4096, 32, 32, 50432),
    "pythia-12b": _pythia("12b", 11_846_072_320, 5120, 36, 40, 50688),
}  # fmt: skip
