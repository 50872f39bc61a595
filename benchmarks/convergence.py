"""Does it train as well? A small Llama on real text, by AdamW in fp32 and by FORGE in its formats.

    python benchmarks/convergence.py                        # all recipes, two seeds
    python benchmarks/convergence.py --recipes 'forge:bf16/*' --seeds 0,1,2 --resume
    python benchmarks/convergence.py --jobs 6               # six runs at a time on the one device
    python benchmarks/convergence.py --check results/h200/convergence.json
    python benchmarks/convergence.py --model tiny --device cpu --steps 30

The model (85 million parameters, bytes as tokens) starts from random weights. With one seed all
recipes start from the same weights and see the same windows of text in the same order; the learning
rate warms up and follows a cosine, the global norm is clipped to 1. What counts is the loss over
the same validation text at the end. Every run is written when it ends.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import convergence_targets
import torch
from convergence_runs import Recipe, Training, recipes, select
from environment import environment, slug, write_json
from llama import TINY, LlamaConfig, build
from points import numbers
from text_corpus import VOCABULARY, Corpus, corpus

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """Sizes of a training.

    Attributes:
        config: the model's.
        batch: windows in a step.
        length: tokens of a window.
        steps: of the optimizer.
        valid: windows of the validation text.
        lr: the highest learning rate, after a tenth of the steps; a tenth of it is left at the end.
    """

    config: LlamaConfig
    batch: int
    length: int
    steps: int
    valid: int
    lr: float

    def lr_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        warm_up = max(1, self.steps // 10)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


SMALL = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
)
PLANS = {
    "small": Plan(SMALL, batch=16, length=512, steps=300, valid=128, lr=6e-4),
    "tiny": Plan(
        replace(TINY, vocab_size=VOCABULARY), batch=4, length=32, steps=40, valid=16, lr=3e-3
    ),
}


@torch.no_grad()
def valid_loss(model: torch.nn.Module, text: Corpus, plan: Plan, device: torch.device) -> float:
    """Mean loss over the validation windows, the same for every recipe and seed."""
    ids, labels = text.windows(text.valid, plan.valid, plan.length, 0, device)
    parts = zip(ids.split(plan.batch), labels.split(plan.batch), strict=True)
    losses = [model(part, wanted) * part.shape[0] for part, wanted in parts]
    return torch.stack(losses).sum().item() / plan.valid


def train(recipe: Recipe, seed: int, text: Corpus, plan: Plan, device: torch.device) -> Row:
    """The row of one run."""
    begin = time.monotonic()
    # Drawn in fp32 whatever the format, so that all start from the same numbers.
    model = build(plan.config, device=device, dtype=torch.float32, seed=seed).to(recipe.dtype)
    training = Training(recipe, model, seed)
    losses, curve = [], []
    every = max(1, plan.steps // 10)
    for step in range(plan.steps):
        place = 1 + seed * plan.steps + step  # 0 is the validation's
        ids, labels = text.windows(text.train, plan.batch, plan.length, place, device)
        losses.append(training.step(ids, labels, plan.lr_at(step)))
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            curve.append([step + 1, valid_loss(model, text, plan, device)])
    final = curve[-1][1]
    row = {
        "name": str(recipe),
        **asdict(recipe),
        "seed": seed,
        "valid_loss": final if math.isfinite(final) else None,
        "valid_losses": curve,
        "train_losses": [round(loss, 5) for loss in torch.stack(losses).tolist()],
        "seconds": time.monotonic() - begin,
    }
    if not math.isfinite(final):
        row["problem"] = f"the final loss is {final}"
    return row


def kept_rows(path: Path, head: Row, options: argparse.Namespace) -> list[Row]:
    """The rows of an earlier run of the same commit, plan and text, if asked for."""
    if not (options.resume and path.is_file()):
        return []
    old = json.loads(path.read_text())
    same = old["commit"] == head["commit"] and old["conditions"] == head["conditions"]
    if not same:
        print(f"{path} is of another commit, plan or text: trained anew")
    return old["rows"] if same else []


Job = tuple[Recipe, int]


def train_alone(job: Job, text: Corpus, plan: Plan, device: torch.device) -> Row:
    """``train`` for a process of its own."""
    return train(*job, text, plan, device)


def in_turn(jobs: Iterable[Job], text: Corpus, plan: Plan, device: torch.device) -> Iterator[Row]:
    """The rows of jobs, one after the other in this process."""
    for job in jobs:
        yield train(*job, text, plan, device)


def together(
    jobs: Iterable[Job], count: int, text: Corpus, plan: Plan, device: torch.device
) -> Iterator[Row]:
    """The rows of jobs, ``count`` at a time, each worker a process; a row comes when it is done.

    No figure of a run depends on what runs beside it: the text, the draws and the kernels' bits
    are the same.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    jobs = iter(jobs)
    running: set[Future[Row]] = set()
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        while True:
            while len(running) < count and (job := next(jobs, None)):
                running.add(pool.submit(train_alone, job, text, plan, device))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def run(options: argparse.Namespace) -> Path:
    """Train until all is done or the time is up; returns the result's path."""
    begin = time.monotonic()
    plan = PLANS[options.model]
    plan = replace(plan, steps=options.steps or plan.steps)
    device = torch.device(options.device)
    text = corpus()
    head = environment()
    head["conditions"] = {
        "model": options.model,
        "parameters": plan.config.parameters(),
        **{key: value for key, value in asdict(plan).items() if key != "config"},
        "text": f"Python's documentation and library, {text.train.numel()} bytes, validation "
        f"{text.valid.numel()} bytes of other documents, sha256 {text.sha256}",
        "max_norm": 1.0,
    }
    path = options.out or ROOT / "benchmarks" / "results" / slug(head["device"]) / (
        "convergence.json"
    )
    rows = kept_rows(path, head, options)
    done = {(row["name"], row["seed"]) for row in rows}
    longest = 0.0

    def affordable() -> Iterator[Job]:
        # A seed of every recipe before the next seed: what is cut off is then comparable.
        for seed in options.seeds:
            for recipe in select(options.recipes):
                if (str(recipe), seed) in done:
                    continue
                if time.monotonic() - begin + longest > options.budget_s:
                    print(f"the budget of {options.budget_s:g} s is used up; --resume goes on")
                    return
                yield recipe, seed

    trained = (
        in_turn(affordable(), text, plan, device)
        if options.jobs == 1
        else together(affordable(), options.jobs, text, plan, device)
    )
    for row in trained:
        rows.append(row)
        write_json(path, {**head, "rows": rows})
        loss = row.get("problem") or f"{row['valid_loss']:.4f}"
        print(f"{row['name']:<28} seed {row['seed']}  {loss}  {row['seconds']:6.1f} s", flush=True)
        # fp32 products take longer than all others, so the next is seldom as long as the longest.
        longest = max(longest, min(row["seconds"], 45.0))
    print(f"{path}: {len(rows)} rows, {time.monotonic() - begin:.0f} s")
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PLANS, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="N,...")
    parser.add_argument(
        "--recipes",
        type=lambda names: names.split(","),
        default=["*"],
        metavar="PATTERN,...",
        help=f"default: all of {', '.join(map(str, recipes()))}",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, each in a process"
    )
    parser.add_argument("--budget-s", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT has")
    parser.add_argument("--out", type=Path, help="default: results/<device>/convergence.json")
    parser.add_argument("--check", type=Path, metavar="JSON", help="only compare with the targets")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {options.jobs}")
    try:
        select(options.recipes)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    """Train, or compare a result with the targets."""
    options = parse()
    if options.check:
        sys.exit(not convergence_targets.check(options.check))
    run(options)


if __name__ == "__main__":
    main()
