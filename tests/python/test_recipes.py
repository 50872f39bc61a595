"""Every program of docs/recipes.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

PROGRAMS = re.findall(
    r"^## (.+?)$|^```python\n(.*?)^```",
    (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"),
    re.M | re.S,
)


def titled() -> list[tuple[str, str]]:
    """Each program under the heading that it follows."""
    found, title = [], ""
    for heading, program in PROGRAMS:
        title = heading or title
        if program:
            found.append((title, program))
    return found


def test_each_heading_has_a_program():
    assert {title for title, _ in titled()} == {heading for heading, _ in PROGRAMS if heading}


@pytest.mark.parametrize(("title", "program"), titled(), ids=[title for title, _ in titled()])
def test_a_recipe(title: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(program, f"recipes.md: {title}", "exec"), names)
    torch._dynamo.reset()
    fused = names["fused"]
    if title != "Param groups":
        assert fused.optimizer.last.ok and fused.engine.steps > 0
