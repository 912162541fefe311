"""Each method on the planted model: a case that it solves, and one that it cannot."""

import pytest

from tests.support.asking import generate, tokens
from tests.support.engines import MiB, reconfigured
from tidal_vllm.planted import make_prompt

NUM_TOKENS, DEPTHS = 1200, (0.05, 0.5, 0.9)
WINDOWED = {"method": "sliding_window", "token_budget": 512}


@pytest.fixture(scope="module")
def spec(planted):
    return planted(hops=2)[0]


@pytest.fixture(scope="module")
def start(engine, planted):
    def start(**tidal):
        folder = planted(hops=2)[1]
        return engine(folder, tidal=tidal, kv_cache_memory_bytes=96 * MiB)

    return start


@pytest.fixture(scope="module")
def llm(start, spec):
    return start(select_layers=list(spec.select_layers))


def share_right(llm, spec, depth):
    """Words of the answer that are right; the first comes from the dense prompt."""
    prompt = make_prompt(spec, NUM_TOKENS, depth, seed=11)
    wanted = prompt.answer_token_ids
    (answer,) = tokens(generate(llm, [prompt.prompt_token_ids], len(wanted)))
    pairs = zip(answer[1:], wanted[1:], strict=True)
    return sum(a == b for a, b in pairs) / (len(wanted) - 1)


def shares_right(llm, spec, depths=DEPTHS):
    return [share_right(llm, spec, depth) for depth in depths]


@pytest.mark.parametrize("method", ["tidaldecode", "lessismore"])
def test_few_layers_choose(llm, spec, method):
    """Solved by the right SELECT layers; not by wrong ones."""
    dense, (first, second) = list(spec.dense_layers), spec.select_layers
    knobs = {"method": method, "token_budget": 64, "dense_layers": dense}
    with reconfigured(llm, **knobs, select_layers=[first, second]):
        assert shares_right(llm, spec) == [1.0] * 3
    with reconfigured(llm, **knobs, select_layers=[first, second + 1]):
        assert shares_right(llm, spec) == [0.0] * 3


def test_oracle(llm, spec):
    """Solved wherever the budget has room for a choice."""
    knobs = {"method": "oracle", "scope": "query_head", "select_block_size": 16}
    with reconfigured(llm, **knobs, token_budget=64):
        assert shares_right(llm, spec) == [1.0] * 3
    with reconfigured(llm, **knobs, token_budget=32, recent_fraction=0.0):
        assert shares_right(llm, spec) == [0.0] * 3  # the sinks and the newest


def test_sliding_window(engine, planted):
    """Solved where the answer is near the end; lost before the window."""
    spec, folder = planted(hops=1)
    llm = engine(folder, tidal=WINDOWED, kv_cache_memory_bytes=96 * MiB)
    assert shares_right(llm, spec) == [0.0, 0.0, 1.0]


def test_quest(start, spec):
    """Solved by small blocks; the bounds of large ones promise too much."""
    knobs = {"method": "quest", "scope": "query_head"}
    small = start(**knobs, token_budget=64, select_block_size=2)
    assert shares_right(small, spec) == [1.0] * 3
    large = start(**knobs, token_budget=64, select_block_size=16)
    assert max(shares_right(large, spec)) < 1.0
