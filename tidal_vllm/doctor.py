"""`tidal-vllm doctor`: is this machine ready, and if not, what mends it.

Whatever may break is tried in a process of its own (`probe`), so that the doctor lives
to say what broke.
"""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from tidal_vllm import __version__
from tidal_vllm.child_process import TIMEOUT, last_words, python_command
from tidal_vllm.extension import LIBRARY, how_to_build, read_record, stale
from tidal_vllm.probe import MARK, STAGES
from tidal_vllm.versions import (
    BUILT_FOR_TORCH,
    SUPPORTED_VLLM,
    TESTED,
    unsupported_vllm,
)

PLUGINS = ("tidal", "tidal_cpu")
ON_REQUEST = "engine"
FIRST_VLLM = f"vllm=={next(iter(TESTED))}"
# Nothing is fetched or told, whatever a stage asks vLLM for.
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: What was looked at.
        ok: Whether it will do.
        found: What was found.
        fix: What mends it; where it will do: what would make it better.
    """

    name: str
    ok: bool
    found: str
    fix: str = ""

    def __str__(self) -> str:
        state = "FAIL" if not self.ok else "WARN" if self.fix else "ok"
        line = f"{state:4}  {self.name:8}  {self.found}"
        return f"{line}\n      {'fix':8}  {self.fix}" if self.fix else line


def examine(
    *, engine: bool = False, on_start: Callable[[str], None] = lambda name: None
) -> Iterator[Finding]:
    """Look at everything, in the order in which things depend on each other.

    Ends after the first failure, which would only repeat itself below.

    Args:
        engine: Also start an engine, and ask it something.
        on_start: Called with each thing's name before it is looked at.
    """
    for finding in _findings(engine, on_start):
        yield finding
        if not finding.ok:
            return


def _findings(engine: bool, on_start: Callable[[str], None]) -> Iterator[Finding]:
    python = f"Python {platform.python_version()} ({sys.executable})"
    yield Finding("package", True, f"tidal_vllm {__version__}, {python}")
    reason = unsupported_vllm()
    fix = f"pip install 'vllm{SUPPORTED_VLLM}'" if reason else ""
    yield Finding("vLLM", not reason, reason or version("vllm"), fix)
    try:
        yield Finding("torch", True, version("torch"))
    except PackageNotFoundError:
        yield Finding("torch", False, "not installed", _fix_torch())
    yield _profiles()
    yield _extension()
    stages = [name for name in STAGES if engine or name != ON_REQUEST]
    yield from _probe_findings(stages, on_start)


def _profiles() -> Finding:
    from tidal_vllm.profiles import list_profiles
    from tidal_vllm.validators import TidalConfigError

    try:
        names = ", ".join(sorted(profile.name for profile in list_profiles()))
    except TidalConfigError as error:
        return Finding("profiles", False, str(error), "mend or remove that file")
    fix = "" if names else "reinstall tidal_vllm"
    return Finding("profiles", bool(names), names or "none", fix)


def _extension() -> Finding:
    """Which compiled kernels are installed; whether they run here is another stage."""
    if not LIBRARY.exists():
        return Finding("CUDA", True, "no compiled kernels in this installation")
    record, outdated = read_record(LIBRARY), stale(LIBRARY)
    found = f"{LIBRARY}: {record or 'says nothing of what it was made of'}"
    if outdated:
        return Finding("CUDA", True, f"{found}; {outdated}", how_to_build())
    return Finding("CUDA", True, found)


def _probe_findings(
    stages: list[str], on_start: Callable[[str], None]
) -> Iterator[Finding]:
    code = f"from tidal_vllm.probe import run_stages; run_stages({stages})"
    process = subprocess.Popen(
        python_command(code),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | OFFLINE,
        start_new_session=True,  # so that all of an engine's processes can be ended
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(TIMEOUT, give_up)
    timer.start()
    name, log = stages[0], []
    try:
        for line in process.stdout:
            _, mark, said = line.partition(MARK)
            if not mark:
                log.append(line)
                continue
            name, *outcome = json.loads(said)
            if not outcome:
                on_start(name)
                continue
            ok, found, advice = outcome
            found = found if ok else root_cause(log, found)
            yield Finding(name, ok, found, advice if ok else FIXES[name](found))
            if not ok or name == stages[-1]:
                return
        said = [f"no answer within {TIMEOUT} s"] if late.is_set() else log
        found = last_words("".join(said), process.wait())
        yield Finding(name, False, found, FIXES[name](found))
    finally:
        timer.cancel()
        _end(process)


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def root_cause(log: list[str], found: str) -> str:
    """The error that vLLM's front end only points to, else what was found.

    Args:
        log: Lines that the process wrote.
    """
    if "root cause" not in found:
        return found
    errors = [match[1] for line in log if (match := _ERROR.search(line))]
    return errors[-1] if errors else found


_ERROR = re.compile(r"\b((?!EngineDeadError)\w+(?:Error|Exception): .+)")


def _fix_imports(found: str) -> str:
    broken = [name for name in BUILT_FOR_TORCH if name in found]
    if broken:
        return (
            f"{_pip()} uninstall {' '.join(broken)} (a build for another torch, which "
            "breaks what imports it)"
        )
    return _fix_torch()


def _fix_torch() -> str:
    """Install the torch that this vLLM requires; where it is there, vLLM anew."""
    with contextlib.suppress(PackageNotFoundError):
        pins = [r for r in requires("vllm") or [] if r.startswith("torch==")]
        if pins and not version("torch").startswith(pins[0].removeprefix("torch==")):
            return f"{_pip()} install '{pins[0]}', which vLLM {version('vllm')} needs"
    return (
        f"reinstall vLLM and its torch: {_pip()} install --force-reinstall "
        f"'vllm{SUPPORTED_VLLM}'"
    )


def _fix_device(found: str) -> str:
    if "torch" in found:  # a GPU that it cannot use
        return "install a build of torch for this GPU and its driver"
    return _fix_plugins("tidal_cpu") or _fix_code(found) or _install_here()


def _fix_registration(found: str) -> str:
    return _fix_plugins("tidal") or _fix_code(found) or _install_here()


def _fix_plugins(needed: str) -> str:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        return ""
    given = [name for name in allowed.split(",") if name]
    missing = [name for name in PLUGINS if name not in given]
    if needed in given:
        return ""
    return (
        f"VLLM_PLUGINS = {allowed!r} leaves out our plug-ins: unset it or set "
        + ",".join(given + missing)
    )


def _fix_code(found: str) -> str:
    """Another vLLM where a name is missing from this one; else nothing."""
    if not re.search(r"ImportError|AttributeError|ModuleNotFoundError", found):
        return ""
    missing = re.search(r"No module named '(\w+)", found)
    if missing and missing[1] not in ("vllm", "tidal_vllm"):
        return f"{_pip()} install {missing[1]}"
    if "vllm" not in found.replace("tidal_vllm", ""):
        return ""
    return (
        f"vLLM {version('vllm')} lacks what tidal_vllm {__version__} uses: "
        f"{_pip()} install '{FIRST_VLLM}', or a newer tidal_vllm"
    )


def _fix_run(found: str) -> str:
    return _fix_code(found) or (
        "the message above names what is wrong with this machine or this installation; "
        f"if it does not, start over: {_pip()} install --force-reinstall {FIRST_VLLM}"
    )


def _install_here() -> str:
    return f"install tidal_vllm into vLLM's environment: {_pip()} install --no-deps ."


def _pip() -> str:
    return f"{sys.executable} -m pip"


FIXES: dict[str, Callable[[str], str]] = {
    "imports": _fix_imports,
    "device": _fix_device,
    "plug-in": _fix_registration,
    "modules": _fix_run,
    "spawn": _fix_registration,
    "kernels": _fix_run,
    "config": _fix_run,
    "engine": _fix_run,
}
