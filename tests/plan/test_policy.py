"""Layer roles, what a set keeps, and the start-up table; no torch needed."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers, safest_roles
from tidal_vllm.plan.roles import LayerPlan, Role, all_dense, format_layers
from tidal_vllm.plan.rule import SelectionRule, num_sets
from tidal_vllm.plan.stages import check_pipeline_stage
from tidal_vllm.plan.steps import kv_read_share, runs_sparse, selection_indices
from tidal_vllm.plan.table import format_plan
from tidal_vllm.profiles import PACKAGED_DIR, Profile
from tidal_vllm.validators import TidalConfigError

D, S, P = Role.DENSE, Role.SELECT, Role.SPARSE


def make_profile(dense=(0, 1), select=(2, 5), num_layers=8):
    return Profile(
        name="eight",
        models=("eight*",),
        num_hidden_layers=num_layers,
        dense_layers=dense,
        select_layers=select,
        source="this test",
        path=PACKAGED_DIR / "eight.json",
    )


def plan(num_layers=8, profile=None, **settings):
    return plan_layers(TidalConfig(**settings), num_layers, profile)


# Roles


@pytest.mark.parametrize(
    ("settings", "profile", "roles", "source"),
    [
        pytest.param({}, make_profile(), (D, D, S, P, P, S, P, P), "eight", id="file"),
        pytest.param(
            {"select_layers": [3, 6]},
            make_profile(),
            (D, D, D, S, P, P, S, P),
            "tidal.select_layers",
            id="select-only-makes-earlier-layers-dense",
        ),
        pytest.param(
            {"dense_layers": [0, 1, 7]},
            make_profile(),
            (D, D, S, P, P, S, P, D),
            "tidal.dense_layers and profile eight",
            id="dense-only-keeps-the-profile's-select",
        ),
        pytest.param(
            {"dense_layers": [], "select_layers": [0]},
            make_profile(),
            (S, P, P, P, P, P, P, P),
            "tidal.dense_layers and tidal.select_layers",
            id="both",
        ),
        pytest.param(
            {}, None, (D, D, S, P, P, P, S, P), "safest roles", id="unknown-model"
        ),
    ],
)
def test_roles(settings, profile, roles, source):
    made = plan(profile=profile, **settings)
    assert made.roles == roles
    assert source in made.source
    assert made.sparse and made.off_reason is None
    assert sum(made.count(role) for role in Role) == made.num_layers == 8


def test_unknown_model_is_warned_about_guessing_a_layer():
    warning = plan().warning
    for words in ("dense_layers", "select_layers", "40 %", "100 %", "12", "13"):
        assert words in warning
    assert plan(dense_layers=[0, 1]).warning == warning
    assert plan(select_layers=[2]).warning is None
    assert plan(profile=make_profile()).warning is None


@pytest.mark.parametrize(
    ("num_layers", "settings", "profile", "reason"),
    [
        pytest.param(3, {}, None, "3 layers, fewer than 4", id="three-layers"),
        pytest.param(1, {}, None, "1 layers, fewer than 4", id="one-layer"),
        pytest.param(8, {"select_layers": []}, None, "no SELECT", id="select-empty"),
        pytest.param(
            8, {}, make_profile(select=()), "no SELECT", id="profile-selects-nothing"
        ),
        pytest.param(
            4, {"select_layers": [1, 2, 3]}, None, "none is left", id="no-sparse-layer"
        ),
        pytest.param(3, {"dense_layers": [0, 1]}, None, "none is left", id="tiny"),
    ],
)
def test_sparse_is_off_with_a_reason(num_layers, settings, profile, reason):
    made = plan(num_layers, profile, **settings)
    assert not made.sparse
    assert made.roles == (D,) * num_layers
    assert reason in made.off_reason
    check_pipeline_stage(made, 0, num_layers)
    table = format_plan(made, TidalConfig(**settings), 128 * K).splitlines()
    assert any(line.startswith("  OFF ") for line in table)


def test_few_layers_run_sparse_when_named():
    assert plan(2, select_layers=[0]).roles == (S, P)
    assert plan(3, make_profile((0,), (1,), 3)).roles == (D, S, P)


@pytest.mark.parametrize(
    ("settings", "profile", "start", "allowed"),
    [
        pytest.param(
            {"select_layers": [2, 8]},
            None,
            "tidal.select_layers = [2, 8]: this model has 8 layers",
            ["must be in 0..7", "[8] not"],
            id="select-beyond-the-model",
        ),
        pytest.param(
            {"dense_layers": [0, 31], "select_layers": [2]},
            None,
            "tidal.dense_layers = [0, 31]: this model has 8 layers",
            ["must be in 0..7", "[31] not"],
            id="dense-beyond-the-model",
        ),
        pytest.param(
            {"dense_layers": [0, 1, 5]},
            make_profile(),
            "tidal.dense_layers = [0, 1, 5]: overlaps select_layers = [2, 5]",
            ["profile eight", "in [5]", "must name other layers"],
            id="dense-overlaps-the-profile",
        ),
        pytest.param(
            {"dense_layers": [2]},
            None,
            "tidal.dense_layers = [2]: overlaps select_layers = [2, 6]",
            ["safest roles", "in [2]", "must name other layers"],
            id="dense-overlaps-the-fallback",
        ),
        pytest.param(
            {"dense_layers": [0], "select_layers": [4]},
            None,
            "tidal.dense_layers = [0]: layers 1-3 would be SPARSE before",
            ["first SELECT layer, 4", "must contain them", "make 1 a SELECT"],
            id="sparse-before-any-select",
        ),
        pytest.param(
            {"dense_layers": []},
            make_profile(),
            "tidal.dense_layers = []: layers 0-1 would be SPARSE before",
            ["first SELECT layer, 2", "must contain them"],
            id="sparse-before-the-profile's-select",
        ),
        pytest.param(
            {},
            make_profile(dense=(0,)),
            "tidal.profile = 'profile eight': its dense_layers: layers 1 would be",
            ["first SELECT layer, 2", "must contain them"],
            id="profile-with-sparse-before-select",
        ),
    ],
)
def test_refuses_layers(settings, profile, start, allowed):
    with pytest.raises(TidalConfigError) as caught:
        plan(profile=profile, **settings)
    assert str(caught.value).startswith(start)
    for words in allowed:
        assert words in str(caught.value)


@settings(deadline=None)
@given(num_layers=st.integers(4, 128))
def test_safest_roles_are_valid_for_every_depth(num_layers):
    made = plan(num_layers)
    dense, select = safest_roles(range(num_layers))
    assert (made.layers(D), made.layers(S)) == (dense, select)
    assert made.roles[:4] == (D, D, S, P)
    assert made.sparse


# Pipeline stages


@pytest.mark.parametrize("stages", [[(0, 8)], [(0, 5), (5, 8)], [(0, 2), (2, 8)]])
def test_stages_that_start_with_a_select_layer(stages):
    made = plan(profile=make_profile())
    for first, end in stages:
        check_pipeline_stage(made, first, end)


def test_dense_only_and_empty_stages_are_fine():
    made = plan(dense_layers=[0, 1, 6, 7], select_layers=[2, 5])
    check_pipeline_stage(made, 6, 8)
    check_pipeline_stage(made, 8, 8)


def test_stage_that_starts_sparse_is_refused():
    with pytest.raises(TidalConfigError) as caught:
        check_pipeline_stage(plan(profile=make_profile()), 4, 8)
    assert str(caught.value) == (
        "tidal.select_layers = [2, 5]: the pipeline stage with layers 4-7 starts with "
        "SPARSE layer 4, and selections do not travel between stages: must contain 4, "
        "e.g. [2, 4, 5]"
    )


# What a set keeps


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
    assert runs_sparse(plan(), make_rule(), seq_len) is sparse
    assert not runs_sparse(all_dense(8, "", "a reason"), make_rule(), seq_len)


@pytest.mark.parametrize(
    ("scope", "sets"), [("sequence", 1), ("kv_head", 8), ("query_head", 32)]
)
def test_sets_per_sequence(scope, sets):
    assert num_sets(scope, 32, 8) == sets


N, K = 32768, 4096
PUBLISHED = LayerPlan((D, D, S) + (P,) * 10 + (S,) + (P,) * 18, "test")


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 4 * N + 28 * K),
        ({"reselect_interval": 4}, 2 * N + 2 * (N + 3 * K) / 4 + 28 * K),
        ({"select_attends": "chosen"}, 2 * N + 2 * (N / 2 + K) + 28 * K),
        (
            {"reselect_interval": 4, "select_attends": "chosen"},
            2 * N + 2 * (N / 8 + K) + 28 * K,
        ),
    ],
)
def test_kv_read_share_is_the_formula_of_the_survey(settings, tokens):
    config = TidalConfig(**settings)
    assert kv_read_share(PUBLISHED, config, N) == tokens / (32 * N)
    assert kv_read_share(PUBLISHED, config, K) == 1.0
    assert kv_read_share(all_dense(32, "", "a reason"), config, N) == 1.0


def test_one_choice_for_all_layers_or_one_per_select_layer():
    made = LayerPlan((D, S, P, P, S, P, D, P), "test")
    every = range(8)
    assert selection_indices(made, every, 1) == dict.fromkeys((1, 2, 3, 4, 5, 7), 0)
    kept = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 7: 1}
    assert selection_indices(made, every, 2) == kept
    assert selection_indices(made, range(4, 8), 2) == {4: 0, 5: 0, 7: 0}


# The start-up table


def test_table():
    made = plan_layers(TidalConfig(), 32, make_profile(select=(2, 13), num_layers=32))
    assert format_plan(made, TidalConfig(), 128 * 1024, "org/eight") == (
        "TIDAL sparse decoding of org/eight, 32 layers\n"
        "  DENSE 2      0-1\n"
        "  SELECT 2     2, 13\n"
        "  SPARSE 28    3-12, 14-31\n"
        "  roles from   profile eight\n"
        "  budget       4096 tokens per set: 256 blocks of 16, scope sequence\n"
        "  forced       first 4 tokens, newest 1024 tokens, within the budget\n"
        "  sparse above 4096 tokens of context\n"
        "  KV read      23.4% of dense at 32K, 15.2% at 128K\n"
        "  selection    in every step; SELECT layers then attend to everything\n"
        "  correction   off; KV of sparse layers is not shared through the prefix cache"
    )


def test_table_when_off():
    assert format_plan(all_dense(8, "", "a test wants it"), TidalConfig(), 4096) == (
        "TIDAL sparse decoding of this model, 8 layers\n"
        "  DENSE 8      0-7\n"
        "  SELECT 0     none\n"
        "  SPARSE 0     none\n"
        "  OFF          every step is dense: a test wants it"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "tidaldecode", "min_sparse_len": 0},
        {"preset": "lessismore", "min_sparse_len": 100_000},
        {"dense_layers": list(range(0, 126, 3)), "select_layers": [1, 2, 124]},
        {"select_layers": []},
    ],
    ids=["default", "tidaldecode", "lessismore", "many-ranges", "off"],
)
def test_table_fits_a_log(settings):
    config = TidalConfig(**settings)
    table = format_plan(
        plan(126, **settings), config, 1_000_000, "/models/" + "long-" * 30
    )
    assert max(map(len, table.splitlines())) <= 80
    assert table == table.strip()


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((), "none"),
        ((3,), "3"),
        ((0, 1), "0-1"),
        ((2, 13), "2, 13"),
        ((0, 1, 3, 4, 5, 9), "0-1, 3-5, 9"),
    ],
)
def test_layer_ranges(layers, text):
    assert format_layers(layers) == text


def test_imports_neither_torch_nor_vllm():
    code = (
        "import sys, tidal_vllm.config, tidal_vllm.plan.layers, tidal_vllm.profiles\n"
        "print([m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
