"""`tidal-vllm calibrate`: the run, its exit code and its output."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tidal_vllm.calibrate.engine import CalibrationEngine, switches
from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.calibrate.pictures import how_to_get
from tidal_vllm.calibrate.record import profile_fields
from tidal_vllm.calibrate.report import write_report
from tidal_vllm.calibrate.request import Request
from tidal_vllm.calibrate.result import Job, NotCalibrated, Result
from tidal_vllm.calibrate.run import calibrate
from tidal_vllm.calibrate.state import State
from tidal_vllm.calibrate.summary import describe
from tidal_vllm.profiles import find_profile, load_profile
from tidal_vllm.validators import TidalConfigError


def run(arguments: argparse.Namespace) -> int:
    """Calibrate as asked and return the exit code."""
    state, interrupts = None, Interrupts()
    try:
        with switches(), interrupts:
            request = Request(arguments)
            job = request.job()
            asked = request.manifest(job)
            state = State(request.state_folder, asked, arguments.restart, interrupts)
            if kept := state.num_replies:
                _say(f"Resuming: {kept} answers are kept in {state.folder}")
            started = time.perf_counter()
            with _Starter(request.engine_kwargs(job)) as start:
                result = calibrate(job, state, start)
            seconds = time.perf_counter() - started
            path = _write(request, job, result, seconds)
            state.remove()
    except TidalConfigError as error:
        _say(f"tidal-vllm calibrate: {error}")
        return 2
    except NotCalibrated as failure:
        _say(f"\nNot calibrated: {failure}.")
        _say(f"What was measured is kept in {state.folder}, for another try.")
        return 1
    except KeyboardInterrupt:
        if state is not None:
            _say(
                f"\nStopped. {state.num_replies} answers are kept in {state.folder}: "
                "repeat the command to go on."
            )
        return interrupts.exit_code()
    print(describe(job, result, seconds))
    print(f"\nProfile: {path}\nReport:  {path.with_suffix('.html')}")
    if advice := how_to_get():
        _say(f"The report has no pictures: {advice}")
    print(_how_to_use(arguments.model, path, request.sha256, job.num_layers))
    return 0


class _Starter:
    """Starts the engine when it is called, and closes it at the end."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self._kwargs, self._engine = kwargs, None

    def __enter__(self) -> _Starter:
        return self

    def __call__(self) -> CalibrationEngine:
        self._engine = CalibrationEngine(self._kwargs)
        return self._engine

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()


def _write(request: Request, job: Job, result: Result, seconds: float) -> Path:
    """Write the profile, complete or not at all, and the report beside it."""
    path = request.output
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = profile_fields(request.name, request.sha256, job, result, seconds)
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps(fields, indent=2) + "\n")
    load_profile(scratch)
    os.replace(scratch, path)
    write_report(path.with_suffix(".html"), job, result, fields)
    return path


def _how_to_use(model: str, path: Path, sha256: str, num_layers: int) -> str:
    found = find_profile(None, model, num_layers, config_sha256=sha256)
    command = f"vllm serve {model} --attention-backend tidal"
    if found is not None and found.path.absolute() == path.absolute():
        return f"Used from this folder by: {command}"
    setting = json.dumps({"tidal": {"profile": str(path)}})
    return f"Used by: {command} --additional-config '{setting}'"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
