"""`tidal-vllm demo`: one model, the same long prompts, dense and sparse in turn.

Changes vLLM at run time: the environment, where it does not say how much vLLM logs.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.engine.metrics import COUNTING_WORKER
from tidal_vllm.fair_timing import Race, waiting_and_running
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.lengths import limit_plan
from tidal_vllm.plan.table import format_plan
from tidal_vllm.planted import (
    PlantedPrompt,
    PlantedSpec,
    build_planted_model,
    make_prompt,
)

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

ANSWER_WORDS = 24
DEPTHS = (0.1, 0.5, 0.9)
KV_CACHE_BYTES = 1 << 30
TRIALS = 5


@dataclass(frozen=True)
class Answer:
    """What one engine made of one prompt."""

    text: str
    right_tokens: int
    """Leading tokens that are as planted."""
    seconds_per_token: float
    """Mean time of a decode step, after the first token."""
    attended: float
    """Tokens that a SPARSE layer attended to, mean over the answer's tokens."""


@dataclass(frozen=True)
class Comparison:
    """All answers to one prompt, dense and sparse, and how their times compare."""

    prompt: PlantedPrompt
    dense: list[Answer]
    sparse: list[Answer]
    race: Race

    @property
    def wrong_answers(self) -> int:
        planted = len(self.prompt.answer_token_ids)
        return sum(a.right_tokens < planted for a in (*self.dense, *self.sparse))


def run_demo(model_dir: Path, contexts: list[int], token_budget: int) -> int:
    """Ask the planted model at each context length; print the comparison.

    Returns:
        Exit code: 0 if every answer was exact, else 1.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    spec = PlantedSpec()
    print(f"Building the planted model in {model_dir} ...", flush=True)
    build_planted_model(model_dir, spec)
    prompts = [
        make_prompt(spec, length, DEPTHS[i % 3], seed=i, chain_len=ANSWER_WORDS)
        for i, length in enumerate(contexts)
    ]
    tidal = {
        "token_budget": token_budget,
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
    }
    config = TidalConfig(**tidal)
    longest = _max_model_len(prompts)
    plan = limit_plan(plan_layers(config, spec.num_layers, None), config, longest)
    print(format_plan(plan, config, longest, "the planted model"), flush=True)
    backend = {"attention_backend": "TIDAL", "additional_config": {"tidal": tidal}}

    engines = []
    try:
        for title, arguments in (
            ("dense: LLM(model)", {}),
            ('sparse: LLM(model, attention_backend="TIDAL")', backend),
        ):
            engines.append(_start(title, model_dir, prompts, arguments))
        comparisons = [_compare(*engines, prompt) for prompt in prompts]
    finally:
        for llm in engines:
            # NOTE: at exit, Python would wait for the engine's process before vLLM
            # tells it to stop.
            llm.llm_engine.engine_core.shutdown()
    print(_table(comparisons))
    wrong = sum(comparison.wrong_answers for comparison in comparisons)
    print(
        f"\n{wrong} answers are wrong." if wrong else "\nEvery answer is exact.",
        "Each is a chain of words hidden in the prompt, known by construction.",
    )
    return 1 if wrong else 0


def _max_model_len(prompts: list[PlantedPrompt]) -> int:
    return max(len(prompt.prompt_token_ids) for prompt in prompts) + 64


def _start(
    title: str, model_dir: Path, prompts: list[PlantedPrompt], backend: dict[str, Any]
) -> "LLM":
    import torch
    from vllm import LLM

    print(f"\n{title}\n  starting vLLM ...", end=" ", flush=True)
    start = time.perf_counter()
    # Two engines share the accelerator; vLLM would claim nearly all of it for one.
    share = {"gpu_memory_utilization": 0.4} if torch.accelerator.is_available() else {}
    llm = LLM(
        str(model_dir),
        max_model_len=_max_model_len(prompts),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_seqs=4,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        worker_extension_cls=COUNTING_WORKER,
        **backend,
        **share,
    )
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return llm


def _compare(dense_llm: "LLM", sparse_llm: "LLM", prompt: PlantedPrompt) -> Comparison:
    """Let both answer in turn, once their prefix caches hold the prompt."""
    length = len(prompt.prompt_token_ids)
    print(f"  {length:>6} tokens of context:", end=" ", flush=True)
    dense, sparse = [_answer(dense_llm, prompt)], [_answer(sparse_llm, prompt)]
    before = waiting_and_running()
    for trial in range(TRIALS):
        turns = [(dense, dense_llm), (sparse, sparse_llm)]
        for answers, llm in turns if trial % 2 else reversed(turns):
            answers.append(_answer(llm, prompt))
    after = waiting_and_running()
    race = Race(
        [answer.seconds_per_token for answer in dense[1:]],
        [answer.seconds_per_token for answer in sparse[1:]],
        waited=after[0] - before[0],
        ran=after[1] - before[1],
    )
    print(f"... {_shorten(sparse[-1].text)}", flush=True)
    return Comparison(prompt, dense, sparse, race)


def _answer(llm: "LLM", prompt: PlantedPrompt) -> Answer:
    from vllm import SamplingParams

    before = _counters(llm)
    (output,) = llm.generate(
        {"prompt_token_ids": prompt.prompt_token_ids},
        SamplingParams(temperature=0, max_tokens=len(prompt.answer_token_ids)),
        use_tqdm=False,
    )
    return _read(output, prompt, before, _counters(llm))


def _counters(llm: "LLM") -> dict[str, int]:
    """What the first worker has counted so far, by name."""
    return llm.collective_rpc("decode_counters")[0]


def _read(
    output: "RequestOutput",
    prompt: PlantedPrompt,
    before: dict[str, int],
    after: dict[str, int],
) -> Answer:
    """What one engine made of a prompt.

    Args:
        before, after: The counters before the request and after it. On a GPU the dense
            engine runs vLLM's own backend, which counts nothing: each of its steps
            attends to all tokens up to its own.
    """
    tokens = list(output.outputs[0].token_ids)
    right = 0
    for given, planted in zip(tokens, prompt.answer_token_ids, strict=False):
        if given != planted:
            break
        right += 1
    timing = output.metrics
    decoding = timing.last_token_ts - timing.first_token_ts
    steps = after["decode_tokens"] - before["decode_tokens"]
    attended = after["sparse_context_tokens"] - before["sparse_context_tokens"]
    if not steps:
        steps = len(tokens) - 1
        attended = sum(len(prompt.prompt_token_ids) + 1 + i for i in range(steps))
    return Answer(
        text=output.outputs[0].text,
        right_tokens=right,
        seconds_per_token=decoding / max(len(tokens) - 1, 1),
        attended=attended / max(steps, 1),
    )


def _shorten(text: str, width: int = 44) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(comparisons: list[Comparison]) -> str:
    lines = [
        "",
        "           exact answer tokens  tokens attended      decode, ms/token",
        "  context     dense   sparse    dense   sparse    dense   sparse  speed-up",
        "  -------  --------  -------  -------  -------  -------  -------  --------",
    ]
    for comparison in comparisons:
        prompt, race = comparison.prompt, comparison.race
        planted = len(prompt.answer_token_ids)
        cells = [f"  {len(prompt.prompt_token_ids):>7}"]
        for answers, width in ((comparison.dense, 8), (comparison.sparse, 7)):
            right = min(answer.right_tokens for answer in answers)
            cells.append(f"{f'{right}/{planted}':>{width}}")
        for answers in (comparison.dense, comparison.sparse):
            cells.append(f"{median(a.attended for a in answers):>7.0f}")
        for seconds in (race.dense, race.sparse):
            cells.append(f"{1e3 * median(seconds):>7.1f}")
        told = "?" if race.reason_unclear() else f"{race.speed_up:.2f}x"
        lines.append("  ".join([*cells, f"{told:>8}"]))
    lines.append("  Tokens attended: per step, by each layer that may be SPARSE.")
    lines.append(f"  Times: medians of {TRIALS} answers, dense and sparse in turn.")
    reasons = dict.fromkeys(c.race.reason_unclear() for c in comparisons)
    lines += [f"  ?: {reason}" for reason in reasons if reason]
    return "\n".join(lines)
