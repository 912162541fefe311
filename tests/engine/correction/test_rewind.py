"""A correction changes nothing but the KV: outputs stay token for token.

The engines here are exact, their budget covers every sequence, but their schedulers
take tokens behind position 32 for polluted. Each output must be that of dense
attention, and of a run without correction.
"""

import pytest

from tests.support.asking import ask, generate, sampling_params, tokens
from tests.support.drifting import EXACT
from tests.support.engines import core, scheduler
from tests.support.models import random_prompt
from tests.support.watching import correcting, watched
from tidal_vllm.plan.pollution import MIN_REMAINING

PROMPTS = [random_prompt(n, seed=n) for n in (100, 60, 10)]
MAX_TOKENS = 48
START = 32


@pytest.fixture(scope="module")
def llm(small_engine):
    return small_engine(EXACT | {"correction_interval": 8})


@pytest.mark.parametrize("interval", [1, 2, 7, 8, 16, 47])
def test_greedy(llm, dense_answers, interval):
    with correcting(llm, interval, START) as counters:
        answers = tokens(generate(llm, PROMPTS, MAX_TOKENS))
    assert answers == dense_answers(PROMPTS, MAX_TOKENS)
    if interval < 40:
        assert counters.corrections >= 3
        assert counters.corrected_tokens == interval * counters.corrections
    # Nothing is corrected within the last few tokens.
    assert 0 <= counters.longest_polluted_run - interval <= MIN_REMAINING


def test_due_requests_are_corrected_in_one_step(llm):
    with correcting(llm, 8, START), watched(llm) as seen:
        generate(llm, [random_prompt(40, seed=i) for i in range(4)], 24)
    corrected = [s for s in seen.steps[1:] if any(n > 1 for _, n in s.values())]
    assert len(corrected) == 2
    for step in corrected:
        assert [count for _, count in step.values()] == [9] * 4
    # A correction yields a token: no step is spent on it.
    assert len(seen.steps) == 24


@pytest.mark.parametrize(
    ("max_tokens", "corrections"), [(9, 0), (13, 0), (14, 1), (22, 1), (23, 2)]
)
def test_a_request_about_to_end_is_not_corrected(llm, max_tokens, corrections):
    with correcting(llm, 8, START) as counters:
        generate(llm, [PROMPTS[0]], max_tokens)
    assert counters.corrections == corrections


def test_short_sequences_are_not_corrected(llm):
    with correcting(llm, 4, 58) as counters:
        generate(llm, [PROMPTS[2]], MAX_TOKENS)
    assert counters.corrections == 0
    assert counters.longest_polluted_run == 0


def test_only_positions_behind_the_exact_ones_are_computed_again(llm):
    with correcting(llm, 4, 40), watched(llm) as seen:
        generate(llm, [random_prompt(30, seed=30)], 30)
    spans = [span for step in seen.steps[1:] for span in step.values() if span[1] > 1]
    assert spans[0] == (40, 5)
    assert [start for start, _ in spans] == [40, 45, 50]


@pytest.mark.parametrize("budget", [8, 12, 24])
def test_split_over_steps(small_engine, dense_answers, budget):
    """Steps too small for a correction, beside other requests."""
    kwargs = {"max_num_batched_tokens": budget, "max_num_seqs": 3}
    llm = small_engine(EXACT | {"correction_interval": 8}, **kwargs)
    prompts = [random_prompt(n, seed=n) for n in (50, 40, 35)]
    with correcting(llm, 20, START) as counters, watched(llm) as seen:
        assert tokens(generate(llm, prompts, 60)) == dense_answers(prompts, 60)
    assert counters.corrections >= 3
    assert max(sum(n for _, n in step.values()) for step in seen.steps) <= budget


def test_long_prefill_token_threshold(small_engine, dense_answers):
    settings = EXACT | {"correction_interval": 8}
    llm = small_engine(settings, long_prefill_token_threshold=5)
    with correcting(llm, 8, START) as counters, watched(llm) as seen:
        answers = tokens(generate(llm, PROMPTS, MAX_TOKENS))
    assert answers == dense_answers(PROMPTS, MAX_TOKENS)
    assert counters.corrections >= 3
    assert max(n for step in seen.steps for _, n in step.values()) == 5


def test_up_to_max_model_len(llm, dense_answers):
    prompt = random_prompt(1000, seed=0)
    with correcting(llm, 8, START) as counters:
        assert tokens(generate(llm, [prompt], 100)) == dense_answers([prompt], 100)
    assert counters.corrections == 2


SAMPLING = {
    "seeded": {"temperature": 1.0, "seed": 3},
    "seeded-top": {"temperature": 1.5, "seed": 4, "top_p": 0.9, "top_k": 50},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
    },
    "min-tokens": {"min_tokens": 10, "stop_token_ids": list(range(200, 512))},
    "stop": {"stop_token_ids": list(range(0, 512, 9))},
    "bias": {"logit_bias": {7: 5.0, 9: -5.0}, "allowed_token_ids": list(range(99))},
}


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("max_num_batched_tokens", [256, 12])
def test_sampling(small_engine, name, max_num_batched_tokens):
    llm = small_engine(
        EXACT | {"correction_interval": 8},
        max_num_batched_tokens=max_num_batched_tokens,
    )
    prompts = PROMPTS[:2]
    with correcting(llm, None, START):
        plain = tokens(generate(llm, prompts, MAX_TOKENS, **SAMPLING[name]))
    llm.reset_prefix_cache()
    with correcting(llm, 3, START) as counters:
        assert tokens(generate(llm, prompts, MAX_TOKENS, **SAMPLING[name])) == plain
    assert counters.corrections > 0


def test_logprobs(llm):
    def logprobs(interval):
        llm.reset_prefix_cache()
        with correcting(llm, interval, START) as counters:
            outputs = ask(llm, PROMPTS, 32, logprobs=3, prompt_logprobs=2)
        found = [
            [{i: p.logprob for i, p in (step or {}).items()} for step in steps]
            for o in outputs
            for steps in (o.outputs[0].logprobs, o.prompt_logprobs)
        ]
        return found, counters.corrections

    plain, corrected = logprobs(None), logprobs(5)
    assert plain[1] == 0 and corrected[1] > 0
    for steps, wanted in zip(corrected[0], plain[0], strict=True):
        for step, values in zip(steps, wanted, strict=True):
            assert step == pytest.approx(values, abs=1e-4)


def test_several_sequences_of_one_prompt(llm):
    def sample(interval):
        llm.reset_prefix_cache()
        with correcting(llm, interval, START) as counters:
            (output,) = ask(llm, PROMPTS[:1], 32, n=3, temperature=1.0, seed=5)
        return [list(o.token_ids) for o in output.outputs], counters.corrections

    (plain, _), (corrected, count) = sample(None), sample(5)
    assert corrected == plain
    assert len({tuple(t) for t in plain}) == 3
    assert count == 3 * 4


def test_abort_in_mid_correction(small_engine, dense_answers):
    llm = small_engine(EXACT | {"correction_interval": 8}, max_num_batched_tokens=12)
    engine, found = llm.llm_engine, {}
    with correcting(llm, 16, START) as counters:
        for i, prompt in enumerate(PROMPTS[:2]):
            request = {"prompt_token_ids": prompt}
            engine.add_request(str(i), request, sampling_params(MAX_TOKENS))
        while not counters.corrections:
            engine.step()
        (split,) = [r for r in scheduler(llm).running if r.is_prefill_chunk]
        assert split.num_computed_tokens > split.num_prompt_tokens
        core(llm).abort_requests([split.request_id])
        kept = int(split.request_id[0] == "0")
        while scheduler(llm).requests:
            for output in engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
        engine.abort_request([str(1 - kept)])
    assert found[str(kept)] == dense_answers(PROMPTS, MAX_TOKENS)[kept]


def test_preemption_in_mid_correction(small_engine, dense_answers):
    llm = small_engine(EXACT | {"correction_interval": 8}, max_num_batched_tokens=12)
    engine, found = llm.llm_engine, {}
    seen = scheduler(llm)
    with correcting(llm, 16, START) as counters:
        for i, prompt in enumerate(PROMPTS[:2]):
            request = {"prompt_token_ids": prompt}
            engine.add_request(str(i), request, sampling_params(MAX_TOKENS))
        preempted = 0
        while engine.has_unfinished_requests():
            split = [
                r for r in seen.running if r.is_prefill_chunk and r.num_output_tokens
            ]
            if split and counters.corrections and preempted < 2:
                seen.running.remove(split[0])
                seen._preempt_request(split[0], 0.0)
                preempted += 1
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)
    assert preempted == 2
    assert [found["0"], found["1"]] == dense_answers(PROMPTS[:2], MAX_TOKENS)


def test_structured_output(small_engine, planted):
    """A grammar is advanced once per token, corrected or not."""
    from vllm.sampling_params import StructuredOutputsParams

    _, folder = planted()
    settings = {"dense_layers": [0], "select_layers": [1]} | {
        "token_budget": 1024,
        "min_sparse_len": 0,
        "correction_interval": 3,
    }
    llm = small_engine(settings, folder=folder, skip_tokenizer_init=False)
    words = llm.get_tokenizer().convert_ids_to_tokens(range(20, 26))
    choice = StructuredOutputsParams(regex=f"(({'|'.join(words)}) ?){{18}}")

    def answer(interval):
        with correcting(llm, interval, START) as counters:
            (text,) = tokens(generate(llm, PROMPTS[:1], 30, structured_outputs=choice))
        return text, counters.corrections

    (plain, none), (corrected, some) = answer(None), answer(3)
    assert corrected == plain
    assert none == 0 and some > 2
