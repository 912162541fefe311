"""Models with sliding windows or states beside full attention: roles and refusals."""

import json

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.engine.torch_dense import ReferenceBuilder
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.roles import Role

ODD = (1, 3, 5, 7)
# Full-attention layers by model.
HYBRIDS = {
    "gemma3": (2, 5, 8, 11),
    "lfm2": ODD,
    "granite4": ODD,
    "qwen3_next": ODD,
}
STATES = ("lfm2", "granite4", "qwen3_next")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Without Triton the platform refuses states."""
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)


@pytest.mark.parametrize("model", HYBRIDS)
def test_roles_go_to_the_full_attention_layers(configure, model):
    full = HYBRIDS[model]
    plan = resolve(configure(model=model)).plan
    assert plan.sparse
    assert plan.layers(Role.DENSE) == full[:2]
    assert plan.layers(Role.SELECT) == (full[2],)
    assert plan.layers(Role.SPARSE) == (full[3],)
    assert plan.count(Role.OTHER) == plan.num_layers - 4


@pytest.mark.parametrize("model", HYBRIDS)
def test_refuses_a_layer_that_cannot_select(refusal, model):
    message = refusal({"select_layers": [0]}, model=model)
    listed = ", ".join(map(str, HYBRIDS[model]))
    assert "tidal.select_layers = [0]: of this model's" in message
    assert f"these have full attention: {listed}; must be among them" in message


@pytest.mark.parametrize("model", STATES)
def test_states_cannot_be_corrected(refusal, configure, model):
    message = refusal({"correction_interval": 8}, model=model)
    assert "tidal.correction_interval = 8: a correction computes tokens" in message
    assert (
        "states cannot be rewound to the first of those tokens: must be null" in message
    )
    configure({"correction_interval": None}, model=model)


def test_windows_can_where_vllm_keeps_what_is_behind_them(refusal, configure):
    settings = {"correction_interval": 8}
    message = refusal(settings, model="gemma3")
    assert "tidal.correction_interval = 8: a correction computes tokens" in message
    assert "must be null, or vLLM be started with --disable-hybrid-kv-cache" in message
    configure(settings, model="gemma3", disable_hybrid_kv_cache_manager=True)


def test_refuses_chunked_attention_by_name(refusal, configure):
    message = refusal(model="llama4")
    assert "layer_types = ['chunked_attention', " in message
    assert "the chunked_attention layers cannot be run beside sparse" in message
    assert "must be among full_attention, " in message


def test_a_model_whose_every_layer_slides_decodes_densely(configure):
    plan = resolve(configure(model="sliding_window")).plan
    assert plan.off_reason.startswith("the model has 0 full-attention layers")
    assert plan.roles == (Role.OTHER,) * 6


def test_three_full_attention_layers_are_too_few_unless_named(configure):
    plan = resolve(configure(model="some_layers_slide")).plan
    assert "has 3 full-attention layers, fewer than 4" in plan.off_reason
    named = resolve(configure({"select_layers": [1]}, model="some_layers_slide")).plan
    assert named.layers(Role.SPARSE) == (3, 5)


def test_a_window_that_no_layer_uses(configure):
    assert resolve(configure(model="no_layer_slides")).plan.count(Role.OTHER) == 0


SHORT = {"token_budget": 32, "select_block_size": 4}


@pytest.mark.parametrize("model", ["sliding_window", "some_layers_slide"])
def test_a_window_that_is_disabled(configure, model):
    config = configure(
        SHORT, model=model, disable_sliding_window=True, max_model_len=64
    )
    assert resolve(config).plan.count(Role.SPARSE) == 3


@pytest.mark.parametrize("model", ["sliding_window", "some_layers_slide"])
def test_a_window_that_holds_every_sequence_is_full_attention(configure, model):
    settings = SHORT | {"correction_interval": 8}
    startup = resolve(configure(settings, model=model, max_model_len=64))
    assert startup.plan.count(Role.SPARSE) == 3
    assert startup.full_layers == tuple(range(6))
    assert (startup.window(64), startup.window(63)) == (None, 63)

    startup = resolve(configure(SHORT, model=model, max_model_len=65))
    assert startup.plan.count(Role.OTHER) == (6 if model == "sliding_window" else 3)
    assert startup.window(64) == 64


def test_a_window_that_never_slides_limits_cuda_graphs(configure, monkeypatch):
    """As a full-attention layer does, whose kernels may not be captured."""
    always, never = AttentionCGSupport.ALWAYS, AttentionCGSupport.NEVER
    monkeypatch.setattr(ReferenceBuilder, "_cudagraph_support", always)
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 32}
    spec = SlidingWindowSpec(**shape, dtype=torch.float32, sliding_window=64)
    settings = SHORT | {"select_layers": [1]}
    for max_model_len, support in ((64, never), (65, always)):
        config = configure(
            settings, model="some_layers_slide", max_model_len=max_model_len
        )
        found = TidalMetadataBuilder.get_cudagraph_support(config, spec)
        assert found is support


def test_windows_stay_where_vllm_has_not_settled_max_model_len(configure):
    """With -1 it may lower it when the layers are made: they would not fit the plan."""
    window = {"sliding_window": 1 << 20}
    settled = configure(SHORT, model="sliding_window", hf_overrides=window)
    assert resolve(settled).plan.sparse
    fitted = {"hf_overrides": window, "max_model_len": -1}
    config = configure(SHORT, model="sliding_window", **fitted)
    assert config.model_config.max_model_len == 16384
    assert resolve(config).plan.count(Role.OTHER) == 6


def test_windows_stay_beside_a_profile_that_was_measured_beside_them(
    configure, tmp_path
):
    path = tmp_path / "beside_windows.json"
    fields = {"name": "x", "models": [], "num_hidden_layers": 6, "source": "this test"}

    def roles(dense, select):
        layers = {"dense_layers": dense, "select_layers": select}
        path.write_text(json.dumps(fields | layers))
        settings = SHORT | {"profile": str(path)}
        return resolve(
            configure(settings, model="some_layers_slide", max_model_len=64)
        ).plan

    assert roles([1], [3]).layers(Role.OTHER) == (0, 2, 4)
    assert roles([0, 1], [2]).layers(Role.SPARSE) == (3, 4, 5)


def test_prints_every_layer_once(started):
    log = started["some_layers_slide"]["log"]
    assert log.count("TIDAL sparse decoding of") == 1
    for line in ("SELECT 1     1\n", "SPARSE 2     3, 5\n", "OTHER 3      0, 2, 4: as"):
        assert log.count(line) == 1, line
    assert started["some_layers_slide"]["counters"]["sparse_steps"] == 7


def test_a_model_of_windows_runs_unselected(started):
    assert started["sliding_window"]["tokens"]


def test_a_model_whose_windows_never_slide_runs_as_one_without(started):
    with_windows, without = started["never_slides"], started["sparse"]
    assert with_windows["tokens"] == without["tokens"]
    assert with_windows["counters"] == without["counters"]
