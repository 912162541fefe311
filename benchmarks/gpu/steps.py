"""The steps of a GPU run, in the order of what they decide: commands and limits."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import pack, unpack

ROOT = Path(__file__).parents[2]
PART_SECONDS = 345
"""Limit of each of the two parts, a little under six minutes."""

# Batch x context : budget, in tokens.
SHAPES = ["64x32768:3264", "16x32768:4096", "16x131072:13104", "1x131072:4096"]
BATCH_4 = "4x131072:4096"
# Rows x context : selection block : budget.
SELECTIONS = [
    f"{of}:{size}:4096" for size in (16, 4) for of in ("16x65536", "64x131072")
]
STACKS = ["64x32768:3264", "1x131072:4096"]
# Of tests/kernels/parity: each differs from the others in what Triton compiles.
SETUPS = [
    "8/2 heads, d128",
    "MQA, 33 heads in two tiles, d256",
    "fp8, d128",
    "odd strides",
    "MHA, d96, fp16",
    "blocks of 8",
]


@dataclass(frozen=True)
class Setup:
    """What a run has been given.

    Attributes:
        out: Where the results go.
        libraries: Builds of the CUDA extension, the first of which is the one to judge.
        fa3: A folder with FlashAttention 3 as the package `vllm_flash_attn`, or with
            an archive of it in part-00, part-01, ...; None where the site has it.
        site: The same of vLLM and what it imports; None where it is installed.
        work: A folder for what is not kept.
        rehearse: No GPU: tiny sizes, the reference in place of the kernels.
    """

    out: Path
    work: Path
    libraries: tuple[Path, ...] = ()
    fa3: Path | None = None
    site: Path | None = None
    rehearse: bool = False
    python: str = sys.executable

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"


@dataclass(frozen=True)
class Command:
    """One child process of a step: Python's arguments, and what differs in its env."""

    words: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        part: 1 needs torch and the kernels; 2 needs vLLM as well.
        limit: Seconds for all its commands.
        decides: What is known after it.
        judges: Whether its failure says that a kernel is wrong.
    """

    name: str
    part: int
    limit: float
    decides: str
    commands: Callable[[Setup], Iterator[Command]]
    judges: bool = False


def _module(setup: Setup, name: str, *words: str, **env: str) -> Command:
    smoke = ["--smoke"] if setup.rehearse else []
    out = ["--out", str(setup.results)]
    return Command(["-m", f"benchmarks.{name}", *words, *smoke, *out], env)


def _of_library(library: Path | None) -> dict[str, str]:
    return {} if library is None else {"TIDAL_CUDA_LIBRARY": str(library)}


def _first(setup: Setup) -> dict[str, str]:
    return _of_library(setup.libraries[0] if setup.libraries else None)


def _device(setup: Setup) -> Iterator[Command]:
    yield _module(setup, "gpu.device", **_first(setup))


def _parity(setup: Setup, implementation: str, *words: str, **env: str) -> Command:
    """Pytest on the kernels' tests, every outcome a record."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    several = not setup.rehearse and workers > 1 and find_spec("xdist") is not None
    return Command(
        [
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
            *("-p", "benchmarks.gpu.parity", "--maxfail=5"),
            *(["-n", str(workers)] if several else []),
            *("--implementation", implementation, "--records", str(setup.results)),
            *(["--rehearse"] if setup.rehearse else []),
            *words,
        ],
        env,
    )


def _cuda_parity(setup: Setup) -> Iterator[Command]:
    files = ("gpu_parity", "dense_decode", "sparse_decode", "select_blocks")
    paths = [f"tests/kernels/cuda/test_{name}.py" for name in files]
    yield _parity(setup, "cuda", *paths, "tests/kernels/parity", **_first(setup))


def _unpack(given: Path | None, package: str, work: Path) -> Iterator[Command]:
    """Unpack what was brought along, where it is packed and was not unpacked before."""
    if given is not None:
        target = unpack.place(given, package, work)
        if target != given and not target.exists():
            words = ["-m", "benchmarks.gpu.unpack", str(given), str(target)]
            yield Command(words)


def _unpack_flash_attention(setup: Setup) -> Iterator[Command]:
    if setup.fa3:
        yield from _unpack(setup.fa3, pack.PACKAGE, setup.work)
    else:
        yield from _unpack(setup.site, "vllm", setup.work)


def _attend(setup: Setup) -> Iterator[Command]:
    yield from _unpack_flash_attention(setup)
    bench, ours = "kernels.bench_attend", ["--implementations", "cuda", "--cases"]
    dense = ["--implementations", "flash_attn", "--cases", *SHAPES, BATCH_4]
    yield _module(setup, bench, *dense)
    first, others = _first(setup), setup.libraries[1:]
    yield _module(setup, bench, *ours, *SHAPES, BATCH_4, **first)
    ours = ["--no-launches", *ours]
    for library in others:
        env = _of_library(library)
        yield _module(setup, bench, *ours, *SHAPES, BATCH_4, **env)
    small = ["--select-blocks", "4", "2", "1"]
    yield _module(setup, bench, *ours, SHAPES[0], *small, **first)
    yield _module(setup, bench, *ours, SHAPES[0], "--kv-cache-dtype", "fp8", **first)


def _select(setup: Setup) -> Iterator[Command]:
    for name, env in (("cuda", _first(setup)), ("triton", {})):
        words = ["--implementations", name, "--scopes", "sequence"]
        words += ["--cases", *SELECTIONS]
        yield _module(setup, "kernels.bench_select", *words, **env)


def _stack(setup: Setup) -> Iterator[Command]:
    yield from _unpack_flash_attention(setup)
    words = ["--implementations", "cuda", "--intervals", "1", "--cases", *STACKS]
    yield _module(setup, "kernels.bench_stack", *words, **_first(setup))


def _triton(setup: Setup) -> Iterator[Command]:
    tests = [
        "tests/kernels/parity/test_attend.py",
        "tests/kernels/parity/test_graphs.py",
    ]
    setups = ["--setups", json.dumps(SETUPS)]
    interpreted = {"TRITON_INTERPRET": "1"} if setup.rehearse else {}
    yield _parity(setup, "triton", *setups, *tests, **interpreted)
    words = ["--implementations", "triton", "--cases", *SHAPES]
    yield _module(setup, "kernels.bench_attend", *words)


def _counters(setup: Setup) -> Iterator[Command]:
    yield _module(setup, "gpu.counters", **_first(setup))


def _site(setup: Setup) -> Iterator[Command]:
    yield from _unpack(setup.site, "vllm", setup.work)


def _planted(setup: Setup) -> Iterator[Command]:
    for interval in ("0", "16"):
        words = ["--correction-interval", interval]
        yield _module(setup, "gpu.planted", *words, **_first(setup))


def _engine(setup: Setup) -> Iterator[Command]:
    words = ["--dummy-weights", "--cases", "8x32768", "--quick-start", "--runner", "v2"]
    # On a CPU, TIDAL without sparse layers stands in for FLASH_ATTN.
    words += ["--baseline", "TIDAL" if setup.rehearse else "FLASH_ATTN"]
    yield _module(setup, "engine.decode_engine", *words, **_first(setup))


STEPS = (
    Step("device", 1, 20, "what the machine is, and what it can move", _device),
    Step("cuda", 1, 70, "whether the CUDA kernels are right", _cuda_parity, True),
    Step("attend", 1, 110, "attention beside FlashAttention 3", _attend, True),
    Step("select", 1, 25, "what choosing costs", _select, True),
    Step("stack", 1, 30, "what a model's attention gains", _stack, True),
    Step("triton", 1, 60, "whether the Triton kernels are right", _triton, True),
    Step("counters", 1, 30, "what limits the kernels", _counters),
    Step("site", 2, 15, "nothing: unpacks vLLM where it still is packed", _site),
    Step("planted", 2, 150, "whether vLLM gives exact answers", _planted),
    Step("engine", 2, 180, "what an engine gains", _engine),
)
