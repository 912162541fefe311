"""Models with sliding windows or states beside full attention: roles and refusals."""

import pytest

from tidal_vllm.policy import Role
from tidal_vllm.startup import resolve

ODD = (1, 3, 5, 7)
# Full-attention layers by model.
HYBRIDS = {
    "gemma3": (2, 5, 8, 11),
    "lfm2": ODD,
    "granite4": ODD,
    "qwen3_next": ODD,
}
STATES = ("lfm2", "granite4", "qwen3_next")


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
    assert "states cannot go back to where those begin: must be null" in message
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


@pytest.mark.parametrize("model", ["sliding_window", "some_layers_slide"])
def test_a_window_that_is_disabled(configure, model):
    config = configure(model=model, disable_sliding_window=True, max_model_len=64)
    assert resolve(config).plan.count(Role.OTHER) == 0


def test_prints_every_layer_once(engines):
    log = engines["some_layers_slide"]["log"]
    assert log.count("TIDAL sparse decoding of") == 1
    for line in ("SELECT 1     1\n", "SPARSE 2     3, 5\n", "OTHER 3      0, 2, 4: as"):
        assert log.count(line) == 1, line
    assert engines["some_layers_slide"]["counters"]["sparse_steps"] == 7


def test_a_model_of_windows_runs_unselected(engines):
    assert engines["sliding_window"]["tokens"]
