"""What a set keeps, which batches run sparse, and how much KV is read; no torch."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.roles import LayerPlan, Role, all_dense
from tidal_vllm.plan.rule import SelectionRule, may_differ_in_group, num_sets
from tidal_vllm.plan.steps import kv_read_share, runs_sparse
from tidal_vllm.validators import TidalConfigError

D, S, P = Role.DENSE, Role.SELECT, Role.SPARSE


def make_rule(budget=64, size=16, sinks=4, recent=16, threshold=None):
    return SelectionRule(
        token_budget=budget,
        select_block_size=size,
        sink_tokens=sinks,
        recent_tokens=recent,
        sparse_threshold=budget if threshold is None else threshold,
    )


@pytest.mark.parametrize(
    ("rule", "seq_len", "kept", "tokens", "forced"),
    [
        pytest.param(make_rule(), 0, 0, 0, (), id="empty"),
        pytest.param(make_rule(), 1, 1, 1, (0,), id="first-token"),
        pytest.param(make_rule(), 64, 4, 64, (0, 3), id="exactly-the-budget"),
        pytest.param(make_rule(), 65, 4, 49, (0, 3, 4), id="one-more"),
        pytest.param(make_rule(), 160, 4, 64, (0, 9), id="recent-fills-one-block"),
        pytest.param(make_rule(), 161, 4, 49, (0, 9, 10), id="recent-straddles"),
        pytest.param(
            make_rule(threshold=200), 200, 13, 200, (0, 11, 12), id="below-threshold"
        ),
        pytest.param(
            make_rule(threshold=0), 64, 4, 64, (0, 3), id="short-but-sparse-path"
        ),
        pytest.param(make_rule(8, 1, 0, 1), 100, 8, 8, (99,), id="tokens-current-only"),
        pytest.param(
            make_rule(8, 1, 2, 2), 100, 8, 8, (0, 1, 98, 99), id="tokens-sink-recent"
        ),
    ],
)
def test_kept_and_forced_blocks(rule, seq_len, kept, tokens, forced):
    assert rule.num_kept_blocks(seq_len) == kept
    assert rule.kept_tokens(seq_len) == tokens
    assert rule.forced_blocks(seq_len) == forced


@st.composite
def configs(draw):
    size = draw(st.sampled_from([1, 2, 3, 8, 16, 64]))
    settings = {
        "select_block_size": size,
        "token_budget": size * draw(st.integers(1, 64)),
        "sink_tokens": draw(st.integers(0, 64)),
        "recent_fraction": draw(st.floats(0, 1, exclude_max=True)),
        "min_sparse_len": draw(st.none() | st.integers(0, 3000)),
    }
    try:
        return TidalConfig(**settings)
    except TidalConfigError:
        assume(False)


@settings(deadline=None)
@given(config=configs(), seq_len=st.integers(0, 5000))
def test_laws_of_the_selection_rule(config, seq_len):
    rule = SelectionRule.from_config(config)
    total, kept = rule.num_blocks(seq_len), rule.num_kept_blocks(seq_len)
    forced = rule.forced_blocks(seq_len)
    size = rule.select_block_size

    assert kept <= total
    assert kept <= config.max_blocks
    assert 0 <= rule.kept_tokens(seq_len) <= min(seq_len, kept * size)
    if seq_len <= rule.keep_all_len:
        assert rule.kept_tokens(seq_len) == seq_len
    else:
        assert kept * size == rule.token_budget

    assert list(forced) == sorted(set(forced))
    assert len(forced) <= kept
    must_keep = {*range(min(rule.sink_tokens, seq_len))}
    must_keep |= {*range(max(seq_len - rule.recent_tokens, 0), seq_len)}
    assert {*forced} == {token // size for token in must_keep}
    if seq_len:
        assert forced[-1] == total - 1


@pytest.mark.parametrize(
    ("seq_len", "sparse"), [(0, False), (64, False), (65, True), (4096, True)]
)
def test_batch_is_sparse_above_the_threshold(seq_len, sparse):
    assert (
        runs_sparse(plan_layers(TidalConfig(), 8, None), make_rule(), seq_len) is sparse
    )
    assert not runs_sparse(all_dense(8, "", "a reason"), make_rule(), seq_len)


@pytest.mark.parametrize(
    ("scope", "sets", "differ"),
    [("sequence", 1, False), ("kv_head", 8, False), ("query_head", 32, True)],
)
def test_sets_per_sequence(scope, sets, differ):
    assert num_sets(scope, 32, 8) == sets
    assert may_differ_in_group(scope) is differ


N, K = 32768, 4096
PUBLISHED = LayerPlan((D, D, S) + (P,) * 10 + (S,) + (P,) * 18, "test")


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 2 * N + 2 * (N / 2 + K) + 28 * K),
        ({"reselect_interval": 4}, 2 * N + 2 * (N / 8 + K) + 28 * K),
        ({"select_attends": "everything"}, 4 * N + 28 * K),
        (
            {"reselect_interval": 4, "select_attends": "everything"},
            2 * N + 2 * (N + 3 * K) / 4 + 28 * K,
        ),
    ],
)
def test_kv_read_share_is_the_formula_of_the_survey(settings, tokens):
    config = TidalConfig(**settings)
    assert kv_read_share(PUBLISHED, config, N) == tokens / (32 * N)
    assert kv_read_share(PUBLISHED, config, K) == 1.0
    assert kv_read_share(all_dense(32, "", "a reason"), config, N) == 1.0
