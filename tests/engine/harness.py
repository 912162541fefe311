"""Driving vLLM's real engine: start it, reconfigure it, ask it, look inside it."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams, envs

from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.engine.state import choose_implementations

MiB = 1 << 20

_broken: set[LLM] = set()


class Engines:
    """Engines of this process, started once per model and arguments, then kept.

    They live side by side: each has its model, KV cache, scheduler and builders, and
    they share only vLLM's process groups of one rank.
    """

    def __init__(self) -> None:
        self._running: dict[str, LLM] = {}

    def __call__(
        self,
        model: Path,
        tidal: dict | None = None,
        layout: str | None = None,
        **kwargs: Any,
    ) -> LLM:
        """An engine with an empty prefix cache.

        Args:
            tidal: Our settings; None leaves the backend unselected: dense attention.
            layout: The KV cache layout; by default the backend's choice.
            kwargs: More arguments of `LLM`.
        """
        kwargs = engine_kwargs(tidal, **kwargs)
        key = json.dumps([str(model), layout, kwargs], sort_keys=True)
        if self._running.get(key) in {None, *_broken}:
            self._running[key] = _start(model, layout, kwargs)
        llm = self._running[key]
        assert llm.reset_prefix_cache(), "blocks are in use: a request never ended"
        return llm

    def shutdown(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # vLLM collects twice per engine; in this big process each takes a second.
            patch.setattr(gc, "collect", lambda *_: 0)
            for llm in self._running.values():
                llm.llm_engine.engine_core.shutdown()
        self._running.clear()


def engine_kwargs(tidal: dict | None = None, **kwargs: Any) -> dict[str, Any]:
    """Arguments of `LLM`: a small KV cache, few sequences, TIDAL if configured."""
    defaults: dict[str, Any] = {
        "block_size": 16,
        "max_num_seqs": 4,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 64 * MiB,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if tidal is not None:
        defaults |= {
            "attention_backend": "TIDAL",
            "additional_config": {"tidal": tidal},
        }
    return defaults | kwargs


def _start(model: Path, layout: str | None, kwargs: dict[str, Any]) -> LLM:
    # NOTE: the first engine makes vLLM read its environment once and for all.
    envs.disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
        if layout is not None:
            patch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        return LLM(str(model), **kwargs)


def scheduler(llm: LLM) -> Any:
    """The V1 scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner(llm: LLM) -> Any:
    """The model runner of an in-process engine with one worker."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner


def impls(llm: LLM) -> list[TidalImpl]:
    """Those of the layers that TIDAL runs."""
    layers = runner(llm).compilation_config.static_forward_context.values()
    found = [getattr(layer, "impl", None) for layer in layers]
    return [impl for impl in found if isinstance(impl, TidalImpl)]


@contextmanager
def reconfigured(llm: LLM, **tidal: Any) -> Iterator[LLM]:
    """The engine under other settings: its real builders and state are made anew.

    Prompts stay in the prefix cache, for their KV is dense under all settings.
    """
    groups = [
        group
        for groups in runner(llm).attn_groups
        for group in groups
        if group.backend is TidalBackend
    ]
    config = copy.copy(runner(llm).vllm_config)
    config.additional_config = {"tidal": tidal}
    kept = [group.metadata_builders for group in groups]
    states = {
        impl: (impl.kernels, impl.state)
        for impl in impls(llm)
        if impl.sliding_window is None
    }
    try:
        first = next(iter(states))
        first.kernels, _ = choose_implementations(config, first.head_size, "auto")
        state = first.make_state(config)
        for impl in states:
            impl.kernels, impl.state = first.kernels, state
        for group in groups:
            group.metadata_builders = [
                type(old)(old.kv_cache_spec, old.layer_names, config, old.device)
                for old in group.metadata_builders
            ]
        yield llm
    finally:
        for group, builders in zip(groups, kept, strict=True):
            group.metadata_builders = builders
        for impl, (kernels, state) in states.items():
            impl.kernels, impl.state = kernels, state


def counters(llm: LLM) -> Counter:
    """Decode counters since the builders were made; subtract to get a difference."""
    (counts,) = llm.collective_rpc("tidal_counters")
    return Counter(counts)


@dataclass(frozen=True)
class Answer:
    """What a request got."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    """The likeliest tokens at each step; empty where none were asked for."""
    num_cached_tokens: int

    @classmethod
    def of(cls, output: Any) -> "Answer":
        (completion,) = output.outputs
        steps = completion.logprobs or ()
        logprobs = [{i: p.logprob for i, p in step.items()} for step in steps]
        return cls(list(completion.token_ids), logprobs, output.num_cached_tokens)


def sampling(max_tokens: int, **more: Any) -> SamplingParams:
    more = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | more
    return SamplingParams(max_tokens=max_tokens, **more)


@contextmanager
def _whole(llm: LLM) -> Iterator[None]:
    """Fail at once if a step of the engine raised before: it would hang now."""
    assert llm not in _broken, "an earlier test broke this engine"
    _broken.add(llm)
    yield
    _broken.remove(llm)


def generate(
    llm: LLM, prompts: Sequence[list[int]], max_tokens: int = 16, **params: Any
) -> list[Answer]:
    """Answers to all prompts in one go, greedy by default."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    with _whole(llm):
        outputs = llm.generate(inputs, sampling(max_tokens, **params), use_tqdm=False)
    return [Answer.of(output) for output in outputs]


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def serve(
    llm: LLM, arrivals: Sequence[tuple[int, list[int], int]], **params: Any
) -> list[Answer]:
    """Answers to requests that come one after another, greedy by default.

    Args:
        arrivals: Step of the engine before which a request arrives, its prompt and
            how many tokens it wants.
    """
    engine = llm.llm_engine
    found: dict[str, Answer] = {}
    waiting = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    step = 0
    with _whole(llm):
        while waiting or engine.has_unfinished_requests():
            while waiting and waiting[0][1][0] <= step:
                index, (_, prompt, max_tokens) = waiting.pop(0)
                request = {"prompt_token_ids": prompt}
                engine.add_request(str(index), request, sampling(max_tokens, **params))
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = Answer.of(output)
            step += 1
    return [found[str(index)] for index in range(len(arrivals))]


@dataclass
class Watched:
    """What the scheduler decided while it was watched."""

    tokens: list[list[int]]
    """Per step, the tokens of each scheduled request."""
    num_preemptions: int = 0


@contextmanager
def watched(llm: LLM) -> Iterator[Watched]:
    seen = Watched([])
    schedule = scheduler(llm).schedule

    def spied(*args, **kwargs):
        output = schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            seen.tokens.append(list(output.num_scheduled_tokens.values()))
        seen.num_preemptions += len(output.preempted_req_ids or ())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler(llm), "schedule", spied)
        yield seen


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a child that runs an engine as users do."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return inherited | {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"} | more


def run_child(tmp_path: Path, jobs: list[dict], **env: str) -> list[dict]:
    """Results of jobs of `child.py`, one after another in one child."""
    asked, given, log = (tmp_path / name for name in ("jobs", "results", "log"))
    asked.write_text(json.dumps(jobs))
    with log.open("w") as printed:
        child = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("child.py"), asked, given],
            env=child_environment(**env),
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait()
        finally:
            _end_session(child.pid)
    print(log.read_text())
    assert code == 0
    assert "Traceback" not in log.read_text()
    return json.loads(given.read_text())


def _end_session(session: int) -> None:
    """Kill what of a child's processes does not end: what does unlinks its memory."""
    from tests.leftovers import living

    end = time.monotonic() + 60
    while (pids := living(session)) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_interpreted(module: str, *arguments: Path, v2_runner: bool) -> str:
    """Run a module under Triton's interpreter, without a GPU; gives what it printed.

    In a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=child_environment(
            CUDA_VISIBLE_DEVICES="",
            TRITON_INTERPRET="1",
            VLLM_USE_V2_MODEL_RUNNER=str(int(v2_runner)),
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        ),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout
