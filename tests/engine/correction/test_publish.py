"""The prefix cache never serves KV that sparse layers wrote, unless it is told to."""

import pytest

from tests.support.asking import ask, generate, sampling_params, tokens
from tests.support.drifting import BLOCK_SIZE, SPARSE
from tests.support.engines import scheduler
from tests.support.models import random_prompt
from tests.support.watching import correcting
from tidal_vllm.names import ASYNC_SCHEDULER

pytestmark = pytest.mark.compat

PROMPT = random_prompt(96, seed=7)
MAX_TOKENS = 80


def next_token_logprobs(llm, prompt):
    """Logprobs of the likeliest next tokens, and how many tokens were cached."""
    (output,) = ask(llm, [prompt], 1, logprobs=20)
    (step,) = output.outputs[0].logprobs
    return {i: p.logprob for i, p in step.items()}, output.num_cached_tokens


def first_turn(llm, interval):
    """A conversation's tokens after one answer."""
    with correcting(llm, interval):
        (answer,) = tokens(generate(llm, [PROMPT], MAX_TOKENS))
    return PROMPT + answer


def difference(found, wanted):
    """Largest difference of logprobs, over the tokens that both have."""
    assert found.keys() & wanted.keys()
    return max(abs(found[i] - wanted[i]) for i in found.keys() & wanted.keys())


@pytest.mark.parametrize("interval", [None, 8])
@pytest.mark.parametrize("kind", [{}, {"scheduler_cls": ASYNC_SCHEDULER}])
def test_a_shared_prefix_is_dense(small_engine, kind, interval):
    """The second conversation continues the first one's answer."""
    # NOTE: the asynchronous one publishes what a step decoded when it learns of it.
    llm = small_engine(SPARSE, **kind)
    asked = first_turn(llm, interval) + random_prompt(9, seed=8)
    found, num_cached = next_token_logprobs(llm, asked)
    wanted, _ = next_token_logprobs(small_engine(), asked)
    assert found.keys() == wanted.keys()
    assert difference(found, wanted) < 1e-3
    if interval is None:
        assert num_cached == len(PROMPT)
    else:
        assert num_cached >= len(PROMPT) + 4 * BLOCK_SIZE


def test_it_is_not_when_polluted_blocks_are_published(small_engine):
    llm = small_engine(SPARSE | {"publish_polluted": True})
    asked = first_turn(llm, None) + random_prompt(9, seed=8)
    found, num_cached = next_token_logprobs(llm, asked)
    wanted, _ = next_token_logprobs(small_engine(), asked)
    assert num_cached >= len(PROMPT) + 4 * BLOCK_SIZE
    assert found.keys() != wanted.keys() or difference(found, wanted) > 0.05


def test_blocks_are_published_up_to_the_clean_position(small_engine):
    """Seen in the block pool, after every step."""
    llm = small_engine(SPARSE)
    core = scheduler(llm)
    manager = core.kv_cache_manager
    engine = llm.llm_engine
    published = set()
    with correcting(llm, 8):
        request = {"prompt_token_ids": PROMPT}
        engine.add_request("r", request, sampling_params(MAX_TOKENS))
        while engine.has_unfinished_requests():
            engine.step()
            for running in core.running:
                (blocks,) = manager.get_blocks(running.request_id).blocks
                hashed = [block.block_hash is not None for block in blocks]
                count = sum(hashed)
                assert hashed == [True] * count + [False] * (len(blocks) - count)
                assert count == core.clean_position(running) // BLOCK_SIZE
                published.add(count)
    assert min(published) == len(PROMPT) // BLOCK_SIZE
    assert max(published) >= (len(PROMPT) + MAX_TOKENS) // BLOCK_SIZE - 1


def test_an_aborted_request_leaves_only_clean_blocks(small_engine):
    llm = small_engine(SPARSE)
    core, engine = scheduler(llm), llm.llm_engine
    with correcting(llm, 16):
        request = {"prompt_token_ids": PROMPT}
        engine.add_request("r", request, sampling_params(MAX_TOKENS))
        while not core.running or core.num_polluted_tokens() < 15:
            engine.step()
        (running,) = core.running
        tokens = list(running.all_token_ids)
        engine.abort_request(["r"])
        while core.requests:
            engine.step()
    _, num_cached = next_token_logprobs(llm, tokens)
    assert num_cached == len(PROMPT)


def test_prompts_of_one_step_share_blocks(small_engine):
    """The rule delays nothing that is dense: vLLM's own behaviour stays."""
    prompts = [PROMPT + random_prompt(5, seed=i) for i in range(2)]
    for settings in (None, SPARSE):
        outputs = ask(small_engine(settings), prompts, 1)
        assert [o.num_cached_tokens for o in outputs] == [0, len(PROMPT)]


def test_without_prefix_caching(small_engine):
    llm = small_engine(SPARSE, enable_prefix_caching=False)
    assert first_turn(llm, 8) == first_turn(llm, 8)
