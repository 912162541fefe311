"""The same tokens through every way vLLM spreads an engine over processes."""

import tempfile

import pytest

from tests.support.asking import generate, tokens
from tests.support.engines import engine_kwargs
from tests.support.models import MAX_LEN, ROLES, random_prompt
from tests.support.processes import run_child
from tidal_vllm.planted import make_prompt

pytestmark = pytest.mark.extended

PROMPTS = [random_prompt(n, seed=n) for n in (300, 20, 90)]
MAX_TOKENS = 12
# Exact, on the sparse path over all blocks; a SELECT layer on each of two stages.
EXACT = ROLES | {"token_budget": MAX_LEN, "min_sparse_len": 0}


@pytest.fixture(scope="module")
def exact(engine, random_llama):
    """A job, and the tokens that the dense engine of one process gives."""
    job = {"kwargs": {"model": str(random_llama)} | engine_kwargs(EXACT)}
    job |= {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    return job, tokens(generate(engine(random_llama), PROMPTS, MAX_TOKENS))


@pytest.fixture(scope="module")
def sparse(planted):
    """A job with a small budget, and the planted answers."""
    spec, folder = planted(hops=2)
    prompts = [make_prompt(spec, 800, depth, seed=9) for depth in (0.1, 0.6)]
    settings = {
        "dense_layers": list(spec.dense_layers),
        "select_layers": [*spec.select_layers[:1], 4, *spec.select_layers[1:]],
        "token_budget": 64,
    }
    job = {
        "kwargs": {"model": str(folder)} | engine_kwargs(settings),
        "prompts": [prompt.prompt_token_ids for prompt in prompts],
        "max_tokens": len(prompts[0].answer_token_ids),
    }
    return job, [prompt.answer_token_ids for prompt in prompts]


def check(results, *cases):
    for result, (_, wanted) in zip(results, cases, strict=True):
        assert result["tokens"] == wanted
        for counted in result["counters"]:
            assert counted["sparse_steps"] > 0
            assert counted["dense_steps"] == 0


def arranged(case, start_method, **parallel):
    """The case's job, spread over processes started in some way."""
    job, _ = case
    kwargs = job["kwargs"] | parallel
    return job | {"kwargs": kwargs, "start_method": start_method}


def test_engine_core_in_a_process_of_its_own(tmp_path, exact):
    """Spawned, then forked."""
    jobs = [arranged(exact, "spawn"), arranged(exact, "fork")]
    check(run_child(tmp_path, jobs), exact, exact)


def test_parallel(tmp_path, exact, sparse):
    """Tensor: one KV head and half of the query heads on each rank.

    Pipeline: half of the layers, with a SELECT layer of their own, on each rank.
    """
    executor = {"distributed_executor_backend": "mp"}
    tensor = executor | {"tensor_parallel_size": 2}
    pipeline = executor | {"pipeline_parallel_size": 2}
    jobs = [
        arranged(exact, "spawn", **tensor),
        arranged(sparse, "fork", **tensor),
        arranged(exact, "fork", **pipeline),
        arranged(sparse, "fork", **pipeline),
    ]
    results = run_child(tmp_path, jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert [len(result["counters"]) for result in results] == [2, 2, 2, 2]
    check(results, exact, sparse, exact, sparse)


@pytest.mark.serial
def test_ray(tmp_path, exact):
    """Tensor parallel over Ray's actors: the config travels by cloudpickle."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ray>=2.48'")
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    job = arranged(exact, "spawn", **parallel) | {"ray": 2}
    # NOTE: Ray makes sockets there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        results = run_child(
            tmp_path,
            [job],
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            RAY_TMPDIR=folder,
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            # A worker's helper unlinks its shared memory; Ray would kill that first.
            RAY_kill_child_processes_on_worker_exit="0",
        )
    assert len(results[0]["counters"]) == 2
    check(results, exact)
