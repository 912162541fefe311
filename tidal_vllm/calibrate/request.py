"""The options of a calibration, checked against the model's config before any work."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidal_vllm.calibrate.engine import complete_settings, engine_kwargs
from tidal_vllm.calibrate.evidence import evidence_needed
from tidal_vllm.calibrate.grid import recorder_settings
from tidal_vllm.calibrate.options import (
    BUDGET_SHARE,
    MOST_BUDGET,
    MOST_CONTEXT,
    check_numbers,
)
from tidal_vllm.calibrate.prompts import (
    BUILTIN,
    Prompt,
    built_in,
    from_file,
    one_more,
    read_file,
)
from tidal_vllm.calibrate.record import versions
from tidal_vllm.calibrate.result import Job, more_evidence
from tidal_vllm.calibrate.text import TextPrompts, is_text, read_text
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layer_kinds import LayerKind
from tidal_vllm.plan.resolve import model_sha256, resolve, uncorrectable
from tidal_vllm.profiles import PROJECT_DIR, load_profile, model_names
from tidal_vllm.validators import TidalConfigError

LEAST_BLOCKS, LEAST_BUDGET = 4, 8  # what is forced by default fits into both
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
MakePrompt = Callable[[int], Prompt | None]


class Request:
    """The options, checked: first by themselves, then against the model's config."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given = arguments
        check_numbers(arguments)
        self.lines = self.text = None
        if is_text(arguments.prompts):
            self.text = read_text(arguments.prompts)
        elif arguments.prompts != BUILTIN:
            self.lines = read_file(arguments.prompts)
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
        tokenizer = self._tokenizer()
        prompts, further = self._prompts(tokenizer)
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        parallel = self.vllm_config.parallel_config
        job = Job(
            model=given.model,
            prompts=tuple(prompts),
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
        _check_evidence(job)
        return job

    def _prompts(self, tokenizer: Any) -> tuple[list[Prompt], MakePrompt | None]:
        """The prompts to record, and what makes more of them."""
        given, most = self.given, self.model_config.max_model_len
        longest = most - given.decode_tokens - 1
        default = min(MOST_CONTEXT, longest)
        text = None
        if self.text is not None:
            text = TextPrompts(given.prompts, self.text, tokenizer)
            default = min(default, text.num_tokens // 2)
        context = self.context = given.context or default
        if not 1 <= context <= longest:
            reason = f"must be 1..{longest}: {given.model} takes {most} "
            reason += f"tokens, {given.decode_tokens} of them for the answer"
            raise TidalConfigError("--context", context, reason)
        if text is not None:
            text.cut(context, given.decode_tokens)
            count = min(given.num_prompts, len(text))
            return [text.prompt(number) for number in range(count)], text.prompt
        vocab_size = self.model_config.get_vocab_size()
        if self.lines is None:
            of_kind = (given.model, tokenizer, vocab_size)

            def further(number: int) -> Prompt:
                return one_more(*of_kind, number, context)

            return built_in(*of_kind, given.num_prompts, context), further
        limit = context if given.context else longest
        made = from_file(given.prompts, self.lines, tokenizer, vocab_size)
        for number, prompt in enumerate(made, 1):
            if len(prompt.token_ids) > limit:
                reason = f"prompt {number} has {len(prompt.token_ids)} tokens: "
                reason += f"must be at most {limit}"
                raise TidalConfigError("--prompts", given.prompts, reason)
        return made, None

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

    def engine_kwargs(self, job: Job) -> dict[str, Any]:
        """Arguments of the engine, long enough for every prompt and answer."""
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
        return engine_kwargs(self.given.model, settings, **more)

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
        taken = {*engine_kwargs("", {}), "speculative_config", "tensor_parallel_size"}
        for key in more:
            if key in taken:
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


def _check_evidence(job: Job) -> None:
    """Refuse prompts of which the best answers would not prove enough."""
    most = sum(
        len(prompt.answer_ids or range(job.decode_tokens)) - 1 for prompt in job.prompts
    )
    needed = evidence_needed(0, job.max_loss)
    if job.further is None and most < needed:
        cure = more_evidence(needed - most, most, job)
        reason = f"takes {needed} decoded tokens to prove, if all agree with dense "
        reason += f"attention, but --prompts gives {most} at most. {cure}"
        raise TidalConfigError("--max-loss", job.max_loss, reason)


def _is_calibrated(path: Path) -> bool:
    """Whether a file is the profile of an earlier calibration."""
    try:
        return bool(load_profile(path).measured)
    except TidalConfigError:
        return False


def _weights(model: str) -> list[list[Any]]:
    """Names, sizes and times of a local folder's weight files."""
    files = sorted(Path(model).glob("*.safetensors")) if os.path.isdir(model) else []
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
