"""A dense and a sparse engine of one model, asked in turn.

Changes vLLM at run time: the environment, where it does not say how much vLLM logs.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tidal_vllm.engine.metrics import COUNTING_WORKER
from tidal_vllm.fair_timing import Race, waiting_and_running

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

KV_CACHE_BYTES = 1 << 30
TRIALS = 5


@dataclass(frozen=True)
class Answer:
    """What one engine made of one prompt."""

    text: str
    token_ids: list[int]
    seconds_per_token: float
    """Mean time of a decode step, after the first token."""
    attended: float
    """Tokens that a SPARSE layer attended to, mean over the answer's tokens."""


@dataclass(frozen=True)
class Answers:
    """All answers to one prompt, dense and sparse, and how their times compare."""

    dense: list[Answer]
    sparse: list[Answer]
    race: Race

    def cells(self) -> list[str]:
        """Of a table's row: tokens attended, times in ms, and the speed-up."""
        cells = [
            f"{median(a.attended for a in answers):>7.0f}"
            for answers in (self.dense, self.sparse)
        ]
        for seconds in (self.race.dense, self.race.sparse):
            cells.append(f"{1e3 * median(seconds):>7.1f}")
        told = "?" if self.race.reason_unclear() else f"{self.race.speed_up:.2f}x"
        return [*cells, f"{told:>8}"]


def footnotes(compared: list[Answers]) -> list[str]:
    """Lines below a table of such rows."""
    lines = [
        "  Tokens attended: per step, by each layer that may be SPARSE.",
        f"  Times: medians of {TRIALS} answers, dense and sparse in turn.",
    ]
    reasons = dict.fromkeys(answers.race.reason_unclear() for answers in compared)
    return lines + [f"  ?: {reason}" for reason in reasons if reason]


@contextlib.contextmanager
def dense_and_sparse(
    model_dir: Path, max_model_len: int, tidal: dict[str, Any]
) -> Iterator[tuple["LLM", "LLM"]]:
    """Two engines, as users start them; they end with the block.

    Args:
        tidal: What `additional_config["tidal"]` holds.
    """
    backend = {"attention_backend": "TIDAL", "additional_config": {"tidal": tidal}}
    engines: list[LLM] = []
    try:
        for title, arguments in (
            ("dense: LLM(model)", {}),
            ('sparse: LLM(model, attention_backend="TIDAL")', backend),
        ):
            engines.append(_start(title, model_dir, max_model_len, arguments))
        yield engines[0], engines[1]
    finally:
        for llm in engines:
            # NOTE: at exit, Python would wait for the engine's process before vLLM
            # tells it to stop.
            llm.llm_engine.engine_core.shutdown()


def log_errors_only() -> None:
    """Unless the user wants more of vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def _start(
    title: str, model_dir: Path, max_model_len: int, backend: dict[str, Any]
) -> "LLM":
    import torch
    from vllm import LLM

    print(f"\n{title}\n  starting vLLM ...", end=" ", flush=True)
    start = time.perf_counter()
    # Two engines share the accelerator; vLLM would claim nearly all of it for one.
    share = {"gpu_memory_utilization": 0.4} if torch.accelerator.is_available() else {}
    llm = LLM(
        str(model_dir),
        max_model_len=max_model_len,
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


def compare(
    dense_llm: "LLM", sparse_llm: "LLM", prompt: list[int], **sampling: Any
) -> Answers:
    """Let both answer in turn, once their prefix caches hold the prompt.

    Args:
        prompt: Token ids.
        sampling: For vLLM's `SamplingParams`, beside the temperature, which is 0.
    """
    print(f"  {len(prompt):>6} tokens of context:", end=" ", flush=True)
    dense = [_answer(dense_llm, prompt, sampling)]
    sparse = [_answer(sparse_llm, prompt, sampling)]
    before = waiting_and_running()
    for trial in range(TRIALS):
        turns = [(dense, dense_llm), (sparse, sparse_llm)]
        for answers, llm in turns if trial % 2 else reversed(turns):
            answers.append(_answer(llm, prompt, sampling))
    after = waiting_and_running()
    race = Race(
        [answer.seconds_per_token for answer in dense[1:]],
        [answer.seconds_per_token for answer in sparse[1:]],
        waited=after[0] - before[0],
        ran=after[1] - before[1],
    )
    print(f"... {_shorten(sparse[-1].text)}", flush=True)
    return Answers(dense, sparse, race)


def _answer(llm: "LLM", prompt: list[int], sampling: dict[str, Any]) -> Answer:
    from vllm import SamplingParams

    before = _counters(llm)
    (output,) = llm.generate(
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0, **sampling),
        use_tqdm=False,
    )
    return read_answer(output, len(prompt), before, _counters(llm))


def _counters(llm: "LLM") -> dict[str, int]:
    """What the first worker has counted so far, by name."""
    return llm.collective_rpc("decode_counters")[0]


def read_answer(
    output: "RequestOutput",
    prompt_tokens: int,
    before: dict[str, int],
    after: dict[str, int],
) -> Answer:
    """What one engine made of a prompt.

    Args:
        prompt_tokens: Length of the prompt.
        before, after: The counters before the request and after it. On a GPU the dense
            engine runs vLLM's own backend, which counts nothing: each of its steps
            attends to all tokens up to its own.
    """
    tokens = list(output.outputs[0].token_ids)
    timing = output.metrics
    decoding = timing.last_token_ts - timing.first_token_ts
    steps = after["decode_tokens"] - before["decode_tokens"]
    attended = after["sparse_context_tokens"] - before["sparse_context_tokens"]
    if not steps:
        steps = len(tokens) - 1
        attended = sum(prompt_tokens + 1 + i for i in range(steps))
    return Answer(
        text=output.outputs[0].text,
        token_ids=tokens,
        seconds_per_token=decoding / max(len(tokens) - 1, 1),
        attended=attended / max(steps, 1),
    )


def equal_tokens(first: list[int], second: list[int]) -> int:
    """Leading tokens that are the same."""
    equal = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        equal += 1
    return equal


def _shorten(text: str, width: int = 44) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
