"""Packaged profiles, how a model finds its own, and every malformed file by name."""

import json
import re
from pathlib import Path

import pytest

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.profiles import (
    PACKAGED_DIR,
    find_profile,
    list_profiles,
    load_profile,
    near_miss,
    search,
)
from tidal_vllm.validators import TidalConfigError

FIELDS = {
    "name": "mine",
    "models": ["my-model*"],
    "num_hidden_layers": 8,
    "dense_layers": [0, 1],
    "select_layers": [2, 5],
    "source": "this test",
}

PUBLISHED = {  # layers, re-selection layers as published
    "llama-2-7b": (32, (7,)),
    "llama-3-8b": (32, (13,)),
    "llama-3.1-8b": (32, (13,)),
    "llama-3-70b": (80, (14, 31)),
    "r1-distill-llama-8b": (32, (12,)),
    "qwen3-4b": (36, (20,)),
    "qwen3-8b": (36, (12,)),
    "qwen3-14b": (40, (12,)),
}


@pytest.fixture(autouse=True)
def no_profiles_of_this_machine(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("project"))
    monkeypatch.setattr(search, "USER_DIR", str(tmp_path_factory.mktemp("user")))


def write(folder, file_name="mine.json", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name
    path.write_text(json.dumps({**FIELDS, **changes}), encoding="utf-8")
    return path


# The packaged ones


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers(name):
    num_layers, reselect = PUBLISHED[name]
    profile = find_profile(name, "any/model", num_layers)
    assert profile.num_hidden_layers == num_layers
    assert profile.dense_layers == (0, 1)
    assert profile.select_layers == (2, *reselect)


@pytest.mark.parametrize(
    "path", sorted(PACKAGED_DIR.glob("*.json")), ids=lambda p: p.stem
)
def test_packaged_profile_is_usable_and_sourced(path):
    profile = load_profile(path)
    assert profile.name == path.stem == profile.label
    assert profile.measured or re.search(r"arXiv \d{4}\.\d{5}", profile.source)
    assert plan_layers(TidalConfig(), profile.num_hidden_layers, profile).sparse


@pytest.mark.parametrize("model", ["hub/SmolLM2-135M-Instruct", "/m/smollm2-0.1.2"])
def test_a_measured_profile_belongs_to_a_config(model):
    name = "smollm2-135m-instruct"
    sha256 = load_profile(PACKAGED_DIR / f"{name}.json").config_sha256
    found = find_profile(None, model, 30, [PACKAGED_DIR], sha256)
    assert found.name == name and found.settings["token_budget"] == 408
    assert find_profile(None, model, 30, [PACKAGED_DIR], "0" * 64) is None


@pytest.mark.parametrize("name", ["llama-3.1-8b", "r1-distill-llama-8b", "qwen3-8b"])
def test_kascade_profiles_are_chosen_by_name_only(name):
    profile = find_profile(f"{name}-kascade", "any/model", PUBLISHED[name][0])
    assert profile.models == ()
    assert (profile.dense_layers, profile.select_layers[0]) == ((), 0)


# Found by the model's name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("lmsys/longchat-7b-v1.5-32k", "llama-2-7b"),
        ("NousResearch/Yarn-Llama-2-7b-128k", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("gradientai/Llama-3-8B-Instruct-Gradient-1048k", "llama-3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("gradientai/Llama-3-70B-Instruct-Gradient-1048k", "llama-3-70b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "r1-distill-llama-8b"),
        ("Qwen/Qwen3-4B-Thinking-2507", "qwen3-4b"),
        ("Qwen/Qwen3-8B-FP8", "qwen3-8b"),
        ("Qwen/Qwen3-14B", "qwen3-14b"),
        ("QWEN3-14B", "qwen3-14b"),
        ("/models/Llama-3.1-8B-Instruct/", "llama-3.1-8b"),
        ("/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46", "qwen3-8b"),
        ("/hub/models--meta-llama--Llama-3.1-8B/snapshots/qwen3-8b", "llama-3.1-8b"),
    ],
)
def test_models_find_their_profile(model, name):
    profile = find_profile(None, model, PUBLISHED[name][0], [PACKAGED_DIR])
    assert profile.name == name


@pytest.mark.parametrize(
    ("model", "num_layers"),
    [
        ("meta-llama/Llama-2-70b-hf", 80),
        ("meta-llama/Llama-3.2-3B", 28),
        ("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", 32),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", 36),
        ("Qwen/Qwen3-32B", 64),
        ("qwen3-8b/finetuned", 36),
        ("", 32),
        ("/", 32),
    ],
)
def test_other_models_find_none(model, num_layers):
    assert find_profile(None, model, num_layers, [PACKAGED_DIR]) is None
    assert near_miss(model, num_layers, [PACKAGED_DIR]) is None


def test_link_to_a_local_folder_finds_its_target(tmp_path):
    (tmp_path / "Qwen3-8B").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "Qwen3-8B")
    assert find_profile(None, str(tmp_path / "current"), 36).name == "qwen3-8b"


def test_same_name_with_another_layer_count_is_no_match_but_a_warning():
    model = "me/Llama-3.1-8B-pruned"
    assert find_profile(None, model, 24) is None
    assert near_miss(model, 24) == (
        "profile llama-3.1-8b fits the name of me/Llama-3.1-8B-pruned but is for 32 "
        "layers, but me/Llama-3.1-8B-pruned has 24: not used"
    )
    assert near_miss(model, 32) is None


def test_most_specific_glob_wins_whatever_the_file_order(tmp_path):
    write(tmp_path, "a.json", name="a", models=["my*", "other"])
    write(tmp_path, "b.json", name="b", models=["my-model-v2*"])
    write(tmp_path, "c.json", name="c", models=["*my-model*"])
    found = [
        find_profile(None, model, 8, [tmp_path]).name
        for model in ("x/My-Model-v2-chat", "x/My-Model-v1", "x/mystery")
    ]
    assert found == ["b", "c", "a"]


def test_equally_specific_globs_go_by_name(tmp_path):
    write(tmp_path, "1.json", name="b")
    write(tmp_path, "2.json", name="a")
    assert find_profile(None, "my-model", 8, [tmp_path]).name == "a"


def test_layer_count_decides_between_profiles_of_one_name(tmp_path):
    write(tmp_path, "deep.json", name="deep", num_hidden_layers=16)
    write(tmp_path, "flat.json", name="flat")
    assert find_profile(None, "my-model", 8, [tmp_path]).name == "flat"
    assert find_profile(None, "my-model", 16, [tmp_path]).name == "deep"


def test_project_then_user_then_packaged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "USER_DIR", str(tmp_path / "user"))
    settings = {"models": ["qwen3-8b*"], "num_hidden_layers": 36}
    assert find_profile(None, "Qwen3-8B", 36).label == "qwen3-8b"
    user = write(tmp_path / "user", name="qwen3-8b", **settings)
    assert find_profile(None, "Qwen3-8B", 36).path == user
    assert find_profile("QWEN3-8B", "any", 36).label == f"qwen3-8b ({user})"
    write(tmp_path / "tidal_profiles", name="project", **settings)
    assert find_profile(None, "Qwen3-8B", 36).name == "project"
    names = [profile.name for profile in list_profiles()]
    assert names[:2] == ["project", "qwen3-8b"]
    assert names.count("qwen3-8b") == 2


def test_explicit_path(tmp_path, monkeypatch):
    path = write(tmp_path)
    assert find_profile(str(path), "any/model", 8).name == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_profile("~/mine.json", "any/model", 8).path == path
    monkeypatch.chdir(tmp_path)
    assert find_profile("mine.json", "any/model", 8).path == Path("mine.json")


# Bad input


def refused(profile, *, num_layers=8, search_dirs=None):
    with pytest.raises(TidalConfigError) as caught:
        find_profile(profile, "any/model", num_layers, search_dirs)
    assert caught.value.key == "tidal.profile"
    message = str(caught.value)
    assert message.startswith(f"tidal.profile = {str(profile)!r}: ")
    return message


def test_unknown_name():
    message = refused("lama-3.1-8b")
    assert "unknown profile; did you mean 'llama-3.1-8b'?" in message
    for name in (*PUBLISHED, ".json"):
        assert name in message


def test_missing_file(tmp_path):
    message = refused(str(tmp_path / "none.json"))
    assert "no such file; must be an existing .json file" in message


def test_folder_instead_of_a_file(tmp_path):
    assert "is a folder; must be a .json file" in refused(str(tmp_path))


def test_path_through_a_file(tmp_path):
    message = refused(str(write(tmp_path) / "mine.json"))
    assert "cannot be read (" in message and "must be a UTF-8 .json file" in message


def test_not_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    message = refused(str(path))
    assert "cannot be read (" in message and "must be a UTF-8 .json file" in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        pytest.param("", "line 1, column 1", id="empty"),
        pytest.param('{"name": "x",\n  "models": [}', "line 2, column 14", id="cut"),
        pytest.param("select: [2]", "line 1, column 1", id="yaml"),
    ],
)
def test_malformed_json(tmp_path, text, place):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    message = refused(str(path))
    assert "is not valid JSON: " in message
    assert f"at {place}; must be a JSON object" in message


def test_explicit_profile_for_another_layer_count(tmp_path):
    for profile in (str(write(tmp_path)), "mine"):
        message = refused(profile, num_layers=32, search_dirs=[tmp_path])
        assert "is for 8 layers, but any/model has 32" in message
        assert "must be a profile with num_hidden_layers = 32" in message


def test_broken_file_in_a_searched_folder_is_named(tmp_path):
    write(tmp_path, "broken.json", models="my-model")
    with pytest.raises(TidalConfigError) as caught:
        find_profile(None, "Qwen3-8B", 36, [tmp_path, PACKAGED_DIR])
    assert caught.value.key == "tidal.profile"
    assert caught.value.value == str(tmp_path / "broken.json")


def bad(name, key, value, *allowed):
    return pytest.param(key, value, allowed, id=name)


STRING = "must be a non-empty string"
GLOBS = "must be a list of model name globs"
LAYERS = "must be a list of different layers >= 0"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        bad("name-empty", "name", "", STRING),
        bad("name-number", "name", 7, STRING),
        bad("source-blank", "source", "  ", STRING),
        bad("notes-list", "notes", ["x"], STRING),
        bad("models-string", "models", "my-model*", GLOBS),
        bad("models-of-numbers", "models", [7], GLOBS),
        bad("models-everything", "models", ["*"], GLOBS),
        bad("count-zero", "num_hidden_layers", 0, "must be an integer >= 1"),
        bad("count-string", "num_hidden_layers", "32", "integer >= 1, not a str"),
        bad("count-bool", "num_hidden_layers", True, "integer >= 1, not a bool"),
        bad("count-too-small", "num_hidden_layers", 5, "must be in 0..4"),
        bad("dense-null", "dense_layers", None, LAYERS, "not a NoneType"),
        bad("dense-negative", "dense_layers", [-1], LAYERS),
        bad("dense-outside", "dense_layers", [0, 8], "must be in 0..7"),
        bad("select-int", "select_layers", 2, LAYERS, "not a int"),
        bad("select-floats", "select_layers", [2.0], LAYERS),
        bad("select-twice", "select_layers", [2, 2], LAYERS, "appears twice"),
        bad("select-outside", "select_layers", [2, 99], "must be in 0..7"),
        bad("overlap", "select_layers", [1, 5], "overlaps", "[1]", "other layers"),
    ],
)
def test_bad_field(tmp_path, key, value, allowed):
    message = refused(str(write(tmp_path, **{key: value})))
    shown = {"num_hidden_layers": "select_layers = [2, 5]"} if value == 5 else {}
    assert f"in this file {shown.get(key, f'{key} = {value!r}')}: " in message
    for words in allowed:
        assert words in message


@pytest.mark.parametrize("key", FIELDS)
def test_missing_key(tmp_path, key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({k: v for k, v in FIELDS.items() if k != key}))
    message = refused(str(path))
    assert f"lacks {key}; must have {', '.join(FIELDS)}" in message


def test_unknown_key(tmp_path):
    message = refused(str(write(tmp_path, select_layer=[2])))
    assert "unknown key 'select_layer'; did you mean 'select_layers'?" in message
    for key in (*FIELDS, "notes"):
        assert key in message


@pytest.mark.parametrize("content", [[], "mine", 3, None], ids=repr)
def test_not_an_object(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    message = refused(str(path))
    assert "must be a JSON object with keys name, models" in message
    assert f"not {type(content).__name__}" in message
