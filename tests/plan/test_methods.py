"""What a method means for the plan, before there is a tensor; no torch needed."""

import pytest

from tidal_vllm.config import PRESETS, TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.steps import kv_read_share
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import TidalConfigError

D, S, X = Role.DENSE, Role.SELECT, Role.OTHER
EVERY_LAYER = ["quest", "sliding_window", "oracle"]


def plan(method, num_layers=6, full_layers=None, **settings):
    config = TidalConfig(method=method, **settings)
    return plan_layers(config, num_layers, None, full_layers)


def test_the_methods_by_which_every_layer_chooses():
    assert [name for name, entry in METHODS.items() if entry.every_layer] == EVERY_LAYER


@pytest.mark.parametrize(
    ("method", "settings", "roles"),
    [
        ("quest", {}, (D, D, S, S, S, S)),
        ("oracle", {}, (S,) * 6),
        ("sliding_window", {"dense_layers": [5]}, (S, S, S, S, S, D)),
        ("quest", {"dense_layers": []}, (S,) * 6),
        ("quest", {"full_layers": (1, 3, 4, 5)}, (X, D, X, D, S, S)),
    ],
)
def test_roles(method, settings, roles):
    found = plan(method, **settings)
    assert found.roles == roles
    assert found.sparse
    assert found.warning is None


def test_off_where_no_layer_is_left_to_choose():
    found = plan("quest", num_layers=2)
    assert found.off_reason == "every layer is DENSE (method 'quest')"


@pytest.mark.parametrize("method", EVERY_LAYER)
def test_off_on_demand(method):
    """As every refusal advises it."""
    found = plan(method, select_layers=[])
    assert found.roles == (D,) * 6
    assert "tidal.select_layers" in found.off_reason


@pytest.mark.parametrize("method", EVERY_LAYER)
@pytest.mark.parametrize(
    ("key", "value"), [("select_layers", [2]), ("profile", "qwen3-8b")]
)
def test_refuses_what_names_select_layers(method, key, value):
    with pytest.raises(TidalConfigError) as caught:
        plan(method, **{key: value})
    assert caught.value.key == f"tidal.{key}"
    assert caught.value.value == value
    assert "must be null" in caught.value.allowed


def test_refuses_layers_that_the_model_lacks():
    with pytest.raises(TidalConfigError, match=r"tidal.dense_layers = \[6\]"):
        plan("oracle", dense_layers=[6])


@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("quest", 1024 / 8192 + 1 / 16),  # the kept tokens, and two vectors per block
        ("oracle", 1024 / 8192 + 1 / 2),  # and all keys
        ("sliding_window", 1024 / 8192),
    ],
)
def test_what_a_step_reads(method, share):
    config = TidalConfig(
        method=method, token_budget=1024, select_block_size=16, dense_layers=[]
    )
    found = kv_read_share(plan_layers(config, 6, None), config, 8192)
    assert found == pytest.approx(share)


@pytest.mark.parametrize("method", EVERY_LAYER)
def test_what_select_layers_attend_to(method):
    for preset in PRESETS:
        config = TidalConfig(preset=preset, method=method)
        assert config.select_attends == "chosen"
    with pytest.raises(TidalConfigError, match="tidal.select_attends = 'everything'"):
        TidalConfig(method=method, select_attends="everything")


def test_a_preset_names_a_method():
    assert {preset: TidalConfig(preset=preset).method for preset in PRESETS} == {
        "default": "tidaldecode"
    } | {method: method for method in METHODS}
    assert TidalConfig(preset="quest", method="oracle").method == "oracle"
