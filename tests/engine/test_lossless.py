"""Lossless mode gives the dense model's answers, whatever is drafted."""

import itertools
from collections import Counter

import pytest
import torch

from tests.support.asking import ask, generate, serve, tokens
from tests.support.engines import runner, scheduler
from tests.support.models import NARROW, ROLES, build_random_model, random_prompt
from tests.support.watching import counters, watched
from tidal_vllm.engine import self_draft
from tidal_vllm.engine.reconfigure import reconfigure
from tidal_vllm.kernels import reference
from tidal_vllm.validators import TidalConfigError

BLOCK_BYTES = 6 * 2 * 16 * 2 * 32 * 4  # 16 tokens, 6 layers, 2 KV heads of 32, fp32
# Short and long prompts, in chunks beside decodes and drafts.
ARRIVALS = [
    (step, random_prompt(length, seed=length), max_tokens)
    for step, length, max_tokens in [
        (0, 600, 40),
        (0, 5, 30),
        (2, 333, 40),
        (3, 64, 7),
        (9, 900, 25),
        (9, 17, 60),
    ]
]
CHUNKS = {"max_num_batched_tokens": 128}


@pytest.fixture(autouse=True)
def always_as_long_as_allowed(monkeypatch):
    """Models this small would not draft: their weights are most of what they read."""
    monkeypatch.setattr(
        self_draft, "best_draft_length", lambda survival, costs: len(survival)
    )


def lossless(**settings):
    return NARROW | {"mode": "lossless"} | settings


@pytest.fixture(scope="module")
def dense(engine, random_llama):
    return serve(engine(random_llama, **CHUNKS), ARRIVALS, logprobs=3)


def drafting_counts(llm, action):
    """What vLLM counts of drafted and kept tokens while something is done."""
    found = Counter()
    stock = scheduler(llm).make_spec_decoding_stats

    def spied(stats, num_draft_tokens, num_accepted_tokens, *more, **named):
        found["drafted"] += num_draft_tokens
        found["kept"] += num_accepted_tokens
        return stock(stats, num_draft_tokens, num_accepted_tokens, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler(llm), "make_spec_decoding_stats", spied)
        return action(), found


def assert_alike(found, wanted):
    """The same tokens, by probabilities that differ by rounding only."""
    assert tokens(found) == tokens(wanted)
    for answer, other in zip(found, wanted, strict=True):
        for step, expected in zip(answer.logprobs, other.logprobs, strict=True):
            for token in step.keys() & expected.keys():
                assert step[token] == pytest.approx(expected[token], abs=1e-3)


@pytest.mark.compat
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"draft_tokens": 1}, marks=pytest.mark.extended),
        {"draft_tokens": 3, "scope": "kv_head"},
        pytest.param(
            {"draft_tokens": 16, "select_block_size": 4}, marks=pytest.mark.extended
        ),
    ],
    ids=str,
)
def test_answers_are_dense(engine, random_llama, dense, settings):
    llm = engine(random_llama, tidal=lossless(**settings), **CHUNKS)
    found, drafts = drafting_counts(llm, lambda: serve(llm, ARRIVALS, logprobs=3))
    assert_alike(found, dense)
    assert drafts["drafted"] > 20
    assert 0 < drafts["kept"] < drafts["drafted"]


def test_a_budget_over_the_context_drafts_what_the_model_says(engine, random_llama):
    """All that is drafted is kept, but for what is past the end of an answer."""
    llm = engine(random_llama, tidal=lossless(token_budget=1024, draft_tokens=4))
    prompt = random_prompt(300, seed=1)
    _, drafts = drafting_counts(llm, lambda: generate(llm, [prompt], 41))
    assert drafts == {"drafted": 32, "kept": 32}


@pytest.mark.extended
def test_preemption(engine, random_llama):
    few = {"kv_cache_memory_bytes": 64 * BLOCK_BYTES, "max_model_len": 512}
    prompts = [random_prompt(n, seed=n) for n in (250, 255, 260)]
    wanted = generate(engine(random_llama), prompts, 120)
    llm = engine(random_llama, tidal=lossless(), **few)
    with watched(llm) as seen:
        assert tokens(generate(llm, prompts, 120)) == tokens(wanted)
    assert seen.num_preemptions > 0


def test_next_turn_finds_all_of_the_last_in_the_prefix_cache(engine, random_llama):
    prompt, more = random_prompt(200, seed=3), random_prompt(30, seed=4)
    answers = []
    for llm in (engine(random_llama), engine(random_llama, tidal=lossless())):
        (first,) = generate(llm, [prompt], 70)
        (second,) = generate(llm, [prompt + first.token_ids + more], 20)
        answers.append((first.token_ids, second.token_ids))
        assert second.num_cached_tokens >= 256
    assert answers[0] == answers[1]


@pytest.mark.extended
def test_up_to_the_longest_sequence(engine, random_llama):
    """A request that nears the end of the context costs another none of its drafts."""
    prompts, counts = [random_prompt(n, seed=n) for n in (470, 30)], [42, 80]
    small = {"max_model_len": 512}
    wanted = generate(engine(random_llama, **small), prompts, counts)
    exact = lossless(draft_tokens=6, token_budget=504)
    llm = engine(random_llama, tidal=exact, **small)
    found, drafts = drafting_counts(llm, lambda: generate(llm, prompts, counts))
    assert tokens(found) == tokens(wanted)
    assert drafts["drafted"] - drafts["kept"] <= 2


def test_a_running_engine_keeps_its_mode(engine, random_llama):
    for settings, other in ((ROLES, lossless()), (lossless(), ROLES)):
        llm = engine(random_llama, tidal=settings)
        with pytest.raises(TidalConfigError, match=r"tidal.mode = .* keeps its mode"):
            reconfigure(runner(llm), other)


def test_scheduler_is_vllms_own(engine, random_llama):
    llm = engine(random_llama, tidal=lossless())
    assert type(scheduler(llm)).__module__.startswith("vllm.")


def test_verification_reads_a_layers_kv_once(engine, random_llama, monkeypatch):
    """One pass over the context for a whole draft, and one over it to choose."""
    llm = engine(random_llama, tidal=lossless(draft_tokens=7), **CHUNKS)
    prompt = random_prompt(500, seed=5)
    generate(llm, [prompt], 2)
    calls = Counter()
    for name in ("dense_extend", "dense_decode", "score_blocks", "sparse_decode"):
        stock = getattr(reference, name)

        def spied(query_or_args, *args, name=name, stock=stock, **kwargs):
            query = getattr(query_or_args, "query", query_or_args)
            calls[name, query.shape[0]] += 1
            return stock(query_or_args, *args, **kwargs)

        monkeypatch.setattr(reference, name, spied)
        ops = core_ops(llm)
        if hasattr(ops, name):
            monkeypatch.setattr(ops, name, spied)
    engine_core = llm.llm_engine
    engine_core.add_request("one", {"prompt_token_ids": prompt}, params(40))
    for _ in range(3):  # the rest of the prompt, then two drafts
        engine_core.step()
    calls.clear()
    engine_core.step()
    engine_core.abort_request(["one"])
    engine_core.step()
    assert calls == {
        ("dense_extend", 8): 6,
        ("score_blocks", 1): 2,
        ("sparse_decode", 1): 6 * 7,
    }


def params(max_tokens, **more):
    from tests.support.asking import sampling_params

    return sampling_params(max_tokens, **more)


def core_ops(llm):
    layers = runner(llm).vllm_config.compilation_config.static_forward_context
    return next(iter(layers.values())).impl.state.kernels.ops


@pytest.mark.extended
@pytest.mark.parametrize("budget", [64, 16], ids=["drafts", "bad drafts"])
def test_samples_have_the_models_distribution(engine, tmp_path_factory, budget):
    """The second token, of 16, against its probabilities; the first is not drafted."""
    folder = tmp_path_factory.mktemp("small-vocabulary")
    model = build_random_model(
        folder, "llama", vocab_size=16, num_hidden_layers=4, initializer_range=0.05
    )
    prompt = [token % 16 for token in random_prompt(120, seed=0)]
    dense = engine(model)
    settings = {"token_budget": budget, "select_block_size": 4, "sink_tokens": 0}
    settings |= {"recent_fraction": 0.0, "mode": "lossless", "draft_tokens": 3}
    llm = engine(
        model, tidal=ROLES | {"select_layers": [1]} | settings, max_num_seqs=64
    )
    count = 3000
    answers = ask(llm, [prompt] * count, 3, temperature=1.0, seed=None)
    found = [output.outputs[0].token_ids for output in answers]
    paths = [
        prompt + [*path]
        for n in (0, 1)
        for path in itertools.product(range(16), repeat=n)
    ]
    steps = generate(dense, paths, 1, logprobs=16)
    probs = torch.tensor(
        [[answer.logprobs[0][i] for i in range(16)] for answer in steps]
    ).exp()
    second = probs[0] @ probs[1:]
    seen = torch.bincount(torch.tensor([path[1] for path in found]), minlength=16)
    assert chi_square(seen, second * count) < 50  # 15 degrees: p = 1e-5
    assert chi_square(seen, torch.full((16,), count / 16)) > 100


def chi_square(seen, expected):
    return float(((seen - expected) ** 2 / expected).sum())


@pytest.mark.extended
def test_nothing_is_drafted_where_it_does_not_pay(engine, random_llama, dense, request):
    """As if the weights were most of what is read; then as if there were none."""
    request.getfixturevalue("monkeypatch").undo()
    llm = engine(random_llama, tidal=lossless(), **CHUNKS)
    found = []
    for weight_bytes in (1e15, 0):
        before = counters(llm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner(llm).drafter, "weight_bytes", weight_bytes)
            assert_alike(serve(llm, ARRIVALS, logprobs=3), dense)
        found.append(counters(llm) - before)
    assert found[0]["draft_tokens"] == 0
    assert found[0]["undrafted_steps"] >= found[0]["dense_steps"] > 40
    assert found[1]["draft_tokens"] > 40
    assert 0 < found[1]["undrafted_steps"] < 40


@pytest.mark.extended
@pytest.mark.parametrize(
    "given",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"repetition_penalty": 1.3},
        {"min_tokens": 12, "stop_token_ids": [*range(0, 512, 3)]},
        {"allowed_token_ids": [*range(0, 512, 7)]},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.0, "seed": 7, "top_k": 5, "top_p": 0.9},
    ],
    ids=lambda given: next(iter(given)),
)
def test_greedy_requests_of_every_kind(engine, random_llama, given):
    """Beside a request that samples, so that a batch has both."""
    prompts = [random_prompt(n, seed=n) for n in (300, 40, 170)]
    answers = []
    for settings in (None, lossless(draft_tokens=4)):
        llm = engine(random_llama, tidal=settings)
        asked = [params(30, **given)] * 2 + [params(30, temperature=1.0, seed=1)]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = llm.generate(inputs, asked, use_tqdm=False)
        answers.append(
            [
                [(one.token_ids, one.finish_reason) for one in output.outputs]
                for output in found[:2]
            ]
        )
    assert answers[0] == answers[1]
