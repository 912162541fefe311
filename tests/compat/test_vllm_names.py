"""Every name of vLLM's that this project uses exists in the vLLM that is installed."""

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.processes import run_python

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[2]
# Modules that import where there is a GPU only: their source is read instead.
NEED_A_GPU = {"vllm.vllm_flash_attn"}
DOTTED = re.compile(r"vllm(\.[A-Za-z_]\w*)+")
# Our loggers, and groups of entry points.
NO_NAMES = ("vllm.tidal", "vllm.general_plugins", "vllm.platform_plugins")


def sources() -> list[Path]:
    return [
        path
        for folder in ("tidal_vllm", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def used_names(source: str) -> Iterator[str]:
    """Dotted names of vLLM's in a file, at any depth.

    Those that it imports, attributes of imported modules, and names in strings, which
    vLLM or a test resolves later.
    """
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_vllms(node.module or ""):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = name
                yield name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_vllms(alias.name):
                    modules[alias.asname or alias.name] = alias.name
                    yield alias.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            in_code = DOTTED.fullmatch(node.value)
            if in_code and not node.value.startswith(NO_NAMES):
                yield node.value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            whole = modules.get(node.value.id)
            if whole and isinstance(resolve(whole), ModuleType):
                yield f"{whole}.{node.attr}"


def is_vllms(module: str) -> bool:
    return module.split(".")[0] == "vllm"


def resolve(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    if module in NEED_A_GPU:
        assert attribute in bound_names(module)
    if NEED_A_GPU & {module, name}:
        return None
    return pkgutil.resolve_name(name)


def bound_names(module: str) -> set[str]:
    path = Path(importlib.util.find_spec(module).origin)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def test_every_name_exists():
    missing = []
    for path in sources():
        for name in used_names(path.read_text()):
            try:
                resolve(name)
            except (ImportError, AttributeError, AssertionError) as error:
                missing.append(f"{path.relative_to(ROOT)}: {name}: {error}")
    assert not missing, "\n".join(missing)


def test_our_platform_is_imported_before_vllm_knows_its_platform():
    """A module that asks for it would find vLLM in the middle of finding out."""
    code = (
        "import tidal_vllm.cpu.platform, vllm.platforms as found\n"
        "print('platform:', found._current_platform)\n"
        "print('then:', type(found.current_platform).__name__)"
    )
    done = run_python(code)
    assert "platform: None" in done.stdout, done.stdout
    assert "then: TidalCpuPlatform" in done.stdout
