"""Engine and oracle give the same tokens, whatever the scope and the block size."""

import pytest

from tests.support.asking import generate
from tests.support.engines import reconfigured, runner
from tests.support.models import ROLES, random_prompt
from tests.support.oracle import Oracle
from tests.support.watching import counters
from tidal_vllm.config import SCOPES

PROMPTS = [random_prompt(n, seed=n) for n in (40, 150, 333)]
MAX_TOKENS = 16


def check(llm, folder, settings):
    with reconfigured(llm, **settings):
        answers = generate(llm, PROMPTS, MAX_TOKENS, logprobs=5)
        assert counters(llm)["sparse_steps"] == MAX_TOKENS - 1
    oracle = Oracle(folder, **settings)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens, logprobs = oracle.generate(prompt, MAX_TOKENS)
        assert answer.token_ids == tokens
        for step, wanted in zip(answer.logprobs, logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(wanted[token].item(), abs=1e-3)


@pytest.mark.parametrize("folder", ["random_llama", "random_qwen"], indirect=True)
@pytest.mark.parametrize("select_block_size", [1, 16])
@pytest.mark.parametrize("scope", SCOPES)
def test_scopes_and_block_sizes(engine, folder, scope, select_block_size):
    settings = {
        "scope": scope,
        "token_budget": 64,
        "select_block_size": select_block_size,
    }
    check(engine(folder, tidal=ROLES), folder, ROLES | settings)


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_forced_but_the_current_token(engine, folder, scope):
    """As the preset tidaldecode has it."""
    settings = {
        "scope": scope,
        "token_budget": 32,
        "select_block_size": 1,
        "sink_tokens": 0,
        "recent_fraction": 0.0,
    }
    check(engine(folder, tidal=ROLES), folder, ROLES | settings)


def test_another_layout_and_odd_blocks(engine, random_llama):
    llm = engine(random_llama, tidal=ROLES, block_size=48, layout="BHLNC")
    assert runner(llm).kv_caches[0].shape[2] == 48
    settings = {"scope": "kv_head", "token_budget": 120, "select_block_size": 12}
    check(llm, random_llama, ROLES | settings)


@pytest.mark.extended
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("reselect_interval", "select_attends"),
    [(1, "chosen"), (4, "everything"), (5, "chosen")],
)
def test_choices_that_hold_and_layers_that_attend_to_them(
    engine, folder, scope, reselect_interval, select_attends
):
    settings = {
        "scope": scope,
        "token_budget": 64,
        "select_block_size": 8,
        "reselect_interval": reselect_interval,
        "select_attends": select_attends,
    }
    check(engine(folder, tidal=ROLES), folder, ROLES | settings)
