"""The same tokens with both model runners, both schedulers, and several ranks."""

import pytest

from tests.support.drifting import EXACT
from tests.support.engines import SMALL_ENGINE, engine_kwargs
from tests.support.models import random_prompt
from tests.support.processes import INTERPRETER, run_child

pytestmark = pytest.mark.extended

PROMPTS = [random_prompt(n, seed=n) for n in (60, 40, 10)]
MAX_TOKENS = 20
INTERVAL = 5
START = 24


@pytest.fixture(scope="module")
def job(drifting):
    kwargs = engine_kwargs(EXACT | {"correction_interval": INTERVAL}, **SMALL_ENGINE)
    return {
        "kwargs": {"model": str(drifting)} | kwargs,
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "exact_up_to": START,
    }


def run(folder, jobs, **env):
    """Results of named jobs, one after another in one child."""
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    results = run_child(folder, [*jobs.values()], **env)
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
    folder = tmp_path_factory.mktemp("v2")
    results = run(folder, jobs, VLLM_USE_V2_MODEL_RUNNER="1", **INTERPRETER)
    assert all(result["scheduler"]["v2"] for result in results.values())
    return results


def check(result, wanted):
    assert result["tokens"] == wanted
    scheduler = result["scheduler"]
    counters = scheduler["counters"]
    assert counters["corrections"] >= 4
    assert counters["corrected_tokens"] == INTERVAL * counters["corrections"]
    assert scheduler["left"] == [0, 0, 0]
    # A correction's tokens are prefill to the attention, on every rank.
    decoded = len(PROMPTS) * (MAX_TOKENS - 1) - counters["corrections"]
    assert {w["decode_tokens"] for w in result["counters"]} == {decoded}


def test_asynchronous_scheduling(v1, dense_answers):
    scheduler = v1["async"]["scheduler"]
    assert (scheduler["name"], scheduler["ahead"]) == ("TidalAsyncScheduler", 1)
    check(v1["async"], dense_answers(PROMPTS, MAX_TOKENS))


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_parallel(v1, dense_answers, kind):
    assert len(v1[kind]["counters"]) == 2
    check(v1[kind], dense_answers(PROMPTS, MAX_TOKENS))


@pytest.mark.parametrize("name", ["sync", "async", "split"])
def test_v2_model_runner(v2, dense_answers, name):
    scheduler = v2[name]["scheduler"]
    kind = ("TidalAsyncScheduler", 1) if name == "async" else ("TidalScheduler", 0)
    assert (scheduler["name"], scheduler["ahead"]) == kind
    check(v2[name], dense_answers(PROMPTS, MAX_TOKENS))


def test_v2_model_runner_samples_alike(v2):
    for name in SAMPLINGS:
        plain = v2[f"plain {name}"]
        assert plain["scheduler"]["counters"]["corrections"] == 0
        check(v2[name], plain["tokens"])
    seeded, penalised = (v2[name]["tokens"] for name in SAMPLINGS)
    assert seeded != penalised
