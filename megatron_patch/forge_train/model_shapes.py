"""The linears of a transformer, from the ``config.json`` that comes with its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Shape = tuple[int, int]


def shapes_of(path: Path) -> list[Shape]:
    """``(out, in)`` of every linear of a Llama-style model, alone and fused as Megatron has them.

    Args:
        path: a ``config.json`` of Hugging Face's names: ``hidden_size``, ``intermediate_size``,
            ``num_attention_heads``; ``num_key_value_heads``, ``head_dim`` and ``vocab_size`` where
            it has them.

    Raises:
        ValueError: it is no JSON object, or lacks one of the first three.
        OSError: it cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object")
    hidden, wide = _size(config, "hidden_size", path), _size(config, "intermediate_size", path)
    heads = _size(config, "num_attention_heads", path)
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or hidden // heads)
    query, key = heads * width, groups * width
    shapes = [
        (query, hidden),
        (key, hidden),
        (query + 2 * key, hidden),
        (hidden, query),
        (wide, hidden),
        (2 * wide, hidden),
        (hidden, wide),
    ]
    if config.get("vocab_size"):
        shapes.append((int(config["vocab_size"]), hidden))
    return list(dict.fromkeys(shapes))


def _size(config: dict[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{path} has no {name}; name the linears with --shape OUTxIN")
    return value
