"""What the user is told at start-up: the plan, or why there is none."""

import pytest

TITLE = "TIDAL sparse decoding of"
TABLE = [
    "DENSE 2      0-1",
    "SELECT 1     2",
    "SPARSE 3     3-5",
    "roles from   tidal.select_layers",
    "budget       64 tokens per set: 16 blocks of 4, scope sequence",
    "forced       first 4 tokens, newest 16 tokens, within the budget",
    "sparse above 64 tokens of context",
    "kernels: PyTorch reference ops (CPU)",
    "selection 0.0 MiB\n",
    "dense attention: PyTorch reference ops\n",
]


def test_prints_the_plan_once(started):
    log = started["sparse"]["log"]
    assert log.count(TITLE) == 1
    for line in TABLE:
        assert log.count(line) == 1, line
    assert started["sparse"]["counters"]["sparse_steps"] == 7


def test_speculative_decoding_keeps_the_plan_and_the_tokens(started):
    speculative, plain = started["speculative"], started["sparse"]
    assert speculative["log"].count(TITLE) == 1
    for line in TABLE[:-2]:
        assert speculative["log"].count(line) == 1, line
    assert speculative["tokens"] == plain["tokens"]
    assert speculative["counters"]["sparse_steps"] > 0
    assert speculative["counters"]["decode_tokens"] > 7, "no draft was verified"


def test_says_that_the_unselected_backend_decodes_densely(started):
    log = started["unselected"]["log"]
    assert "OFF          every step is dense: the attention backend TIDAL is not" in log
    assert started["unselected"]["counters"]["sparse_steps"] == 0


def test_warns_of_settings_without_the_backend(configure, tidal_log):
    configure({"token_budget": 512}, attention_backend=None)
    (warning,) = [line for line in tidal_log if "additional_config" in line]
    assert warning == (
        "WARNING additional_config['tidal'] has no effect: the attention backend "
        "TIDAL is not selected (--attention-backend tidal)"
    )


def test_does_not_warn_of_the_settings_of_others(configure, tidal_log):
    configure(attention_backend=None, additional_config={"other": {}})
    assert not [line for line in tidal_log if "additional_config" in line]


@pytest.mark.parametrize("given", [{}, {"dense_layers": [0, 1]}], ids=["none", "dense"])
def test_warns_that_no_profile_knows_the_model(configure, tidal_log, given):
    configure(given)
    warnings = [line for line in tidal_log if "no profile knows this model" in line]
    assert len(warnings) == 1
    assert "tidal.select_layers" in warnings[0]


def test_does_not_warn_where_the_roles_are_given(configure, tidal_log):
    configure({"select_layers": [2]})
    assert not [line for line in tidal_log if "no profile" in line]


def test_warns_that_no_sequence_is_longer_than_the_budget(configure, tidal_log):
    config = configure({"token_budget": 4096, "select_layers": [2]}, max_model_len=4097)
    (warning,) = [line for line in tidal_log if "sparse decoding is off" in line]
    assert warning.startswith("WARNING sparse decoding is off: tidal.token_budget = 40")
    assert "must be below max_model_len - 1 = 4096" in warning
    assert config.scheduler_config.scheduler_cls is None, "there is nothing to correct"
