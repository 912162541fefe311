"""The same tokens with both model runners, both schedulers, and several ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.correction.harness import engine_kwargs
from tests.engine.correction.models import EXACT, random_prompt
from tests.engine.harness import child_environment

pytestmark = pytest.mark.extended

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
    """Results of named jobs, one after another in one child."""
    (folder / "jobs.json").write_text(json.dumps([*jobs.values()]))
    done = subprocess.run(
        [sys.executable, CHILD, folder / "jobs.json", folder / "results.json"],
        env=child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", **env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    results = json.loads((folder / "results.json").read_text())
    return dict(zip(jobs, results, strict=True))


@pytest.fixture(scope="module")
def v1(tmp_path_factory, job):
    """One engine with the asynchronous scheduler, two of two ranks."""
    # A pipeline stage needs a SELECT layer of its own.
    settings = EXACT | {"correction_interval": INTERVAL, "select_layers": [1, 2]}
    jobs = {}
    for kind in ("tensor", "pipeline"):
        parallel = {f"{kind}_parallel_size": 2, "distributed_executor_backend": "mp"}
        kwargs = job["kwargs"] | {"additional_config": {"tidal": settings}} | parallel
        jobs[kind] = job | {"kwargs": kwargs, "start_method": "fork"}
    jobs["async"] = job | {"async": True}
    return run(tmp_path_factory.mktemp("v1"), jobs)


# Random states and penalties outlive a request's second announcement.
# NOTE: top-k, top-p and min-p are beyond Triton's interpreter.
SAMPLINGS = {
    "seeded": {"temperature": 1.0, "seed": 3},
    "penalties": {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.5,
        "temperature": 0.8,
        "seed": 4,
    },
}


@pytest.fixture(scope="module")
def v2(tmp_path_factory, job):
    """The V2 model runner, under Triton's interpreter; split corrections too."""
    kwargs = job["kwargs"] | {"max_num_batched_tokens": 7, "max_num_seqs": 3}
    jobs = {
        "sync": job,
        "async": job | {"async": True},
        "split": job | {"kwargs": kwargs},
    }
    off = {"additional_config": {"tidal": EXACT | {"correction_interval": None}}}
    uncorrected = job | {"kwargs": job["kwargs"] | off}
    for name, sampling in SAMPLINGS.items():
        jobs[f"plain {name}"] = uncorrected | {"sampling": sampling}
        jobs[name] = job | {"sampling": sampling}
    env = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    folder = tmp_path_factory.mktemp("v2")
    results = run(folder, jobs, VLLM_USE_V2_MODEL_RUNNER="1", **env)
    assert all(result["v2"] for result in results.values())
    return results


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


def test_asynchronous_scheduling(v1, dense):
    assert v1["async"]["scheduler"] == "TidalAsyncScheduler"
    assert v1["async"]["ahead"] == 1
    check(v1["async"], dense(PROMPTS, MAX_TOKENS))


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_parallel(v1, dense, kind):
    assert len(v1[kind]["workers"]) == 2
    check(v1[kind], dense(PROMPTS, MAX_TOKENS))


@pytest.mark.parametrize("name", ["sync", "async", "split"])
def test_v2_model_runner(v2, dense, name):
    scheduler, ahead = ("TidalScheduler", 0)
    if name == "async":
        scheduler, ahead = ("TidalAsyncScheduler", 1)
    assert (v2[name]["scheduler"], v2[name]["ahead"]) == (scheduler, ahead)
    check(v2[name], dense(PROMPTS, MAX_TOKENS))


def test_v2_model_runner_samples_alike(v2):
    for name in SAMPLINGS:
        plain = v2[f"plain {name}"]
        assert plain["counters"]["corrections"] == 0
        check(v2[name], plain["tokens"])
    seeded, penalised = (v2[name]["tokens"] for name in SAMPLINGS)
    assert seeded != penalised
