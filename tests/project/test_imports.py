"""Imports run one way, and only the modules at vLLM's side import vLLM."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tidal_vllm

PACKAGE = Path(tidal_vllm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The rooms of the house from the bottom up: what each may import of the package. A
# folder counts as one room here; inside it `test_no_module_imports_in_a_circle` holds.
LEAVES = {"__init__", "names", "registry", "versions", "config", "validators"}
LEAVES |= {"extension"}
PROFILES = LEAVES | {"profiles"}
PLAN = PROFILES | {"plan"}
KERNELS = PLAN | {"kernels"}
METHODS = KERNELS | {"methods"}
ENGINE = METHODS | {"engine"}
CPU = ENGINE | {"cpu"}
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "planted": {"planted"},
    "profiles": PROFILES,
    "plan": PLAN,
    "kernels": KERNELS,
    "methods": METHODS,
    "engine": ENGINE,
    "scheduler": {"engine"},
    "cpu": CPU,
    "calibrate": ENGINE | {"calibrate", "natural_text", "planted"},
    "fair_timing": set(),
    "natural_text": set(),
    "child_process": set(),
    "plugin": CPU,
    "probe": CPU | {"child_process", "plugin", "planted"},
    "doctor": LEAVES | {"child_process", "probe", "profiles"},
    "models": {"models"},
    "demo": ENGINE | {"demo", "planted", "fair_timing", "natural_text"},
    "cli": CPU | {"calibrate", "demo", "doctor", "models", "planted"},
}
# Loaded in every process of vLLM's, before the command line is read.
WITHOUT_TORCH = ("names", "versions", "config", "plan", "profiles", "plugin", "cli")
WITHOUT_TORCH += ("extension", "doctor", "models")
WITHOUT_VLLM = (*WITHOUT_TORCH, "kernels", "methods", "demo", "probe")


def name_of(source: Path) -> str:
    """The dotted name of a module, without the package's own."""
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "__init__"


MODULES = {name_of(source): source for source in SOURCES}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported(source: Path, only_at_import: bool = False) -> set[str]:
    """Dotted names of everything that a file imports, at any depth.

    Args:
        only_at_import: Leave out what functions import when they are called, and what
            only type checkers read.
    """
    names = set()
    pending = list(ast.parse(source.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lazy = True
        if not (lazy and only_at_import):
            pending += ast.iter_child_nodes(node)
    return names


def within_package(names: set[str]) -> set[str]:
    """The modules of the package that are meant by these names."""
    found = set()
    for name in names:
        inner = name.removeprefix("tidal_vllm.")
        if inner == name:
            continue
        parent = inner.rpartition(".")[0] or "__init__"
        found.add(inner if inner in MODULES else parent)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    used = {room_of(name) for name in within_package(imported(MODULES[module]))}
    assert used - {"__init__"} <= MAY_IMPORT[room_of(module)]


def test_every_room_is_in_the_table():
    assert {room_of(name) for name in MODULES} == MAY_IMPORT.keys()


def test_no_module_imports_in_a_circle():
    """Not even at call time: whoever needs something above it has the wrong place."""
    graph = {
        name: within_package(imported(source)) - {name, "__init__"}
        for name, source in MODULES.items()
    }
    while leaves := [name for name, used in graph.items() if not used & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize(
    ("rooms", "absent"),
    [
        (WITHOUT_TORCH, ("torch", "vllm", "transformers")),
        (WITHOUT_VLLM, ("vllm",)),
    ],
    ids=["no torch", "no vLLM"],
)
def test_a_process_that_imports_them(rooms, absent):
    modules = [m for m in MODULES if room_of(m) in rooms and "triton" not in m]
    modules = [m for m in modules if m != "kernels.cuda"]
    lines = ["import sys", "import tidal_vllm"]
    lines += [f"import tidal_vllm.{module}" for module in modules]
    lines += [f"print(sorted(set({absent!r}) & sys.modules.keys()))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
