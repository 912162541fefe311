"""`tidal-vllm calibrate` and `tidal-vllm profiles`, as users run them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.quality.calibration_baselines import random_spec
from tests.calibrate.commands import ENGINE, QUICK, calibrate
from tests.calibrate.pages import check_html, pictures_of
from tests.support.models import build_random_model, random_prompt
from tests.support.processes import child_environment
from tidal_vllm import cli
from tidal_vllm.calibrate import command
from tidal_vllm.calibrate.engine import CalibrationEngine
from tidal_vllm.config import SCOPES
from tidal_vllm.engine.metrics import COUNTING_WORKER
from tidal_vllm.planted import build_planted_model, make_prompt
from tidal_vllm.profiles import load_profile

pytestmark = pytest.mark.usefixtures("vllm_in_a_project")


def planted(hops: int, seed: int, num_layers: int = 9):
    spec = random_spec(hops, seed, num_layers)
    return spec, build_planted_model(Path(f"hops-{hops}"), spec)


# Whole runs


def check_everything(spec, model, shown):
    """The layers are found; profile and report say all that was measured."""
    select = list(spec.select_layers)
    path = Path("tidal_profiles", f"{model.name}.json")
    profile = load_profile(path)
    assert list(profile.select_layers) == select
    assert list(profile.dense_layers) == [0, 1]
    measured = profile.measured
    assert measured["dense"] == {"right": 3, "judged": 3}
    chosen = next(t for t in measured["tried"] if t["select_layers"] == select)
    assert chosen["holds"] and chosen["agreed"] == chosen["tokens"] == 40
    recommended = measured["recommended"]
    assert recommended["tokens"] == 40, "3 prompts were not enough, so 2 more"
    assert 0.9 <= recommended["agreement_at_least"] < 1
    assert measured["stability"] == 1.0
    budgets = {point["token_budget"] for point in measured["curve"]}
    assert budgets == {16, 32, 64, 128}
    assert {p["select_block_size"] for p in measured["curve"]} == {4, 16}
    scopes = {point["scope"] for point in measured["curve"]}
    assert scopes == set(SCOPES)
    assert set(profile.versions) >= {"tidal_vllm", "vllm", "torch"}
    assert measured["runner_up"] not in (None, select)
    assert not measured["tried"][0]["holds"], "fewer full layers were tried first"

    report = path.with_suffix(".html").read_text()
    assert len(pictures_of(report)) == 2 and "mean overlap (TidalDecode)" in report
    assert "http" not in report, "a page that needs nothing else"
    check_html(report)
    assert f"Profile: {path}" in shown.out
    assert "left]" in shown.err, "a bar with the time left"
    assert not Path(f"{path}.state").exists()


@pytest.mark.extended
def test_finds_three_layers():
    spec, model = planted(3, 5)
    assert calibrate(model.name, *QUICK) == 0
    profile = load_profile(f"tidal_profiles/{model.name}.json")
    assert profile.select_layers == spec.select_layers


def test_the_profile_is_found_and_used_by_the_backend(capsys):
    """After calibration, the one flag is all that is needed."""
    from vllm import LLM, SamplingParams

    spec, model = planted(2, 4)
    assert calibrate(model.name, *QUICK) == 0
    shown = capsys.readouterr()
    check_everything(spec, model, shown)
    assert "Used from this folder by: vllm serve" in shown.out
    profile = load_profile(f"tidal_profiles/{model.name}.json")
    asked = make_prompt(spec, 700, 0.4, seed=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(
            str(model),
            attention_backend="TIDAL",
            worker_extension_cls=COUNTING_WORKER,
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=2,
            **ENGINE,
        )
    (output,) = llm.generate(
        {"prompt_token_ids": asked.prompt_token_ids},
        SamplingParams(temperature=0, max_tokens=12, detokenize=False),
        use_tqdm=False,
    )
    (counters,) = llm.collective_rpc("decode_counters")
    llm.llm_engine.engine_core.shutdown()
    assert output.outputs[0].token_ids == asked.answer_token_ids
    assert counters["sparse_steps"] == len(asked.answer_token_ids) - 1
    budget = profile.settings["token_budget"]
    assert counters["sparse_context_tokens"] <= budget * counters["decode_tokens"]


@pytest.mark.extended
def test_ctrl_c_leaves_a_state_that_resumes(capsys):
    spec, model = planted(2, 7)
    arguments = [model.name, "--num-prompts", "16", "--context", "400"]
    arguments += ["--budget", "64", "--max-loss", "0.1", "-o", "out/p.json"]
    line = [sys.executable, "-m", "tidal_vllm.cli", "calibrate", *arguments]
    line += ["--engine-args", json.dumps(ENGINE)]
    replies = Path("out/p.json.state/replies.jsonl")
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, env=child_environment()
    ) as child:
        try:
            while not replies.exists() or len(replies.read_text().splitlines()) < 4:
                assert child.poll() is None, child.stderr.read()
                time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            _, printed = child.communicate()
        finally:
            child.kill()
    assert child.returncode == 130
    kept = len(replies.read_text().splitlines())
    assert 3 < kept < 16
    assert f"Stopped. {kept} answers are kept" in printed
    assert "Traceback" not in printed

    # Another request is not mixed into it.
    assert calibrate(*arguments, "--budget", "80") == 2
    assert "asked for other setting" in capsys.readouterr().err

    with replies.open("a") as log:
        log.write('{"key": "dense 15", "reply"')  # cut off in mid-write
    assert calibrate(*arguments) == 0
    assert f"Resuming: {kept} answers are kept" in capsys.readouterr().err
    profile = load_profile("out/p.json")
    assert profile.select_layers == spec.select_layers
    assert profile.measured["prompts"]["count"] == 16


@pytest.mark.extended
def test_tensor_parallel():
    """Each rank has half of the heads; both choose one set."""
    spec, model = planted(2, 8)
    line = [sys.executable, "-m", "tidal_vllm.cli", "calibrate", model.name, *QUICK]
    line += ["--tensor-parallel-size", "2", "--engine-args"]
    line += [json.dumps(ENGINE | {"distributed_executor_backend": "mp"})]
    done = subprocess.run(line, capture_output=True, text=True, env=child_environment())
    assert done.returncode == 0, done.stderr
    profile = load_profile(f"tidal_profiles/{model.name}.json")
    assert profile.select_layers == spec.select_layers
    assert "Traceback" not in done.stderr


@pytest.mark.extended
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_families_with_the_user_s_prompts(family, capsys):
    """Random weights, grouped queries, QK norm; no tokenizer, no known answers."""
    build_random_model(Path(family), family)
    prompts = [{"prompt_token_ids": random_prompt(200 + n, n)} for n in range(3)]
    prompts[1]["answer_token_ids"] = [9, 8]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    asked = [family, "--prompts", "p.jsonl", "--budget", "48", "--decode-tokens", "8"]
    asked += ["--dense-layers", "1", "--max-select-layers", "2"]
    if family == "llama":
        # The 15 tokens of these prompts, if none is lost, prove a loss of 0.21.
        assert calibrate(*asked, "--max-loss", "0.21") == 1
        failure = capsys.readouterr().err
        assert "Not calibrated: " in failure
        assert not Path(f"tidal_profiles/{family}.json").exists()

    # What was measured is not asked again.
    assert calibrate(*asked, "--max-loss", "1") == 0
    shown = capsys.readouterr()
    assert ("Resuming: " in shown.err) == (family == "llama")
    profile = load_profile(f"tidal_profiles/{family}.json")
    assert profile.num_hidden_layers == 6 and profile.dense_layers == (0,)
    measured = profile.measured
    assert measured["prompts"]["kinds"] == ["file"]
    assert measured["dense"] == {"right": 0, "judged": 1}
    assert "NOTE: dense attention itself answers 0 of 1" in shown.out
    assert 0 < measured["curve"][0]["captured_mass"] < 1
    shares = [p["kv_read_share"] for p in measured["curve"] if p["scope"] == "sequence"]
    assert all(0.25 < share < 1 for share in shares)


@pytest.mark.extended
def test_no_setting_reaches_the_target(capsys):
    build_random_model(Path("llama"), "llama")
    prompt = {"prompt_token_ids": random_prompt(200, 0)}
    Path("p.jsonl").write_text(json.dumps(prompt))
    asked = ["llama", "--prompts", "p.jsonl", "--budget", "48", "--decode-tokens", "12"]
    asked += ["--max-loss", "1", "--max-select-layers", "1", "--dense-layers", "1"]
    assert calibrate(*asked, "--target-agreement", "1.0") == 1
    assert "no setting reaches --target-agreement 1;" in capsys.readouterr().err


# Bad input


def refused(capsys, *arguments, **engine) -> str:
    assert calibrate(*arguments, **engine) == 2
    message = capsys.readouterr().err
    assert message.startswith("tidal-vllm calibrate: ")
    assert not list(Path().glob("**/*.state"))
    return message


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_random_model(tmp_path_factory.mktemp("m") / "llama", "llama")


@pytest.fixture
def no_engine(monkeypatch):
    def start(*_):
        raise AssertionError("work began before the input was refused")

    monkeypatch.setattr(command, "CalibrationEngine", start)
    monkeypatch.setattr(CalibrationEngine, "__init__", start)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--num-prompts", "0"], "--num-prompts = 0: must be 1 or more"),
        (["--decode-tokens", "1"], "--decode-tokens = 1: must be 2 or more"),
        (["--max-select-layers", "0"], "--max-select-layers = 0: must be 1"),
        (["--dense-layers", "-1"], "--dense-layers = -1: must be 0 or more"),
        (["--dense-layers", "5"], "--dense-layers = 5: must be 0..4"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size = 0: must be"),
        (["--max-loss", "1.5"], "--max-loss = 1.5: must be a share, 0 to 1"),
        (["--target-agreement", "99"], "--target-agreement = 99.0: must be a share"),
        (["--max-loss", "0"], "--max-loss = 0.0: must be 0.0001 or more: no number"),
        (["--scope", "head"], "--scope = 'head': must be one of sequence, kv_head"),
        (["--context", "0"], "--context = 0: must be 1 or more"),
        (["--context", "2040"], "--context = 2040: must be 1..2031"),
        (["--context", "20"], "--context = 20: no built-in prompt: needs 32 tokens"),
        (["--budget", "302", "--context", "200"], "tidal.token_budget = 302: must be"),
        (["--budget", "320", "--context", "200"], "--budget = 320: must be below"),
        (["--budget", "8"], "tidal.token_budget = 8: must have room"),
        (["--select-block-size", "32"], "select_block_size = 32: must divide"),
        (["--prompts", "none.jsonl"], "--prompts = 'none.jsonl': cannot be read"),
        (["-o", "profile.yaml"], "-o = 'profile.yaml': must end in .json"),
        (["-o", "folder.json"], "-o = 'folder.json': is a folder"),
        (["-o", "mine.json"], "-o = 'mine.json': is there already"),
        (["-o", "a-file/p.json"], "-o = 'a-file/p.json': "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(no_engine, llama, capsys, arguments, reason):
    Path("folder.json").mkdir()
    Path("mine.json").write_text("{}")
    Path("a-file").write_text("")
    assert reason in refused(capsys, llama, *arguments)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "does not travel between pipeline stages"),
        ({"attention_backend": "TIDAL"}, "is set by the calibration itself"),
        ({"speculative_config": {}}, "is set by the calibration itself"),
        ({"tensor_parallel_size": 2}, "is set by the calibration itself"),
        ({"no_such_argument": 1}, "vLLM refuses it: "),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype = fp8: allowed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_engine_arguments(no_engine, llama, capsys, given, reason):
    assert reason in refused(capsys, llama, **given)


@pytest.mark.parametrize(
    ("text", "reason"), [("[]", "JSON object"), ("{", "not valid")]
)
def test_engine_arguments_that_are_no_object(no_engine, llama, capsys, text, reason):
    assert cli.main(["calibrate", str(llama), "--engine-args", text]) == 2
    assert reason in capsys.readouterr().err


def test_bad_models(no_engine, capsys, tmp_path):
    assert "holds no config.json" in refused(capsys, tmp_path)
    assert "must be a model's name" in refused(capsys, "/")
    assert "vLLM refuses it" in refused(capsys, "no/such-model")


def test_a_folder_in_the_way_of_the_state(no_engine, llama, capsys):
    Path("tidal_profiles/llama.json.state").mkdir(parents=True)
    assert calibrate(llama, "--context", "400") == 2
    assert "is no interrupted calibration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "holds no prompt"),
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: must be a JSON object"),
        ('{"prompt_ids": [1]}', "key 'prompt_ids'; did you mean 'prompt_token_ids'?"),
        ('{"answer": "x"}', "line 1: lacks `prompt` or `prompt_token_ids`"),
        ('{"prompt": ""}', "line 1: prompt must be a non-empty string"),
        ('{"prompt_token_ids": []}', "must be a non-empty list of token ids"),
        ('{"prompt_token_ids": [true]}', "must be a non-empty list of token ids"),
        ('{"prompt": "x", "prompt_token_ids": [1]}', "has both prompt and"),
        ('{"prompt": "x"}', "prompt 1: prompt is text, but the model has no"),
        ('{"prompt_token_ids": [512]}', "token 512 is not in the model's vocab"),
        (json.dumps({"prompt_token_ids": [9] * 2040}), "has 2040 tokens: must be at"),
        ('{"prompt_token_ids": [9, 9]}', "--budget = 16: must be below the shortest"),
        (
            json.dumps({"prompt_token_ids": [9] * 900}),
            "--max-loss = 0.01: takes 381 decoded tokens to prove, if all agree with "
            "dense attention, but --prompts gives 15 at most. Give about 25 more "
            "prompts like these in --prompts, or --decode-tokens 382;",
        ),
    ],
)
def test_bad_prompts(no_engine, llama, capsys, line, reason):
    Path("p.jsonl").write_text(line + "\n")
    assert reason in refused(capsys, llama, "--prompts", "p.jsonl")


# tidal-vllm profiles


def test_profiles_lists_and_shows(capsys):
    assert cli.main(["profiles"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].split()[:5] == ["NAME", "LAYERS", "DENSE", "SELECT", "BUDGET"]
    (line,) = [line for line in listed if line.startswith("qwen3-8b ")]
    assert re.split(r"\s{2,}", line)[1:4] == ["36", "0,1", "2,12"]
    assert cli.main(["profiles", "qwen3-8b"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# ") and '"num_hidden_layers": 36' in shown
    assert cli.main(["profiles", "qwen3-9b"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert cli.main(["profiles", "./none.json"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert os.listdir() == []
