"""The small trained model's script, end to end on a tiny configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import tidal_vllm
from benchmarks.train import small_model_tasks as tasks
from benchmarks.train import train_small_model
from tests.support.processes import child_environment
from tidal_vllm import cli
from tidal_vllm.profiles import load_profile, search

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks.train.train_small_model"
SOURCE = Path(tidal_vllm.__file__).parent
TINY = ["--steps", "6", "--contexts", "128", "256", "--batch-tokens", "512"]
TINY += ["--layers", "5", "--hidden", "64", "--heads", "2", "--kv-heads", "1"]
TINY += ["--questions", "2", "--text", str(SOURCE), "--device", "cpu"]


def train(out: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", SCRIPT, str(out), *TINY, *more],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was interrupted, and of one that was not."""
    root = tmp_path_factory.mktemp("trained")
    stopped, whole = root / "stopped", root / "whole"
    first = train(stopped, "--stop-after", "3")
    assert "Stopped at step 3; repeat the command" in first.stdout, first.stderr
    assert not stopped.exists(), "a model folder is complete or not there"
    assert train(stopped, "--seed", "1").stderr.count("that run had other seed") == 1
    second = train(stopped)
    assert "Resuming at step 3 of 6" in second.stdout, second.stderr
    assert "6/6" in second.stderr and "answers=" in second.stderr
    done = train(whole)
    assert done.returncode == 0, done.stderr
    return stopped, whole


@pytest.mark.extended
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trained):
    resumed, whole = (load_file(folder / "model.safetensors") for folder in trained)
    assert resumed.keys() == whole.keys()
    assert all(resumed[name].equal(whole[name]) for name in whole)


@pytest.mark.extended
def test_the_record(trained):
    about = json.loads((trained[1] / "training.json").read_text())
    assert (about["seed"], about["steps"], about["tokens"]) == (0, 6, 6 * 512)
    assert about["bytes"] > 1 << 14 and len(about["sha256"]) == 64
    assert set(about["dense_scores"]) == set(tasks.TASKS)
    assert set(about["dense_scores"]["copy"]) == {"128", "256"}
    assert about["worth_keeping"] is False, "six steps teach nothing"


@pytest.mark.extended
def test_vllm_serves_it_and_it_can_be_calibrated(
    vllm_here, trained, tmp_path, monkeypatch
):
    """As text through its tokenizer, then by its own calibration questions."""
    from vllm import LLM, SamplingParams, envs

    envs.disable_envs_cache()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "USER_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folder, engine = str(trained[1]), {"kv_cache_memory_bytes": 1 << 24}
    llm = LLM(folder, max_model_len=512, max_num_seqs=2, **engine)
    text = "def f():<end><pair><k7><v1><v2><v3><v4><ask><k7>"
    (output,) = llm.generate(text, SamplingParams(max_tokens=4), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    ids = output.prompt_token_ids
    assert ids[:8] == list(b"def f():")
    assert ids[8:11] == [tasks.END, tasks.PAIR, tasks.FIRST_KEY + 7]
    assert len(output.outputs[0].token_ids) == 4

    line = ["calibrate", folder, "--prompts", f"{folder}/calibration.jsonl"]
    line += ["--budget", "64", "--max-loss", "1", "-o", "p.json"]
    assert cli.main([*line, "--engine-args", json.dumps(engine)]) == 0
    assert load_profile("p.json").measured["dense"]["judged"] == 3
    assert os.path.exists("p.html")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--heads", "3"], "--heads must divide --hidden"),
        (["--contexts", "100"], "--contexts must be multiples of 8"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, more, reason):
    line = [SCRIPT, str(tmp_path / "m"), *TINY, *more]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        train_small_model.parse()
    assert reason in capsys.readouterr().err


def test_a_folder_of_someone_else_s_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path), *TINY])
    with pytest.raises(SystemExit):
        train_small_model.parse()
    assert "exists and was not made by this script" in capsys.readouterr().err


# The tasks


@pytest.fixture(scope="module")
def text():
    return tasks.Text.load(SOURCE, 1 << 20)


def look_up(before: list[int], question: list[int]) -> list[int]:
    """The answer to a question by what stands before it."""
    kind, first, second = question[:3]
    at = range(len(before))
    if kind == tasks.COPY:
        (place,) = {i for i in at if before[i : i + 2] == [first, second]}
        return before[place + 2 : place + 6]
    if kind == tasks.HOP:
        (link,) = {i for i in at if before[i : i + 2] == [tasks.LINK, first]}
        first = before[link + 2]
    (pair,) = {i for i in at if before[i : i + 2] == [tasks.PAIR, first]}
    return before[pair + 2 : pair + 6]


def test_every_answer_stands_before_its_question(text):
    seen = dict.fromkeys((tasks.ASK, tasks.HOP), 0)
    for row in range(4):
        rng = np.random.default_rng([1, row])
        tokens, is_answer = (a.tolist() for a in tasks.make_sequence(rng, text, 1024))
        assert len(tokens) == 1024 and tokens[0] == tasks.BOS
        assert max(tokens) < tasks.VOCAB_SIZE
        assert sum(t < tasks.BYTES for t in tokens) > 400, "source text in between"
        for i, token in enumerate(tokens):
            if token in seen:
                answer = tokens[i + 2 : i + 6]
                assert all(is_answer[i + 2 : i + 6])
                assert look_up(tokens[:i], tokens[i : i + 3]) == answer
                seen[token] += 1
    assert min(seen.values()) > 20


@pytest.mark.parametrize("task", tasks.TASKS)
def test_questions_for_the_scores(text, task):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        prompt, answer = tasks.make_question(rng, text, 512, task)
        start = -3 if task == "copy" else -2
        question = [*prompt[start:].tolist(), 0][:3]
        assert len(prompt) in (507, 508) and len(answer) == tasks.ANSWER
        assert look_up(prompt[:start].tolist(), question) == answer.tolist()


def test_batches_are_functions_of_seed_and_number(text):
    one, two, three = (tasks.make_batch(text, 0, n, 2, 128)[0] for n in (7, 7, 8))
    assert (one == two).all() and (one != three).any()
    assert (tasks.make_batch(text, 1, 7, 2, 128)[0] != one).any()
