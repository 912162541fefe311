"""Streaming sessions: a turn's polluted tokens are corrected with the next prompt."""

import pytest

from tests.support.asking import sampling_params
from tests.support.drifting import EXACT, SPARSE
from tests.support.engines import core, scheduler
from tests.support.kv import kv_of, relative_errors
from tests.support.models import random_prompt
from tests.support.watching import correcting

pytestmark = pytest.mark.compat

TURNS = [random_prompt(60, seed=1), random_prompt(7, seed=2), random_prompt(5, seed=3)]
TURN_TOKENS = 20


def converse(llm, name="s"):
    """Output tokens of each turn, growing; yields once a turn has its first."""
    processor = llm.llm_engine.input_processor
    client = llm.llm_engine.engine_core
    for turn in TURNS:
        request = processor.process_inputs(
            name,
            {"type": "token", "prompt_token_ids": list(turn)},
            sampling_params(TURN_TOKENS),
            supported_tasks=("generate",),
            resumable=True,
        )
        client.add_request(request)
        tokens = []
        while len(tokens) < TURN_TOKENS:
            outputs, _ = core(llm).step_fn()
            for output in outputs[0].outputs if outputs else ():
                tokens += output.new_token_ids
            if len(tokens) == 1:
                yield tokens
    core(llm).abort_requests([name])
    while scheduler(llm).has_requests():
        core(llm).step_fn()


def dense_tokens(dense_answers):
    """The same conversation, each turn asked anew of a dense engine.

    vLLM drops the last token of a turn, which was never computed.
    """
    talk, turns = [], []
    for turn in TURNS:
        talk = talk + turn
        (answer,) = dense_answers([talk], TURN_TOKENS)
        turns.append(answer)
        talk = talk + answer[:-1]
    return turns


def test_exact(small_engine, dense_answers):
    llm = small_engine(EXACT | {"correction_interval": 8})
    for interval in (None, 6):
        llm.reset_prefix_cache()
        with correcting(llm, interval, 32) as counters:
            turns = list(converse(llm))
        assert turns == dense_tokens(dense_answers)
    assert counters.corrections >= 3 * 2 + 2


@pytest.mark.parametrize("interval", [None, 1000])
def test_the_next_turn_starts_clean(small_engine, interval):
    llm, seen = small_engine(SPARSE), []
    with correcting(llm, interval):
        for _ in converse(llm):
            (request,) = scheduler(llm).running
            computed = request.num_computed_tokens
            clean = scheduler(llm).clean_position(request)
            kv = kv_of(llm, request.request_id, 0, computed)
            seen.append((list(request.all_token_ids)[:computed], clean, kv))
    assert [clean for _, clean, _ in seen[1:]] == (
        [len(TURNS[0])] * 2
        if interval is None
        else [len(tokens) for tokens, _, _ in seen[1:]]
    )
    tokens, _, kv = seen[-1]
    error = float(relative_errors(kv, _dense_kv(small_engine, tokens)).max())
    assert error > 0.01 if interval is None else error < 1e-5


def _dense_kv(small_engine, tokens):
    llm = small_engine(max_num_batched_tokens=1024)
    engine = llm.llm_engine
    engine.add_request("dense", {"prompt_token_ids": tokens}, sampling_params(2))
    engine.step()
    (request,) = scheduler(llm).running
    kv = kv_of(llm, request.request_id, 0, len(tokens))
    engine.abort_request(["dense"])
    while scheduler(llm).requests:
        engine.step()
    return kv
