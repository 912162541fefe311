"""`tidal-vllm calibrate`: what is refused before any work, the run, its output."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tidal_vllm.calibrate import prompts as asking
from tidal_vllm.calibrate.choice import evidence_needed
from tidal_vllm.calibrate.engine import (
    CalibrationEngine,
    complete_settings,
    engine_kwargs,
    switches,
)
from tidal_vllm.calibrate.grid import recorder_settings
from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.calibrate.options import BUDGET_SHARE, MOST_BUDGET, MOST_CONTEXT
from tidal_vllm.calibrate.record import profile_fields, versions
from tidal_vllm.calibrate.report import describe, write_report
from tidal_vllm.calibrate.result import Job, NotCalibrated, Result, more_evidence
from tidal_vllm.calibrate.run import calibrate
from tidal_vllm.calibrate.state import State
from tidal_vllm.config import SCOPES, TidalConfig
from tidal_vllm.plan.layer_kinds import LayerKind
from tidal_vllm.plan.resolve import model_sha256, resolve, uncorrectable
from tidal_vllm.profiles import PROJECT_DIR, find_profile, load_profile, model_names
from tidal_vllm.validators import TidalConfigError

LEAST_LOSS = 0.0001  # takes 38,413 tokens to prove
LEAST_BLOCKS, LEAST_BUDGET = 4, 8  # what is forced by default fits into both
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate as asked and return the exit code."""
    state, interrupts = None, Interrupts()
    try:
        with switches(), interrupts:
            request = _Request(arguments)
            job = request.job()
            asked = request.manifest(job)
            state = State(request.state_folder, asked, arguments.restart, interrupts)
            if kept := state.num_replies:
                _say(f"Resuming: {kept} answers are kept in {state.folder}")
            started = time.perf_counter()
            with request.engine(job) as start:
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
    print(_how_to_use(arguments.model, path, request.sha256, job.num_layers))
    return 0


class _Request:
    """The options, checked: first by themselves, then against the model's config."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given = arguments
        self._check_numbers()
        self.lines = None
        if arguments.prompts != asking.BUILTIN:
            self.lines = asking.read_file(arguments.prompts)
        self.more = self._engine_args()
        name = model_names(arguments.model)
        if not any(name):
            raise TidalConfigError("MODEL", arguments.model, "must be a model's name")
        self.name = name[0].lower()
        self.output = arguments.output or PROJECT_DIR / f"{self.name}.json"
        self._check_output()
        self._read_model()

    @property
    def state_folder(self) -> Path:
        return self.output.with_name(self.output.name + ".state")

    def job(self) -> Job:
        """What to do, with the prompts made and measured."""
        given, config = self.given, self.model_config
        vocab_size, tokenizer = config.get_vocab_size(), self._tokenizer()
        longest = config.max_model_len - given.decode_tokens - 1
        context = self.context = given.context or min(MOST_CONTEXT, longest)
        if not 1 <= context <= longest:
            reason = (
                f"must be 1..{longest}: {given.model} takes {config.max_model_len} "
            )
            reason += f"tokens, {given.decode_tokens} of them for the answer"
            raise TidalConfigError("--context", context, reason)
        further = None
        if self.lines is None:
            kind = (given.model, tokenizer, vocab_size)
            made = asking.built_in(*kind, given.num_prompts, context)

            def further(number: int) -> asking.Prompt:
                return asking.one_more(*kind, number, context)
        else:
            limit = context if given.context else longest
            made = asking.from_file(given.prompts, self.lines, tokenizer, vocab_size)
            for number, prompt in enumerate(made, 1):
                if len(prompt.token_ids) > limit:
                    reason = f"prompt {number} has {len(prompt.token_ids)} tokens: "
                    reason += f"must be at most {limit}"
                    raise TidalConfigError("--prompts", given.prompts, reason)
        shortest = min(len(prompt.token_ids) for prompt in made)
        parallel = self.vllm_config.parallel_config
        job = Job(
            model=given.model,
            prompts=tuple(made),
            further=further,
            decode=tokenizer.decode if tokenizer else None,
            config=self._config(shortest),
            first_select=given.dense_layers,
            max_select=given.max_select_layers,
            max_loss=given.max_loss,
            target_agreement=given.target_agreement,
            decode_tokens=given.decode_tokens,
            num_layers=self.num_layers,
            full_layers=self.full_layers,
            correctable=uncorrectable(self.vllm_config, self.startup) is None,
            group_size=config.get_num_attention_heads(parallel)
            // config.get_num_kv_heads(parallel),
            kv_block_size=self.kv_block_size,
        )
        self._check_evidence(job)
        return job

    def _check_evidence(self, job: Job) -> None:
        """Refuse prompts of which the best answers would not prove enough."""
        most = sum(
            len(prompt.answer_ids or range(job.decode_tokens)) - 1
            for prompt in job.prompts
        )
        needed = evidence_needed(0, job.max_loss)
        if job.further is None and most < needed:
            cure = more_evidence(needed - most, most, job)
            reason = f"takes {needed} decoded tokens to prove, if all agree with dense "
            reason += f"attention, but --prompts gives {most} at most. {cure}"
            raise TidalConfigError("--max-loss", job.max_loss, reason)

    def manifest(self, job: Job) -> dict[str, Any]:
        """All that an answer depends on."""
        asked = [dataclasses.astuple(prompt) for prompt in job.prompts]
        return {
            "model": self.given.model,
            "config_sha256": self.sha256,
            "weights": _weights(self.given.model),
            "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "setting": recorder_settings(job.config),
            "dense_layers": job.first_select,
            "decode_tokens": job.decode_tokens,
            "engine_args": self.more,
            "versions": versions(),
        }

    def engine(self, job: Job) -> _Starter:
        longest = max(len(prompt.token_ids) for prompt in job.prompts)
        if job.further is not None:
            longest = max(longest, self.context)
        answer = max(len(prompt.answer_ids or ()) for prompt in job.prompts)
        full = job.full_layers
        first = min(job.first_select, len(full) - 1)
        settings = complete_settings(job.config, full[:first], [full[first]])
        length = longest + max(answer, job.decode_tokens) + 1
        if LayerKind.WINDOW in self.startup.kinds:
            # In an engine for shorter sequences they would be full attention.
            length = max(length, self.model_config.get_sliding_window() + 1)
        more = {"max_model_len": length, **self.more}
        return _Starter(engine_kwargs(self.given.model, settings, **more))

    def _check_numbers(self) -> None:
        given = self.given
        least = {"num_prompts": 1, "decode_tokens": 2, "dense_layers": 0}
        least |= {"max_select_layers": 1, "tensor_parallel_size": 1}
        least |= {"select_block_size": 1, "context": 1, "budget": 1}
        for key, low in least.items():
            value = getattr(given, key)
            if value is not None and value < low:
                raise TidalConfigError(_option(key), value, f"must be {low} or more")
        for key in ("max_loss", "target_agreement"):
            value = getattr(given, key)
            if value is not None and not 0 <= value <= 1:
                raise TidalConfigError(_option(key), value, "must be a share, 0 to 1")
        if given.max_loss < LEAST_LOSS:
            reason = f"must be {LEAST_LOSS} or more: no number of tokens proves that "
            reason += "none is lost, and a smaller share takes too many"
            raise TidalConfigError("--max-loss", given.max_loss, reason)
        if given.scope not in SCOPES:
            reason = f"must be one of {', '.join(SCOPES)}"
            raise TidalConfigError("--scope", given.scope, reason)

    def _engine_args(self) -> dict[str, Any]:
        text = self.given.engine_args
        try:
            more = json.loads(text)
        except json.JSONDecodeError as error:
            reason = f"is not valid JSON: {error.msg} at column {error.colno}"
            raise TidalConfigError("--engine-args", text, reason) from None
        if not isinstance(more, dict):
            reason = 'must be a JSON object such as {"dtype": "bfloat16"}'
            raise TidalConfigError("--engine-args", text, reason)
        if more.get("pipeline_parallel_size", 1) != 1:
            reason = (
                "must be 1: a selection does not travel between pipeline stages, so "
                "what one captures of another's layers would never be used; calibrate "
                "with tensor_parallel_size, then serve with stages that start with a "
                "SELECT layer"
            )
            raise TidalConfigError(
                "--engine-args pipeline_parallel_size",
                more["pipeline_parallel_size"],
                reason,
            )
        ours = {*engine_kwargs("", {}), "speculative_config", "tensor_parallel_size"}
        for key in more:
            if key in ours:
                reason = "is set by the calibration itself; must be left out"
                raise TidalConfigError(f"--engine-args {key}", more[key], reason)
        more["tensor_parallel_size"] = self.given.tensor_parallel_size
        return more

    def _check_output(self) -> None:
        shown = str(self.output)
        if self.output.suffix != ".json":
            raise TidalConfigError("-o", shown, "must end in .json")
        if self.output.is_dir():
            raise TidalConfigError("-o", shown, "is a folder; must be a file")
        if self.output.exists() and not _is_calibrated(self.output):
            reason = "is there already, and no earlier calibration: would be lost"
            raise TidalConfigError("-o", shown, reason)
        parent = next(p for p in self.output.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise TidalConfigError("-o", shown, f"{parent} cannot be written to")

    def _read_model(self) -> None:
        """Let vLLM read the config; it refuses what the backend cannot run."""
        from vllm.engine.arg_utils import EngineArgs

        from tidal_vllm.engine.support import kv_block_size

        model = self.given.model
        if os.path.isdir(model) and not os.path.exists(f"{model}/config.json"):
            raise TidalConfigError("MODEL", model, "this folder holds no config.json")
        off = {"dense_layers": [], "select_layers": []}
        try:
            arguments = EngineArgs(**engine_kwargs(model, off, **self.more))
            self.vllm_config = arguments.create_engine_config()
        except TidalConfigError:
            raise
        except (OSError, ValueError, TypeError) as error:
            reason = f"vLLM refuses it: {str(error).strip()}"
            raise TidalConfigError("MODEL", model, reason) from None
        self.model_config = self.vllm_config.model_config
        self.kv_block_size = kv_block_size(self.vllm_config)
        self.sha256 = model_sha256(self.model_config)
        self.num_layers = self.model_config.get_total_num_hidden_layers()
        self.startup = resolve(self.vllm_config)
        self.full_layers = self.startup.full_layers
        most = len(self.full_layers) - 2
        if most < 0:
            reason = f"only its layers {list(self.full_layers)} attend to everything: "
            reason += "one has to select and one to be SPARSE"
            raise TidalConfigError("MODEL", model, reason)
        if self.given.dense_layers > most:
            reason = f"must be 0..{most}: {model} has {most + 2} layers with full "
            reason += "attention, and one has to select and one to be SPARSE"
            raise TidalConfigError("--dense-layers", self.given.dense_layers, reason)

    def _config(self, shortest: int) -> TidalConfig:
        size = self.given.select_block_size
        budget = self.given.budget
        if budget is None:
            least = max(LEAST_BLOCKS, -(-LEAST_BUDGET // size))
            wanted = min(shortest // BUDGET_SHARE, MOST_BUDGET)
            budget = max(wanted // size, least) * size
        config = TidalConfig(
            token_budget=budget, select_block_size=size, scope=self.given.scope
        )
        if budget >= shortest:
            reason = f"must be below the shortest prompt, {shortest} tokens: up to the "
            reason += "budget sparse attention is dense"
            raise TidalConfigError("--budget", budget, reason)
        config.check_kv_block_size(self.kv_block_size)
        return config

    def _tokenizer(self) -> Any:
        model = self.given.model
        if os.path.isdir(model) and not any(
            os.path.exists(f"{model}/{name}") for name in _TOKENIZER_FILES
        ):
            return None
        from vllm.tokenizers import get_tokenizer

        return get_tokenizer(self.more.get("tokenizer") or model)


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


def _is_calibrated(path: Path) -> bool:
    """Whether a file is the profile of an earlier calibration."""
    try:
        return bool(load_profile(path).measured)
    except TidalConfigError:
        return False


def _write(request: _Request, job: Job, result: Result, seconds: float) -> Path:
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


def _weights(model: str) -> list[list[Any]]:
    """Names, sizes and times of a local folder's weight files."""
    files = sorted(Path(model).glob("*.safetensors")) if os.path.isdir(model) else []
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
