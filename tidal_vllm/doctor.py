"""`tidal-vllm doctor`: is this machine ready, and if not, what mends it.

Whatever may break on import is imported in a process of its own (`probe`), so that
the doctor lives to say what broke.
"""

import importlib.util
import json
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from textwrap import shorten

from tidal_vllm import __version__
from tidal_vllm.plugin import NAME
from tidal_vllm.versions import SUPPORTED_VLLM, unsupported_vllm

# CUDA builds of these come with vLLM's wheel and break imports beside a CPU torch.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
PLUGINS = ("tidal", "tidal_cpu")
TIMEOUT = 600  # seconds; a cold disk takes its time
_MARK = "tidal-vllm doctor: "  # vLLM logs to stdout too


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{'ok' if self.ok else 'FAIL':4}  {self.name:8}  {self.found}"
        return line if self.ok else f"{line}\n      {'fix':8}  {self.fix}"


def examine() -> Iterator[Finding]:
    """Look at everything, in the order in which things depend on each other.

    Ends after the first failure, which would only repeat itself below.
    """
    for finding in _findings():
        yield finding
        if not finding.ok:
            return


def _findings() -> Iterator[Finding]:
    python = f"Python {platform.python_version()} ({sys.executable})"
    yield Finding("package", True, f"tidal_vllm {__version__}, {python}")
    reason = unsupported_vllm()
    reinstall = f"pip install 'vllm{SUPPORTED_VLLM}'"
    yield Finding("vLLM", not reason, reason or version("vllm"), reinstall)
    try:
        yield Finding("torch", True, version("torch"))
    except PackageNotFoundError:
        yield Finding("torch", False, "not installed", reinstall)
    yield from _probe_findings()
    yield _profiles()


def _profiles() -> Finding:
    from tidal_vllm.config import TidalConfigError
    from tidal_vllm.profiles import list_profiles

    try:
        names = ", ".join(sorted(profile.name for profile in list_profiles()))
    except TidalConfigError as error:
        return Finding("profiles", False, str(error), "mend or remove that file")
    return Finding("profiles", bool(names), names or "none", "reinstall tidal_vllm")


def _probe_findings() -> Iterator[Finding]:
    done = run_python("from tidal_vllm.doctor import probe; probe()")
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    stages = list(STAGES)
    for line in lines:
        name, ok, found = json.loads(line.removeprefix(_MARK))
        stages.remove(name)
        yield Finding(name, ok, found, FIXES[name]())
    if stages:  # the process died on the way, or the line above says why
        yield Finding(stages[0], False, last_words(done), FIXES[stages[0]]())


def probe() -> None:
    """Print the outcome of each stage as a line of JSON; stop at the first failure."""
    for name, stage in STAGES.items():
        try:
            ok, found = True, stage()
        except Exception as error:
            ok, found = False, f"{type(error).__name__}: {error}"
        print(_MARK + json.dumps([name, ok, shorten(found, 300)]), flush=True)
        if not ok:
            return


def _import_everything() -> str:
    import transformers.models.llama.modeling_llama  # noqa: F401
    from vllm import LLM  # noqa: F401

    return "torch, transformers and vllm import"


def _find_device() -> str:
    import torch
    from vllm.platforms import current_platform as device

    kind, where = device.device_type, type(device).__name__
    if not kind:
        raise RuntimeError("vLLM found no device to run on")
    if kind == "cpu":
        cores = len(os.sched_getaffinity(0))
        return f"cpu, {torch.get_num_threads()} threads on {cores} cores ({where})"
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"vLLM found a GPU that torch {torch.__version__} cannot use"
        )
    memory = device.get_device_total_memory() / 2**30
    return f"{kind}, {device.get_device_name()}, {memory:.0f} GiB ({where})"


def _register() -> str:
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    AttentionBackendEnum[NAME].get_class()
    return f"--attention-backend {NAME.lower()} is known to vLLM"


def _reach_spawned_processes() -> str:
    """A spawned engine unpickles the choice before it has loaded any plug-in."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    choice = pickle.dumps(AttentionBackendEnum[NAME])
    done = run_python(f"import pickle; print(pickle.loads({choice!r}).name)")
    if done.returncode or NAME not in done.stdout.split():
        raise RuntimeError(last_words(done))
    return "the choice reaches spawned processes"


def _describe_kernels() -> str:
    import torch
    from vllm.platforms import current_platform

    from tidal_vllm import ops

    return ops.describe(torch.device(current_platform.device_type))


STAGES: dict[str, Callable[[], str]] = {
    "imports": _import_everything,
    "device": _find_device,
    "plug-in": _register,
    "spawn": _reach_spawned_processes,
    "kernels": _describe_kernels,
}


def _fix_imports() -> str:
    present = [name for name in CUDA_ONLY if importlib.util.find_spec(name)]
    if "+cpu" in version("torch") and present:
        return (
            f"pip uninstall {' '.join(CUDA_ONLY)} (CUDA builds, which break imports "
            f"beside a CPU build of torch; present: {', '.join(present)})"
        )
    return f"reinstall vLLM and its torch: pip install 'vllm{SUPPORTED_VLLM}'"


def _fix_device() -> str:
    return _fix_plugins() or (
        "install tidal_vllm into vLLM's environment, its CPU platform steps in where "
        "there is no GPU; where there is one, install the CUDA build of torch"
    )


def _fix_registration() -> str:
    return _fix_plugins() or "install tidal_vllm into vLLM's environment again"


def _fix_plugins() -> str:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        return ""
    given = [name for name in allowed.split(",") if name]
    missing = [name for name in PLUGINS if name not in given]
    if not missing:
        return ""
    return (
        f"VLLM_PLUGINS = {allowed!r} leaves out our plug-ins: unset it or set "
        + ",".join(given + missing)
    )


FIXES: dict[str, Callable[[], str]] = {
    "imports": _fix_imports,
    "device": _fix_device,
    "plug-in": _fix_registration,
    "spawn": _fix_registration,
    "kernels": _fix_registration,
}


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, without the current folder on its path."""
    code = f"import sys; sys.path = [p for p in sys.path if p]; {code}"
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        message = f"no answer within {TIMEOUT} s"
        return subprocess.CompletedProcess(late.cmd, 1, "", message)


def last_words(done: subprocess.CompletedProcess) -> str:
    """The last line a process wrote on stderr, and how it ended."""
    lines = done.stderr.strip().splitlines()
    return f"{lines[-1] if lines else 'no message'} (exit status {done.returncode})"
