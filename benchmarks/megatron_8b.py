"""Llama-3-8B in Megatron-LM's own training step, stock against FORGE, under a limit of memory.

    python benchmarks/megatron_8b.py                               # two GPUs: TP of 2 with SP
    python benchmarks/megatron_8b.py --tp 1 --layers 14            # one GPU
    python benchmarks/megatron_8b.py --budget-s 560 --resume       # the next piece of it
    python benchmarks/megatron_8b.py --methods stock,forge:bf16+16/q8 --micro-batches 1,2,4
    python benchmarks/megatron_8b.py --check results/h200-x2/megatron_8b.json
    python benchmarks/megatron_8b.py --model tiny --device cpu     # in a minute
    python benchmarks/megatron_8b.py --flags forge:bf16+16/q8      # what Megatron is given

For each method it searches the largest micro-batch that fits under ``--memory-limit-gb``, and
measures tokens/s and memory of every size on the way, with one micro-batch per step. A method has
its own processes (``megatron_8b_process.py``), one for each GPU, which build the model once;
new ones are started where an allocation failed on one of several GPUs. FORGE is also measured at
stock's largest, so name ``stock`` first. Results are written after every process group.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import megatron_8b_targets
from environment import environment, slug, write_json
from megatron_8b_job import DEFAULT_METHODS, MODELS, Method, flags_of, method_of
from micro_batches import largest, next_size
from points import numbers

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = {
    "sequence_parallel": "with TP of 2",
    "recompute": "full, uniform, every layer",
    "step": "megatron.training's train_step with one micro-batch: forward, backward, optimizer",
    "attention": "torch's scaled_dot_product_attention (flash), causal, for every method",
    "norms": "torch's RMSNorm, for every method",
    "adam": "torch's AdamW with fused=True in place of the for-each form that Megatron falls back "
    "to without Transformer Engine and Apex: all of stock's weights, FORGE's embeddings and norms",
    "limit": "of torch's allocator on each GPU; the driver's and NCCL's own memory come on top",
    "data": "seeded random tokens, the same at every step",
    "time": "median of synchronised steps, of each the slowest rank; spread: quartiles' distance "
    "over it",
    "peak": "largest allocation over these steps on any rank, GB = 1e9 bytes",
    "optimizer_bytes_per_param": "allocated when a forward begins, gradients zeroed, above the "
    "weights the model computes with, over this GPU's parameters: gradient buffers, masters, "
    "moments, workspaces; on a CPU the tensors' bytes",
}


def environment_elsewhere() -> Row:
    """:func:`environment`, from a process of its own: this one is to hold no device memory."""
    code = "import json, environment; print(json.dumps(environment.environment()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else environment()


def child_environment(device: str) -> dict[str, str]:
    """Of a method's processes."""
    made = dict(os.environ)
    # Megatron asks for it under tensor parallelism.
    made["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Or a method's limit would be the order in which its tensors came.
    made.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if device == "cpu":
        made.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(group: subprocess.Popen[bytes]) -> None:
    """End a process group, politely first: torchrun takes up to 30 s to end its workers."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if group.poll() is not None:
            return
        try:
            os.killpg(group.pid, sign)
            group.wait(45)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def spawn(method: Method, rows: list[Row], wanted: list[int], options: argparse.Namespace,
          limit_s: float) -> tuple[list[Row], str]:  # fmt: skip
    """Run one process group; the new rows, and how it ended if not well."""
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "rows", Path(folder) / "log"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.tp}",
            f"--master-port={_free_port()}",
            str(Path(__file__).with_name("megatron_8b_process.py")), str(lines),
            f"--method={method}", f"--model={options.model}", f"--layers={options.layers}",
            f"--device={options.device}", f"--tp={options.tp}",
            f"--clip-grad={options.clip_grad}", f"--memory-limit-gb={options.memory_limit_gb}",
            f"--most={options.most}", f"--steps={options.steps}", f"--warm-up={options.warm_up}",
            f"--more-flags={options.more_flags}",
            *([f"--micro-batches={','.join(map(str, wanted))}"] if wanted else []),
            *(["--search"] if options.search else []),
        ]  # fmt: skip
        with log.open("wb") as output:
            group = subprocess.Popen(
                command, env=child_environment(options.device), process_group=0,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                status = group.wait(limit_s)
                ended = f"the processes ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                ended = f"no result within {limit_s:.0f} s"
            finally:
                _end(group)
        known = len(rows)
        made = [json.loads(line) for line in lines.read_text().splitlines()[known:]]
        if ended and not any(row["fits"] is False for row in made):
            tail = log.read_text(errors="replace").splitlines()[-options.tail :]
            print("\n".join(["-" * 40, *tail, "-" * 40]), file=sys.stderr)
        # Every rank that failed has written a row.
        return list({row["micro_batch"]: row for row in made}.values()), ended


# -- the run ----------------------------------------------------------------------------------


class Result:
    """The result's file.

    Attributes:
        rows: by method and micro-batch.
    """

    def __init__(self, path: Path, head: Row, options: argparse.Namespace) -> None:
        """Take the rows of the same commit and conditions over, if asked to."""
        self.path, self.run = path, head["date"]
        own = ("model", "layers", "tp", "clip_grad", "memory_limit_gb", "most", "steps", "warm_up",
               "more_flags")  # fmt: skip
        conditions = {
            **{name: getattr(options, name) for name in own},
            "sequence": MODELS[options.model].sequence,
            "allocator": child_environment(options.device)["PYTORCH_ALLOC_CONF"],
            "flags": shlex.join(stock_flags(options)),
            **CONDITIONS,
        }
        self.rows: dict[tuple[str, int], Row] = {}
        runs: dict[str, Row] = {}
        if options.resume and path.is_file():
            old = json.loads(path.read_text())
            same = all(old[key] == head[key] for key in ("commit", "device"))
            if same and old["conditions"] == conditions:
                kept = [r for r in old["rows"] if not (options.retry and r.get("problem"))]
                self.rows = {(row["name"], row["micro_batch"]): row for row in kept}
                runs = old["runs"]
            else:
                print(f"{path} is of another commit, device or conditions: measured anew")
        self.head = {**head, "conditions": conditions, "runs": {**runs, self.run: head}}

    def of(self, method: Method) -> list[Row]:
        """A method's rows."""
        return [row for (name, _), row in self.rows.items() if name == str(method)]

    def found(self, method: Method) -> dict[int, float | None]:
        """Micro-batch → peak; None: does not fit."""
        return {
            row["micro_batch"]: (row["peak_gb"] or 0.0) if row["fits"] else None
            for row in self.of(method)
            if row["fits"] is not None
        }

    def add(self, rows: list[Row], options: argparse.Namespace) -> None:
        """Take rows, and write all of them."""
        for row in rows:
            place = {"tp": options.tp, "layers": options.layers, "run": self.run}
            self.rows[row["name"], row["micro_batch"]] = {**row, **place}
        write_json(self.path, {**self.head, "rows": list(self.rows.values())})


def stock_flags(options: argparse.Namespace, method: str = "stock") -> list[str]:
    """Megatron's command line for micro-batches of 1."""
    sizes = {"layers": options.layers, "tp": options.tp, "clip": options.clip_grad}
    gpu = options.device == "cuda"
    flags = flags_of(method_of(method), MODELS[options.model], **sizes, micro_batch=1, gpu=gpu)
    return [*flags, *options.more_flags.split()]


def line_of(row: Row) -> str:
    """For the terminal."""
    start = f"{row['name']:<28} micro-batch {row['micro_batch']:>3}"
    if not row["fits"]:
        return f"{start}  {row.get('problem') or 'does not fit: ' + row['message']}"[:160]
    peak = f"{row['peak_gb']:6.1f} GB  " if row["peak_gb"] else ""
    problem = f"  PROBLEM: {row['problem']}" if row.get("problem") else ""
    return (
        f"{start}  {row['tokens_per_s']:9.1f} tokens/s ±{100 * row['step_ms_spread']:4.1f} %  "
        f"{peak}{row['optimizer_bytes_per_param']:5.2f} B/param{problem}"
    )


def run_method(method: Method, wanted: list[int], result: Result, options: argparse.Namespace,
               deadline: float) -> bool:  # fmt: skip
    """Measure what is left of a method; whether the time sufficed."""
    while True:
        rows = result.of(method)
        size = next_size(
            result.found(method), wanted, search=options.search,
            limit=options.memory_limit_gb, most=options.most,
        )  # fmt: skip
        if size is None or any(row["fits"] is None for row in rows):
            return True
        left = deadline - time.monotonic()
        if left < options.least_s:
            return False
        made, ended = spawn(method, rows, wanted, options, min(left, options.timeout_s))
        for row in made:
            print(line_of(row), flush=True)
        result.add(made, options)
        if ended.startswith("no result") and left <= options.timeout_s:
            return False  # not a property of the method: --resume takes it up again
        if ended and all(row["fits"] for row in made):
            # It died without a word at the size that came next.
            failed = next_size(
                result.found(method), wanted, search=options.search,
                limit=options.memory_limit_gb, most=options.most,
            )  # fmt: skip
            row = {"fits": None, "peak_gb": None, "problem": ended}
            result.add([{**method.row(failed or size), **row}], options)
            print(line_of(result.of(method)[-1]), flush=True)


def run(options: argparse.Namespace) -> Path:
    """Measure until the time is up; returns the result's path."""
    begin = time.monotonic()
    head = environment_elsewhere()
    folder = slug(head["device"]) + (f"-x{options.tp}" if options.tp > 1 else "")
    path = options.out or ROOT / "benchmarks" / "results" / folder / "megatron_8b.json"
    result = Result(path, head, options)
    deadline = begin + options.budget_s
    for method in map(method_of, options.methods):
        stock = largest(result.found(method_of("stock")))
        wanted = set(options.micro_batches) | ({stock} - {0} if options.search else set())
        if not run_method(method, sorted(wanted), result, options, deadline):
            print(f"the budget of {options.budget_s:g} s is used up; --resume goes on")
            break
    print(f"{path}: {len(result.rows)} rows, {time.monotonic() - begin:.0f} s")
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama-3-8b")
    add("--layers", type=int, metavar="N", help="default: the model's")
    add("--tp", type=int, choices=(1, 2), default=2, help="GPUs (default 2)")
    add("--memory-limit-gb", type=float, default=80.0, help="of each GPU (default 80)")
    add("--clip-grad", type=float, default=0.0, help="for all methods; 0: none (default)")
    add(
        "--methods",
        type=lambda text: text.split(","),
        default=DEFAULT_METHODS.split(","),
        metavar="NAME,...",
        help=f"stock, stock:bf16-grads, forge:WEIGHT/STATE[:SCHEDULE] (default {DEFAULT_METHODS})",
    )
    add("--micro-batches", type=numbers, default=[], metavar="N,...", help="instead of a search")
    add("--most", type=int, help="the search's largest micro-batch (default 64, on a CPU 2)")
    add("--steps", type=int, default=6, help="timed (default 6)")
    add("--warm-up", type=int, default=2, help="steps before (default 2)")
    add("--more-flags", default="", metavar="'FLAGS'", help="of Megatron, for all methods")
    add("--timeout-s", type=float, default=600.0, help="for a process group (default 600)")
    add("--least-s", type=float, default=60.0, help="start none with less time left (default 60)")
    add("--budget-s", type=float, default=math.inf, help="stop after this time")
    add("--resume", action="store_true", help="keep the rows that OUT has")
    add("--retry", action="store_true", help="with --resume: measure rows with a problem anew")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tail", type=int, default=40, help="lines of a failed group's output (default 40)")
    add("--out", type=Path, help="default: results/<device>[-x2]/megatron_8b.json")
    add("--check", type=Path, metavar="JSON", help="only compare with the targets")
    add("--flags", metavar="METHOD", help="only print what Megatron is given")
    options = parser.parse_args(arguments)
    for name in ("steps", "warm_up", "most", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if not options.memory_limit_gb > 0:
        parser.error(f"--memory-limit-gb is {options.memory_limit_gb:g}: it must be above 0")
    if any(size < 1 for size in options.micro_batches):
        parser.error(f"--micro-batches {options.micro_batches}: each must be at least 1")
    try:
        for name in [*options.methods, *([options.flags] if options.flags else [])]:
            method_of(name)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cpu" and options.model != "tiny":
        parser.error(f"--model {options.model} needs a GPU; --model tiny runs on a CPU")
    options.layers = options.layers or MODELS[options.model].layers
    options.search = not options.micro_batches
    # On a CPU nothing is counted, and the search goes to its end.
    options.most = options.most or (64 if options.device == "cuda" else 2)
    return options


def main() -> None:
    """Measure, or compare a result with the targets."""
    options = parse()
    if options.check:
        sys.exit(not megatron_8b_targets.check(options.check))
    elif options.flags:
        print(shlex.join(stock_flags(options, options.flags)))
    else:
        # So that the processes that were started are ended.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        run(options)


if __name__ == "__main__":
    main()
