"""scripts/check_docs.py knows every block that the pages show, and names what it does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import ROOT

_SPEC = importlib.util.spec_from_file_location("check_docs", ROOT / "scripts" / "check_docs.py")
assert _SPEC is not None and _SPEC.loader is not None
check_docs = importlib.util.module_from_spec(_SPEC)
sys.modules["check_docs"] = check_docs  # where its dataclasses look for their module
_SPEC.loader.exec_module(check_docs)


def test_every_block_is_known():
    assert check_docs.differences(check_docs.read_pages()) == []


def test_blocks_are_fenced_or_indented_after_an_empty_line():
    text = """# Page
words
    that go on

## One

    first --flag   # why
    second

- an item
    that goes on

```python
    x = 1

    y = 2
```
    """
    one, two = check_docs.blocks("p.md", text)
    assert one.heading == "One" and one.language == "console"
    assert check_docs.commands(one) == ["first --flag", "second"]
    assert two.language == "python" and two.text == "    x = 1\n\n    y = 2"


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("console", "rm -rf everything", "`rm -rf everything` is new"),
        ("python", "print(1)", "README.md, Elsewhere: a program that is new"),
    ],
)
def test_what_is_new_is_named(language: str, text: str, words: str):
    new = check_docs.Block("README.md", "Elsewhere", language, text)
    (line,) = check_docs.differences([*check_docs.read_pages(), new])
    assert words in line


def test_what_no_page_shows_any_more_is_named():
    shown = check_docs.read_pages()
    gone = next(block for block in shown if "doctor" in block.text)
    program = next(block for block in shown if check_docs.key_of(block) == ("README.md", "In C"))
    rest = [block for block in shown if block not in (gone, program)]
    assert check_docs.differences(rest) == [
        "COMMANDS: no page shows `python -m forge_train doctor`",
        "PROGRAMS: no program is at ('README.md', 'In C')",
    ]


def test_a_second_program_of_a_heading_is_not_overlooked():
    again = check_docs.Block("README.md", "In PyTorch", "python", "1 / 0")
    (line,) = check_docs.differences([*check_docs.read_pages(), again])
    assert line == "README.md, In PyTorch: 2 programs under one heading"


def test_a_reason_must_not_point_nowhere(monkeypatch: pytest.MonkeyPatch):
    reason = check_docs.NotRun("it is a test", "tests/python/test_gone.py")
    monkeypatch.setitem(check_docs.PROGRAMS, ("README.md", "In C"), reason)
    (line,) = check_docs.differences(check_docs.read_pages())
    assert line == "tests/python/test_gone.py is gone, where it was to be run: it is a test"


@pytest.mark.parametrize(
    ("command", "failed"), [("true", 0), ("false", 1), ("false\ntrue", 1), ("true\nexit 3", 1)]
)
def test_a_command_that_fails_is_told(
    command: str,
    failed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for line in command.splitlines():
        monkeypatch.setitem(check_docs.COMMANDS, line, line)
    runner = check_docs.Runner(tmp_path)
    runner.block(check_docs.Block("p.md", "Heading", "console", command))
    assert runner.failed == failed
    assert ("FAILED" in capsys.readouterr().out) == bool(failed)


def test_a_program_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    how = check_docs.Program("a = 1", "assert a == b")
    monkeypatch.setitem(check_docs.PROGRAMS, ("p.md", "Heading"), how)
    runner = check_docs.Runner(tmp_path)
    for value, failed in ((1, 0), (2, 1)):
        runner.block(check_docs.Block("p.md", "Heading", "python", f"b = {value}"))
        assert runner.failed == failed


def test_nothing_of_the_callers_environment_reaches_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORGE_NVRTC", "/nowhere")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    made = check_docs.Runner(tmp_path).environment()
    assert "FORGE_NVRTC" not in made and "PYTHONSTARTUP" not in made
    assert made["CUDA_VISIBLE_DEVICES"] == ""
