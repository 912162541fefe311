"""`tidal-vllm doctor`: is this machine ready, and if not, what mends it."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from tidal_vllm.plugin import NAME
from tidal_vllm.versions import unsupported_vllm


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything, in the order in which things depend on each other.

    Stops after the first check whose failure would only repeat itself below.
    """
    findings = []
    for check in (_vllm_version, _torch, _imports, _platform, _registration, _spawn):
        findings.append(check())
        if not findings[-1].ok:
            return findings
    return [*findings, _kernels(), _profiles()]


def report(findings: list[Finding]) -> str:
    """The findings as lines, the fix below what is wrong."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok  " if finding.ok else "FAIL"
        lines.append(f"{mark}  {finding.name:<{width}}  {finding.found}")
        if not finding.ok:
            lines.append(f"{'':6}{'fix':<{width}}  {finding.fix}")
    return "\n".join(lines)


def _vllm_version() -> Finding:
    if reason := unsupported_vllm():
        return Finding("vLLM", False, reason, "see above")
    return Finding("vLLM", True, version("vllm"))


def _torch() -> Finding:
    try:
        return Finding("torch", True, version("torch"))
    except PackageNotFoundError:
        return Finding("torch", False, "not installed", "pip install torch")


def _imports() -> Finding:
    done = _python("import transformers.models.llama.modeling_llama, vllm")
    if done.returncode == 0:
        return Finding("imports", True, "vllm and transformers import")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    fix = "read the message above; reinstalling vllm may help"
    if "+cpu" in version("torch"):
        fix = (
            "CUDA builds of torchvision, torchaudio and torchcodec break imports "
            "beside a CPU build of torch: "
            "pip uninstall torchvision torchaudio torchcodec"
        )
    return Finding("imports", False, last, fix)


def _platform() -> Finding:
    done = _python(
        "from vllm.platforms import current_platform as p;"
        "print(p.device_type, type(p).__module__ + '.' + type(p).__name__)"
    )
    words = (done.stdout.strip().splitlines() or [""])[-1].split()
    if done.returncode or len(words) != 2 or not words[0]:
        return Finding(
            "device",
            False,
            "vLLM found no device",
            "install tidal_vllm into the environment of vLLM (its CPU platform "
            f"steps in where there is no GPU){_plugins_hint('tidal_cpu')}",
        )
    return Finding("device", True, f"{words[0]} ({words[1]})")


_LOAD_AND_LOOK_UP = (
    "from vllm.plugins import load_general_plugins as load;"
    "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
    f"load(); load(); print(E['{NAME}'].get_class().get_name())"
)


def _registration() -> Finding:
    done = _python(_LOAD_AND_LOOK_UP)
    if done.returncode == 0 and done.stdout.strip().endswith(NAME):
        return Finding("plug-in", True, "registers in a fresh process")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(
        "plug-in",
        False,
        last,
        f"reinstall tidal_vllm beside vLLM{_plugins_hint('tidal')}",
    )


def _spawn() -> Finding:
    """A spawned engine unpickles the choice before it has loaded any plug-in."""
    from tidal_vllm.plugin import register

    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    pickled = pickle.dumps(AttentionBackendEnum[NAME])
    done = _python(f"import pickle; print(pickle.loads({pickled!r}).name)")
    if done.returncode == 0 and done.stdout.strip().endswith(NAME):
        return Finding("spawn", True, "the choice reaches spawned processes")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding("spawn", False, last, "reinstall tidal_vllm beside vLLM")


def _kernels() -> Finding:
    import torch
    from vllm.platforms import current_platform

    from tidal_vllm import ops

    device = torch.device(current_platform.device_type)
    return Finding("kernels", True, ops.describe(device))


def _profiles() -> Finding:
    from tidal_vllm.profiles import list_profiles

    names = ", ".join(sorted(profile.name for profile in list_profiles()))
    return Finding("profiles", bool(names), names or "none found", "reinstall")


def _plugins_hint(name: str) -> str:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or name in allowed.split(","):
        return ""
    return f"; VLLM_PLUGINS = {allowed!r} leaves out {name!r}: add it or unset it"


def _python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
