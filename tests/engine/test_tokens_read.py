"""Which layers read how many tokens: seen from inside the engine."""

from collections import Counter

import pytest

from tests.support.asking import generate, serve, tokens
from tests.support.engines import reconfigured
from tests.support.models import NUM_LAYERS, ROLES, random_prompt
from tests.support.spy import spying
from tests.support.watching import counters
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.plan.rule import num_sets

ENGINE_SETTINGS = ROLES
DENSE_LAYERS, SELECT_LAYERS = ROLES["dense_layers"], ROLES["select_layers"]
SPARSE_LAYERS = [2, 4, 5]
BUDGET = 64
NUM_HEADS, NUM_KV_HEADS = 6, 2
ALL_LAYERS = list(range(NUM_LAYERS))


def layers(calls):
    return [call.layer for call in calls]


def check_sparse_step(step, scope, select_block_size, keep_all_len=BUDGET):
    """One decode step by the book; returns what layers read of their choice."""
    lens = step.decode_lens
    dense, scored = step.of("dense_decode"), step.of("score_blocks")
    sparse = step.of("sparse_decode")
    assert (layers(dense), layers(scored)) == (DENSE_LAYERS, SELECT_LAYERS)
    assert layers(sparse) == sorted(SELECT_LAYERS + SPARSE_LAYERS)
    for call in dense + scored:
        assert call.tokens == [[n] for n in lens]
        assert call.selects == (call.layer in SELECT_LAYERS)
    for call in sparse:
        for read, seq_len in zip(call.tokens, lens, strict=True):
            assert len(read) == num_sets(scope, NUM_HEADS, NUM_KV_HEADS)
            if seq_len <= keep_all_len:
                assert set(read) == {seq_len}
            else:
                unfilled = -seq_len % select_block_size
                assert set(read) == {BUDGET - unfilled}
                assert max(read) <= BUDGET
    return [sum(row[0] for row in call.tokens) for call in sparse]


@pytest.mark.parametrize(
    ("scope", "select_block_size"),
    [("sequence", 16), ("kv_head", 4), ("query_head", 1)],
)
def test_layers_read_by_their_roles(llm, scope, select_block_size):
    settings = {
        "token_budget": BUDGET,
        "scope": scope,
        "select_block_size": select_block_size,
    }
    prompts = [random_prompt(n, seed=n) for n in (200, 20, 63, 481)]
    with reconfigured(llm, **ROLES, **settings):
        llm.reset_prefix_cache()
        unseen = tokens(generate(llm, prompts))
        llm.reset_prefix_cache()
        before = counters(llm)
        with spying() as steps:
            seen = tokens(generate(llm, prompts))
        counted = counters(llm) - before
    assert seen == unseen  # the ops found all they need in what they may read

    read = Counter()
    for step in steps:
        lens = step.decode_lens
        read["decode_tokens"] += len(lens)
        read["context_tokens"] += sum(lens)
        if step.num_prefills:
            assert layers(step.of("dense_extend")) == ALL_LAYERS
        if not step.metadata.sparse:
            read["dense_steps"] += bool(lens)
            read["sparse_context_tokens"] += sum(lens)
            assert layers(step.of("dense_decode")) == ALL_LAYERS * bool(lens)
            assert not step.of("sparse_decode")
            assert not any(call.selects for call in step.calls)
            continue
        read["sparse_steps"] += 1
        by_layer = check_sparse_step(step, scope, select_block_size)
        assert len(set(by_layer)) == 1
        read["sparse_context_tokens"] += by_layer[0]
    assert read["sparse_steps"] >= 15
    assert +counted == +read


def test_rows_up_to_min_sparse_len_are_read_whole(llm):
    prompts = [random_prompt(n, seed=n) for n in (20, 90, 120, 300)]
    settings = {"token_budget": BUDGET, "min_sparse_len": 150}
    with reconfigured(llm, **ROLES, **settings), spying() as steps:
        generate(llm, prompts)
    sparse = [step for step in steps if step.metadata.sparse]
    assert len(sparse) == 15
    for step in sparse:
        check_sparse_step(step, "sequence", 4, keep_all_len=150)


def test_prefill_is_dense_in_all_layers(llm):
    """Chunks of 128 of a prompt far over the budget, the last of a single token."""
    prompt = random_prompt(257, seed=3)
    with reconfigured(llm, **ROLES, token_budget=BUDGET), spying() as steps:
        generate(llm, [prompt], max_tokens=3)
        counted = counters(llm)
    for step, seq_len in zip(steps[:3], (128, 256, 257), strict=True):
        assert layers(step.calls) == ALL_LAYERS
        assert {call.op for call in step.calls} == {"dense_extend"}
        assert all(call.tokens == [[seq_len]] for call in step.calls)
        assert step.metadata.num_decodes == 0
        assert not step.metadata.sparse
    (first, second) = steps[3:]
    check_sparse_step(first, "sequence", 4)
    check_sparse_step(second, "sequence", 4)
    assert counted["decode_tokens"] == 2


def test_the_recomputed_last_token_of_a_cached_prompt_is_prefill(llm):
    """A prefix-cache hit may leave one token of the prompt to compute: dense."""
    llm.reset_prefix_cache()
    prompt = random_prompt(257, seed=4)
    with reconfigured(llm, **ROLES, token_budget=BUDGET):
        generate(llm, [prompt[:256]], max_tokens=1)
        with spying() as steps:
            (answer,) = generate(llm, [prompt], max_tokens=1)
    assert answer.num_cached_tokens == 256
    (step,) = steps
    assert step.metadata.dense.num_actual_tokens == 1
    assert step.metadata.num_decodes == 0
    assert layers(step.of("dense_extend")) == ALL_LAYERS
    assert layers(step.calls) == ALL_LAYERS


def test_prefill_beside_sparse_decodes(llm):
    """In one step: decodes by their roles, chunks densely in every layer."""
    prompts = [random_prompt(n, seed=n) for n in (200, 300)]
    with reconfigured(llm, **ROLES, token_budget=BUDGET), spying() as steps:
        llm.reset_prefix_cache()
        serve(llm, [(0, prompts[0], 12), (4, prompts[1], 4)])
    mixed = [s for s in steps if s.num_prefills and s.metadata.num_decodes]
    assert len(mixed) == 3
    for step in mixed:
        check_sparse_step(step, "sequence", 4)
        extends = step.of("dense_extend")
        assert layers(extends) == ALL_LAYERS
        seq_len = step.seq_lens[1]
        assert all(call.tokens == [[seq_len]] for call in extends)


def test_a_selection_is_made_anew_in_every_step(llm, monkeypatch):
    """What SPARSE layers follow is never older than the step's SELECT layers."""
    build, cleaned = TidalMetadataBuilder.build, []

    def spied(self, *args, **kwargs):
        self.state.selection.topk_blocks.fill_(-(2**30))
        self.state.selection.topk_lens.fill_(2**30)
        metadata = build(self, *args, **kwargs)
        cleaned.append(metadata.sparse)
        return metadata

    prompt = random_prompt(400, seed=6)
    with reconfigured(llm, **ROLES, token_budget=BUDGET):
        plain = tokens(generate(llm, [prompt]))
        monkeypatch.setattr(TidalMetadataBuilder, "build", spied)
        assert tokens(generate(llm, [prompt])) == plain
    assert sum(cleaned) == 15
