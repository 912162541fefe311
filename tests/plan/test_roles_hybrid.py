"""Roles where only some layers have full attention; indices stay the model's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.made_profile import make_profile
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers, safest_roles
from tidal_vllm.plan.roles import Role, format_layers
from tidal_vllm.plan.stages import check_full_layers, check_pipeline_stage
from tidal_vllm.plan.steps import kv_read_share, selection_indices
from tidal_vllm.validators import TidalConfigError

D, S, P, OTHER = Role.DENSE, Role.SELECT, Role.SPARSE, Role.OTHER
# One layer of three, as in a model of 18 layers.
FULL = (2, 5, 8, 11, 14, 17)


def plan(profile=None, full=FULL, num_layers=18, **fields):
    return plan_layers(TidalConfig(**fields), num_layers, profile, full)


@pytest.mark.parametrize(
    ("fields", "profile", "roles"),
    [
        pytest.param({}, None, (D, D, S, P, P, P), id="safest"),
        pytest.param({"select_layers": [8]}, None, (D, D, S, P, P, P), id="select"),
        pytest.param(
            {"dense_layers": [17], "select_layers": [2]},
            None,
            (S, P, P, P, P, D),
            id="both",
        ),
        pytest.param(
            {},
            make_profile((2,), (5, 14), 18, "third"),
            (D, S, P, P, S, P),
            id="profile",
        ),
        pytest.param(
            {"dense_layers": [2, 17]},
            make_profile((2,), (5, 14), 18, "third"),
            (D, S, P, P, S, D),
            id="dense-beside-a-profile",
        ),
    ],
)
def test_full_layers_share_the_roles_and_others_keep_theirs(fields, profile, roles):
    made = plan(profile, **fields)
    assert tuple(made.roles[i] for i in FULL) == roles
    assert made.layers(OTHER) == tuple(i for i in range(18) if i not in FULL)
    assert (made.num_layers, made.num_full_layers) == (18, 6)
    assert made.sparse


@settings(deadline=None)
@given(st.sets(st.integers(0, 63), min_size=4).map(sorted))
def test_safest_roles_count_full_layers_only(full):
    made = plan(full=tuple(full), num_layers=64)
    dense, select = safest_roles(full)
    assert (made.layers(D), made.layers(S)) == (dense, select)
    among = plan_layers(TidalConfig(), len(full), None)
    assert tuple(made.roles[i] for i in full) == among.roles


@pytest.mark.parametrize(
    ("fields", "full", "reason"),
    [
        ({}, (2, 5, 8), "has 3 full-attention layers, fewer than 4"),
        ({}, (), "has 0 full-attention layers, fewer than 4"),
        ({"select_layers": []}, FULL, "no SELECT layer"),
        ({"select_layers": [2, 5]}, (2, 5), "every full-attention layer is DENSE or"),
    ],
)
def test_sparse_is_off_with_a_reason(fields, full, reason):
    made = plan(full=full, **fields)
    assert reason in made.off_reason
    assert made.layers(D) == full
    assert made.count(D) + made.count(OTHER) == 18
    assert kv_read_share(made, TidalConfig(**fields), 32768) == 1.0


@pytest.mark.parametrize(
    ("fields", "profile", "start"),
    [
        ({"select_layers": [5, 6]}, None, "tidal.select_layers = [5, 6]: "),
        (
            {"dense_layers": [0, 2, 6], "select_layers": [5]},
            None,
            "tidal.dense_layers = [0, 2, 6]: ",
        ),
        ({"dense_layers": [18]}, None, "tidal.dense_layers = [18]: "),
        (
            {},
            make_profile((0, 1, 2), (5,), 18, "third"),
            "tidal.profile third: dense_layers = [0, 1, 2]: ",
        ),
        (
            {},
            make_profile((2,), (6,), 18, "third"),
            "tidal.profile third: select_layers = [6]: ",
        ),
    ],
)
def test_refuses_layers_without_full_attention(fields, profile, start):
    with pytest.raises(TidalConfigError) as caught:
        plan(profile, **fields)
    words = str(caught.value)
    assert words.startswith(
        start + "of this model's 18 layers these have full attention: 2, 5, 8, 11, "
        "14, 17; must be among them, ["
    )
    assert words.endswith("] not")


def test_an_other_layer_needs_no_selection():
    check_pipeline_stage(plan(), 6, 18)  # layers 6 and 7 slide, 8 selects
    with pytest.raises(TidalConfigError, match="starts with SPARSE layer 11"):
        check_pipeline_stage(plan(), 9, 18)


def test_what_vllm_built_has_to_be_what_the_config_says():
    made = plan()
    check_full_layers(made, range(18), FULL)
    check_full_layers(made, range(6, 12), [11, 8])
    for built in (FULL[:-1], (*FULL, 16), ()):
        with pytest.raises(ValueError) as caught:
            check_full_layers(made, range(18), built)
        words = str(caught.value)
        assert f"full attention in layers {format_layers(sorted(built))}, but" in words
        assert "layers are 2, 5, 8, 11, 14, 17: allowed are" in words
    check_full_layers(plan(select_layers=[]), range(18), ())


def test_choices_go_to_full_layers():
    made = plan(select_layers=[5, 14])
    assert selection_indices(made, range(18), 1) == dict.fromkeys((5, 8, 11, 14, 17), 0)
    kept = {5: 0, 8: 0, 11: 0, 14: 1, 17: 1}
    assert selection_indices(made, range(18), 2) == kept


def test_the_share_is_that_of_the_full_layers():
    among = plan_layers(TidalConfig(), 6, None)
    for length in (4096, 32768, 131072):
        share = kv_read_share(plan(), TidalConfig(), length)
        assert share == kv_read_share(among, TidalConfig(), length)
