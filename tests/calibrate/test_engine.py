"""Trials: forced tokens, settings per request, corrections, layers that take part."""

from types import SimpleNamespace

import pytest

from tests.support.models import build_random_model, random_prompt
from tidal_vllm.calibrate import worker
from tidal_vllm.calibrate.engine import complete_settings
from tidal_vllm.config import TidalConfig

DENSE, SELECT = [0], [1, 3]
STEPS = 14


@pytest.fixture(scope="module")
def llama(start_engine, tmp_path_factory):
    """An engine, a prompt and its dense answer with what was recorded."""
    engine = start_engine(
        build_random_model(tmp_path_factory.mktemp("m") / "l", "llama")
    )
    prompt = random_prompt(300, seed=1)
    folder = tmp_path_factory.mktemp("recorded")
    reply, found = engine.record(prompt, STEPS, [{"token_budget": 64}], folder)
    assert list(folder.iterdir()) == []
    return engine, prompt, reply, found


def settings(**changes) -> dict:
    return complete_settings(TidalConfig(**changes), DENSE, SELECT)


def trial(engine, prompt, tokens, settings):
    """The reply of a batch of one."""
    (reply,) = engine.trials([prompt], [tokens], settings)
    return reply


def scheduler(engine):
    return engine._llm.llm_engine.engine_core.engine_core.scheduler


def test_recording_does_not_change_the_answer(llama):
    engine, prompt, reply, found = llama
    assert engine.layers == tuple(range(6))
    assert found["worst"].shape == (STEPS - 1, 1, 6, 6)
    off = settings() | {"select_layers": [], "dense_layers": []}
    again = trial(engine, prompt, reply.token_ids, off)
    assert again.token_ids == reply.token_ids
    assert all(again.agreed)
    assert again.logprobs == pytest.approx(reply.logprobs, abs=1e-4)


def test_a_budget_over_everything_agrees_with_dense(llama):
    engine, prompt, reply, _ = llama
    every = settings(token_budget=1024, min_sparse_len=0)
    found = trial(engine, prompt, reply.token_ids, every)
    assert all(found.agreed)
    assert found.logprobs == pytest.approx(reply.logprobs, abs=1e-3)


def test_a_small_budget_emits_the_forced_tokens_but_disagrees(llama):
    engine, prompt, reply, _ = llama
    found = trial(engine, prompt, reply.token_ids, settings(token_budget=64))
    assert found.token_ids == reply.token_ids
    assert found.agreed[0], "the first token comes from the prefill, which is dense"
    assert not all(found.agreed)
    assert sum(found.logprobs) < sum(reply.logprobs) - 1


def test_other_tokens_can_be_forced(llama):
    engine, prompt, reply, _ = llama
    forced = [11, 12, 13, 14]
    found = trial(engine, prompt, forced, settings(token_budget=64))
    assert found.token_ids == tuple(forced)
    assert not any(found.agreed)


def test_prompts_tried_at_once_do_as_they_do_alone(llama):
    """Answers of different lengths, with corrections and without."""
    engine, prompt, reply, _ = llama
    prompts = [prompt, random_prompt(290, seed=2), random_prompt(311, seed=3)]
    dense = engine.answers(prompts, [STEPS, 5, STEPS])
    assert dense[0].token_ids == reply.token_ids and len(dense[1].token_ids) == 5
    tokens = [one.token_ids for one in dense]
    often = settings(token_budget=64, correction_interval=3)
    for setting in (settings(token_budget=64), often):
        asked = zip(prompts, tokens, strict=True)
        alone = [trial(engine, p, t, setting) for p, t in asked]
        together = engine.trials(prompts, tokens, setting)
        for one, found in zip(alone, together, strict=True):
            assert found.token_ids == one.token_ids and found.agreed == one.agreed
            assert found.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def test_corrections_run_under_the_trial_s_settings(llama):
    engine, prompt, reply, _ = llama

    def corrections() -> int:
        return scheduler(engine).correction_counters.corrections

    before = corrections()
    never = trial(engine, prompt, reply.token_ids, settings(token_budget=64))
    assert corrections() == before
    often = trial(
        engine,
        prompt,
        reply.token_ids,
        settings(token_budget=64, correction_interval=3),
    )
    assert corrections() > before
    assert often.token_ids == never.token_ids
    assert often.logprobs != never.logprobs


def test_prompts_are_computed_once(llama):
    """Blocks of the prompt are in the prefix cache; polluted ones never are."""
    engine, prompt, reply, _ = llama
    small = settings(token_budget=64)
    first = trial(engine, prompt, reply.token_ids, small)
    assert trial(engine, prompt, reply.token_ids, small) == first
    manager = scheduler(engine).kv_cache_manager
    assert manager.prefix_cache_stats is None or manager.usage < 0.01
    longer = [*prompt, *reply.token_ids]
    forced = [11, 12]
    after = trial(engine, longer, forced, settings(token_budget=1024, min_sparse_len=0))
    assert engine._llm.reset_prefix_cache()
    clean = trial(engine, longer, forced, settings(token_budget=1024, min_sparse_len=0))
    assert after.logprobs == pytest.approx(clean.logprobs, abs=1e-4)


def test_only_layers_with_full_attention_take_part():
    """Of a hybrid model: linear attention has no TIDAL implementation, a window has."""

    def layer(tidal: bool, sliding_window: int | None = None):
        impl = object.__new__(worker.TidalImpl) if tidal else object()
        if tidal:
            impl.sliding_window = sliding_window
        return SimpleNamespace(impl=impl)

    context = {
        f"model.layers.{i}.{'self_attn' if i % 4 == 3 else 'linear_attn'}": layer(
            i % 4 == 3
        )
        for i in range(12)
    }
    context["model.layers.2.mlp.experts"] = SimpleNamespace()
    context["model.layers.12.self_attn"] = layer(True, sliding_window=16)
    compilation = SimpleNamespace(static_forward_context=context)
    config = SimpleNamespace(compilation_config=compilation)
    assert sorted(worker._full_layers(config)) == [3, 7, 11]
