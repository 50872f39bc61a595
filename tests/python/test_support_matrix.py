"""The support matrix of docs/megatron.md names a test for each claim, and every format."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

from forge_train._types import SCHEDULES, STATE_FORMATS, WEIGHT_FORMATS

_CELL = re.compile(r"(?:refused )?(\d+(?:, \d+)*)|not tested")
_WITHOUT_CLAIM = "not tested"


def section() -> str:
    page = (ROOT / "docs" / "megatron.md").read_text(encoding="utf-8")
    match = re.search(r"^## Support matrix\n(.*?)^## ", page, re.M | re.S)
    assert match is not None
    return match.group(1)


def tables() -> list[list[list[str]]]:
    """Rows of cells of each table; the first row is the header."""
    found: list[list[list[str]]] = []
    for part in section().split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        if lines:
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            found.append([rows[0], *rows[2:]])
    return found


def listed() -> dict[int, str]:
    return {int(n): name for n, name in re.findall(r"^(\d+)\. `(\w+)`$", section(), re.M)}


def functions() -> set[str]:
    """Tests and registered scenarios of tests/megatron."""
    names = set()
    for path in (ROOT / "tests" / "megatron").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                calls = [x for x in node.decorator_list if isinstance(x, ast.Call)]
                registered = any(getattr(call.func, "id", "") == "scenario" for call in calls)
                if registered or node.name.startswith("test_"):
                    names.add(node.name)
    return names


def names(cells: list[str]) -> set[str]:
    return set(re.findall(r"`([^`]+)`", " ".join(cells)))


def test_each_cell_says_which_test_or_that_there_is_none():
    used = set()
    for header, *rows in tables():
        for row in rows:
            assert len(row) == len(header), row
            for cell in row[1:]:
                match = _CELL.fullmatch(cell)
                assert match, f"{cell!r} in the row {row[0]}"
                used.update(int(n) for n in (match.group(1) or "").split(", ") if n)
    assert used == set(listed())


def test_the_tests_exist():
    assert set(listed().values()) <= functions()
    assert len(set(listed().values())) == len(listed())
    assert list(listed()) == list(range(1, len(listed()) + 1))


@pytest.mark.parametrize("refused", [True, False])
def test_what_refuses_and_what_trains_are_told_apart(refused: bool):
    """A test of refusals backs no claim that something works, and the other way round."""
    for _, *rows in tables():
        for row in rows:
            for cell in row[1:]:
                if cell != _WITHOUT_CLAIM and cell.startswith("refused") == refused:
                    for number in re.findall(r"\d+", cell):
                        assert ("refused" in listed()[int(number)]) == refused, (row, number)


def test_every_format_and_schedule_has_its_place():
    formats, parallelism, *_ = tables()
    assert names([row[0] for row in formats[1:]]) == set(WEIGHT_FORMATS)
    assert names(formats[0][1:]) == set(STATE_FORMATS)
    assert names(parallelism[0]) == set(SCHEDULES)
