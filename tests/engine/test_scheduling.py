"""Prefix-cache hits, chunked prefill and preemption change no answer."""

import functools

import pytest

from tests.support.asking import generate, serve, tokens
from tests.support.models import MAX_LEN, ROLES, random_prompt
from tests.support.watching import watched
from tidal_vllm.planted import make_prompt

# Exact, on the sparse path over all blocks.
EXACT = ROLES | {"token_budget": MAX_LEN, "min_sparse_len": 0}
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def dense(engine, random_llama):
    """The dense engine's answer, each prompt alone and the prefix cache empty."""

    @functools.cache
    def answer(*prompt):
        (found,) = generate(engine(random_llama), [[*prompt]], MAX_TOKENS)
        assert found.num_cached_tokens == 0
        return found.token_ids

    def ask(prompt):
        return answer(*prompt)

    return ask


@pytest.fixture(scope="module")
def two_hops(planted):
    return planted(hops=2)


def sparse(spec):
    return {
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
        "token_budget": 64,
    }


def ask_again(prompt, known):
    """The planted question about the word after the first `known` of the answer."""
    if not known:
        return prompt.prompt_token_ids
    return [*prompt.prompt_token_ids[:-1], prompt.answer_token_ids[known - 1]]


class TestPrefixCache:
    def test_exact(self, engine, random_llama, dense):
        llm = engine(random_llama, tidal=EXACT)
        shared = random_prompt(320, seed=1)
        prompts = [shared + random_prompt(n, seed=n) for n in (1, 16, 100)]
        generate(llm, [shared])
        answers = generate(llm, prompts, MAX_TOKENS)
        assert [a.num_cached_tokens for a in answers] == [320, 320, 320]
        assert tokens(answers) == [dense(prompt) for prompt in prompts]

    def test_a_whole_prompt(self, engine, random_llama, dense):
        """Its last block is computed again, into slots that others read."""
        llm = engine(random_llama, tidal=EXACT)
        prompt = random_prompt(320, seed=1)
        generate(llm, [prompt])
        answers = generate(llm, [prompt] * 3, MAX_TOKENS)
        assert [a.num_cached_tokens for a in answers] == [304] * 3
        assert tokens(answers) == [dense(prompt)] * 3

    def test_a_second_turn(self, engine, random_llama, dense):
        """Blocks that decoding wrote are hit as well."""
        llm = engine(random_llama, tidal=EXACT)
        first = random_prompt(100, seed=1)
        (answer,) = tokens(generate(llm, [first], MAX_TOKENS))
        second = first + answer + random_prompt(30, seed=2)
        (again,) = generate(llm, [second], MAX_TOKENS)
        assert again.num_cached_tokens == 128
        assert again.token_ids == dense(second)

    def test_planted(self, engine, two_hops):
        spec, folder = two_hops
        llm = engine(folder, tidal=sparse(spec))
        prompt = make_prompt(spec, 1000, 0.3, seed=5)
        questions = [ask_again(prompt, known) for known in range(4)]
        (first,) = generate(llm, questions[:1], max_tokens=9)
        others = generate(llm, questions[1:], max_tokens=9)
        assert first.num_cached_tokens == 0
        assert [answer.num_cached_tokens for answer in others] == [992] * 3
        for known, answer in enumerate([first, *others]):
            wanted = prompt.answer_token_ids[known:]
            assert answer.token_ids[: len(wanted)] == wanted


class TestChunkedPrefill:
    CHUNK = 64

    @pytest.fixture
    def llm(self, engine, random_llama):
        return engine(random_llama, tidal=EXACT, max_num_batched_tokens=self.CHUNK)

    @pytest.mark.parametrize("num_tokens", [64, 65, 129, 600])
    def test_exact(self, llm, dense, num_tokens):
        """Also with a last chunk of a single token."""
        prompt = random_prompt(num_tokens, seed=num_tokens)
        with watched(llm) as seen:
            assert tokens(generate(llm, [prompt], MAX_TOKENS)) == [dense(prompt)]
        whole, rest = divmod(num_tokens, self.CHUNK)
        chunks = [[self.CHUNK]] * whole + [[rest]] * (rest > 0)
        assert seen.tokens == chunks + [[1]] * (MAX_TOKENS - 1)

    def test_exact_while_others_decode(self, llm, dense):
        prompts = [random_prompt(n, seed=n) for n in (30, 129, 200, 65)]
        arrivals = [(3 * i, prompt, MAX_TOKENS) for i, prompt in enumerate(prompts)]
        with watched(llm) as seen:
            answers = serve(llm, arrivals)
        assert tokens(answers) == [dense(prompt) for prompt in prompts]
        mixed = [step for step in seen.tokens if 1 in step and max(step) > 1]
        assert len(mixed) >= 6

    def test_planted(self, engine, two_hops):
        spec, folder = two_hops
        llm = engine(folder, tidal=sparse(spec), max_num_batched_tokens=self.CHUNK)
        # 641 tokens leave a chunk of one token.
        prompts = [make_prompt(spec, n, d, seed=n) for n, d in ((641, 0.1), (700, 0.6))]
        with watched(llm) as seen:
            for prompt in prompts:
                asked, wanted = prompt.prompt_token_ids, prompt.answer_token_ids
                assert tokens(generate(llm, [asked], len(wanted))) == [wanted]
        assert seen.tokens[:11] == [[64]] * 10 + [[1]]
        llm.reset_prefix_cache()
        arrivals = [(2 * i, p.prompt_token_ids, 9) for i, p in enumerate(prompts)]
        answers = serve(llm, arrivals)
        assert tokens(answers) == [p.answer_token_ids for p in prompts]


class TestPreemption:
    """A KV pool too small for what was admitted."""

    @pytest.mark.parametrize("caching", [True, False])
    def test_exact(self, engine, random_llama, dense, caching):
        llm = engine(
            random_llama,
            tidal=EXACT,
            max_model_len=512,
            num_gpu_blocks_override=40,
            enable_prefix_caching=caching,
        )
        prompts = [random_prompt(n, seed=n) for n in (150, 140, 133, 127)]
        with watched(llm) as seen:
            answers = tokens(generate(llm, prompts, MAX_TOKENS))
        assert seen.num_preemptions > 0
        assert answers == [dense(prompt) for prompt in prompts]

    def test_planted(self, engine, two_hops):
        spec, folder = two_hops
        llm = engine(
            folder,
            tidal=sparse(spec),
            max_model_len=512,
            num_gpu_blocks_override=106,
            enable_prefix_caching=False,
        )
        prompts = [
            make_prompt(spec, 410, depth, seed=i, chain_len=24)
            for i, depth in enumerate((0.1, 0.4, 0.7, 0.9))
        ]
        with watched(llm) as seen:
            asked = [prompt.prompt_token_ids for prompt in prompts]
            answers = tokens(generate(llm, asked, max_tokens=25))
        assert seen.num_preemptions > 0
        assert answers == [prompt.answer_token_ids for prompt in prompts]


def test_planted_under_all_three(engine, two_hops):
    spec, folder = two_hops
    llm = engine(
        folder,
        tidal=sparse(spec),
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=54,
    )
    prompts = [make_prompt(spec, 410, d, seed=0, chain_len=24) for d in (0.2, 0.7)]
    asked = [(prompt, known) for known in (0, 1, 4) for prompt in prompts]
    arrivals = [(0, ask_again(p, known), 25 - known) for p, known in asked]
    with watched(llm) as seen:
        answers = serve(llm, arrivals)
    assert max(map(sum, seen.tokens)) == 64
    assert seen.num_preemptions > 0
    assert any(answer.num_cached_tokens for answer in answers)
    assert tokens(answers) == [p.answer_token_ids[known:] for p, known in asked]
