"""A whole training step of Llama-3.1-8B, batch 1, by every way to update it.

    python benchmarks/llama_step.py                                  # all methods, all tokens
    python benchmarks/llama_step.py --budget-s 560 --resume          # the next piece of it
    python benchmarks/llama_step.py --methods 'forge:bf16/*' --tokens 512,4096
    python benchmarks/llama_step.py --check results/h200/llama_step.json
    python benchmarks/llama_step.py --model tiny --steps 3           # on a CPU, in seconds
    python benchmarks/llama_step.py --list                           # the methods' names

One process for each method, one after the other on one device; each makes the same random weights
there and trains on the same sequence, through the same attention and loss. The methods that others
are compared with (``training_methods.REFERENCES``) are measured in every run, and a ratio is only
taken within a run. ``--rounds 2`` goes through the methods twice (A B C A B C), so that a drift of
the clock meets all of them. Results are written after every process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_targets
from environment import environment, slug, write_json
from llama import MODELS
from points import numbers
from speed_of_light import device_of, limit_ms
from step_process import row_of
from training_methods import REFERENCES, Method, all_methods, select

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
# What the targets ask about first.
BLOCKS = [[512, 4096], [1024, 2048, 8192]]
TINY_BLOCKS = [[16, 32]]
FIELDS = ("method", "tokens", "weight_format", "state_format", "schedule", "clip", "graph", "rest")


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is of, whenever it was measured."""
    return tuple(row[field] for field in FIELDS)


def figures(row: Row, times_ms: list[float], model: str, device: str) -> Row:
    """A row's figures that follow from the times of its steps."""
    median = statistics.median(times_ms)
    quartiles = statistics.quantiles(times_ms, n=4) if len(times_ms) > 3 else [median] * 3
    # The limit is a whole step's.
    sheet = device_of(device) if row["method"] != "frozen" else None
    formats = (row["weight_format"], row["state_format"])
    limit = limit_ms(sheet, MODELS[model], row["tokens"], *formats, row["clip"]) if sheet else None
    return {
        "step_ms": median,
        "step_ms_spread": (quartiles[2] - quartiles[0]) / median,
        "tokens_per_s": 1e3 * row["tokens"] / median,
        "limit_ms": limit,
        "share_of_limit": limit / median if limit else None,
        "times_ms": [round(time_ms, 3) for time_ms in times_ms],
    }


def spawn(method: Method, tokens: list[int], options: argparse.Namespace, limit: float) -> Row:
    """Run a method's process; its rows by tokens, each with figures or a reason."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows"
        lines.touch()
        command = [
            sys.executable, str(Path(__file__).with_name("step_process.py")), str(lines),
            "--method", str(method), "--tokens", ",".join(map(str, tokens)),
            "--model", options.model, "--device", options.device,
            "--steps", str(options.steps), "--warm-up", str(options.warm_up),
        ]  # fmt: skip
        timeout = None if math.isinf(limit) else max(limit, 1.0)
        try:
            done = subprocess.run(command, timeout=timeout)
            status = f"the process ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = ""  # not a property of the method: no row, and --resume takes it up again
        rows = {row["tokens"]: row for row in map(json.loads, lines.read_text().splitlines())}
    if status:
        for count in tokens:
            rows.setdefault(count, {**row_of(method, count), "unsupported": status})
    return rows


# -- the run ----------------------------------------------------------------------------------


class Result:
    """The result's file.

    Attributes:
        rows: by key and run.
    """

    def __init__(self, path: Path, head: Row, options: argparse.Namespace) -> None:
        """Take the rows of the same commit and conditions over, if asked to."""
        self.path, self.run = path, head["date"]
        self.model, self.device = options.model, head["device"]
        conditions = {
            "model": options.model,
            "batch": 1,
            "warm_up": options.warm_up,
            "steps": options.steps,
            "time": "median of steps between CUDA events; spread: quartiles' distance over it",
            "peak": "largest allocation over these steps, GB = 1e9 bytes, GiB = 2**30",
            "data": "one seeded sequence of random ids for each number of tokens",
        }
        self.rows: dict[Any, Row] = {}
        runs: dict[str, Row] = {}
        if options.resume and path.is_file():
            old = json.loads(path.read_text())
            same = all(old[key] == head[key] for key in ("commit", "device"))
            if same and all(old["conditions"][key] == conditions[key] for key in conditions):
                kept = [r for r in old["rows"] if not (options.retry and r.get("unsupported"))]
                self.rows = {(key_of(row), row["run"]): row for row in kept}
                runs = old["runs"]
            else:
                print(
                    f"{path} is of another commit, device or model, or other steps: measured anew"
                )
        self.head = {**head, "conditions": conditions, "runs": {**runs, self.run: head}}

    def has(self, method: Method, tokens: int) -> bool:
        """Whether any run has measured it."""
        key = key_of(row_of(method, tokens))
        return any(place[0] == key for place in self.rows)

    def add(self, row: Row) -> None:
        """Take a row; steps of an earlier round of this run count with it."""
        place = (key_of(row), self.run)
        times = row.get("times_ms")
        if times:
            before = self.rows.get(place, {}).get("times_ms") or []
            row = {**row, **figures(row, before + times, self.model, self.device)}
        self.rows[place] = {**row, "run": self.run}

    def write(self) -> None:
        """Write all of it."""
        write_json(self.path, {**self.head, "rows": list(self.rows.values())})


def line_of(row: Row) -> str:
    """For the terminal."""
    start = f"{row['name']:<38} {row['tokens']:>6}"
    if row.get("unsupported"):
        return f"{start}  {row['unsupported']}"
    peak = f"{row['peak_gb']:7.2f} GB" if row["peak_gb"] else "          "
    share = f"  {100 * row['share_of_limit']:3.0f} % of limit" if row["share_of_limit"] else ""
    problem = f"  PROBLEM: {row['problem']}" if row.get("problem") else ""
    spread = f"±{100 * row['step_ms_spread']:4.1f} %"
    return f"{start}  {row['step_ms']:9.2f} ms {spread}  {peak}{share}{problem}"


def environment_elsewhere() -> Row:
    """:func:`environment`, from a process of its own: this one is to hold no device memory."""
    code = "import json, environment; print(json.dumps(environment.environment()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else environment()


def run(options: argparse.Namespace) -> Path:
    """Measure until the time is up; returns the result's path."""
    begin = time.monotonic()
    wanted = select(options.methods)
    references = select(list(REFERENCES))
    head = environment_elsewhere()
    path = options.out or ROOT / "benchmarks" / "results" / slug(head["device"]) / "llama_step.json"
    result = Result(path, head, options)
    blocks = TINY_BLOCKS if options.model == "tiny" else BLOCKS
    longest = 0.0
    for block in [options.tokens] if options.tokens else blocks:
        todo = [(m, [t for t in block if not result.has(m, t)]) for m in wanted]
        missing = [(method, tokens) for method, tokens in todo if tokens]
        if not missing:
            continue
        # A ratio needs its reference from the same run, whatever an earlier run has measured.
        needed = [t for t in block if any(t in tokens for _, tokens in missing)]
        clipped = any(method.clip for method, _ in missing)
        own = [(m, needed) for m in references if clipped or not m.clip]
        plan = own + [entry for entry in missing if entry[0] not in references]
        for _round in range(options.rounds):
            for method, tokens in plan:
                started = time.monotonic()
                left = options.budget_s - (started - begin)
                if longest > left:
                    print(f"the budget of {options.budget_s:g} s is used up; --resume goes on")
                    return path
                rows = spawn(method, tokens, options, left)
                for _count, row in sorted(rows.items()):
                    result.add(row)
                    shown = result.rows[key_of(row), result.run]
                    print(line_of(shown) + f"  ({time.monotonic() - begin:.0f} s)")
                sys.stdout.flush()
                result.write()
                longest = max(longest, time.monotonic() - started)
    print(f"{path}: {len(result.rows)} rows, {time.monotonic() - begin:.0f} s")
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=numbers, metavar="N,...", help="of the one sequence")
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=["*"],
        metavar="PATTERN,...",
        help="names from --list; * stands for anything",
    )
    parser.add_argument("--rounds", type=int, default=1, help="through all methods (default 1)")
    parser.add_argument("--steps", type=int, default=10, help="timed, in each round (default 10)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before (default 3)")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT has")
    parser.add_argument("--retry", action="store_true", help="with --resume: what was refused, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: results/<device>/llama_step.json")
    parser.add_argument("--check", type=Path, metavar="JSON", help="only compare with the targets")
    parser.add_argument("--list", action="store_true", help="print the methods' names")
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("steps", 1), ("warm_up", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if options.check is None and not options.list:
        if options.model != "tiny" and options.device == "cpu":
            parser.error(f"--model {options.model} needs a GPU; --model tiny runs on a CPU")
        try:
            select(options.methods)
        except ValueError as error:
            parser.error(str(error))
    return options


def main() -> None:
    """Measure, or compare a result with the targets."""
    options = parse()
    if options.list:
        print("\n".join(map(str, all_methods())))
    elif options.check:
        sys.exit(not llama_targets.check(options.check))
    else:
        run(options)


if __name__ == "__main__":
    main()
