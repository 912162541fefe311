"""Which of its requirements vLLM needs where there is no NVIDIA GPU.

`steps.py` runs this with the Python of its environment, step by step, and installs
what it prints, one requirement a line. All of it is read from the metadata of what is
installed there, so it follows vLLM's version:

    bare    packages whose requirements are not to be installed with them
    rest    what those require, without what only a GPU uses
    beside  companions of torch, which may not fit its build; their names are given
"""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Whatever requires one of these belongs here too: pip looks at all below it.
BARE = ("torch", "cuda-toolkit", "vllm", "xgrammar", "compressed-tensors")
GPU_ONLY = (
    # Kernels, and what compiles them.
    *("flashinfer-cubin", "flashinfer-python", "humming-kernels", "quack-kernels"),
    *("nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "tilelang", "tokenspeed-mla"),
    # Loading weights and decoding videos straight into a GPU's memory; profiling.
    *("fastsafetensors", "instanttensor", "nvtx", "pynvvideocodec"),
    # Of a torch with CUDA: not among what `import torch` links to.
    *("cuda-bindings", "nvidia-cusolver", "nvidia-nvtx"),
)


def requirements(kind: str, beside: list[str]) -> list[str]:
    """The requirements of one kind (bare, rest, beside), sorted.

    Args:
        beside: Names of the packages of that kind.
    """
    return sorted({_text(found) for found in _walk() if _kind(found, beside) == kind})


def _walk() -> Iterator[Requirement]:
    """Every requirement that is not below one that gets installed with its own."""
    todo, seen = [Requirement("torch"), Requirement("vllm")], set()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        yield requirement
        if canonicalize_name(requirement.name) in BARE:
            todo += _required_by(requirement)


def _required_by(parent: Requirement) -> list[Requirement]:
    try:
        lines = requires(parent.name) or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [child for child in found if _applies(child, parent.extras)]


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({"extra": extra}) for extra in ("", *extras)
    )


def _kind(requirement: Requirement, beside: list[str]) -> str:
    name = canonicalize_name(requirement.name)
    named = {"bare": BARE, "beside": beside, "left out": GPU_ONLY}
    return next((kind for kind, names in named.items() if name in names), "rest")


def _text(requirement: Requirement) -> str:
    """A requirement without its marker, which applied: pip would look at it again."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


if __name__ == "__main__":
    print(*requirements(sys.argv[1], beside=sys.argv[2:]), sep="\n")
