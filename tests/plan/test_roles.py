"""The role of each layer, and which roles are refused; no torch needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.made_profile import make_profile
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers, safest_roles
from tidal_vllm.plan.roles import LayerPlan, Role, format_layers
from tidal_vllm.plan.stages import check_pipeline_stage
from tidal_vllm.plan.steps import selection_indices
from tidal_vllm.plan.table import format_plan
from tidal_vllm.validators import TidalConfigError

D, S, P = Role.DENSE, Role.SELECT, Role.SPARSE


def plan(num_layers=8, profile=None, **settings):
    return plan_layers(TidalConfig(**settings), num_layers, profile)


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
    ],
)
def test_roles(settings, profile, roles, source):
    made = plan(profile=profile, **settings)
    assert made.roles == roles
    assert source in made.source
    assert made.sparse and made.off_reason is None
    assert sum(made.count(role) for role in Role) == made.num_layers == 8


@pytest.mark.parametrize(
    ("num_layers", "select"),
    [
        (4, (2,)),
        (13, (2,)),
        (14, (2, 8)),
        (30, (2, 8, 14, 20)),
        (32, (2, 8, 14, 20, 26)),
    ],
)
def test_an_unknown_model_chooses_again_in_every_sixth_layer(num_layers, select):
    """But not near the end, where few layers follow it."""
    made = plan(num_layers)
    assert (made.layers(D), made.layers(S)) == ((0, 1), select)
    assert "safest roles" in made.source


def test_unknown_model_is_warned_about_guessing_a_layer():
    warning = plan().warning
    for words in ("dense_layers", "select_layers", "40 %", "100 %", "12", "13"):
        assert words in warning
    assert "every 6th after it that is not among the last 5)" in warning
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
    table = format_plan(made, TidalConfig(**settings), 131072).splitlines()
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
            "tidal.dense_layers = [2]: overlaps select_layers = [2]",
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
    start = "tidal.select_layers = [2, 5]: the pipeline stage with layers 4-7"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith("must contain 4, e.g. [2, 4, 5]")


def test_one_choice_for_all_layers_or_one_per_select_layer():
    made = LayerPlan((D, S, P, P, S, P, D, P), "test")
    every = range(8)
    assert selection_indices(made, every, 1) == dict.fromkeys((1, 2, 3, 4, 5, 7), 0)
    kept = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 7: 1}
    assert selection_indices(made, every, 2) == kept
    assert selection_indices(made, range(4, 8), 2) == {4: 0, 5: 0, 7: 0}


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
