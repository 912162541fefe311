"""docs/design.md lists every run-time change to vLLM, and each is guarded by a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tidal_vllm"
HEADING = "## Every run-time change to vLLM\n"
MARK = "Changes vLLM at run time:"
# Lists of vLLM's objects that the code of vLLM calls; they are set to lists.
LISTS_OF_CODE = {"metadata_builders"}
# Calls that change what other modules do.
CALLS = {
    *("pickle", "Library", "addFilter", "filterwarnings", "register_kernels"),
    *("register_oot", "add_signal_handler"),
}


def rows() -> list[list[str]]:
    """The cells of each row: what, where, why, when, guarded by."""
    section = (ROOT / "docs/design.md").read_text().split(HEADING)[1]
    table = [line for line in section.split("\n## ")[0].splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


ROWS = rows()
# What the rows of a module name in backticks.
LISTED: dict[str, str] = {}
for _what, _where, *_ in ROWS:
    LISTED[_where.strip("`")] = LISTED.get(_where.strip("`"), "") + _what
SOURCES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def replaced(tree: ast.Module) -> set[str]:
    """Attributes of foreign objects that a module sets to code, by their last name.

    Code is what the module imports, or defines as a function or class.
    """
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if re.match(r"(vllm|torch)\b", getattr(node, "module", None) or alias.name)
    }
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        value = node.value
        if isinstance(value, ast.Call) and len(value.args) == 1:
            value = value.args[0]  # classmethod(...)
        is_code = isinstance(value, ast.Lambda) or (
            isinstance(value, ast.Name) and value.id in defined
        )
        for target in node.targets:
            if not isinstance(target, ast.Attribute):
                continue
            root = target.value
            while isinstance(root, ast.Attribute):
                root = root.value
            owner = getattr(root, "id", "")
            foreign_code = is_code or target.attr in LISTS_OF_CODE
            if owner in imported or (foreign_code and owner != "self"):
                found.add(target.attr)
    return found


def called(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.FunctionDef | ast.ClassDef):
            asked = [node.func] if isinstance(node, ast.Call) else node.decorator_list
            names |= {getattr(a, "attr", getattr(a, "id", "")) for a in asked}
    return names & CALLS


def environment_changes(tree: ast.Module) -> list[ast.expr]:
    """Keys, or mappings of keys, that a module sets in `os.environ`."""
    changes: list[ast.expr] = []
    setters = ("os.environ.setdefault", "os.environ.update")
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            changes += [node.slice] * (ast.unparse(node.value) == "os.environ")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in setters:
            changes.append(node.args[0])
    return changes


@pytest.mark.parametrize("module", SOURCES)
def test_whatever_is_set_in_the_environment_is_listed(module):
    tree = ast.parse(SOURCES[module].read_text())
    for change in environment_changes(tree):
        if isinstance(change, ast.Constant):
            assert f"`{change.value}`" in LISTED.get(module, "")
        assert "environment: " in LISTED.get(module, "")


@pytest.mark.parametrize("module", SOURCES)
def test_whatever_is_replaced_is_listed(module):
    tree = ast.parse(SOURCES[module].read_text())
    own = {"calibrate/worker.py": {"forward"}}.get(module, set())  # of `TidalImpl`
    missing = {
        name for name in replaced(tree) - own if name not in LISTED.get(module, "")
    }
    assert not missing, f"docs/design.md does not list what {module} replaces"
    assert module in LISTED or not called(tree)


def test_the_modules_say_it_themselves():
    told = {name for name, path in SOURCES.items() if MARK in docstring_of(path)}
    assert told == LISTED.keys()


@pytest.mark.parametrize("what", [row[0] for row in ROWS])
def test_every_row_is_guarded_by_a_test(what):
    *_, guard = next(row for row in ROWS if row[0] == what)
    file, *names = guard.strip("`").split("::")
    source = (ROOT / "tests/compat" / file).read_text()
    assert "pytestmark = pytest.mark.compat" in source
    (name,) = names
    assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE)
