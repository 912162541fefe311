"""TidalConfig: defaults, presets, derived values, and every refusal by name."""

import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidal_vllm.config import (
    KERNELS,
    KEYS,
    PRESETS,
    RANK_CHOICES,
    SCOPES,
    SELECT_ATTENDS,
    TidalConfig,
)
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import MAX_TOKENS, TidalConfigError


def read(settings):
    return TidalConfig.from_additional_config({"tidal": settings})


def bad(name, key, value, *allowed, **others):
    """One refused setting: its key, its value and words of what is allowed."""
    return pytest.param({**others, key: value}, key, value, allowed, id=name)


BUDGET = "must be a positive multiple of select_block_size (4)"
SINK = "must be an integer >= 0 (tokens)"
SIZE = "must be an integer >= 1 (tokens)"
FRACTION = "must be a number in [0, 1)"
STEPS = "must be an integer >= 1 (decode steps)"
LAYERS = "must be a list of different layers >= 0"
ROOM = "must have room for its forced tokens"

BAD_SETTINGS = [
    bad("budget-negative", "token_budget", -16, BUDGET),
    bad("budget-zero", "token_budget", 0, BUDGET),
    bad("budget-string", "token_budget", "4096", BUDGET, "not a str"),
    bad("budget-float", "token_budget", 4096.0, BUDGET, "not a float"),
    bad("budget-bool", "token_budget", True, BUDGET, "not a bool"),
    bad("budget-null", "token_budget", None, BUDGET, "not a NoneType"),
    bad("budget-list", "token_budget", [4096], BUDGET, "not a list"),
    bad("budget-beyond-int32", "token_budget", 2**31, BUDGET, str(MAX_TOKENS)),
    bad("budget-no-whole-blocks", "token_budget", 1002, BUDGET),
    bad(
        "budget-below-own-block-size",
        "token_budget",
        64,
        "multiple of select_block_size (128)",
        select_block_size=128,
    ),
    bad("budget-below-forced", "token_budget", 8, ROOM, "touch 3 blocks", "to 16"),
    bad("budget-below-sinks", "token_budget", 512, ROOM, "e.g. to", sink_tokens=500),
    bad("budget-all-recent", "token_budget", 4096, ROOM, recent_fraction=0.999),
    bad("block-size-zero", "select_block_size", 0, SIZE),
    bad("block-size-negative", "select_block_size", -1, SIZE),
    bad("block-size-string", "select_block_size", "16", SIZE, "not a str"),
    bad("block-size-float", "select_block_size", 16.0, SIZE, "not a float"),
    bad("block-size-bool", "select_block_size", True, SIZE, "not a bool"),
    bad("scope-unknown", "scope", "head", "one of", *SCOPES, "mean 'kv_head'"),
    bad("scope-upper-case", "scope", "Sequence", "one of", "mean 'sequence'"),
    bad("scope-wrong-type", "scope", 1, "one of", *SCOPES),
    bad("scope-list", "scope", ["sequence"], "one of", *SCOPES),
    bad("preset-unknown", "preset", "tidal", "one of", "mean 'tidaldecode'"),
    bad("preset-wrong-type", "preset", None, "one of", *PRESETS),
    bad("preset-unhashable", "preset", {}, "one of", *PRESETS),
    bad("kernels-unknown", "kernels", "cud", "one of", *KERNELS, "mean 'cuda'"),
    bad("kernels-upper-case", "kernels", "CUDA", "one of", "mean 'cuda'"),
    bad("kernels-null", "kernels", None, "one of", *KERNELS),
    bad("kernels-bool", "kernels", True, "one of", *KERNELS),
    bad("sinks-negative", "sink_tokens", -4, SINK),
    bad("sinks-float", "sink_tokens", 4.0, SINK, "not a float"),
    bad("sinks-bool", "sink_tokens", False, SINK, "not a bool"),
    bad("sinks-beyond-int32", "sink_tokens", 10**400, SINK, str(MAX_TOKENS)),
    bad("recent-negative", "recent_fraction", -0.1, FRACTION),
    bad("recent-one", "recent_fraction", 1.0, FRACTION),
    bad("recent-nan", "recent_fraction", float("nan"), FRACTION),
    bad("recent-string", "recent_fraction", "0.25", FRACTION, "not a str"),
    bad("recent-bool", "recent_fraction", False, FRACTION, "not a bool"),
    bad("min-len-negative", "min_sparse_len", -1, SINK, "null", "(4096)"),
    bad("min-len-float", "min_sparse_len", 1e3, SINK, "not a float"),
    bad("min-len-bool", "min_sparse_len", True, SINK, "not a bool"),
    bad("reselect-zero", "reselect_interval", 0, STEPS),
    bad("reselect-null", "reselect_interval", None, STEPS, "not a NoneType"),
    bad("reselect-float", "reselect_interval", 4.0, STEPS, "not a float"),
    bad("reselect-bool", "reselect_interval", True, STEPS, "not a bool"),
    bad("attends-unknown", "select_attends", "all", "one of", *SELECT_ATTENDS),
    bad("attends-null", "select_attends", None, "one of", *SELECT_ATTENDS),
    bad("attends-number", "select_attends", 1, "one of", *SELECT_ATTENDS),
    bad(
        "attends-everything-where-all-choose",
        "select_attends",
        "everything",
        "with method 'quest' every layer chooses",
        "must be 'chosen'",
        method="quest",
    ),
    bad("rank-choice-unknown", "rank_choice", "all", "one of", *RANK_CHOICES),
    bad("rank-choice-number", "rank_choice", 1, "one of", *RANK_CHOICES),
    bad(
        "ranks-that-cannot-agree",
        "rank_choice",
        "agreed",
        "with method 'lessismore' ranks cannot agree: must be 'own', or null",
        method="lessismore",
    ),
    bad("method-unknown", "method", "quests", "one of", *METHODS, "mean 'quest'?"),
    bad("method-null", "method", None, "one of", *METHODS),
    bad("select-negative", "select_layers", [2, -1], LAYERS, "-1 is not one"),
    bad("select-string", "select_layers", "2,13", LAYERS, "not a str"),
    bad("select-int", "select_layers", 2, LAYERS, "not a int"),
    bad("select-of-strings", "select_layers", ["2"], LAYERS, "'2' is not one"),
    bad("select-of-floats", "select_layers", [2.0], LAYERS, "2.0 is not one"),
    bad("select-of-bools", "select_layers", [True], LAYERS, "True is not one"),
    bad("select-twice", "select_layers", [2, 13, 2], LAYERS, "[2] appears twice"),
    bad("dense-negative", "dense_layers", [-2], LAYERS, "-2 is not one"),
    bad("dense-twice", "dense_layers", [1, 1], LAYERS, "[1] appears twice"),
    bad("dense-object", "dense_layers", {"0": 1}, LAYERS, "not a dict"),
    bad(
        "layers-overlap",
        "select_layers",
        [2, 13],
        "overlaps dense_layers = [0, 1, 2] in [2]",
        "must name other layers",
        dense_layers=[0, 1, 2],
    ),
    bad("profile-number", "profile", 3, "name of a profile", ".json", "null"),
    bad("profile-empty", "profile", " ", "name of a profile", ".json", "null"),
    bad("key-unknown", "window", 64, "unknown key", *KEYS),
    bad("key-misspelt", "sink_token", 4, "unknown key", "mean 'sink_tokens'"),
    bad("key-of-later", "log_attention", 32, "unknown key", *KEYS),
]


@pytest.mark.parametrize(("settings", "key", "value", "allowed"), BAD_SETTINGS)
def test_refuses(settings, key, value, allowed):
    with pytest.raises(TidalConfigError) as caught:
        read(settings)
    message = str(caught.value)
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:197] + "..."
    assert message.startswith(f"tidal.{key} = {shown}: ")
    for words in allowed:
        assert words in message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("additional_config", "start", "allowed"),
    [
        pytest.param([], "additional_config = []", '{"tidal": {', id="not-an-object"),
        pytest.param({"tidal": None}, "tidal = None", "token_budget", id="null"),
        pytest.param({"tidal": 4096}, "tidal = 4096", "token_budget", id="number"),
        pytest.param({"tidal": [1]}, "tidal = [1]", "token_budget", id="list"),
        pytest.param(
            {"tidal": {1: 2}}, "tidal.1 = 2", "unknown key; the keys are", id="int-key"
        ),
        pytest.param(
            {"token_budget": 512},
            "additional_config.token_budget = 512",
            '{"tidal": {"token_budget": ...}}',
            id="outside-tidal",
        ),
        pytest.param(
            {"TIDAL": {}}, "additional_config.TIDAL = {}", '{"tidal": {', id="case"
        ),
    ],
)
def test_refuses_the_wrong_place(additional_config, start, allowed):
    with pytest.raises(TidalConfigError) as caught:
        TidalConfig.from_additional_config(additional_config)
    assert str(caught.value).startswith(start)
    assert allowed in str(caught.value)


def test_error_survives_pickling():
    error = TidalConfigError("tidal.scope", "head", "must be one of ...")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.key, copy.value, copy.allowed) == (
        error.key,
        error.value,
        error.allowed,
    )


@pytest.mark.parametrize(
    "additional_config",
    [None, {}, {"tidal": {}}, {"of_another_plugin": 1, "profile": 3}],
    ids=["none", "empty", "no-keys", "others-keys"],
)
def test_defaults(additional_config):
    config = TidalConfig.from_additional_config(additional_config)
    assert dataclasses.asdict(config) == {
        "preset": "default",
        "method": "tidaldecode",
        "token_budget": 4096,
        "select_block_size": 4,
        "scope": "sequence",
        "sink_tokens": 4,
        "recent_fraction": 0.25,
        "dense_layers": None,
        "select_layers": None,
        "profile": None,
        "min_sparse_len": None,
        "reselect_interval": 1,
        "select_attends": "chosen",
        "rank_choice": "agreed",
        "correction_interval": None,
        "publish_polluted": False,
        "kernels": "auto",
        "mode": "sparse",
        "draft_tokens": None,
    }
    assert config == TidalConfig()
    hash(config)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_where_the_method_lets_them(method):
    choice = "own" if method in ("lessismore", "quest") else "agreed"
    assert read({"method": method}).rank_choice == choice
    assert read({"method": method, "rank_choice": "own"}).rank_choice == "own"


def test_a_preset_names_its_method():
    for name, fields in PRESETS.items():
        assert read({"preset": name}).method == fields["method"]
        assert fields["method"] == (name if name != "default" else "tidaldecode")
    assert read({"preset": "quest", "method": "oracle"}).method == "oracle"


def test_tidaldecode_forces_only_the_current_token():
    config = read({"preset": "tidaldecode"})
    assert (config.scope, config.select_block_size) == ("query_head", 1)
    assert (config.sink_tokens, config.recent_tokens) == (0, 1)
    assert config.select_attends == "everything"


def test_lessismore_has_one_set_of_tokens_four_sinks_and_a_quarter_recent():
    config = read({"preset": "lessismore"})
    assert (config.scope, config.select_block_size) == ("sequence", 1)
    assert (config.sink_tokens, config.recent_tokens) == (4, 1024)
    assert config.select_attends == "everything"


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_keys_win_over_the_preset(preset):
    settings = {
        "preset": preset,
        "token_budget": 320,
        "select_block_size": 32,
        "scope": "kv_head",
        "sink_tokens": 7,
        "recent_fraction": 0.5,
    }
    config = read(settings)
    assert {key: getattr(config, key) for key in settings} == settings
    assert TidalConfig(**settings) == config


def test_a_preset_also_fills_a_config_built_directly():
    assert TidalConfig(preset="tidaldecode") == read({"preset": "tidaldecode"})


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_can_be_named(kernels):
    assert read({"kernels": kernels}).kernels == kernels


def test_layers_are_sorted_and_may_be_empty():
    config = read({"select_layers": [13, 2], "dense_layers": []})
    assert (config.dense_layers, config.select_layers) == ((), (2, 13))


def test_whole_number_recent_fraction_is_a_number():
    assert read({"recent_fraction": 0}).recent_tokens == 1


@pytest.mark.parametrize(
    ("min_sparse_len", "threshold", "max_blocks"),
    [(None, 512, 128), (0, 0, 128), (100, 100, 128), (512, 512, 128), (998, 998, 250)],
)
def test_threshold_and_capacity(min_sparse_len, threshold, max_blocks):
    config = TidalConfig(token_budget=512, min_sparse_len=min_sparse_len)
    assert config.sparse_threshold == threshold
    assert config.max_blocks == max_blocks


@pytest.mark.parametrize(
    ("interval", "size", "more"),
    [(1, 1, 0), (2, 1, 1), (9, 1, 8), (2, 16, 1), (17, 16, 1), (18, 16, 2)],
)
def test_capacity_for_blocks_that_begin_while_a_choice_holds(interval, size, more):
    config = TidalConfig(
        token_budget=512, select_block_size=size, reselect_interval=interval
    )
    assert config.max_blocks == 512 // size + more


def test_forced_tokens_may_fill_the_budget():
    config = TidalConfig(token_budget=12)  # 1 sink block, 3 recent tokens in 2
    assert (config.recent_tokens, config.max_blocks) == (3, 3)


@pytest.mark.parametrize("kv_block_size", [16, 32, 784])
def test_block_size_that_divides_is_accepted(kv_block_size):
    TidalConfig().check_kv_block_size(kv_block_size)


def test_block_size_must_divide_the_kv_block_size():
    with pytest.raises(TidalConfigError) as caught:
        TidalConfig().check_kv_block_size(18)
    assert str(caught.value) == (
        "tidal.select_block_size = 4: must divide the KV cache block size "
        "(18 tokens): one of 1, 2, 3, 6, 9, 18"
    )


SIZES = st.sampled_from([1, 2, 3, 8, 16, 32])


@settings(deadline=None)
@given(
    size=SIZES,
    blocks=st.integers(1, 40),
    sinks=st.integers(0, 100),
    fraction=st.floats(0, 1, exclude_max=True),
)
def test_a_too_small_budget_is_told_one_that_works(size, blocks, sinks, fraction):
    settings = {
        "select_block_size": size,
        "token_budget": blocks * size,
        "sink_tokens": sinks,
        "recent_fraction": fraction,
    }
    try:
        TidalConfig(**settings)
    except TidalConfigError as error:
        assert error.key == "tidal.token_budget"
        told = int(error.allowed.split("(e.g. to ")[1].split(")")[0])
        assert told > settings["token_budget"]
        if told <= MAX_TOKENS:
            TidalConfig(**{**settings, "token_budget": told})
