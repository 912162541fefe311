"""The kernels use of Triton what its oldest supported release was seen to compile.

No environment of the tests has that release, and newer ones compile more: `tl.clamp` of
integers, for one. To use a name or a keyword that is not listed here, compile first,
for which no GPU is needed (`--all` takes a minute), then list it:

    pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER python -m tests.kernels.compile_child sm_90 --all

How a listed name is used, with which dtypes for one, is seen by compiling alone.
"""

import ast
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tidal_vllm/kernels/triton"
OLDEST_TORCH = "torch>=2.11"  # requires triton==3.6.0
# Of `triton`, of `tl` and of its tensors.
NAMES = """
arange atomic_add cdiv constexpr cumsum dot dtype element_ty exp exp2 float16 float32
full histogram int32 int64 jit load log2 max maximum min minimum num_programs
pointer_type program_id range reshape split static_range store sum to trans uint16
uint32 where zeros
"""
KEYWORDS = {
    *("atomic_add(mask)", "atomic_add(sem)", "cumsum(reverse)", "dot(input_precision)"),
    *("histogram(mask)", "jit(do_not_specialize)", "load(mask)", "load(other)"),
    *("store(mask)", "to(bitcast)"),
}


def test_kernels_use_what_it_compiles():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert OLDEST_TORCH in project["dependencies"], "another torch, another Triton"
    used = set().union(*map(used_by, KERNELS.glob("*.py")))
    assert "load" in used
    assert used <= {*NAMES.split()} | KEYWORDS, __doc__


def used_by(file: Path) -> set[str]:
    """What the kernels of a file use: names after a dot, and keywords of such calls."""
    used = set()
    for kernel in filter(is_kernel, ast.parse(file.read_text()).body):
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                used |= {f"{node.func.attr}({word.arg})" for word in node.keywords}
    return used


def is_kernel(node: ast.stmt) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(one).startswith("triton.jit") for one in decorators)
