"""What the longest sequence makes of a plan, and of what is shown of it."""

import pytest

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.lengths import limit_plan
from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.table import format_plan

NEVER = (
    "tidal.{} = 256, and no longer sequence is decoded: must be below max_model_len - "
    "1 = 256, the longest decode"
)


def limited(max_model_len, full_layers=None, **settings):
    config = TidalConfig(**{"token_budget": 256, "select_layers": [2]} | settings)
    plan = plan_layers(config, 6, None, full_layers)
    return plan, limit_plan(plan, config, max_model_len)


def test_a_plan_for_sequences_longer_than_the_budget_stays():
    plan, same = limited(258)
    assert plan.sparse
    assert same is plan


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "token_budget"),
        ({"token_budget": 64, "min_sparse_len": 256}, "min_sparse_len"),
    ],
)
def test_off_where_no_sequence_is_long_enough(settings, key):
    _, off = limited(257, **settings)
    reason = NEVER.format(key)
    assert off.off_reason == reason
    assert off.warning == (
        f"sparse decoding is off: {reason} (or raise --max-model-len)"
    )
    assert off.roles == (Role.DENSE,) * 6


def test_off_keeps_layers_without_full_attention():
    _, off = limited(257, full_layers=[0, 2, 3, 5])
    assert off.layers(Role.OTHER) == (1, 4)
    assert off.count(Role.DENSE) == 4


def test_warns_where_every_sequence_keeps_all_its_blocks():
    plan, same = limited(257, min_sparse_len=0)
    assert same.roles == plan.roles
    assert same.warning.startswith("tidal.token_budget = 256 holds all of every sequen")
    assert "must be below max_model_len - 1 = 256, the longest decode" in same.warning
    assert limited(258, min_sparse_len=0)[1].warning is None


def test_a_reason_to_be_off_that_was_there_before_stays():
    plan, same = limited(256, select_layers=[])
    assert same is plan
    assert same.warning is None


@pytest.mark.parametrize(
    ("max_model_len", "shown"),
    [
        (5000, "96.3% of dense at 5000 tokens"),
        (8192, "75.0% of dense at 8K"),
        (32768, "50.0% of dense at 32K"),
        (40960, "50.0% of dense at 32K, 48.3% at 40K"),
        (131072, "50.0% of dense at 32K, 43.8% at 128K"),
        (1 << 20, "50.0% of dense at 32K, 43.8% at 128K, 41.9% at 1024K"),
    ],
)
def test_shows_what_is_read_at_lengths_that_can_occur(max_model_len, shown):
    config = TidalConfig(select_layers=[2])
    table = format_plan(plan_layers(config, 6, None), config, max_model_len)
    assert f"  KV read      {shown}\n" in table
