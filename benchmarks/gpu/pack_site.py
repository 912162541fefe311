"""vLLM and what an engine imports, in one folder, for a GPU machine without a network.

vLLM is the installed one, less what a GPU run does not need. Its modules are compiled
for every Python; those of its dependencies are not, so that pip fetches wheels for the
GPU machine's Python, in the versions that are installed here.
"""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from benchmarks.gpu import fat_binary

GPU = 90
"""Whose machine code is kept: FlashAttention 3, the only version that is packed, runs
on compute capability 9.0 alone."""

COMPILED = (
    "_C_stable_libtorch",
    "vllm_flash_attn/_vllm_fa3_C",
    "cumem_allocator",
    "spinloop",
    "fs_io_C",
)
"""The compiled modules that are packed. Without the others an engine loses mixtures of
experts, FlashAttention 2, MLA and some quantized formats; it starts all the same."""

LEFT_OUT = (
    "vllm-rs",
    "third_party/fmha_sm100",
    "third_party/deep_gemm",
    "third_party/tml_fa4",
)
"""What else stays behind: a server in Rust, and kernels that no GPU run calls."""

IMPORTED = (
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "annotated-doc",
    "annotated-types",
    "anyio",
    "apache-tvm-ffi",
    "attrs",
    "blake3",
    "cachetools",
    "cbor2",
    "certifi",
    "charset-normalizer",
    "cloudpickle",
    "compressed-tensors",
    "depyf",
    "dill",
    "einops",
    "email-validator",
    "fastapi",
    "fastapi-cli",
    "fastsafetensors",
    "frozenlist",
    "googleapis-common-protos",
    "grpcio",
    "h11",
    "httpcore2",
    "httpx2",
    "huggingface-hub",
    "humming-kernels",
    "idna",
    "ijson",
    "jsonschema",
    "jsonschema-specifications",
    "lark",
    "llguidance",
    "lm-format-enforcer",
    "loguru",
    "mcp",
    "ml-dtypes",
    "model-hosting-container-standards",
    "msgpack",
    "msgspec",
    "multidict",
    "nvidia-ml-py",
    "openai",
    "opencv-python-headless",
    "opentelemetry-api",
    "opentelemetry-exporter-http-transport",
    "opentelemetry-exporter-otlp",
    "opentelemetry-exporter-otlp-common",
    "opentelemetry-exporter-otlp-proto-common",
    "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-proto",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions",
    "opentelemetry-semantic-conventions-ai",
    "oss-harmony",
    "outlines-core",
    "packaging",
    "partial-json-parser",
    "pillow",
    "prometheus-client",
    "prometheus-fastapi-instrumentator",
    "propcache",
    "protobuf",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "pydantic-extra-types",
    "python-json-logger",
    "python-multipart",
    "pyyaml",
    "pyzmq",
    "referencing",
    "regex",
    "requests",
    "rpds-py",
    "safetensors",
    "sentencepiece",
    "setproctitle",
    "sniffio",
    "starlette",
    "tabulate",
    "tiktoken",
    "tokenizers",
    "tqdm",
    "transformers",
    "truststore",
    "typing-inspection",
    "urllib3",
    "uvloop",
    "watchfiles",
    "xgrammar",
    "yarl",
)
"""Distributions that `benchmarks.gpu.planted --smoke` had imported when it ended, found
in `sys.modules` with vLLM 0.32.0, and small dependencies of vLLM that other paths
import. Left out are torch, Triton, numpy and what comes with them, which are the GPU
machine's, and what is tried and not missed: ray, CUTLASS, cuda-tile. flashinfer is not
imported, if VLLM_USE_FLASHINFER_SAMPLER=0 says so."""


def requirements(site_packages: Path, have: str = "") -> list[str]:
    """The distributions to fetch, as pip takes them.

    Args:
        site_packages: Where vLLM is installed; its versions are taken. What is not
            there is left out.
        have: What the GPU machine has, in any version: names between commas or blanks.
    """
    present = {_canonical(name) for name in re.split(r"[\s,]+", have)}
    here = {
        _canonical(found.metadata["Name"]): found.version
        for found in distributions(path=[str(site_packages)])
    }
    return [f"{n}=={here[n]}" for n in IMPORTED if n in here and n not in present]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def fetch(wanted: Iterable[str], python: str, target: Path) -> None:
    """Install wheels for another Python into an empty folder.

    Args:
        python: The version, "3.12".

    Raises:
        SystemExit: pip found no wheel.
    """
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(40, 16, -1)]
    platforms = [f"--platform={tag}" for tag in (*tags, f"manylinux2014_{machine}")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    pip += ["--no-compile", "--only-binary=:all:", "--implementation=cp", *platforms]
    done = subprocess.run(
        [*pip, f"--python-version={python}", f"--target={target}", *wanted]
    )
    if done.returncode:
        raise SystemExit(f"pip ended with {done.returncode}")
    shutil.rmtree(target / "bin", ignore_errors=True)
    for tests in [path for path in target.rglob("tests") if path.is_dir()]:
        shutil.rmtree(tests, ignore_errors=True)


def copy_vllm(source: Path, target: Path) -> None:
    """Copy what a GPU run needs of the package vLLM, and what Python knows about it.

    Args:
        source: The folder `vllm` of a site-packages.
        target: The folder that gets `vllm` and its dist-info.

    Raises:
        SystemExit: A compiled module is missing, or has nothing for the GPU.
    """

    def ignored(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(source)
        return {
            name
            for name in names
            if name == "__pycache__"
            or name.endswith(".so")
            or (inside / name).as_posix() in LEFT_OUT
        }

    shutil.copytree(source, target / "vllm", ignore=ignored)
    for name in COMPILED:
        found = sorted(source.glob(f"{name}.*.so"))
        if not found:
            raise SystemExit(f"{source}: lacks {name}.*.so")
        module = bytearray(found[0].read_bytes())
        kept, zeroed = fat_binary.zero_others(module, GPU)
        if zeroed and not kept:
            raise SystemExit(f"{found[0]}: no machine code of compute capability 9.0")
        (target / "vllm" / found[0].relative_to(source)).write_bytes(module)
    (about,) = Distribution.discover(name="vllm", path=[str(source.parent)])
    info = target / f"vllm-{about.version}.dist-info"
    info.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (info / name).write_text(about.read_text(name) or "")


def stage(target: Path, source: Path, python: str, have: str = "") -> None:
    """Put everything into an empty folder; the arguments are those of the above."""
    fetch(requirements(source.parent, have), python, target)
    copy_vllm(source, target)
