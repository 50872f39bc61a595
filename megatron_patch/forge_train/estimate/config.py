"""Architectures from a name, from a Hugging Face ``config.json``, or from linears by hand."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .architecture import FAMILIES, LLAMA_LIKE, Architecture
from .known_models import KNOWN_MODELS

_LINEARS = re.compile(r"(\d+)x(\d+)(?:\*(\d+))?")


def architecture(model: str) -> Architecture:
    """A model by name, or from the path of a ``config.json``.

    Raises:
        ValueError: no such name and no such file, or a config that lacks a key or is of a family
            that is not known; the message names what is needed.
    """
    known = KNOWN_MODELS.get(model.lower())
    if known is not None:
        return from_config(known, model.lower())
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        near = difflib.get_close_matches(model.lower(), KNOWN_MODELS, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"--model {model}: neither a file nor a known name{hint} Known are "
            f"{', '.join(KNOWN_MODELS)}; give any other model's config.json, or its linears with "
            "--linear OUTxIN*COUNT"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--model {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--model {path} is no JSON object")
    return from_config(config, str(path))


def from_linears(texts: Sequence[str]) -> Architecture:
    """Linears one after another, each ``OUTxIN`` or ``OUTxIN*COUNT``.

    Raises:
        ValueError: a text that is not of that form.
    """
    linears = []
    for text in texts:
        match = _LINEARS.fullmatch(text)
        numbers = [int(number or 1) for number in match.groups()] if match else [0]
        if not all(numbers):
            raise ValueError(f"--linear {text!r} is not OUTxIN*COUNT, such as 14336x4096*32")
        linears.append((numbers[0], numbers[1], numbers[2]))
    return Architecture("linears", "linears", linears=tuple(linears))


def from_config(config: Mapping[str, Any], name: str) -> Architecture:
    """An architecture from the keys of a ``config.json``.

    Raises:
        ValueError: the family is not known, or a key is missing or is no size.
    """
    family = config.get("model_type")
    if family in LLAMA_LIKE:
        found = _llama(config, name, str(family))
    elif family == "gpt2":
        found = _gpt2(config, name)
    elif family == "gpt_neox":
        found = _gpt_neox(config, name)
    else:
        raise ValueError(
            f"--model {name}: model_type={family!r} is not known; known are {', '.join(FAMILIES)}. "
            "If its layers are those of a Llama, set model_type to 'llama'; that needs "
            "hidden_size, intermediate_size, num_hidden_layers, num_attention_heads and "
            "vocab_size. Else describe its linears with --linear OUTxIN*COUNT"
        )
    if found.heads % found.key_value_heads:
        raise ValueError(
            f"--model {name}: num_attention_heads={found.heads} does not divide by "
            f"num_key_value_heads={found.key_value_heads}"
        )
    return found


def _size(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"--model {name}: {key} is {value!r}, a positive number is needed")
    return value


def _llama(config: Mapping[str, Any], name: str, family: str) -> Architecture:
    if config.get("num_local_experts") or config.get("num_experts"):
        raise ValueError(f"--model {name}: mixtures of experts are not known; see --linear")
    hidden, heads = _size(config, "hidden_size", name), _size(config, "num_attention_heads", name)
    # Qwen2's class has biases on q, k and v, whatever its config says.
    attention_bias = bool(config.get("attention_bias"))
    return Architecture(
        name,
        family,
        hidden=hidden,
        intermediate=_size(config, "intermediate_size", name),
        layers=_size(config, "num_hidden_layers", name),
        heads=heads,
        key_value_heads=_size({**config, "num_key_value_heads": config.get(
            "num_key_value_heads") or heads}, "num_key_value_heads", name),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocabulary=_size(config, "vocab_size", name),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias")),
        query_key_norm=family == "qwen3",
    )  # fmt: skip


def _gpt2(config: Mapping[str, Any], name: str) -> Architecture:
    hidden, heads = _size(config, "n_embd", name), _size(config, "n_head", name)
    places = {"attn_pdrop": "attention", "resid_pdrop": "residual", "embd_pdrop": "embedding"}
    return Architecture(
        name,
        "gpt2",
        hidden=hidden,
        intermediate=int(config.get("n_inner") or 4 * hidden),
        layers=_size(config, "n_layer", name),
        heads=heads,
        key_value_heads=heads,
        head_dim=hidden // heads,
        vocabulary=_size(config, "vocab_size", name),
        positions=_size(config, "n_positions", name),
        tied=bool(config.get("tie_word_embeddings", True)),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=0.0,
        dropout=frozenset(place for key, place in places.items() if config.get(key, 0.1)),
        activation="gelu_new",
    )


def _gpt_neox(config: Mapping[str, Any], name: str) -> Architecture:
    hidden, heads = _size(config, "hidden_size", name), _size(config, "num_attention_heads", name)
    bias = bool(config.get("attention_bias", True))
    places = {"attention_dropout": "attention", "hidden_dropout": "residual"}
    rotary = config.get("rotary_pct")
    rope = config.get("rope_parameters") or {}
    return Architecture(
        name,
        "gpt_neox",
        hidden=hidden,
        intermediate=_size(config, "intermediate_size", name),
        layers=_size(config, "num_hidden_layers", name),
        heads=heads,
        key_value_heads=heads,
        head_dim=hidden // heads,
        vocabulary=_size(config, "vocab_size", name),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        rotary=float(rope.get("partial_rotary_factor", 0.25) if rotary is None else rotary),
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        dropout=frozenset(place for key, place in places.items() if config.get(key)),
        activation="gelu",
    )
