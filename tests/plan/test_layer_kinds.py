"""Kinds of layers, as transformers' own config classes state them."""

from types import SimpleNamespace

import pytest
import transformers

from tidal_vllm.plan.layer_kinds import LayerKind, correction_obstacle, layer_kinds
from tidal_vllm.profiles.fingerprint import config_sha256
from tidal_vllm.validators import TidalConfigError

F, W, S, N = LayerKind.FULL, LayerKind.WINDOW, LayerKind.STATE, LayerKind.NONE

# transformers' class, its fields, whether vLLM keeps a state, and the kinds.
FAMILIES = {
    "Llama": ("LlamaConfig", {}, False, [F] * 4),
    "Qwen3": ("Qwen3Config", {}, False, [F] * 4),
    "Qwen3, half sliding": (
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        False,
        [F, F, W, W],
    ),
    "Mistral": ("MistralConfig", {"sliding_window": 64}, False, [W] * 4),
    "Gemma 2": ("Gemma2Config", {}, False, [W, F] * 2),
    "Gemma 3": ("Gemma3TextConfig", {}, False, ([W] * 5 + [F]) * 2),
    "Olmo 3": ("Olmo3Config", {}, False, ([W] * 3 + [F]) * 2),
    "Exaone 4": ("Exaone4Config", {"sliding_window_pattern": 4}, False, [W] * 3 + [F]),
    "Cohere 2": ("Cohere2Config", {}, False, [W] * 3 + [F]),
    "Qwen3-Next": ("Qwen3NextConfig", {}, True, ([S] * 3 + [F]) * 2),
    "Qwen3.5": ("Qwen3_5TextConfig", {}, True, [S] * 3 + [F]),
    "Granite 4": (
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
        True,
        [S, S, F, S],
    ),
    "LFM2": ("Lfm2Config", {"full_attn_idxs": [2, 5]}, True, [S, S, F, S, S, F]),
    "Jamba": (
        "JambaConfig",
        {"attn_layer_period": 4, "attn_layer_offset": 2},
        True,
        [S, S, F, S],
    ),
    "Bamba": ("BambaConfig", {"attn_layer_indices": [1]}, True, [S, F, S, S]),
    "Falcon-H1": ("FalconH1Config", {}, True, [F] * 4),
    "Nemotron-H": (
        "NemotronHConfig",
        {"hybrid_override_pattern": "M-M*-E"},
        True,
        [S, N, S, F, N, N],
    ),
    "MiniMax": ("MiniMaxConfig", {}, True, [F, S, F, S]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds(family):
    name, fields, has_state, kinds = FAMILIES[family]
    shape = {} if "hybrid_override_pattern" in fields else {"num_hidden_layers": None}
    shape = dict.fromkeys(shape, len(kinds))
    config = getattr(transformers, name)(**shape | fields)
    window = getattr(config, "sliding_window", None)
    assert layer_kinds(config, len(kinds), window, has_state) == tuple(kinds)


@pytest.mark.parametrize("family", ["Jamba", "Bamba", "Nemotron-H", "LFM2"])
def test_a_profile_is_for_one_pattern(family):
    """Two models that differ in their kinds of layers alone have other hashes."""
    name, fields, *_ = FAMILIES[family]
    other = {
        "Jamba": {"attn_layer_offset": 1},
        "Bamba": {"attn_layer_indices": [2]},
        "Nemotron-H": {"hybrid_override_pattern": "M-*M-E"},
        "LFM2": {"full_attn_idxs": [1, 4]},
    }[family]
    config = getattr(transformers, name)
    hashes = {config_sha256(config(**fields | more).to_dict()) for more in ({}, other)}
    assert len(hashes) == 2


def test_minimax_text_01_says_it_in_numbers():
    config = SimpleNamespace(attn_type_list=[0, 0, 1, 0])
    assert layer_kinds(config, 4, None, True) == (S, S, F, S)


def test_a_field_may_go_on_behind_the_models_layers():
    config = SimpleNamespace(layer_types=["full_attention"] * 3 + ["sliding_attention"])
    assert layer_kinds(config, 3, 64, False) == (F, F, F)


def test_a_window_that_is_disabled_is_none():
    config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    assert layer_kinds(config, 2, None, False) == (F, F)
    assert layer_kinds(SimpleNamespace(), 2, None, False) == (F, F)


def test_refuses_llama_4():
    config = transformers.Llama4TextConfig(num_hidden_layers=4)
    with pytest.raises(TidalConfigError) as caught:
        layer_kinds(config, 4, None, False)
    words = str(caught.value)
    assert words.startswith("layer_types = ['chunked_attention', ")
    assert "the chunked_attention layers cannot be run beside sparse" in words
    assert "must be among full_attention, " in words


def test_refuses_a_field_that_is_too_short():
    config = SimpleNamespace(layer_types=["full_attention"])
    with pytest.raises(TidalConfigError, match="each of the model's 2 layers"):
        layer_kinds(config, 2, None, False)


def test_refuses_states_at_unknown_places():
    with pytest.raises(TidalConfigError, match="must have one of layers_block_type, "):
        layer_kinds(SimpleNamespace(), 2, None, True)


@pytest.mark.parametrize(
    ("kinds", "has_state", "frees_blocks", "words"),
    [
        ([F, F], False, True, None),
        ([F, W], False, False, None),
        ([F, W], False, True, "--disable-hybrid-kv-cache-manager"),
        ([F, S], True, False, "states cannot be rewound"),
        ([F, F], True, True, "states cannot be rewound"),
    ],
)
def test_what_cannot_be_corrected(kinds, has_state, frees_blocks, words):
    reason = correction_obstacle(kinds, has_state, frees_blocks)
    assert reason is None if words is None else f"{words}" in reason
    assert reason is None or "must be null" in reason
