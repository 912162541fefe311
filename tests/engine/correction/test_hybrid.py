"""Sliding windows: the publish rule in every KV cache group, and what is refused."""

from collections import Counter

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.engine.correction.test_publish import (
    MAX_TOKENS,
    PROMPT,
    difference,
    next_token_logprobs,
)
from tests.support.asking import generate, sampling_params, tokens
from tests.support.drifting import BLOCK_SIZE, SPARSE, build_drifting_model
from tests.support.engines import SMALL_ENGINE, engine_kwargs, scheduler
from tests.support.models import LFM2, build_random_model, random_prompt
from tests.support.watching import correcting

FULL, SLIDES = "full_attention", "sliding_attention"
LAYER_TYPES = [SLIDES, FULL, FULL, SLIDES, FULL, FULL]
TIDAL = SPARSE | {"dense_layers": [], "select_layers": [1]}
# vLLM keeps only a prompt's last window for the prefix cache, unless it is told:
ALL_WINDOWS = {"prefix_cache_retention_interval": None}
ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}


@pytest.fixture(scope="session")
def windowed(tmp_path_factory):
    """Two layers with a window of 40 tokens among four without."""
    return build_drifting_model(
        tmp_path_factory.mktemp("windowed"),
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=LAYER_TYPES,
        sliding_window=40,
    )


@pytest.fixture(scope="session")
def stateful(tmp_path_factory):
    """The same with short convolutions for the windows."""
    return build_random_model(
        tmp_path_factory.mktemp("stateful"),
        "lfm2",
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=["conv" if word == SLIDES else word for word in LAYER_TYPES],
        **LFM2,
    )


@pytest.fixture(params=["windowed", "stateful"])
def hybrid(request):
    return request.getfixturevalue(request.param)


def test_each_group_publishes_up_to_the_clean_position(small_engine, hybrid):
    """Seen in the block pool, after every step."""
    llm = small_engine(TIDAL, folder=hybrid, **ALL_WINDOWS)
    core, engine = scheduler(llm), llm.llm_engine
    published = [set(), set(), set()]
    engine.add_request("r", {"prompt_token_ids": PROMPT}, sampling_params(MAX_TOKENS))
    while engine.has_unfinished_requests():
        engine.step()
        for running in core.running:
            groups = core.kv_cache_manager.get_blocks(running.request_id).blocks
            clean = core.clean_position(running) // BLOCK_SIZE
            for blocks, seen in zip(groups, published, strict=True):
                # Blocks behind a window or a state are given away: null ones then.
                kept = [i for i, block in enumerate(blocks) if not block.is_null]
                hashed = [i for i in kept if blocks[i].block_hash is not None]
                assert hashed == [i for i in kept if i < clean]
                seen |= {*hashed}
    assert {max(seen) for seen in published} == {len(PROMPT) // BLOCK_SIZE - 1}


def test_nothing_is_published_again_in_sparse_steps(small_engine, hybrid, monkeypatch):
    """By then a running state is past the length that it would be published under."""
    llm = small_engine(TIDAL, folder=hybrid)
    lengths = []
    for manager in scheduler(llm).kv_cache_manager.coordinator.single_type_managers:

        def seen(request, num_tokens, *args, publish=manager.cache_blocks, **kwargs):
            lengths.append(num_tokens)
            publish(request, num_tokens, *args, **kwargs)

        monkeypatch.setattr(manager, "cache_blocks", seen)
    generate(llm, [PROMPT], MAX_TOKENS)
    assert lengths == sorted(lengths) and lengths[-1] == len(PROMPT)
    assert {*Counter(lengths).values()} == {3}, "once in each group"


def test_a_shared_prefix_is_dense(small_engine, hybrid):
    """The second conversation continues the first one's answer."""
    llm = small_engine(TIDAL, folder=hybrid, **ALL_WINDOWS)
    (answer,) = tokens(generate(llm, [PROMPT], MAX_TOKENS))
    asked = PROMPT + answer + random_prompt(9, seed=8)
    found, num_cached = next_token_logprobs(llm, asked)
    wanted, _ = next_token_logprobs(small_engine(folder=hybrid), asked)
    assert difference(found, wanted) < 1e-3
    assert num_cached == len(PROMPT)


def test_it_is_not_when_polluted_blocks_are_published(small_engine, hybrid):
    settings = TIDAL | {"publish_polluted": True}
    llm = small_engine(settings, folder=hybrid, **ALL_WINDOWS)
    (answer,) = tokens(generate(llm, [PROMPT], MAX_TOKENS))
    asked = PROMPT + answer + random_prompt(9, seed=8)
    found, num_cached = next_token_logprobs(llm, asked)
    wanted, _ = next_token_logprobs(small_engine(folder=hybrid), asked)
    assert num_cached > len(PROMPT)
    assert found.keys() != wanted.keys() or difference(found, wanted) > 0.01


def test_one_group_can_be_corrected(small_engine, windowed):
    """Without the hybrid KV cache manager nothing of a window is given away."""
    llm = small_engine(TIDAL, folder=windowed, **ONE_GROUP)
    with correcting(llm, 8) as counted:
        (answer,) = tokens(generate(llm, [PROMPT], MAX_TOKENS))
        assert counted.corrections >= 8
    asked = PROMPT + answer + random_prompt(9, seed=8)
    found, num_cached = next_token_logprobs(llm, asked)
    wanted, _ = next_token_logprobs(small_engine(folder=windowed), asked)
    assert difference(found, wanted) < 1e-3
    assert num_cached >= len(PROMPT) + 4 * BLOCK_SIZE


@pytest.mark.parametrize(
    ("interval", "kwargs", "refused"),
    [(8, {}, True), (8, ONE_GROUP, False), (None, {}, False)],
)
def test_windows_whose_blocks_are_freed_are_not_corrected(
    windowed, interval, kwargs, refused
):
    tidal = TIDAL | {"correction_interval": interval}
    arguments = engine_kwargs(tidal, **SMALL_ENGINE | kwargs)
    arguments = EngineArgs(model=str(windowed), **arguments)
    if not refused:
        arguments.create_engine_config()
        return
    with pytest.raises(ValueError) as caught:
        arguments.create_engine_config()
    assert "tidal.correction_interval = 8: a correction computes" in str(caught.value)
    assert "must be null" in str(caught.value)
    assert "--disable-hybrid-kv-cache-manager" in str(caught.value)
