"""How many tokens to draft: as many as read least for each token that is kept."""

import itertools

import pytest

from tidal_vllm.plan.draft_length import (
    ENOUGH,
    Acceptance,
    StepCosts,
    best_draft_length,
    gain,
)

# An 8B model with 16-bit weights, 128 KiB of KV per token, 10 % of the context kept.
WEIGHTS, TOKEN = 16e9, 131072


def costs(*lens, weights=WEIGHTS):
    return StepCosts.of_batch(weights, TOKEN, lens, [n // 10 for n in lens], 0.05)


def brute_force(survival, cost):
    """Tokens per byte, step by step: each draft length's expectation, enumerated."""
    found = {0: 1 / cost.dense}
    for length in range(1, len(survival) + 1):
        chances = [1.0, *survival[:length], 0.0]
        kept = [a - b for a, b in itertools.pairwise(chances)]
        tokens = sum((n + 1) * chance for n, chance in enumerate(kept))
        found[length] = tokens / (cost.verify + length * cost.draft)
    return max(found, key=found.get), found


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("lens", [(1000,), (32768,), (32768,) * 64, (131072, 900)])
def test_the_length_is_the_best_of_all(rate, lens):
    survival = [rate ** (n + 1) for n in range(16)]
    cost = costs(*lens)
    best, found = brute_force(survival, cost)
    enough = found[best] / found[0] >= ENOUGH
    assert best_draft_length(survival, cost) == (best if enough else 0)
    for length in range(1, 17):
        wanted = found[length] / found[0]
        assert gain(survival, cost, length) == pytest.approx(wanted)


def test_drafts_pay_where_kv_is_most_of_what_is_read():
    survival = [0.9 ** (n + 1) for n in range(16)]
    lengths = [best_draft_length(survival, costs(*[n] * 16)) for n in (1000, 32768)]
    assert lengths[0] == 0
    assert lengths[1] >= 3


def test_what_a_batch_reads():
    cost = costs(1000, 3000, weights=1e9)
    assert cost.dense == 1e9 + 4000 * TOKEN
    assert cost.draft == 1e9 + 400 * TOKEN
    assert cost.verify == cost.dense + 200 * TOKEN


def test_acceptance_is_a_mean_at_first():
    seen = Acceptance.unknown(2)
    for kept in (1, 0, 1, 2):
        seen.count(2, kept)
    assert seen.rates == pytest.approx([(4 * 0.9 + 3) / 8, (4 * 0.9 + 1) / 7])


def test_acceptance_follows_what_is_kept():
    seen = Acceptance.unknown(4)
    assert seen.survival == pytest.approx([0.9, 0.81, 0.729, 0.6561])
    for _ in range(400):
        seen.count(3, 1)
    assert seen.rates == pytest.approx([1, 0, 0.9, 0.9], abs=1e-3)
    assert seen.survival == pytest.approx([1, 0, 0, 0], abs=1e-3)
    for _ in range(400):
        seen.count(4, 4)
    assert seen.survival == pytest.approx([1] * 4, abs=2e-3)


def test_a_failure_is_forgotten_while_nothing_is_drafted():
    """A draft is tried again some hundred steps later, and one failure ends it."""
    seen, cost = Acceptance.unknown(8), costs(*[32768] * 16)
    assert best_draft_length(seen.survival, cost) > 0
    for _ in range(100):
        seen.count(1, 0)
    steps = 0
    while not best_draft_length(seen.survival, cost):
        seen.rest()
        steps += 1
    assert 100 < steps < 1000
    seen.count(best_draft_length(seen.survival, cost), 0)
    assert not best_draft_length(seen.survival, cost)
