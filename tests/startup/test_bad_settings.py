"""Settings that must be refused where vLLM completes its config: nothing was started.

Each case: the settings, and what the message must say: key and value as they were
given, then what is allowed.
"""

import json

import pytest

pytestmark = pytest.mark.compat

PIPELINE = {"pipeline_parallel_size": 2}
KV_BLOCK_16 = {"block_size": 16}
LOSSLESS = {"mode": "lossless"}

SETTINGS = {
    "unknown_key": (
        {"token_bugdet": 512},
        "tidal.token_bugdet = 512: unknown key; did you mean 'token_budget'?",
        "the keys are preset, method, token_budget, select_block_size",
    ),
    "settings_no_object": (
        [512],
        "tidal = [512]: must be a JSON object",
        "keys among preset, method, token_budget",
    ),
    "budget_a_string": (
        {"token_budget": "512"},
        "tidal.token_budget = '512': must be a positive multiple of",
        "select_block_size (4), not a str",
    ),
    "budget_a_float": ({"token_budget": 512.0}, "tidal.token_budget = 512.0", "float"),
    "budget_a_bool": (
        {"token_budget": True},
        "tidal.token_budget = True",
        "not a bool",
    ),
    "budget_zero": ({"token_budget": 0}, "tidal.token_budget = 0", "positive multiple"),
    "budget_negative": (
        {"token_budget": -512},
        "tidal.token_budget = -512",
        "positive multiple",
    ),
    "budget_no_multiple": (
        {"token_budget": 502},
        "tidal.token_budget = 502",
        "multiple of select_block_size (4)",
    ),
    "budget_below_forced": (
        {"token_budget": 64, "sink_tokens": 64},
        "tidal.token_budget = 64: must have room for its forced tokens",
        "raise it (e.g. to",
    ),
    "block_size_zero": (
        {"select_block_size": 0},
        "tidal.select_block_size = 0",
        "must be an integer >= 1",
    ),
    "block_size_negative": (
        {"select_block_size": -16},
        "tidal.select_block_size = -16",
        "must be an integer >= 1",
    ),
    "sinks_negative": (
        {"sink_tokens": -1},
        "tidal.sink_tokens = -1",
        "must be an integer >= 0",
    ),
    "recent_share_of_one": (
        {"recent_fraction": 1},
        "tidal.recent_fraction = 1",
        "in [0, 1)",
    ),
    "threshold_negative": (
        {"min_sparse_len": -1},
        "tidal.min_sparse_len = -1",
        "must be an integer >= 0",
    ),
    "unknown_preset": (
        {"preset": "tidal-decode"},
        "tidal.preset = 'tidal-decode': must be one of",
        "did you mean 'tidaldecode'?",
    ),
    "unknown_scope": (
        {"scope": "head"},
        "tidal.scope = 'head': must be one of",
        "'sequence', 'kv_head', 'query_head'",
    ),
    "unknown_profile": (
        {"profile": "llama-3.1-8"},
        "tidal.profile = 'llama-3.1-8': unknown profile; did you mean",
        "or one of llama-2-7b",
    ),
    "profile_for_other_layer_count": (
        {"profile": "llama-3.1-8b"},
        "tidal.profile = 'llama-3.1-8b': is for 32 layers",
        "num_hidden_layers = 6",
    ),
    "layers_no_list": (
        {"select_layers": 2},
        "tidal.select_layers = 2: must be a list",
        "not a int",
    ),
    "layers_negative": (
        {"select_layers": [-1]},
        "tidal.select_layers = [-1]",
        "different layers >= 0",
    ),
    "layers_twice": (
        {"select_layers": [2, 2]},
        "tidal.select_layers = [2, 2]",
        "[2] appears twice",
    ),
    "layers_overlap": (
        {"dense_layers": [0, 1, 2], "select_layers": [2]},
        "tidal.select_layers = [2]: overlaps dense_layers = [0, 1, 2] in [2]",
        "a layer has one role",
    ),
    "select_layer_out_of_range": (
        {"select_layers": [2, 6]},
        "tidal.select_layers = [2, 6]: this model has 6 layers",
        "must be in 0..5",
    ),
    "dense_layer_out_of_range": (
        {"dense_layers": [0, 7], "select_layers": [1]},
        "tidal.dense_layers = [0, 7]: this model has 6 layers",
        "must be in 0..5",
    ),
    "sparse_before_select": (
        {"dense_layers": [0], "select_layers": [3]},
        "tidal.dense_layers = [0]: layers 1-2 would be SPARSE before the first SELECT",
        "must contain them",
    ),
    "mode_unknown": (
        {"mode": "lossles"},
        "tidal.mode = 'lossles': must be one of",
        "did you mean 'lossless'?",
    ),
    "drafts_in_sparse_mode": (
        {"draft_tokens": 4},
        "tidal.draft_tokens = 4: drafts come with tidal.mode = 'lossless'",
        "must be null",
    ),
    "no_drafts": (
        LOSSLESS | {"draft_tokens": 0},
        "tidal.draft_tokens = 0",
        "an integer in [1, 128]",
    ),
    "drafts_negative": (
        LOSSLESS | {"draft_tokens": -1},
        "tidal.draft_tokens = -1",
        "an integer in [1, 128]",
    ),
    "drafts_a_float": (
        LOSSLESS | {"draft_tokens": 4.0},
        "tidal.draft_tokens = 4.0",
        "an integer in [1, 128], or null, not a float",
    ),
    "drafts_longer_than_vllm_verifies": (
        LOSSLESS | {"draft_tokens": 129},
        "tidal.draft_tokens = 129",
        "an integer in [1, 128]",
    ),
    "lossless_corrected": (
        LOSSLESS | {"correction_interval": 32},
        "tidal.correction_interval = 32",
        "must be null with tidal.mode = 'lossless'",
    ),
    "lossless_published": (
        LOSSLESS | {"publish_polluted": True},
        "tidal.publish_polluted = True",
        "must be False with tidal.mode = 'lossless'",
    ),
    "lossless_by_another_method": (
        LOSSLESS | {"preset": "quest"},
        "tidal.method = 'quest'",
        "must be 'tidaldecode' with tidal.mode = 'lossless'",
    ),
    "lossless_without_sparse_layers": (
        LOSSLESS | {"select_layers": []},
        "tidal.mode = 'lossless': no layer could draft sparsely",
        "must be 'sparse'",
    ),
}

SETTINGS_WITH_ARGUMENTS = {
    "lossless_beside_other_drafts": (
        LOSSLESS,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative_config = {'method': 'ngram', 'num_speculative_tokens': 2}",
        "allowed None, or tidal.mode = sparse",
    ),
    "lossless_with_adapters": (
        LOSSLESS,
        {"enable_lora": True},
        "tidal.mode = 'lossless': does not know enable_lora",
        "must be 'sparse'",
    ),
    "lossless_with_prompt_embeddings": (
        LOSSLESS,
        {"enable_prompt_embeds": True},
        "tidal.mode = 'lossless': does not know enable_prompt_embeds",
        "must be 'sparse'",
    ),
    "lossless_in_stages": (
        LOSSLESS | {"select_layers": [2, 3]},
        PIPELINE,
        "pipeline_parallel_size = 2: drafts are made on the last stage",
        "allowed 1, or tidal.mode = sparse",
    ),
    "block_size_divides_not_the_default": (
        {"select_block_size": 24, "token_budget": 2400},
        {},
        "tidal.select_block_size = 24: must divide the KV cache block size (128",
        "one of 1, 2, 4, 8, 16, 32, 64, 128",
    ),
    "block_size_divides_not_the_given": (
        {"select_block_size": 32},
        KV_BLOCK_16,
        "tidal.select_block_size = 32: must divide the KV cache block size (16",
        "one of 1, 2, 4, 8, 16",
    ),
    "pipeline_stage_without_select": (
        {"select_layers": [2]},
        PIPELINE,
        "tidal.select_layers = [2]: the pipeline stage with layers 3-5",
        "must contain 3, e.g. [2, 3]",
    ),
    "settings_one_level_up": (
        None,
        {"additional_config": {"token_budget": 512}},
        "additional_config.token_budget = 512: would be ignored",
        'inside {"tidal": {"token_budget": ...}}',
    ),
    "settings_misspelt": (
        None,
        {"additional_config": {"Tidal": {}}},
        "additional_config.Tidal = {}: would be ignored",
        'inside {"tidal": {...}}',
    ),
}

PROFILE = {
    "name": "mine",
    "models": [],
    "num_hidden_layers": 6,
    "dense_layers": [0, 1],
    "select_layers": [2],
    "source": "this test",
}
PROFILE_FILES = {
    "no_such_file": (None, "no such file", "existing .json file"),
    "no_json": ("{", "is not valid JSON", "line 1, column 2"),
    "no_object": ("[]", "must be a JSON object with keys name, models", "not list"),
    "unknown_key": (
        json.dumps(PROFILE | {"layers": 6}),
        "unknown key 'layers'",
        "the keys are name",
    ),
    "missing_key": (json.dumps({"name": "x"}), "lacks models", "must have name"),
    "mistyped": (
        json.dumps(PROFILE | {"select_layers": "2"}),
        "in this file select_layers = '2'",
        "must be a list",
    ),
    "other_layer_count": (
        json.dumps(PROFILE | {"num_hidden_layers": 5}),
        "is for 5 layers",
        "num_hidden_layers = 6",
    ),
    "sparse_before_select": (
        json.dumps(PROFILE | {"dense_layers": [0]}),
        "layers 1 would be SPARSE",
        "must contain them",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_refuses_setting(refusal, case):
    settings, given, allowed = SETTINGS[case]
    message = refusal(settings)
    assert given in message
    assert allowed in message


@pytest.mark.parametrize("case", SETTINGS_WITH_ARGUMENTS)
def test_refuses_setting_for_these_engine_arguments(refusal, case):
    settings, arguments, given, allowed = SETTINGS_WITH_ARGUMENTS[case]
    message = refusal(settings, **arguments)
    assert given in message
    assert allowed in message


@pytest.mark.parametrize("case", PROFILE_FILES)
def test_refuses_profile_file(refusal, tmp_path, case):
    text, problem, allowed = PROFILE_FILES[case]
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    message = refusal({"profile": str(path)})
    assert f"tidal.profile = {str(path)!r}" in message or f"({path})" in message
    assert problem in message
    assert allowed in message


def test_refuses_a_broken_profile_among_the_projects(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tidal_profiles").mkdir()
    (tmp_path / "tidal_profiles" / "broken.json").write_text("{")
    assert "tidal.profile = 'tidal_profiles/broken.json'" in refusal({})


@pytest.mark.parametrize(
    "settings, arguments",
    [
        ({}, {}),
        ({"token_budget": 512, "select_layers": [2]}, {}),
        ({"select_block_size": 16}, KV_BLOCK_16),
        ({"select_block_size": 64}, {}),
        ({"select_layers": [2, 3]}, PIPELINE),
        ({"preset": "tidaldecode"}, {}),
    ],
    ids=["defaults", "explicit", "kv_block_16", "kv_block_128", "pipeline", "preset"],
)
def test_accepts_the_same_without_the_mistake(configure, settings, arguments):
    config = configure(settings, **arguments)
    assert config.attention_config.backend.name == "TIDAL"
    assert config.additional_config == {"tidal": settings}


def test_accepts_a_profile_file(configure, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PROFILE))
    configure({"profile": str(path)})
