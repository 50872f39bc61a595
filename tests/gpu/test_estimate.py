"""The estimate against the peak of torch's allocator on a GPU, within 5 %."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE, needs_gpu

import forge_train
from forge_train._context import default_context
from forge_train.estimate import Architecture, Options, estimate
from forge_train.estimate.fused import CONTEXT_WORKSPACE_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from small_llama import SmallLlama

pytestmark = needs_gpu

# Large enough that workspaces, which depend on the GPU, are a small part.
LLAMA = Architecture(
    "small", "llama", hidden=2048, intermediate=8192, layers=6, heads=16, key_value_heads=4,
    head_dim=128, vocabulary=65536,
)  # fmt: skip


def peak_of(step: Callable[[], None], before: int) -> int:
    """Of a step in the steady state, above what was allocated before the model."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def model_of(options: Options) -> SmallLlama:
    with torch.device(DEVICE):
        model = SmallLlama(
            LLAMA, exact=True, fused=options.norm == "fused", checkpointing=options.checkpointing,
            attention=options.attention,
        ).bfloat16()  # fmt: skip
    return model


def check(options: Options, method: str, train: Callable[..., Callable[[], None]]) -> None:
    default_context(DEVICE)  # its workspace is in every estimate, and stays
    gc.collect()
    torch.cuda.empty_cache()
    lent = default_context(DEVICE).workspace
    before = torch.cuda.memory_allocated() - (lent.nbytes if lent is not None else 0)
    model = model_of(options)
    ids = torch.randint(LLAMA.vocabulary, (options.batch, options.tokens), device=DEVICE)
    peak = peak_of(train(model, ids), before)
    (row,) = (row for row in estimate(LLAMA, options).rows if row.method == method)
    predicted = row.peak + (0 if method == "forge" else CONTEXT_WORKSPACE_BYTES)
    parts = {name: f"{size / 2**20:.0f}" for name, size in row.at_peak.items()}
    said = f"{predicted / 2**20:.0f} MiB for {peak / 2**20:.0f} MiB in the {row.phase}: {parts}"
    assert abs(predicted / peak - 1) < 0.05, said


@pytest.mark.parametrize("tokens", [256, 4096])
@pytest.mark.parametrize("how", ["loop", "foreach", "fused", "hooks"])
def test_torch(how, tokens):
    def train(model: SmallLlama, ids: torch.Tensor) -> Callable[[], None]:
        if how == "hooks":
            for parameter in model.parameters():
                optimizer = torch.optim.AdamW([parameter], fused=True)

                def update(_parameter, optimizer=optimizer):
                    optimizer.step()
                    optimizer.zero_grad()

                parameter.register_post_accumulate_grad_hook(update)
            return lambda: model(ids).backward()
        kind = {"foreach": how == "foreach", "fused": how == "fused"}
        optimizer = torch.optim.AdamW(model.parameters(), **kind)

        def step() -> None:
            model(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    method = "hooks-fused" if how == "hooks" else f"adamw-{how}"
    check(Options(tokens=tokens), method, train)


CASES = {
    "immediate": {"schedule": "immediate"},
    "immediate, few tokens": {"schedule": "immediate", "tokens": 256},
    "deferred": {"schedule": "deferred"},
    "deferred, few tokens, clipped": {"schedule": "deferred", "tokens": 256, "clip": True},
    "auto, clipped": {"clip": True},
    "accumulate": {"schedule": "accumulate", "micro_batches": 2},
    "micro-batches": {"schedule": "deferred", "micro_batches": 3, "tokens": 512},
    "16 more bits": {"schedule": "immediate", "weight_format": "bf16+16"},
    "fused norm": {"schedule": "immediate", "norm": "fused"},
    "checkpointing": {"schedule": "deferred", "checkpointing": True},
    "eager": {"schedule": "immediate", "attention": "eager", "tokens": 2048},
}


@pytest.mark.parametrize("case", CASES)
def test_forge(case):
    options = Options(
        **{"tokens": 4096, "weight_format": "bf16", "state_format": "q8", **CASES[case]}
    )

    def train(model: SmallLlama, ids: torch.Tensor) -> Callable[[], None]:
        fused = forge_train.fuse(
            model, forge_train.AdamW(), weight_format=options.weight_format,
            state_format=options.state_format, schedule=options.schedule,
            max_norm=1.0 if options.clip else None, micro_batches=options.micro_batches,
        )  # fmt: skip

        def step() -> None:
            for _ in range(options.micro_batches):
                model(ids).backward()
            fused.optimizer.step()
            fused.optimizer.zero_grad()

        return step

    check(options, "forge", train)


def test_the_workspace_is_within_its_bound():
    workspace = default_context(DEVICE).workspace
    assert workspace is not None
    assert 0 < workspace.nbytes <= CONTEXT_WORKSPACE_BYTES
