"""`tidal-vllm demo`: one model, the same long prompts, dense and sparse."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tidal_vllm.config import TidalConfig
from tidal_vllm.lengths import limit_plan
from tidal_vllm.plan_table import format_plan
from tidal_vllm.planted import (
    PlantedPrompt,
    PlantedSpec,
    build_planted_model,
    make_prompt,
)
from tidal_vllm.policy import plan_layers

ANSWER_WORDS = 24
DEPTHS = (0.1, 0.5, 0.9)
KV_CACHE_BYTES = 1 << 30


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
    print(format_plan(plan, config, longest, "the planted model"))

    dense = _ask("dense: LLM(model)", model_dir, prompts, {})
    sparse = _ask(
        'sparse: LLM(model, attention_backend="TIDAL")',
        model_dir,
        prompts,
        {"attention_backend": "TIDAL", "additional_config": {"tidal": tidal}},
    )
    print(_table(prompts, dense, sparse))
    wrong = sum(
        answer.right_tokens < len(prompt.answer_token_ids)
        for answers in (dense, sparse)
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    print(
        f"\n{wrong} answers are wrong." if wrong else "\nEvery answer is exact.",
        "Each is a chain of words hidden in the prompt, known by construction.",
    )
    return 1 if wrong else 0


def _max_model_len(prompts: list[PlantedPrompt]) -> int:
    return max(len(prompt.prompt_token_ids) for prompt in prompts) + 64


def _ask(
    title: str, model_dir: Path, prompts: list[PlantedPrompt], backend: dict
) -> list[Answer]:
    """Start an engine, ask it every prompt alone, and stop it."""
    from vllm import LLM

    print(f"\n{title}\n  starting vLLM ...", end=" ", flush=True)
    start = time.perf_counter()
    llm = LLM(
        str(model_dir),
        max_model_len=_max_model_len(prompts),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_seqs=4,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        **backend,
    )
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    try:
        return [_answer(llm, prompt) for prompt in prompts]
    finally:
        # NOTE: at exit, Python would wait for the engine's process before vLLM
        # tells it to stop.
        llm.llm_engine.engine_core.shutdown()


def _answer(llm, prompt: PlantedPrompt) -> Answer:
    from vllm import SamplingParams

    print(
        f"  {len(prompt.prompt_token_ids):>6} tokens of context:", end=" ", flush=True
    )
    before = _counters(llm)
    (output,) = llm.generate(
        {"prompt_token_ids": prompt.prompt_token_ids},
        SamplingParams(temperature=0, max_tokens=len(prompt.answer_token_ids)),
        use_tqdm=False,
    )
    answer = _read(output, prompt, before, _counters(llm))
    print(f"... {_shorten(answer.text)}", flush=True)
    return answer


def _counters(llm) -> dict[str, int]:
    return llm.collective_rpc("tidal_counters")[0]


def _read(output, prompt: PlantedPrompt, before: dict, after: dict) -> Answer:
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
    return Answer(
        text=output.outputs[0].text,
        right_tokens=right,
        seconds_per_token=decoding / max(len(tokens) - 1, 1),
        attended=attended / max(steps, 1),
    )


def _shorten(text: str, width: int = 44) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(
    prompts: list[PlantedPrompt], dense: list[Answer], sparse: list[Answer]
) -> str:
    lines = [
        "",
        "           exact answer tokens  tokens attended      decode, ms/token",
        "  context     dense   sparse    dense   sparse    dense   sparse  speed-up",
        "  -------  --------  -------  -------  -------  -------  -------  --------",
    ]
    for prompt, full, few in zip(prompts, dense, sparse, strict=True):
        planted = len(prompt.answer_token_ids)
        speedup = full.seconds_per_token / few.seconds_per_token
        lines.append(
            f"  {len(prompt.prompt_token_ids):>7}"
            f"  {f'{full.right_tokens}/{planted}':>8}"
            f"  {f'{few.right_tokens}/{planted}':>7}"
            f"  {full.attended:>7.0f}  {few.attended:>7.0f}"
            f"  {1e3 * full.seconds_per_token:>7.1f}"
            f"  {1e3 * few.seconds_per_token:>7.1f}  {speedup:>7.2f}x"
        )
    lines.append("  Tokens attended: per step, by each layer that may be SPARSE.")
    lines.append("  One run each; a busy machine slows dense decoding most.")
    return "\n".join(lines)
