"""A measured profile fits its model and is plausible, or is refused with a reason."""

import json
import types
from pathlib import Path

import pytest

from tidal_vllm.plan.resolve import resolve
from tidal_vllm.profiles import find_profile, load_profile, near_miss
from tidal_vllm.profiles.fingerprint import config_sha256
from tidal_vllm.validators import TidalConfigError

pytestmark = pytest.mark.usefixtures("in_a_project")
SHAPE = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64}
SHA = config_sha256(SHAPE)
FIELDS = {
    "name": "mine-calibrated",
    "models": ["mine"],
    "model": "mine",
    "config_sha256": SHA,
    "num_hidden_layers": 8,
    "dense_layers": [0, 1],
    "select_layers": [2, 5],
    "token_budget": 256,
    "select_block_size": 16,
    "scope": "kv_head",
    "sink_tokens": 4,
    "recent_fraction": 0.25,
    "correction_interval": None,
    "source": "this test",
    "measured": {
        "recommended": {"tokens": 381, "agreement_at_least": 0.99},
        "max_loss": 0.01,
    },
    "versions": {"vllm": "0.32.0"},
}


def write(**changes) -> Path:
    folder = Path("tidal_profiles")
    folder.mkdir(exist_ok=True)
    fields = {k: v for k, v in (FIELDS | changes).items() if v is not ...}
    path = folder / "mine.json"
    path.write_text(json.dumps(fields, indent=2))
    return path


def measured(**changes) -> dict:
    return {"measured": FIELDS["measured"] | changes}


def recommended(**changes) -> dict:
    return measured(recommended=FIELDS["measured"]["recommended"] | changes)


def test_is_found_by_its_model():
    path = write()
    profile = find_profile(None, "models/Mine", 8, config_sha256=SHA)
    assert profile.path == path
    assert profile.settings["token_budget"] == 256
    assert profile.measured == FIELDS["measured"]
    assert find_profile(str(path), "mine", 8, config_sha256=SHA).name == profile.name


@pytest.mark.parametrize(
    ("model", "layers", "sha", "reason"),
    [
        ("mine", 9, SHA, "is for 8 layers, but mine has 9"),
        ("yours", 8, SHA, "was measured on mine and fits mine, not yours"),
        ("mine", 8, "0" * 64, "config_sha256 .*, but that of mine is 000000000000"),
    ],
    ids=["layer count", "model", "config"],
)
def test_is_refused_for_another(model, layers, sha, reason):
    path = write()
    with pytest.raises(TidalConfigError, match=reason) as refusal:
        find_profile(str(path), model, layers, config_sha256=sha)
    assert "tidal-vllm calibrate" in str(refusal.value)
    assert find_profile(None, model, layers, config_sha256=sha) is None
    warning = near_miss(model, layers, config_sha256=sha)
    assert (warning is None) == (model == "yours")


@pytest.mark.parametrize(
    ("recommended", "reason"),
    [
        ({"tokens": 32, "agreement_at_least": 0.8928}, "rests on 32 tokens, .* 89.3%"),
        (..., "does not say how sure"),
    ],
)
def test_one_without_evidence_is_not_used(recommended, reason):
    found = {"max_loss": 0.01, "recommended": recommended}
    path = write(measured={k: v for k, v in found.items() if v is not ...})
    with pytest.raises(TidalConfigError, match=reason) as refusal:
        find_profile(str(path), "mine", 8, config_sha256=SHA)
    assert "calibrated on this model: tidal-vllm calibrate mine" in str(refusal.value)
    plan = startup({}).plan
    assert "fits the name of mine but" in plan.warning
    assert "safest roles" in plan.warning


def test_another_config_falls_through_to_the_next_profile():
    write()
    plain = {k: FIELDS[k] for k in ("models", "num_hidden_layers", "source")}
    plain |= {"name": "z-plain", "dense_layers": [0], "select_layers": [1]}
    Path("tidal_profiles/z.json").write_text(json.dumps(plain))
    assert find_profile(None, "mine", 8, config_sha256="0" * 64).name == "z-plain"


def test_may_be_edited_by_hand():
    path = write(select_layers=[2, 6], token_budget=512, notes="mine")
    profile = find_profile(str(path), "mine", 8, config_sha256=SHA)
    assert profile.select_layers == (2, 6)
    assert (profile.settings["token_budget"], profile.notes) == (512, "mine")
    assert startup({}).config.token_budget == 512


@pytest.mark.parametrize("missing", ["measured", "config_sha256", "model", "versions"])
def test_truncated_to_valid_json(missing):
    path = write(**{missing: ...})
    with pytest.raises(TidalConfigError, match=f"lacks {missing}: truncated"):
        load_profile(path)


def test_truncated_in_mid_file():
    path = write()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(TidalConfigError, match="not valid JSON"):
        load_profile(path)


def test_without_all_that_was_measured_it_is_a_hand_written_one():
    path = write()
    keys = ("model", "config_sha256", "measured", "versions")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in keys}))
    assert find_profile(str(path), "yours", 8, config_sha256="1" * 64).measured == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_budget": 100}, "must be a positive multiple of select_block_size"),
        ({"scope": "heads"}, "must be one of 'sequence'"),
        ({"measured": [1]}, "measured = .1.: must be a JSON object"),
        ({"versions": None}, "versions = None: must be a JSON object"),
        ({"model": 7}, "model = 7: must be a non-empty string"),
        ({"model": ""}, "model = '': must be a non-empty string"),
        ({"config_sha256": SHA[:12]}, "config_sha256 = .*: must be a SHA-256 hash"),
        (measured(max_loss="1%"), "max_loss = '1%': must be a number in 0..1"),
        (measured(recommended=[0.99]), r"recommended = \[0.99\]: must be a JSON obj"),
        (recommended(tokens=0), "tokens = 0: must be an integer >= 1"),
        (recommended(tokens=381.0), "tokens = 381.0: must be an integer >= 1, not a"),
        (recommended(agreed=382), "agreed = 382: must be an integer in 0..381"),
        (recommended(agreement_at_least=1.5), "= 1.5: must be a number in 0..1"),
        (recommended(agreed=300), "agreement_at_least = 0.99: must be a number in 0.."),
    ],
)
def test_bad_values(changes, reason):
    path = write(**changes)
    with pytest.raises(TidalConfigError, match=reason):
        load_profile(path)


def test_config_hash_is_of_the_shape():
    assert config_sha256(SHAPE | {"dtype": "bfloat16", "eos_token_id": 3}) == SHA
    for key, value in (("hidden_size", 65), ("rope_theta", 1e6), ("head_dim", 8)):
        assert config_sha256(SHAPE | {key: value}) != SHA


# What the backend makes of one


def startup(tidal: dict, max_model_len: int = 8192):
    """`resolve` with the parts of vLLM's config that it reads."""
    shape = types.SimpleNamespace(to_dict=lambda: SHAPE)
    model = types.SimpleNamespace(
        model="mine",
        max_model_len=max_model_len,
        original_max_model_len=max_model_len,
        hf_text_config=shape,
        get_total_num_hidden_layers=lambda: 8,
        get_sliding_window=lambda: None,
        is_hybrid=False,
    )
    backend = types.SimpleNamespace(name="TIDAL")
    attention = types.SimpleNamespace(backend=backend, backend_per_kind=None)
    return resolve(
        types.SimpleNamespace(
            model_config=model,
            attention_config=attention,
            additional_config={"tidal": tidal} if tidal is not None else {},
            speculative_config=None,
        )
    )


def test_settings_come_with_the_layers():
    write()
    for tidal in ({}, None):
        config = startup(tidal).config
        assert (config.token_budget, config.scope) == (256, "kv_head")
    assert startup({}).plan.source.startswith("profile mine-calibrated")


def test_what_the_user_says_wins():
    write()
    config = startup({"token_budget": 512}).config
    assert (config.token_budget, config.scope) == (512, "kv_head")
    config = startup({"preset": "tidaldecode"}).config
    assert (config.token_budget, config.scope) == (4096, "query_head")


def test_a_method_by_which_every_layer_chooses_takes_neither():
    write()
    found = startup({"method": "oracle"})
    assert found.plan.source == "method 'oracle'"
    assert (found.config.token_budget, found.config.scope) == (4096, "sequence")


def test_an_interval_no_output_can_reach_is_left_out():
    write(correction_interval=64)
    assert startup({}).config.correction_interval == 64
    assert startup({}, max_model_len=50).config.correction_interval is None


def test_a_near_miss_warns_and_takes_the_safest_roles():
    write(config_sha256="0" * 64)
    plan = startup({}).plan
    assert "measured on a model of another config" in plan.warning
    assert "safest roles" in plan.warning
