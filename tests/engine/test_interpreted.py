"""What a GPU runs, on the CPU: Triton kernels, vLLM's Triton attention, V2 runner.

All of it under Triton's interpreter, in fp16: vLLM's kernel is wrong there in bf16.
What it has to give is what the reference ops give on the V1 runner, in this process.
"""

import json

import pytest

from tests.support.interpreted_child import EXACT, REUSING, WINDOWED, answers, start
from tests.support.models import build_random_model
from tests.support.processes import run_interpreted

pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    slides, full = "sliding_attention", "full_attention"
    return (
        build_random_model(folder / "model", "llama", num_hidden_layers=3),
        build_random_model(
            folder / "windowed",
            "llama",
            num_hidden_layers=4,
            layer_types=[slides, full, full, slides],
            sliding_window=24,
        ),
    )


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreted") / "results.json"
    child = "tests.support.interpreted_child"
    run_interpreted(child, *models, path, v2_runner=True)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def reference(engine, models):
    model, windowed = models
    found = {
        "sparse": answers(start(engine, model, **REUSING)),
        "exact": answers(start(engine, model, **EXACT)),
        "windowed": answers(start(engine, windowed, **WINDOWED), 2),
    }
    return json.loads(json.dumps(found))


def test_everything_is_interpreted(results, reference):
    for name, wanted in reference.items():
        assert results[name]["kernels"] == "triton"
        assert results[name]["dense"] == "TRITON_ATTN"
        assert results[name]["runner"].startswith("vllm.v1.worker.cpu.")
        assert wanted["dense"] == "PyTorch reference ops"
        assert wanted["runner"] == "tidal_vllm.cpu.worker"


def test_exact_where_all_blocks_are_kept(results, reference):
    """Through mixed batches, chunks, a shared prefix, corrections."""
    found, wanted = results["exact"], reference["exact"]
    assert found["corrections"] >= 1
    assert found["counters"]["sparse_steps"] >= 6
    compared = sum(map(compare, found["answers"], wanted["answers"]))
    assert compared >= 20
    assert found["answers"][-1]["num_cached_tokens"] == 32


@pytest.mark.parametrize(("name", "enough"), [("sparse", 20), ("windowed", 12)])
def test_sparse_answers_are_those_of_the_reference(results, reference, name, enough):
    """Windowed: two KV cache groups, the windows run by vLLM's Triton attention."""
    found, wanted = results[name], reference[name]
    assert found["counters"] == wanted["counters"]
    assert found["counters"]["sparse_steps"] >= 6
    compared = sum(map(compare, found["answers"], wanted["answers"]))
    assert compared >= enough


def test_no_kernel_is_first_launched_in_a_request(results):
    """New builders launch what serving will, on rows that are left out."""
    assert len(results["at start"]) >= 3, results["at start"]
    assert results["first in a request"] == []
    assert results["untouched"]


def compare(one, other) -> int:
    """How many tokens of two answers could be compared: all up to a tie."""
    assert one["num_cached_tokens"] == other["num_cached_tokens"]
    steps = zip(one["logprobs"], other["logprobs"], strict=True)
    pairs = zip(one["token_ids"], other["token_ids"], strict=True)
    for index, ((step, wanted), (token, expected)) in enumerate(
        zip(steps, pairs, strict=True)
    ):
        both = step.keys() & wanted.keys()
        assert len(both) >= 2  # the third may tie with the fourth
        for known in both:
            assert step[known] == pytest.approx(wanted[known], abs=0.05)
        if token != expected:
            assert wanted[str(token)] == pytest.approx(max(wanted.values()), abs=0.02)
            return index + 1
    return len(one["token_ids"])


def test_captured_metadata_replays_bit_by_bit(results):
    """With a row of padding, which comes out as zeros; also where ranks agree."""
    replay = results["replay"]
    assert replay["equal"]
    assert replay["agreed"]
    assert replay["padding"] == 0.0
    assert max(replay["differences"]) < 2e-3
