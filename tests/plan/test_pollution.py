"""The decisions behind corrections, from plain integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.pollution import (
    MIN_REMAINING,
    StepDemand,
    choose_corrections,
    clean_position_after,
    is_due,
    pollutes,
)
from tidal_vllm.plan.roles import all_dense
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.plan.table import format_plan
from tidal_vllm.validators import TidalConfigError

SETTINGS = {"dense_layers": [0], "select_layers": [1], "token_budget": 64}
PLAN = plan_layers(TidalConfig(**SETTINGS), 4, None)


def rule(**settings):
    return SelectionRule.from_config(TidalConfig(**SETTINGS, **settings))


@pytest.mark.parametrize(
    ("query_len", "num_computed", "num_prompt", "polluted"),
    [
        pytest.param(1, 64, 10, True, id="decode"),
        pytest.param(1, 63, 10, False, id="all-blocks-kept"),
        pytest.param(1, 100, 100, True, id="first-decode"),
        pytest.param(1, 99, 100, False, id="last-token-of-the-prompt"),
        pytest.param(2, 100, 50, False, id="extend"),
        pytest.param(100, 0, 100, False, id="prefill"),
    ],
)
def test_what_pollutes(query_len, num_computed, num_prompt, polluted):
    assert pollutes(PLAN, rule(), query_len, num_computed, num_prompt) is polluted
    dense = all_dense(4, "", "a test")
    assert not pollutes(dense, rule(), query_len, num_computed, num_prompt)


@pytest.mark.parametrize(
    ("query_len", "num_computed", "num_prompt", "polluted"),
    [
        pytest.param(3, 100, 50, True, id="draft"),
        pytest.param(3, 62, 50, True, id="draft-whose-last-token-is-sparse"),
        pytest.param(3, 61, 50, False, id="draft-that-keeps-all-blocks"),
        pytest.param(1, 100, 50, True, id="decode"),
        pytest.param(4, 100, 50, False, id="longer-than-any-draft"),
        pytest.param(3, 99, 100, False, id="prompt"),
    ],
)
def test_what_pollutes_with_drafts(query_len, num_computed, num_prompt, polluted):
    request = (query_len, num_computed, num_prompt)
    assert pollutes(PLAN, rule(), *request, max_decode_query_len=3) is polluted


@pytest.mark.parametrize(
    ("min_sparse_len", "clean_len"), [(0, 64), (32, 64), (64, 64), (90, 90)]
)
def test_sequences_that_keep_all_blocks_stay_clean(min_sparse_len, clean_len):
    found = rule(min_sparse_len=min_sparse_len)
    assert not pollutes(PLAN, found, 1, clean_len - 1, 1)
    assert pollutes(PLAN, found, 1, clean_len, 1)


@pytest.mark.parametrize(
    ("clean", "start", "query_len", "polluted", "after"),
    [
        pytest.param(100, 100, 1, True, 100, id="decode"),
        pytest.param(100, 105, 1, True, 100, id="later-decode"),
        pytest.param(100, 100, 6, False, 106, id="correction"),
        pytest.param(100, 105, 8, False, 100, id="dense-on-polluted"),
        pytest.param(0, 0, 50, False, 50, id="prefill"),
        pytest.param(100, 64, 10, False, 74, id="tokens-were-dropped"),
        pytest.param(100, 64, 1, True, 64, id="one-token-of-a-correction"),
    ],
)
def test_clean_position(clean, start, query_len, polluted, after):
    assert clean_position_after(clean, start, query_len, polluted) == after


@pytest.mark.parametrize(
    ("interval", "num_polluted", "num_remaining", "due"),
    [
        (8, 8, 100, True),
        (8, 9, 100, True),
        (8, 7, 100, False),
        (None, 999, 100, False),
        (8, 8, MIN_REMAINING, False),
        (8, 8, MIN_REMAINING + 1, True),
        (1, 0, 100, False),
    ],
)
def test_who_is_due(interval, num_polluted, num_remaining, due):
    assert is_due(interval, num_polluted, num_remaining) is due


def decode(corrected=None):
    return StepDemand(1, corrected)


@pytest.mark.parametrize(
    ("demands", "budget", "limit", "chosen"),
    [
        pytest.param([decode(9)] * 3, 64, 64, [1, 1, 1], id="all-in-one-step"),
        pytest.param([decode(9)] * 3, 27, 64, [1, 1, 1], id="just-fits"),
        pytest.param([decode(9)] * 3, 26, 64, [1, 1, 0], id="the-last-waits"),
        pytest.param([decode(9), decode()], 9, 9, [1, 0], id="too-long-is-split"),
        pytest.param([decode(9), decode(9)], 6, 6, [1, 0], id="one-split-at-a-time"),
        pytest.param([decode(9), decode()], 16, 4, [1, 0], id="split-by-the-limit"),
        pytest.param(
            [StepDemand(40), decode(9), decode()], 48, 48, [0, 0, 0], id="prefill-first"
        ),
        pytest.param(
            [decode(9), decode(), StepDemand(400)], 48, 48, [1, 0, 0], id="prefill-last"
        ),
        pytest.param([StepDemand(0), decode(9)], 9, 9, [0, 1], id="beside-one-on-hold"),
        pytest.param([decode(9), decode()], 2, 2, [0, 0], id="no-room-for-two-tokens"),
        pytest.param([], 8, 8, [], id="nobody"),
    ],
)
def test_choice(demands, budget, limit, chosen):
    assert choose_corrections(demands, budget, limit) == [bool(c) for c in chosen]


@given(
    st.lists(st.builds(StepDemand, st.just(1), st.none() | st.integers(2, 40))),
    st.integers(2, 200),
)
def test_a_step_holds_what_was_chosen(demands, budget):
    """Corrections that are not split leave a token for every other request."""
    chosen = choose_corrections(demands, budget, budget)
    wanted = [
        demand.corrected if corrected else demand.plain
        for demand, corrected in zip(demands, chosen, strict=True)
    ]
    assert all(d.corrected for d, c in zip(demands, chosen, strict=True) if c)
    if any(chosen) and sum(wanted) > budget:
        assert sum(chosen) == 1  # split
        (split,) = (w for w, c in zip(wanted, chosen, strict=True) if c)
        assert split > budget - len(demands) + 1


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("correction_interval", 0, "an integer >= 1 (decode steps), or null"),
        ("correction_interval", -8, "an integer >= 1"),
        ("correction_interval", 8.0, "not a float"),
        ("correction_interval", 0.5, "not a float"),
        ("correction_interval", True, "not a bool"),
        ("correction_interval", "8", "not a str"),
        ("correction_interval", 2**31, "at most 2147483647"),
        ("publish_polluted", 1, "true or false, not a int"),
        ("publish_polluted", None, "not a NoneType"),
        ("publish_polluted", "yes", "not a str"),
    ],
)
def test_refused_settings(key, value, allowed):
    with pytest.raises(TidalConfigError) as caught:
        TidalConfig.from_additional_config({"tidal": {key: value}})
    assert str(caught.value).startswith(f"tidal.{key} = {value!r}: must be ")
    assert allowed in str(caught.value)


def test_interval_beyond_any_output():
    config = TidalConfig(correction_interval=1024)
    config.check_max_model_len(1025)
    with pytest.raises(TidalConfigError, match="max_model_len - 1 = 1023"):
        config.check_max_model_len(1024)
    TidalConfig().check_max_model_len(1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "off; KV of sparse layers is not shared"),
        ({"publish_polluted": True}, "off; KV of sparse layers is shared"),
        (
            {"correction_interval": 32},
            "after 32 sparse decode steps; other KV of sparse layers is not shared",
        ),
    ],
)
def test_the_start_up_table_says_so(settings, text):
    table = format_plan(PLAN, TidalConfig(**SETTINGS, **settings), 1024)
    assert f"correction {text}" in " ".join(table.split())
