"""A request gets in any company what it gets alone."""

import pytest

from tests.support.asking import generate, serve, tokens
from tests.support.engines import reconfigured, runner
from tests.support.models import NARROW, random_prompt
from tests.support.watching import counters
from tidal_vllm.config import SCOPES
from tidal_vllm.planted import make_prompt

# Above and below the budget, growing over it, at block edges; unlike durations, so
# that rows are swapped and the batch is compacted as requests end.
LENGTHS = (300, 7, 63, 700, 16, 150, 64, 33, 420)
MAX_TOKENS = (9, 20, 12, 5, 30, 3, 14, 40, 16)
STEPS = (0, 0, 0, 2, 3, 3, 9, 10, 18)


@pytest.fixture(scope="module")
def llm(engine, random_llama):
    # Fewer rows than requests.
    return engine(random_llama, tidal=NARROW, max_num_seqs=3)


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(n, seed=n) for n in LENGTHS]


@pytest.fixture(scope="module", params=SCOPES)
def alone(request, llm, prompts):
    """The answers under one scope, which stays in force for the test."""
    with reconfigured(llm, **NARROW, scope=request.param):
        yield [
            tokens(generate(llm, [prompt], max_tokens))[0]
            for prompt, max_tokens in zip(prompts, MAX_TOKENS, strict=True)
        ]


def test_arrivals_while_others_decode(llm, prompts, alone):
    llm.reset_prefix_cache()
    arrivals = list(zip(STEPS, prompts, MAX_TOKENS, strict=True))
    assert tokens(serve(llm, arrivals)) == alone
    assert counters(llm)["sparse_steps"] and counters(llm)["dense_steps"]


def test_all_at_once(llm, prompts, alone):
    llm.reset_prefix_cache()
    arrivals = [(0, *rest) for rest in zip(prompts, MAX_TOKENS, strict=True)]
    assert tokens(serve(llm, arrivals)) == alone


def test_the_same_prompt_beside_itself(llm, prompts, alone):
    """Rows that share their KV blocks, and one that has them in part."""
    copies = [prompts[0], prompts[0], prompts[0][:200]]
    (part,) = tokens(generate(llm, [copies[2]], max_tokens=9))
    assert tokens(generate(llm, copies, max_tokens=9)) == [alone[0], alone[0], part]


def test_rows_move_in_these_batches(llm, prompts, monkeypatch):
    """Else the tests above would not test what they say."""
    batch = runner(llm).input_batch
    moved = {"condense": 0, "swap_states": 0}

    def spy(name):
        move = getattr(batch, name)

        def spied(*args):
            before = dict(batch.req_id_to_index)
            move(*args)
            after = batch.req_id_to_index
            moved[name] += any(before[i] != row for i, row in after.items())

        monkeypatch.setattr(batch, name, spied)

    for name in moved:
        spy(name)
    llm.reset_prefix_cache()
    serve(llm, list(zip(STEPS, prompts, MAX_TOKENS, strict=True)))
    assert all(moved.values()), moved


def test_planted_questions_among_random_requests(engine, planted):
    spec, folder = planted(hops=2)
    roles = {
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
    }
    settings = roles | {"token_budget": 64}
    llm = engine(folder, tidal=settings, max_num_seqs=3)
    questions = [
        make_prompt(spec, n, depth, seed=n)
        for n, depth in ((900, 0.1), (120, 0.5), (1500, 0.8), (400, 0.3))
    ]
    noise = [random_prompt(n, seed=n) for n in (20, 250, 64)]
    arrivals = [(4 * i, q.prompt_token_ids, 9) for i, q in enumerate(questions)]
    arrivals += [(3 * i + 1, prompt, 15) for i, prompt in enumerate(noise)]
    answers = serve(llm, arrivals)[: len(questions)]
    assert tokens(answers) == [q.answer_token_ids for q in questions]
