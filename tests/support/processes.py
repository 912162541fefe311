"""Processes of their own: commands, Python code, and the modules that run engines."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidal_vllm.names import TOLD

ROOT = Path(__file__).parents[2]
TIDAL_VLLM = Path(sys.executable).with_name("tidal-vllm")
TIMEOUT = 550  # seconds
# Triton reads its variable when it is imported; its interpreter needs no GPU.
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(
    command: Sequence[str | Path], first_on_path: Path | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Run a command; stdout and stderr come back as one text, in `stdout`.

    Args:
        first_on_path: A folder that Python looks into before all others.
        env: Additions to the environment.
    """
    path = [str(first_on_path)] if first_on_path else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=_without_notes() | {"PYTHONPATH": os.pathsep.join(path)} | env,
    )


def run_python(
    code: str, *arguments: str | Path, **kwargs: Any
) -> subprocess.CompletedProcess:
    """Run Python code; the keyword arguments are those of `run`."""
    return run([sys.executable, "-c", code, *arguments], **kwargs)


def _without_notes() -> dict[str, str]:
    """This process's environment without what its own engines have warned of."""
    return {name: value for name, value in os.environ.items() if name != TOLD}


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a child that runs an engine as users do."""
    inherited = {k: v for k, v in _without_notes().items() if k[:5] != "VLLM_"}
    return inherited | {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"} | more


def run_module(module: str, *arguments: str | Path, **env: str) -> str:
    """Run a module of the tests as a program; gives what it and its children printed.

    Args:
        env: Additions to `child_environment`.
    """
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    env = {"PYTHONPATH": os.pathsep.join(path)} | env
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=child_environment(**env),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait()
        finally:
            _end_session(child.pid)
        log.seek(0)
        printed = log.read()
    print(printed)
    assert code == 0
    return printed


def run_child(folder: Path, jobs: list[dict], **env: str) -> list[dict]:
    """Results of jobs of `tests/support/child.py`, one after another in one child."""
    asked, given = folder / "jobs.json", folder / "results.json"
    asked.write_text(json.dumps(jobs))
    printed = run_module("tests.support.child", asked, given, **env)
    assert "Traceback" not in printed
    return json.loads(given.read_text())


def run_interpreted(module: str, *arguments: str | Path, v2_runner: bool) -> str:
    """As `run_module`, under Triton's interpreter, with the engine core in the child.

    Args:
        v2_runner: Whether vLLM's V2 model runner runs the model.
    """
    return run_module(
        module,
        *arguments,
        **INTERPRETER,
        VLLM_USE_V2_MODEL_RUNNER=str(int(v2_runner)),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )


def living(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                alive.append(int(folder.name))
    return alive


def _end_session(session: int) -> None:
    """Kill what of a child's processes does not end: what does unlinks its memory."""
    end = time.monotonic() + 60
    while (pids := living(session)) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def write_distribution(folder: Path, name: str, version: str) -> Path:
    """Metadata that says a version of a package is installed in this folder."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
    return folder
