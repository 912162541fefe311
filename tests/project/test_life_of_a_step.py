"""docs/life_of_a_step.md names functions that exist, and calls as they are made."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tidal_vllm"
PAGE = (ROOT / "docs/life_of_a_step.md").read_text()
ENTRY = re.compile(r"^( *)\* `([\w/.]+)::([\w.]+)`", re.MULTILINE)
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def entries() -> list[tuple[int, str, str]]:
    """Depth, file and function of each entry, in the page's order."""
    return [
        (len(indent) // 4, file, name) for indent, file, name in ENTRY.findall(PAGE)
    ]


def calls() -> dict[tuple[str, str], list[str]]:
    """What the page says each function calls, by the last part of their names."""
    found: dict[tuple[str, str], list[str]] = {}
    above: list[tuple[str, str]] = []
    for depth, file, name in entries():
        above[depth:] = [(file, name)]
        if depth:
            found.setdefault(above[depth - 1], []).append(name.rpartition(".")[2])
    return found


def function(file: str, name: str) -> FUNCTION:
    """The function of a file, which may be a method."""
    body = ast.parse((PACKAGE / file).read_text()).body
    *classes, last = name.split(".")
    for owner in classes:
        (cls,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == owner)
        body = cls.body
    (found,) = (n for n in body if isinstance(n, FUNCTION) and n.name == last)
    return found


def names_called(node: FUNCTION) -> list[str]:
    """The names of all calls below a node, in the order of the source."""
    found = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    found.sort(key=lambda call: (call.func.end_lineno, call.func.end_col_offset))
    return [getattr(c.func, "attr", getattr(c.func, "id", "")) for c in found]


def test_every_entry_is_read():
    """None is lost by the way in which the page is written."""
    assert len(entries()) == PAGE.count("::")
    assert len(calls()) >= 10


@pytest.mark.parametrize(("file", "name"), [entry[1:] for entry in entries()])
def test_every_function_exists(file, name):
    assert function(file, name)


@pytest.mark.parametrize("caller", calls(), ids="::".join)
def test_calls_are_made_in_this_order(caller):
    made = names_called(function(*caller))
    for name in calls()[caller]:
        assert name in made, f"{caller} does not call {name} here"
        made = made[made.index(name) + 1 :]
