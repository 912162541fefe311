"""Drafts on the V2 model runner, a GPU's default: they inherit the target's backend.

Under Triton's interpreter, which runs that runner of vLLM 0.32 alone.
"""

import json

import pytest

from tests.support.models import build_random_model
from tests.support.processes import run_interpreted
from tests.support.speculative_child import NUM_LAYERS, VOCAB_SIZE, assert_alike

pytestmark = pytest.mark.extended
PLAIN = {
    "draft model": "plain",
    "shallow draft": "plain",
    "eagle": "plain",
    "mtp": "plain mixture",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    model = build_random_model(
        folder / "model", "llama", num_hidden_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE
    )
    names = [*PLAIN, *dict.fromkeys(PLAIN.values())]
    log = run_interpreted(
        "tests.support.speculative_child",
        *(model, folder / "results.json", "few", *names),
        v2_runner=True,
    )
    assert log.count("TIDAL sparse decoding of") == len(names)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("speculative", "plain"), PLAIN.items())
def test_answers_are_those_without_a_draft(results, speculative, plain):
    assert_alike(results, speculative, plain)


@pytest.mark.parametrize(("speculative", "plain"), PLAIN.items())
def test_drafts_are_verified_sparsely(results, speculative, plain):
    found, wanted = (results[name]["counters"] for name in (speculative, plain))
    assert found["sparse_steps"] >= 3
    assert found["decode_tokens"] > wanted["decode_tokens"]


@pytest.mark.parametrize("speculative", PLAIN)
def test_layers_that_draft_are_dense(results, speculative):
    """They hold no buffers, and are those that vLLM marks later on."""
    layers = results[speculative]["layers"].values()
    assert sum(drafts for drafts, _ in layers) >= 1
    assert all(drafts is not sparse for drafts, sparse in layers)
