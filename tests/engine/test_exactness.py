"""Where sparse decoding keeps every block it must give what dense decoding gives."""

import pytest
import torch

from tests.support.asking import generate, tokens
from tests.support.engines import reconfigured
from tests.support.models import MAX_LEN, ROLES, random_prompt
from tests.support.watching import counters
from tidal_vllm.config import SCOPES

PROMPTS = [random_prompt(n, seed=n) for n in (5, 64, 333, 600)]
MAX_TOKENS = 24
LONGEST = 600 + MAX_TOKENS


def ask(llm):
    return generate(llm, PROMPTS, MAX_TOKENS, logprobs=5)


def assert_close(answers, expected):
    """The same tokens, with probabilities that differ by rounding only."""
    assert tokens(answers) == tokens(expected)
    for answer, other in zip(answers, expected, strict=True):
        for step, wanted in zip(answer.logprobs, other.logprobs, strict=True):
            both = step.keys() & wanted.keys()
            assert len(both) >= 4  # the fifth may tie with the sixth
            for token in both:
                assert step[token] == pytest.approx(wanted[token], abs=2e-4)


@pytest.fixture(scope="module")
def dense(engine, folder):
    """Answers of the engine without any setting of ours."""
    return ask(engine(folder))


@pytest.fixture
def llm(engine, folder):
    return engine(folder, tidal=ROLES)


@pytest.mark.parametrize("folder", ["random_llama", "random_qwen"], indirect=True)
def test_dense_engine_answers_as_transformers_does(folder, dense):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, answer in zip(PROMPTS, dense, strict=True):
        whole = torch.tensor([prompt + answer.token_ids])
        with torch.no_grad():
            logprobs = oracle(whole).logits[0].log_softmax(-1)
        steps = logprobs[len(prompt) - 1 : -1]
        assert steps.argmax(-1).tolist() == answer.token_ids
        for wanted, step in zip(steps, answer.logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(wanted[token].item(), abs=1e-3)


@pytest.mark.parametrize("select_block_size", [1, 16])
@pytest.mark.parametrize("scope", SCOPES)
def test_sparse_path_over_all_blocks_is_dense(llm, dense, scope, select_block_size):
    settings = {
        "token_budget": MAX_LEN,
        "min_sparse_len": 0,
        "scope": scope,
        "select_block_size": select_block_size,
    }
    check_sparse_path(llm, dense, settings)


def check_sparse_path(llm, dense, settings):
    with reconfigured(llm, **ROLES, **settings):
        assert_close(ask(llm), dense)
        counted = counters(llm)
    assert counted["sparse_steps"] == MAX_TOKENS - 1
    assert counted["dense_steps"] == 0
    assert counted["sparse_context_tokens"] == counted["context_tokens"]


@pytest.mark.parametrize("select_attends", ["everything", "chosen"])
@pytest.mark.parametrize("scope", SCOPES)
def test_so_it_is_where_a_choice_holds_for_some_steps(
    llm, dense, scope, select_attends
):
    settings = {
        "token_budget": MAX_LEN,
        "min_sparse_len": 0,
        "scope": scope,
        "select_attends": select_attends,
        "reselect_interval": 7,
    }
    check_sparse_path(llm, dense, settings)


def test_min_sparse_len_below_the_budget(llm, dense):
    """Between the two, rows take the sparse path over all their blocks."""
    with reconfigured(llm, **ROLES, token_budget=640, min_sparse_len=400):
        assert_close(ask(llm), dense)
        counted = counters(llm)
    assert counted["sparse_steps"] == MAX_TOKENS - 1
    assert counted["sparse_context_tokens"] == counted["context_tokens"]


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 640},
        {"token_budget": 64, "min_sparse_len": LONGEST},
        {"token_budget": 64, "min_sparse_len": 0, "select_layers": []},
    ],
    ids=["budget", "min_sparse_len", "no SELECT layer"],
)
def test_dense_steps_are_bit_identical(llm, dense, settings):
    with reconfigured(llm, **ROLES | settings):
        assert ask(llm) == dense
        counted = counters(llm)
    assert counted["sparse_steps"] == 0
    assert counted["dense_steps"] == MAX_TOKENS - 1


def test_min_sparse_len_is_the_last_dense_length(llm):
    """The first step over it is sparse, and none before."""
    prompt = random_prompt(100, seed=1)
    for min_sparse_len, sparse_steps in ((108, 2), (109, 1), (110, 0)):
        settings = {"token_budget": 64, "min_sparse_len": min_sparse_len}
        with reconfigured(llm, **ROLES, **settings):
            generate(llm, [prompt], max_tokens=11)
            counted = counters(llm)
        assert counted["sparse_steps"] == sparse_steps
        assert counted["dense_steps"] == 10 - sparse_steps


def test_short_rows_stay_exact_beside_a_long_one(llm, dense):
    """One row above the budget makes the step sparse; the others keep all blocks."""
    with reconfigured(llm, **ROLES, token_budget=384):
        answers = ask(llm)
        counted = counters(llm)
    assert counted["sparse_steps"] == MAX_TOKENS - 1
    assert_close(answers[:3], dense[:3])
    assert answers[3] != dense[3]


def test_a_small_budget_changes_answers(llm, dense):
    """So that the equalities above mean something."""
    with reconfigured(llm, **ROLES, token_budget=64):
        answers = ask(llm)
    assert answers[0].token_ids == dense[0].token_ids
    for answer, other in zip(answers[2:], dense[2:], strict=True):
        assert answer.token_ids[0] == other.token_ids[0]  # from the prompt, dense
        assert answer.token_ids != other.token_ids
