"""The command line: flags, their checks, and what runs in which order."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

from forge_train.demo import checkpoint_files
from forge_train.demo.config import (
    DEFAULT_LR,
    DEVICES,
    MAX_WARMUP_STEPS,
    RULES,
    SCHEDULES,
    STATE_FORMATS,
    WEIGHT_FORMATS,
    ConfigError,
    RunConfig,
    default_schedule,
    default_warmup,
)

_DESCRIPTION = """\
Train a small Llama-style GPT on real English text (the reference that ships inside Python) with
unmodified megatron-core. FORGE fuses the optimizer's update into the backward pass of every linear
layer, so that no weight gradient of them is ever held in memory.

One token is one byte; losses are in nats per byte (an untrained model has about 5.5).
Everything a run writes is in runs/<name>/: log.jsonl, summary.json, loss.png, memory.png and
checkpoints/.
"""

_EXAMPLES = """\
examples:
  train with the defaults                     %(prog)s
  the same beside stock Megatron              %(prog)s --compare --name against-stock
  no gradient norm needed: update at once     %(prog)s --clip-grad 0
  8-bit optimizer states, bf16 weights        %(prog)s --weight-format bf16+16 --state-format q8
  go on with a run that was interrupted       %(prog)s --resume
"""

#: What a resumed run may change. Of these only `steps` alters a step: the learning rate's decay.
_FREE_ON_RESUME = {"device", "tp", "sequence_parallel", "steps", "save_interval"}

#: Settings that change nothing in a stock run. The weight format does: it says fp32 or bf16.
_FORGE_ONLY = ("state_format", "schedule")


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: only what the user typed is set, so that --resume can tell it from the defaults.
    parser = argparse.ArgumentParser(
        prog="train.sh",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    default = RunConfig()

    what = parser.add_argument_group("what to run")
    what.add_argument("--name", help=f"the run's folder under --out (default: {default.name})")
    what.add_argument("--out", help=f"where runs are kept (default: {default.out})")
    what.add_argument(
        "--compare",
        action="store_true",
        help="run stock Megatron with the same seed first, then FORGE, and overlay both",
    )
    what.add_argument("--stock", action="store_true", help="run stock Megatron only, without FORGE")
    what.add_argument(
        "--resume",
        action="store_true",
        help="continue --name from its newest complete checkpoint, with the settings it was "
        "started with; --steps, --device, --tp and --save-interval may be changed",
    )

    forge = parser.add_argument_group("FORGE")
    forge.add_argument("--rule", choices=RULES, help=f"update rule (default: {default.rule})")
    forge.add_argument(
        "--weight-format",
        choices=WEIGHT_FORMATS,
        help="how weights are stored: fp32; bf16 rounded stochastically; bf16 with an fp32 master "
        "copy; or bf16 plus the 16 bits below it. All but fp32 train a bf16 model "
        f"(default: {default.weight_format})",
    )
    forge.add_argument(
        "--state-format",
        choices=STATE_FORMATS,
        help=f"how optimizer states are stored (default: {default.state_format})",
    )
    forge.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="when weights are updated: immediate (inside the backward; needs --clip-grad 0 and "
        "one micro-batch), deferred (at the step, from the kept factors), accumulate (all "
        "micro-batches but the last go into an fp32 gradient buffer), or auto, which chooses per "
        "layer and takes accumulate for weights smaller than their factors (default: immediate "
        "where it is possible, else deferred: no gradient buffer for any fused weight)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help=f"optimizer steps (default: {default.steps})")
    training.add_argument(
        "--lr",
        type=float,
        help="peak learning rate; a linear warm-up leads to it, a cosine down to a tenth of it "
        f"(default by rule: {', '.join(f'{rule} {lr:g}' for rule, lr in DEFAULT_LR.items())})",
    )
    training.add_argument(
        "--adam-eps",
        type=float,
        help="epsilon of adam and adamw, in units of a gradient element "
        f"(default: {default.adam_eps:g})",
    )
    training.add_argument(
        "--warmup-steps",
        type=int,
        metavar="N",
        help=f"steps until the peak learning rate (default: {MAX_WARMUP_STEPS}, but at most a "
        "tenth of --steps)",
    )
    training.add_argument(
        "--weight-decay", type=float, help=f"weight decay (default: {default.weight_decay:g})"
    )
    training.add_argument(
        "--clip-grad",
        type=float,
        metavar="NORM",
        help="clip the gradient to this global L2 norm; 0 turns clipping off "
        f"(default: {default.clip_grad:g}, as in Megatron)",
    )
    training.add_argument(
        "--micro-batches",
        type=int,
        metavar="N",
        help=f"micro-batches per step: gradient accumulation (default: {default.micro_batches})",
    )
    training.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help=f"sequences per micro-batch (default: {default.micro_batch_size})",
    )
    training.add_argument(
        "--seed",
        type=int,
        help=f"of weights, sample order and rounding; 0 or more (default: {default.seed})",
    )
    training.add_argument(
        "--save-interval",
        type=int,
        metavar="STEPS",
        help="steps between checkpoints; 0 writes none; the newest two are kept "
        f"(default: {default.save_interval})",
    )

    parallel = parser.add_argument_group("device and parallelism")
    parallel.add_argument(
        "--device",
        choices=DEVICES,
        help="cpu; cuda: one GPU, by FORGE's CUDA backend; auto: the GPU if there is one "
        "(default: auto)",
    )
    parallel.add_argument(
        "--tp",
        type=int,
        metavar="RANKS",
        help="tensor-parallel ranks, one process each (default: 2; on a GPU 1, and no more)",
    )
    parallel.add_argument(
        "--no-sequence-parallel",
        dest="sequence_parallel",
        action="store_false",
        help="do not split tokens over the ranks between the linear layers",
    )

    model = parser.add_argument_group("model")
    for flag, field, text in (
        ("--hidden", default.hidden, "hidden size"),
        ("--ffn", default.ffn, "inner size of the SwiGLU MLP"),
        ("--layers", default.layers, "transformer layers"),
        ("--heads", default.heads, "attention heads"),
        ("--sequence", default.sequence, "tokens per sequence"),
    ):
        model.add_argument(flag, type=int, metavar="N", help=f"{text} (default: {field})")
    return parser


def _check_stock_flags(given: dict[str, object]) -> None:
    """Refuse what a stock run would not look at."""
    for field in _FORGE_ONLY if given.get("stock") else ():
        if field in given:
            flag = "--" + field.replace("_", "-")
            raise ConfigError(
                f"{flag} {given[field]} with --stock: only FORGE has this setting; leave {flag} "
                "out, or use --compare to run both"
            )


def _configure(given: dict[str, object], resume: bool) -> RunConfig:
    """The run that the flags ask for; a resumed run's own settings fill in what they leave out."""
    # A resumed run goes on where it was, unless it is told otherwise.
    if "device" in given or not resume:
        given["device"] = _device(given.get("device", "auto"))
        if given["device"] == "cuda":
            given.setdefault("tp", 1)
    run = RunConfig(**given)
    if not resume:
        if "lr" not in given:
            run.lr = DEFAULT_LR[run.rule]
        if "schedule" not in given:
            run.schedule = default_schedule(run.clip_grad, run.micro_batches)
        if "warmup_steps" not in given:
            run.warmup_steps = default_warmup(run.steps)
        return run
    saved = run.directory / "config.json"
    if not saved.is_file():
        raise ConfigError(
            f"--resume: there is no run in {run.directory} (no config.json); check --name and "
            "--out, or leave --resume out to start it"
        )
    old = RunConfig.load(saved)
    for field, value in given.items():
        was = getattr(old, field)
        if field not in _FREE_ON_RESUME | {"name", "out", "stock"} and value != was:
            flag = "--" + field.replace("_", "-")
            raise ConfigError(
                f"{flag} {value}: the run {run.directory} was started with {was}, and a resumed "
                f"run keeps it; leave {flag} out, or choose another --name"
            )
    run = dataclasses.replace(old, **given)
    reached = checkpoint_files.latest(run.directory / "checkpoints")
    if reached is not None and checkpoint_files.step_of(reached) > run.steps:
        raise ConfigError(
            f"--steps {run.steps}: {reached} is further than that; give --steps "
            f"{checkpoint_files.step_of(reached)} or more, or start anew without --resume"
        )
    return run


def _device(asked: object) -> str:
    """``cpu`` or ``cuda``, for ``--device`` as it was asked for."""
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError(
            "--device cuda: torch sees no GPU (torch.cuda.is_available() is False); check the "
            "driver and torch's CUDA version, or use --device cpu"
        )
    return "cpu"


def _check_device(run: RunConfig) -> None:
    """A run that is resumed elsewhere may find no GPU there."""
    _device(run.device)


def _start(run: RunConfig, resume: bool) -> None:
    """Train one run, in a folder that is fresh unless it is resumed."""
    from forge_train.demo.launch import launch

    if not resume:
        if (run.directory / "config.json").is_file():
            print(f"{run.directory}: replacing the run that is there")
        checkpoint_files.clear(run.directory / "checkpoints")
        for leftover in ("log.jsonl", "summary.json", "compare.json"):
            (run.directory / leftover).unlink(missing_ok=True)
    run.directory.mkdir(parents=True, exist_ok=True)
    run.save(run.directory / "config.json")
    launch(run, resume)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status: 2 for settings that cannot run."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    compare, resume = given.pop("compare", False), given.pop("resume", False)
    try:
        if compare and given.get("stock"):
            raise ConfigError("--compare with --stock: --compare runs both; leave --stock out")
        _check_stock_flags(given)
        run = _configure(given, resume)
        run.check()
        runs = [dataclasses.replace(run, stock=True), run] if compare else [run]
        for each in runs:
            each.check()
        _check_device(run)
    except ConfigError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2

    from forge_train.demo import report
    from forge_train.demo.launch import RankError

    begin = time.perf_counter()
    try:
        for each in runs:
            # A stock run that never started cannot be resumed: it starts.
            _start(each, resume and (each.directory / "config.json").is_file())
    except RankError as error:
        print(f"{parser.prog}: a rank failed:\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; --resume continues", file=sys.stderr)
        return 130
    if compare:
        print(report.compare_line(report.compare(run)))
    loss, memory = report.write_plots(run, compare)
    print(f"done in {time.perf_counter() - begin:.0f} s: see {loss}, {memory}")
    return 0
