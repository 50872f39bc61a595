"""Methods of ``llama_step.json`` in words, for plots and tables; needs no package."""

from __future__ import annotations

from typing import Any

LABELS = {
    "frozen": "forward and backward alone, no dW, no update",
    "adamw": "torch AdamW, for-loop",
    "adamw_foreach": "torch AdamW, foreach",
    "adamw_fused": "torch AdamW, fused",
    "adamw_in_backward": "torch AdamW, fused, in backward hooks",
    "flashoptim_release": "FlashOptim, gradient release",
    "forge": "FORGE",
}


def label(row: dict[str, Any]) -> str:
    """The method of a row."""
    words = LABELS[row["method"]]
    if row["method"] in ("forge", "flashoptim_release"):
        words += f", {row['weight_format']} weights, {row['state_format']} states"
    if row["method"] == "forge":
        words += f", {row['schedule']}"
    if row["clip"]:
        words += ", clipped"
    if row["rest"] == "torch":
        words += ", the rest by torch"
    return words + (", CUDA graph" if row["graph"] else "")
