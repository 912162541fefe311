"""Another budget for a running engine whose method keeps something of every key."""

import pytest

from tests.support.asking import generate, tokens
from tests.support.engines import reconfigured
from tests.support.models import NUM_LAYERS, ROLES, random_prompt
from tidal_vllm.validators import TidalConfigError

QUEST = {"preset": "quest", "dense_layers": [0], "select_block_size": 8}
PROMPTS = [random_prompt(n, seed=n) for n in (150, 333)]


@pytest.fixture(scope="module")
def start(engine, random_llama):
    return lambda: engine(random_llama, tidal=QUEST | {"token_budget": 64})


def test_the_bounds_of_cached_prompts_stay_and_come_back(start):
    llm = start()
    first = tokens(generate(llm, PROMPTS))
    with reconfigured(llm, **QUEST, token_budget=96):
        cached = generate(llm, PROMPTS)
        llm.reset_prefix_cache()
        anew = generate(llm, PROMPTS)
    assert all(answer.num_cached_tokens for answer in cached)
    assert tokens(cached) == tokens(anew) != first
    again = generate(llm, PROMPTS)
    assert all(answer.num_cached_tokens for answer in again)
    assert tokens(again) == first


@pytest.mark.parametrize(
    "settings",
    [
        QUEST | {"select_block_size": 16},
        ROLES | {"select_block_size": 8},
        QUEST | {"dense_layers": [*range(NUM_LAYERS)]},
    ],
    ids=["block size", "method", "dense"],
)
def test_nothing_else_may_change(start, settings):
    llm = start()
    with (
        pytest.raises(TidalConfigError, match="stays as the engine was started"),
        reconfigured(llm, **settings, token_budget=96),
    ):
        pass
