"""Seeded sampling where a prompt comes in chunks: vLLM's CPU runner dies of it."""

import pytest

from tests.support.asking import generate, serve, tokens
from tests.support.models import ROLES, random_prompt
from tests.support.watching import watched

SETTINGS = ROLES | {"token_budget": 64}
PROMPTS = [random_prompt(n, seed=n) for n in (200, 129, 30)]
SAMPLING = {"temperature": 1.0, "seed": 1234}


@pytest.fixture(scope="module")
def whole(engine, random_llama):
    """Answers to prompts that come in one piece, each alone."""
    llm = engine(random_llama, tidal=SETTINGS)
    return [tokens(generate(llm, [p], 20, **SAMPLING))[0] for p in PROMPTS]


@pytest.fixture
def llm(engine, random_llama):
    return engine(random_llama, tidal=SETTINGS, max_num_batched_tokens=64)


def test_the_same_tokens_with_and_without_chunks(llm, whole):
    with watched(llm) as seen:
        answers = [tokens(generate(llm, [p], 20, **SAMPLING))[0] for p in PROMPTS]
    assert seen.tokens[:4] == [[64], [64], [64], [8]]
    assert answers == whole


def test_chunks_while_others_sample(llm, whole):
    arrivals = [(2 * i, prompt, 20) for i, prompt in enumerate(PROMPTS)]
    assert tokens(serve(llm, arrivals, **SAMPLING)) == whole


def test_the_seed_decides(llm, whole):
    again = tokens(generate(llm, PROMPTS[:1], 20, **SAMPLING | {"seed": 4321}))
    assert again != whole[:1]
