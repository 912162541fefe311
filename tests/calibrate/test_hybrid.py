"""Of a hybrid model the layers with full attention are calibrated, and no others."""

from pathlib import Path

import pytest

from benchmarks.quality.calibration_baselines import random_spec
from tests.calibrate.commands import ENGINE, QUICK, calibrate
from tests.support.models import (
    build_random_model,
    build_windowed_planted_model,
    hybrid_layers,
)
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.roles import Role
from tidal_vllm.planted import build_planted_model, make_prompt
from tidal_vllm.profiles import load_profile

pytestmark = pytest.mark.usefixtures("vllm_in_a_project")
IDLE_AFTER = (1, 3, 4, 7)
SLIDES, FULL = "sliding_attention", "full_attention"


@pytest.mark.extended
def test_the_profile_names_the_models_own_layers_and_serves(capsys):
    from vllm import LLM, SamplingParams

    spec = random_spec(2, 4, 9)
    planted = build_planted_model(Path("planted"), spec)
    model = Path("windowed")
    build_windowed_planted_model(model, planted, spec, IDLE_AFTER, window=16)
    assert calibrate(model, *QUICK, "--dense-layers", 1) == 0
    shown = capsys.readouterr().out

    at = hybrid_layers(spec, IDLE_AFTER)
    select = [at[i] for i in spec.select_layers]
    profile = load_profile(Path("tidal_profiles/windowed.json"))
    assert (list(profile.select_layers), profile.dense_layers) == (select, (at[1],))
    assert profile.num_hidden_layers == 13
    assert profile.measured["stability"] == 1.0
    full = "8 full-attention layers (the model has 13)"
    assert f"DENSE {at[1]} of {full}" in shown
    report = Path("tidal_profiles/windowed.html").read_text()
    assert f"all others of {full} SPARSE" in report
    assert f"<th>{at[3]}</th>" in report
    assert f"<th>{at[3] + 1}</th>" not in report, "a window was recorded"
    (best,) = (p for p in profile.measured["curve"] if p["token_budget"] == 128)
    assert 0 < best["kv_read_share"] < 1

    asked = make_prompt(spec, 700, 0.4, seed=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(
            str(model),
            attention_backend="TIDAL",
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=2,
            **ENGINE,
        )
    plan = resolve(llm.llm_engine.vllm_config).plan
    assert plan.source.startswith("profile windowed-calibrated")
    assert plan.layers(Role.SELECT) == tuple(select)
    (output,) = llm.generate(
        {"prompt_token_ids": asked.prompt_token_ids},
        SamplingParams(temperature=0, max_tokens=12, detokenize=False),
        use_tqdm=False,
    )
    answer = asked.answer_token_ids
    assert list(output.outputs[0].token_ids)[: len(answer)] == answer


@pytest.mark.parametrize(
    ("layer_types", "dense_layers", "words"),
    [
        ([SLIDES, FULL] * 3, 2, ["--dense-layers = 2: must be 0..1", "3 layers with"]),
        ([SLIDES] * 5 + [FULL], 0, ["only its layers [5] attend to everything"]),
    ],
)
def test_refuses_what_leaves_no_layer_to_be_sparse(
    tmp_path, capsys, layer_types, dense_layers, words
):
    fields = {"layer_types": layer_types, "sliding_window": 16}
    model = build_random_model(tmp_path / "model", "llama", **fields)
    assert calibrate(model, *QUICK, "--dense-layers", dense_layers) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
