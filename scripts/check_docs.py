"""Run what the documentation tells people to run; ``scripts/check_docs.sh`` sets up first.

Every command and program of the pages below is either run, with the changes that this file names
(a small model, a CPU, a folder that is thrown away), or has a reason here why it is not. What the
pages show and this file does not know is an error, and the other way round.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/megatron.md", "docs/python.md", "docs/recipes.md")
_LIMIT_S = 300


@dataclass(frozen=True)
class Block:
    """What a page shows as code.

    Attributes:
        page: where.
        heading: the section that it is in.
        language: of the fence; ``console`` for indented commands.
        text: without indentation.
    """

    page: str
    heading: str
    language: str
    text: str


@dataclass(frozen=True)
class NotRun:
    """Why something is not run here; ``test``, a file that names the page or does the same."""

    why: str
    test: str | None = None


@dataclass(frozen=True)
class Program:
    """How a program is run: what comes before and after it."""

    before: str = ""
    after: str = ""


_DEMO = "./scripts/train.sh --out {folder}/runs --steps {steps} --device cpu"
_TORCHRUN = "torchrun --nproc-per-node 2 --master-port {port}"

COMMANDS: dict[str, str | NotRun] = {
    "./scripts/train.sh": _DEMO.replace("{steps}", "2"),
    "./scripts/test.sh": NotRun("CI runs it, and it would run this"),
    "./scripts/train.sh --compare --name against-stock": _DEMO.replace("{steps}", "2")
    + " --compare --name against-stock",
    "./scripts/train.sh --resume": _DEMO.replace("{steps}", "3") + " --resume",
    "./scripts/train.sh --help": "./scripts/train.sh --help",
    "torchrun --nproc-per-node 8 pretrain_gpt.py <flags>": NotRun(
        "Megatron asks for a GPU where nothing redirects it", "tests/megatron/test_launch.py"
    ),
    "torchrun --nproc-per-node 8 -m forge_train.megatron pretrain_gpt.py <flags> --forge": (
        _TORCHRUN
        + " -m forge_train.megatron {root}/tests/megatron/pretrain_tiny.py {flags} --forge"
    ),
    "cargo build --release": "cargo build --release",
    "export PYTHONPATH=megatron_patch FORGE_LIBRARY=target/release/libforge.so": (
        "export PYTHONPATH=megatron_patch FORGE_LIBRARY=target/release/libforge.so"
    ),
    'python -c "import forge_train; print(forge_train.__version__)"': (
        'python -c "import forge_train; print(forge_train.__version__)"'
    ),
    "python -m forge_train doctor": "python -m forge_train doctor",
    "python -m forge_train estimate --model llama-3.1-8b --tokens 512 --weight-format bf16 "
    "--state-format q8": (
        "python -m forge_train estimate --model llama-3.1-8b --tokens 512 --weight-format bf16 "
        "--state-format q8"
    ),
    # One shape: all take minutes.
    "python -m forge_train warm --arch sm_90a --weight-format bf16 --state-format q8 "
    "--cache-dir kernels": (
        "python -m forge_train warm --arch sm_90a --weight-format bf16 --state-format q8 "
        "--cache-dir {folder}/kernels --shape 256x256 --tokens 128 --by-value"
    ),
    "FORGE_CACHE_DIR=kernels python train.py": "FORGE_CACHE_DIR={folder}/kernels python {train}",
}
"""What is shown, and what is run for it; in the order of a page."""

_SMALL_GPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/megatron")!r})
from forge_train.megatron import cpu
cpu.enable()
import gpt
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
gpt.start(0, 1, {{port}}, tp=1)
config = TransformerConfig(
    num_layers=1, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True,
    persist_layer_norm=False,
)
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
optimizer_config = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0)
"""
_FUSED_GPT = "assert len(fused.layers) == 5 and optimizer.forge.layers == fused.layers\n"
_MODEL = """
import torch
import forge_train
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
"""
_A_STEP = """
weight = next(model.parameters())
x = torch.randn(8, 64, device=weight.device, dtype=weight.dtype)
model(x).square().mean().backward()
fused.optimizer.step()
assert fused.optimizer.last.ok and all(row.fused for row in fused.rows if "weight" in row.name)
"""

PROGRAMS: dict[tuple[str, str], Program | NotRun] = {
    ("README.md", "In PyTorch"): Program(),
    ("README.md", "On a GPU"): Program(_MODEL, _A_STEP),
    ("README.md", "In Megatron-LM"): Program(_SMALL_GPT, _FUSED_GPT),
    ("README.md", "In C"): NotRun("lines of a program that is run", "tests/c/doc_example.c"),
    ("docs/python.md", "fuse"): Program(after=_A_STEP),
    ("docs/python.md", "On a GPU"): Program(_MODEL, _A_STEP),
    ("docs/python.md", "Megatron-core"): Program(_SMALL_GPT, _FUSED_GPT),
    ("docs/recipes.md", "*"): NotRun("each is a test of its own", "tests/python/test_recipes.py"),
}
"""By page and heading, ``*`` for all of a page."""


# -- what the pages show --------------------------------------------------------------------------


def blocks(page: str, text: str) -> list[Block]:
    """Fenced blocks, and indented ones after an empty line."""
    found: list[Block] = []
    heading, language, lines = "", None, []
    fenced, before = False, ""
    for line in [*text.splitlines(), ""]:
        if fenced:
            if line.startswith("```"):
                found.append(Block(page, heading, language or "", "\n".join(lines)))
                fenced, lines = False, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            fenced, language = True, line[3:].strip()
        elif line.startswith("    ") and (lines or not before.strip()):
            lines.append(line[4:])
        else:
            if lines:
                found.append(Block(page, heading, "console", "\n".join(lines)))
                lines = []
            if match := re.match(r"#+ +(.*)", line):
                heading = match.group(1)
        before = line
    return found


def commands(block: Block) -> list[str]:
    """The lines of indented commands, without what comments say."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in block.text.splitlines())
    return [line for line in lines if line]


def key_of(block: Block) -> tuple[str, str]:
    """Of :data:`PROGRAMS`."""
    every = (block.page, "*")
    return every if every in PROGRAMS else (block.page, block.heading)


def differences(shown: Sequence[Block]) -> list[str]:
    """What pages show and this file does not know, and the other way round; also lost tests."""
    lines = [(b, line) for b in shown if b.language == "console" for line in commands(b)]
    programs = {key_of(b): b for b in shown if b.language != "console"}
    wrong = [
        f"{b.page}, {b.heading}: `{line}` is new: say in COMMANDS how to run it, or why not"
        for b, line in lines
        if line not in COMMANDS
    ]
    wrong += [
        f"{page}, {heading}: a program that is new: say in PROGRAMS how to run it, or why not"
        for page, heading in programs
        if (page, heading) not in PROGRAMS
    ]
    known = {line for _, line in lines}
    wrong += [f"COMMANDS: no page shows `{line}`" for line in COMMANDS if line not in known]
    wrong += [f"PROGRAMS: no program is at {key}" for key in PROGRAMS if key not in programs]
    keys = [key_of(b) for b in shown if b.language != "console"]
    wrong += [
        f"{key[0]}, {key[1]}: {keys.count(key)} programs under one heading"
        for key in sorted(set(keys))
        if key[1] != "*" and keys.count(key) > 1
    ]
    for item in (*COMMANDS.values(), *PROGRAMS.values()):
        if isinstance(item, NotRun) and item.test and not (ROOT / item.test).is_file():
            wrong.append(f"{item.test} is gone, where it was to be run: {item.why}")
    return wrong


# -- what is run ----------------------------------------------------------------------------------


class Runner:
    """Runs commands and programs as somebody would who has read the page.

    Args:
        folder: what is written goes there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.failed = folder, 0
        self._in_tree = os.environ.get("FORGE_LIBRARY")
        self._train = folder / "train.py"
        program = next(b for b in read_pages() if key_of(b) == ("README.md", "In PyTorch"))
        self._train.write_text(program.text, encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """Nothing of the caller's but where programs are, and the CPU in place of GPUs."""
        kept = ("HOME", "CARGO_HOME", "RUSTUP_HOME", "LANG", "TMPDIR", "CUDA_HOME")
        made = {name: os.environ[name] for name in kept if name in os.environ}
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", "/usr/bin:/bin")]
        made.update(
            PATH=os.pathsep.join(path),
            OMP_NUM_THREADS="1",
            FORGE_CACHE_DIR=str(self.folder / "cache"),
            FORGE_MEGATRON_CPU="1",
            TORCHDYNAMO_DISABLE="1",
            CUDA_DEVICE_MAX_CONNECTIONS="1",
            CUDA_VISIBLE_DEVICES="",
        )
        if self._in_tree is not None:
            made.update(FORGE_LIBRARY=self._in_tree, PYTHONPATH=str(ROOT / "megatron_patch"))
        return made

    def _fill(self, text: str) -> str:
        """What stands in braces in :data:`COMMANDS`."""
        for name, value in (
            ("folder", str(self.folder)),
            ("root", str(ROOT)),
            ("train", str(self._train)),
            ("port", free_port()),
            ("flags", tiny_flags()),
        ):
            text = text.replace("{" + name + "}", value)
        if self._in_tree is not None:
            # The script would build the wheel first.
            text = text.replace("./scripts/train.sh", "python -m forge_train.demo")
        return text

    def block(self, block: Block) -> None:
        """Run what is to be run of a block, and say what was done."""
        if block.language != "console":
            self._program(block)
            return
        script = ["set -e", f"cd {shlex.quote(str(ROOT))}"]
        shown = []
        for line in commands(block):
            how = COMMANDS[line]
            if isinstance(how, NotRun):
                _say("not run", line, how.why)
            elif self._in_tree is not None and line.startswith("cargo build"):
                _say("not run", line, "FORGE_LIBRARY is set: that is what is used, as it is")
            else:
                shown.append(line)
                script.append(self._fill(how))
        if shown:
            self._run(["bash", "-c", "\n".join(script)], " && ".join(shown), block)

    def _program(self, block: Block) -> None:
        how = PROGRAMS[key_of(block)]
        what = f"program of {block.page}, {block.heading}"
        if isinstance(how, NotRun):
            _say("not run", what, how.why + (f": {how.test}" if how.test else ""))
            return
        # Without a GPU in sight; the arithmetic is the same.
        text = block.text.replace('"cuda"', '"cpu"')
        program = self._fill("\n".join((how.before, text, how.after)))
        self._run([sys.executable, "-c", program], what, block)

    def _run(self, command: list[str], what: str, block: Block) -> None:
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self.environment(), text=True, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=_LIMIT_S,
            )  # fmt: skip
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = -1, f"{error.stdout or ''}\nnot done after {_LIMIT_S} s"
        seconds = f"{time.monotonic() - begin:.0f} s"
        if code == 0:
            _say("ok", what, seconds)
            return
        self.failed += 1
        _say("FAILED", what, f"{block.page}, {block.heading}; status {code}, {seconds}")
        print(textwrap.indent(output[-4000:], "    "), flush=True)


def _say(outcome: str, what: str, more: str) -> None:
    print(f"{outcome:8} {what}  ({more})", flush=True)


def free_port() -> str:
    """A port of this machine for the ranks of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def tiny_flags() -> str:
    """Those of the smallest job of the tests."""
    source = (ROOT / "tests/megatron/test_launch.py").read_text(encoding="utf-8")
    match = re.search(r'^_FLAGS = """(.*?)"""', source, re.M | re.S)
    if match is None:
        raise SystemExit("check_docs: tests/megatron/test_launch.py has no _FLAGS any more")
    return " ".join(match.group(1).split())


def read_pages() -> list[Block]:
    """All blocks of all pages."""
    return [b for page in PAGES for b in blocks(page, (ROOT / page).read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, then run; 0 if all is well, 1 with what is wrong."""
    parser = argparse.ArgumentParser(prog="check_docs", description=__doc__)
    parser.add_argument("--only", default="", help="run only blocks of which this is a part")
    parser.add_argument("--compare", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    shown = read_pages()
    wrong = differences(shown)
    for line in wrong:
        print(f"check_docs: {line}", file=sys.stderr)
    if wrong or given.compare:
        return bool(wrong)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check-docs-") as folder:
        runner = Runner(Path(folder))
        seen: set[tuple[str, str]] = set()
        for block in shown:
            # A line that two pages show is run once.
            key = key_of(block) if block.language != "console" else ("", block.text)
            part = given.only in block.text or given.only in block.heading
            if part and key not in seen:
                runner.block(block)
            seen.add(key)
    print(f"{runner.failed or 'none'} failed, {time.monotonic() - begin:.0f} s")
    return bool(runner.failed)


if __name__ == "__main__":
    sys.exit(main())
