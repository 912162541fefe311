"""Requests to an engine of this process, and the answers that it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams

from tests.support.engines import unbroken


@dataclass(frozen=True)
class Answer:
    """What a request got."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    """The likeliest tokens at each step; empty where none were asked for."""
    num_cached_tokens: int

    @classmethod
    def of(cls, output: RequestOutput) -> "Answer":
        (completion,) = output.outputs
        steps = completion.logprobs or ()
        logprobs = [{i: p.logprob for i, p in step.items()} for step in steps]
        return cls(list(completion.token_ids), logprobs, output.num_cached_tokens)


def sampling_params(max_tokens: int, **more: Any) -> SamplingParams:
    """Parameters of a greedy request of `max_tokens` tokens, unless `more` says so."""
    more = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | more
    return SamplingParams(max_tokens=max_tokens, **more)


def ask(
    llm: LLM,
    prompts: Sequence[list[int]],
    max_tokens: int | Sequence[int] = 16,
    **params: Any,
) -> list[RequestOutput]:
    """vLLM's outputs for all prompts in one go, greedy by default.

    Args:
        max_tokens: Of each answer, or one number for each prompt.
        params: More fields of `SamplingParams`.
    """
    counts = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    asked = [sampling_params(count, **params) for count in counts]
    with unbroken(llm):
        return llm.generate(inputs, asked, use_tqdm=False)


def generate(
    llm: LLM,
    prompts: Sequence[list[int]],
    max_tokens: int | Sequence[int] = 16,
    **params: Any,
) -> list[Answer]:
    """Answers to all prompts in one go; the arguments are those of `ask`."""
    return [Answer.of(output) for output in ask(llm, prompts, max_tokens, **params)]


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def serve(
    llm: LLM, arrivals: Sequence[tuple[int, list[int], int]], **params: Any
) -> list[Answer]:
    """Answers to requests that come one after another, greedy by default.

    Args:
        arrivals: Step of the engine before which a request arrives, its prompt and
            how many tokens it wants.
        params: More fields of `SamplingParams`.
    """
    engine = llm.llm_engine
    found: dict[str, Answer] = {}
    waiting = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    step = 0
    with unbroken(llm):
        while waiting or engine.has_unfinished_requests():
            while waiting and waiting[0][1][0] <= step:
                index, (_, prompt, max_tokens) = waiting.pop(0)
                asked = sampling_params(max_tokens, **params)
                engine.add_request(str(index), {"prompt_token_ids": prompt}, asked)
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = Answer.of(output)
            step += 1
    return [found[str(index)] for index in range(len(arrivals))]
