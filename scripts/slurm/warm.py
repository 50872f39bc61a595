"""Compiles the kernels of a Megatron job ahead of its ranks: ``python -m forge_train warm``, by its flags.

``warm.py --ranks N MEGATRON_FLAGS...`` on a node with the job's GPU, or with ``JOB_WARM_ARCH=sm_90a``
on one without.
"""  # noqa: E501  (a command)

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from forge_train import cli

_COUNTS = {
    "ranks": 1,
    "hidden-size": None,
    "ffn-hidden-size": None,
    "num-attention-heads": None,
    "num-query-groups": None,
    "kv-channels": None,
    "vocab-size": None,
    "seq-length": None,
    "micro-batch-size": 1,
    "global-batch-size": None,
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1,
}
_CHOICES = {"forge-state-format": "fp32"} | dict.fromkeys(
    ("forge-weight-rounding", "forge-state-rounding"), "stochastic"
)


def _parser() -> argparse.ArgumentParser:
    """Of Megatron's flags, those that decide on kernels; the others are let through."""
    parser = argparse.ArgumentParser(prog="warm.py", allow_abbrev=False)
    for name, default in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in _CHOICES.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--forge-weight-format", default="auto")
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--sgd-momentum", type=float, default=0.9)
    parser.add_argument("--bf16", action="store_true")
    return parser


def model_config(given: argparse.Namespace) -> dict[str, int]:
    """The linears' sizes under the names that ``warm --model`` reads.

    Raises:
        ValueError: the flags lack one.
    """
    for name in ("hidden_size", "num_attention_heads"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing in the job's flags")
    config = {
        "hidden_size": given.hidden_size,
        "intermediate_size": given.ffn_hidden_size or 4 * given.hidden_size,
        "num_attention_heads": given.num_attention_heads,
        "num_key_value_heads": given.num_query_groups or given.num_attention_heads,
    }
    if given.kv_channels:
        config["head_dim"] = given.kv_channels
    if given.vocab_size:
        config["vocab_size"] = given.vocab_size
    return config


def warm_arguments(flags: Sequence[str], architecture: str, model: Path) -> list[str]:
    """Arguments of ``python -m forge_train`` for a job with these flags.

    Args:
        flags: Megatron's, and ``--ranks``.
        architecture: such as ``sm_90a``.
        model: file that :func:`model_config` is written to.

    Raises:
        ValueError: the flags lack a size.
    """
    given, _ = _parser().parse_known_args(flags)
    model.write_text(json.dumps(model_config(given)), encoding="utf-8")
    tensor = given.tensor_model_parallel_size
    share = tensor * given.pipeline_model_parallel_size * given.context_parallel_size
    replicas = max(given.ranks // share, 1)
    batch = given.micro_batch_size * replicas
    weight = given.forge_weight_format
    if weight == "auto":
        weight = "bf16+16" if given.bf16 else "fp32"
    rule = "adamw" if given.optimizer == "adam" else given.optimizer
    arguments = ["warm", "--arch", architecture, "--model", str(model), "--tp", str(tensor)]
    arguments += ["--rule", rule, "--weight-format", weight]
    if given.optimizer == "sgd":
        arguments += ["--option", f"momentum={given.sgd_momentum}"]
    arguments += ["--state-format", given.forge_state_format]
    arguments += ["--weight-rounding", given.forge_weight_rounding]
    arguments += ["--state-rounding", given.forge_state_rounding]
    arguments += ["--micro-batches", str(max((given.global_batch_size or batch) // batch, 1))]
    if given.seq_length:
        tokens = given.micro_batch_size * given.seq_length // given.context_parallel_size
        arguments += ["--tokens", str(tokens)]
    return arguments


def _gpu() -> list[str]:
    """``--arch`` of this node's GPU, and its multiprocessors, which decide on tiles."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("warm.py: torch sees no GPU here; set JOB_WARM_ARCH=sm_90a, or JOB_WARM=0")
    major, minor = torch.cuda.get_device_capability()
    own = "a" if major >= 9 else ""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    return [f"sm_{major}{minor}{own}", "--sm-count", str(count)]


def main(flags: Sequence[str]) -> int:
    """Compile; 0, or the tool's own status."""
    given = os.environ.get("JOB_WARM_ARCH")
    architecture, *more = [given] if given else _gpu()
    with tempfile.TemporaryDirectory() as folder:
        arguments = warm_arguments(flags, architecture, Path(folder) / "config.json")
        print("python -m forge_train", *arguments, *more, flush=True)
        return cli.main([*arguments, *more])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
