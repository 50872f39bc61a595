"""Rows as ``llama_step.py`` on an H200 would write them, with made-up figures."""

from __future__ import annotations

import llama_step
import step_process
import training_methods


def h200_rows(forge_ms: float, run: str = "a") -> list[dict]:
    """Rows as an H200 would write them, with made-up figures."""
    found = []
    for method in training_methods.all_methods():
        for tokens in (512, 4096):
            time_ms = forge_ms if method.kind == "forge" else 100.0
            row = step_process.row_of(method, tokens)
            row |= llama_step.figures(row, [time_ms] * 10, "llama-3.1-8b", "NVIDIA H200")
            peak = 36.0 if method.state_format == "q8" else 50.0
            memory = {"peak_gb": peak, "peak_gib": peak * 1e9 / 2**30}
            found.append({**row, **memory, "run": run})
    return found


def result_of(rows: list[dict]) -> dict:
    conditions = {"model": "llama-3.1-8b", "steps": 10, "warm_up": 3}
    head = {"device": "NVIDIA H200", "driver": "1", "torch": "2", "commit": "c", "date": "2026"}
    return {**head, "conditions": conditions, "rows": rows}
