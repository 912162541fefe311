"""The same tokens with both model runners, both schedulers, and several ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import engine_kwargs
from .models import EXACT, random_prompt

pytestmark = pytest.mark.timeout(600)

CHILD = Path(__file__).with_name("child.py")
PROMPTS = [random_prompt(n, seed=n) for n in (60, 40, 10)]
MAX_TOKENS = 20
INTERVAL = 5
START = 24


@pytest.fixture(scope="module")
def job(model):
    kwargs = engine_kwargs(EXACT | {"correction_interval": INTERVAL})
    return {
        "kwargs": {"model": str(model)} | kwargs,
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "exact_up_to": START,
    }


def run(folder, jobs, **env):
    """Results of jobs, one after another in one child."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, CHILD, folder / "jobs.json", folder / "results.json"],
        env=inherited | ours | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    return json.loads((folder / "results.json").read_text())


def check(result, wanted):
    assert result["tokens"] == wanted
    counters = result["counters"]
    assert counters["corrections"] >= 4
    assert counters["corrected_tokens"] == INTERVAL * counters["corrections"]
    assert result["left"] == [0, 0, 0]
    # A correction's tokens are prefill to the attention, on every rank.
    decoded = len(PROMPTS) * (MAX_TOKENS - 1) - counters["corrections"]
    assert [w["decode_tokens"] for w in result["workers"]] == [decoded] * len(
        result["workers"]
    )


def test_asynchronous_scheduling(tmp_path, job, dense):
    (result,) = run(tmp_path, [job | {"async": True}])
    assert result["scheduler"] == "TidalAsyncScheduler"
    assert result["ahead"] == 1
    check(result, dense(PROMPTS, MAX_TOKENS))


def test_v2_model_runner(tmp_path, job, dense):
    """Under Triton's interpreter; split corrections too."""
    kwargs = job["kwargs"] | {"max_num_batched_tokens": 7, "max_num_seqs": 3}
    jobs = [job, job | {"async": True}, job | {"kwargs": kwargs}]
    env = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    results = run(tmp_path, jobs, VLLM_USE_V2_MODEL_RUNNER="1", **env)
    names = ["TidalScheduler", "TidalAsyncScheduler", "TidalScheduler"]
    assert [result["scheduler"] for result in results] == names
    assert [result["ahead"] for result in results] == [0, 1, 0]
    assert all(result["v2"] for result in results)
    wanted = dense(PROMPTS, MAX_TOKENS)
    for result in results:
        check(result, wanted)


def test_v2_model_runner_samples_alike(tmp_path, job):
    """Random states and penalties outlive a request's second announcement.

    NOTE: top-k, top-p and min-p are beyond Triton's interpreter.
    """
    samplings = [
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "temperature": 0.8},
    ]
    samplings[1] |= {"presence_penalty": 0.5, "seed": 4}
    off = {"additional_config": {"tidal": EXACT | {"correction_interval": None}}}
    uncorrected = job | {"kwargs": job["kwargs"] | off}
    jobs = [
        kind | {"sampling": sampling}
        for sampling in samplings
        for kind in (uncorrected, job)
    ]
    env = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    results = run(tmp_path, jobs, VLLM_USE_V2_MODEL_RUNNER="1", **env)
    assert all(result["v2"] for result in results)
    answers = [result["tokens"] for result in results]
    assert answers[0] != answers[2]
    for plain, corrected in (results[:2], results[2:]):
        assert plain["counters"]["corrections"] == 0
        check(corrected, plain["tokens"])


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_parallel(tmp_path, job, dense, kind):
    # A pipeline stage needs a SELECT layer of its own.
    settings = EXACT | {"correction_interval": INTERVAL, "select_layers": [1, 2]}
    parallel = {f"{kind}_parallel_size": 2, "distributed_executor_backend": "mp"}
    kwargs = job["kwargs"] | {"additional_config": {"tidal": settings}} | parallel
    (result,) = run(tmp_path, [job | {"kwargs": kwargs, "start_method": "spawn"}])
    assert len(result["workers"]) == 2
    check(result, dense(PROMPTS, MAX_TOKENS))
