"""Imports run one way, and only the modules at vLLM's side import vLLM."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tidal_vllm

PACKAGE = Path(tidal_vllm.__file__).parent
NO_TORCH = (
    *(
        "config",
        "policy",
        "correction",
        "layer_kinds",
        "lengths",
        "plan_table",
        "profiles",
        "planted",
        "promises",
        "startup",
        "versions",
        "plugin",
        "log_filters",
        "cuda_build",
        "fair_timing",
    ),
    *("cli", "calibrate.choice", "calibrate.baselines", "calibrate.report"),
)
# At import; the others of MAY_IMPORT_VLLM do it where they need it.
NO_VLLM = (
    *(*NO_TORCH, "ops", "metrics", "demo", "doctor", "probe", "calibrate.recorder"),
)
MAY_IMPORT_VLLM = {
    "plugin",
    "backend",
    "dense",
    "sparse_state",
    "metadata",
    "attention",
    "scheduler",
    "platform",
    "shutdown",
    "cpu_worker",
    "cpu_lora",
    "cpu_moe",
    "cpu_refusals",
    "metrics",
    "demo",
    "doctor",
    "probe",
    "calibrate",
}
# What a module of the package may import of it, at its top level or inside; a folder
# counts as one module. Modules of the command line are the top: they see everything.
BELOW = {
    "__init__": set(),
    "versions": set(),
    "config": set(),
    "cuda_build": set(),
    "profiles": {"config"},
    "policy": {"config", "profiles"},
    "correction": {"policy"},
    "lengths": {"config", "policy"},
    "plan_table": {"config", "lengths", "policy"},
    "ops": {"config", "cuda_build"},
    "planted": set(),
    "metrics": {"policy"},
    "log_filters": set(),
    "plugin": {"versions", "log_filters", "platform", "startup", "backend"},
    "layer_kinds": {"config"},
    "startup": {"config", "layer_kinds", "lengths", "policy", "plugin", "profiles"},
    "promises": {"config", "plugin", "startup"},
    "dense": {"ops"},
    "selection": set(),
    "query_rows": set(),
    "sparse_state": {"dense", "ops", "policy", "selection", "startup"},
    "metadata": {
        *("dense", "metrics", "plan_table", "plugin", "policy", "query_rows"),
        *("sparse_state", "startup"),
    },
    "attention": {"metadata", "policy", "sparse_state", "startup"},
    "scheduler": {"correction", "metrics", "promises", "startup"},
    "backend": {
        "attention",
        "dense",
        "metadata",
        "plugin",
        "policy",
        "promises",
        "scheduler",
        "sparse_state",
        "startup",
        "versions",
    },
    "cpu_lora": set(),
    "cpu_moe": set(),
    "cpu_refusals": {"startup"},
    "cpu_worker": {"cpu_lora", "cpu_moe", "metrics"},
    "shutdown": set(),
    "platform": {
        *("backend", "cpu_refusals", "cpu_worker", "log_filters", "plugin"),
        *("shutdown", "startup"),
    },
}
TOP = {"cli", "demo", "fair_timing", "doctor", "probe", "calibrate"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(source: Path) -> str:
    first = source.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(source: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: str(s.relative_to(PACKAGE)))
class TestEachFile:
    def test_only_some_import_vllm(self, source):
        if module_of(source) not in MAY_IMPORT_VLLM:
            assert "vllm" not in roots(imported(source))

    def test_imports_run_one_way(self, source):
        module = module_of(source)
        if module in TOP:
            return
        used = {
            name.split(".")[1]
            for name in imported(source)
            if name.startswith("tidal_vllm.")
        }
        used -= {module, "__version__"}
        assert used <= BELOW[module]

    def test_policy_and_config_know_no_torch(self, source):
        pure = source.name in ("choice.py", "baselines.py", "state.py", "prompts.py")
        if pure or module_of(source) in ("config", "layer_kinds", "policy", "profiles"):
            assert not roots(imported(source)) & {"torch", "vllm", "transformers"}


def test_the_tables_above_are_of_this_package():
    modules = {module_of(source) for source in SOURCES}
    assert modules == BELOW.keys() | TOP


@pytest.mark.parametrize(
    ("modules", "absent"),
    [(NO_TORCH, ("torch", "vllm", "transformers")), (NO_VLLM, ("vllm",))],
    ids=["no torch", "no vLLM"],
)
def test_a_process_that_imports_them(modules, absent):
    lines = ["import sys", "import tidal_vllm"]
    lines += [f"import tidal_vllm.{module}" for module in modules]
    lines += [f"print(sorted(set({absent!r}) & sys.modules.keys()))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
