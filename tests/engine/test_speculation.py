"""Speculative decoding changes no answer: a draft's tokens choose for themselves."""

import json

import pytest

from tests.support.models import build_random_model
from tests.support.processes import run_interpreted
from tests.support.speculative_child import (
    LENGTHS,
    MAX_TOKENS,
    NUM_LAYERS,
    SETTINGS,
    VOCAB_SIZE,
    assert_alike,
)

pytestmark = [pytest.mark.extended, pytest.mark.compat]
BUDGET = SETTINGS["token_budget"]
NAMES = ["plain", "ngram", "draft model", "shallow draft", "eagle", "preempted"]
NAMES += ["plain exact", "other settings", "plain other settings"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculation")
    model = build_random_model(
        folder / "model", "llama", num_hidden_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE
    )
    log = run_interpreted(
        "tests.support.speculative_child",
        *(model, folder / "results.json", "all", *NAMES),
        v2_runner=False,
    )
    return json.loads((folder / "results.json").read_text()) | {"log": log}


@pytest.mark.parametrize(
    ("speculative", "plain"),
    [
        ("ngram", "plain"),
        ("draft model", "plain"),
        ("shallow draft", "plain"),
        ("eagle", "plain"),
        ("preempted", "plain exact"),
        ("other settings", "plain other settings"),
    ],
)
def test_answers_are_those_without_speculation(results, speculative, plain):
    assert_alike(results, speculative, plain)


def test_other_settings_give_other_answers(results):
    """So that the comparison above means something."""
    answers = [
        [answer["token_ids"] for answer in results[name]["answers"]]
        for name in ("plain", "plain other settings", "plain exact")
    ]
    assert answers[0] != answers[1] != answers[2] != answers[0]


@pytest.mark.parametrize("name", ["ngram", "draft model"])
def test_drafts_are_verified_sparsely(results, name):
    """Fewer steps than without, and more rows than tokens."""
    found, plain = results[name], results["plain"]
    assert len(found["scheduled"]) < len(plain["scheduled"])
    assert found["counters"]["sparse_steps"] >= 10
    assert found["counters"]["decode_tokens"] > plain["counters"]["decode_tokens"]
    share = "sparse_context_tokens", "context_tokens"
    read, of = (found["counters"][key] for key in share)
    assert read < 0.5 * of


def test_drafts_of_all_lengths_share_a_batch(results):
    mixed = [{*step} for step in results["ngram"]["scheduled"]]
    assert any({1, 4} <= step for step in mixed)
    assert {1, 2, 3, 4} <= set().union(*mixed)


def test_a_draft_model_is_dense_and_announced_by_no_second_table(results):
    """vLLM makes a config for it, which is not the user's."""
    title = "TIDAL sparse decoding of"
    assert results["log"].count(title) == len(NAMES)
    assert "has no effect" not in results["log"]
    accepted = len(results["plain"]["scheduled"]) - len(
        results["draft model"]["scheduled"]
    )
    assert accepted >= 10  # the model drafts for itself, short of what sparsity loses


def test_the_prefix_cache_gets_clean_blocks_only(results):
    """Prompts, and what was decoded while all blocks were kept.

    A draft is sparse as soon as one of its tokens is, so there may be a block less.
    """
    assert results["ngram"]["scheduler"] == "TidalScheduler"
    for name in ("ngram", "draft model"):
        for cached, length in zip(results[name]["cached"], LENGTHS, strict=True):
            clean = min(max(length, BUDGET), length + MAX_TOKENS - 1)
            assert cached in (clean // 16 * 16, clean // 16 * 16 - 16)
    assert results["ngram"]["left"] == [0, 0]


def test_preempted_requests_come_back(results):
    assert results["preempted"]["preemptions"] > 0
    assert results["preempted"]["counters"]["sparse_steps"] >= 10
    assert results["plain"]["preemptions"] == results["ngram"]["preemptions"] == 0
