"""The search for SELECT layers, and the rules beside it, on made-up matrices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidal_vllm.calibrate import baselines
from tidal_vllm.calibrate.candidates import (
    LAYER_COST,
    assess,
    best_candidates,
    exhaustive_candidate,
    over_steps,
    stability,
    worth_running,
)


def random_loss(seed: int, num_layers: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((num_layers, num_layers))  # what is not above counts nothing


def hops_loss(num_layers: int, *hops: int) -> np.ndarray:
    """Selections are worth something within a hop's layers only."""
    hop = np.searchsorted(hops, np.arange(num_layers), side="right")
    return np.triu((hop[:, None] != hop[None, :]).astype(float), 1)


def test_assess_by_hand():
    loss = np.arange(25.0).reshape(5, 5)
    found = assess(loss, (1, 3))
    # Layer 2 attends to what 1 selects, layer 4 to what 3 selects.
    assert found.loss == loss[1, 2] + loss[3, 4]
    assert (found.num_full, found.dense) == (3, (0,))
    assert found.score == pytest.approx(found.loss + 3 * LAYER_COST)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_layers=st.integers(2, 8),
    first=st.integers(0, 3),
    extra=st.integers(1, 5),
)
def test_search_is_exhaustive(seed, num_layers, first, extra):
    first = min(first, num_layers - 1)
    full = min(first + extra, num_layers)
    loss = random_loss(seed, num_layers)
    (best,) = best_candidates(loss, full, first)
    wanted = exhaustive_candidate(loss, full, first)
    assert best.loss == pytest.approx(wanted.loss)
    assert best.select == wanted.select
    assert best.num_full == full and best.select[0] >= first


@pytest.mark.parametrize("seed", range(5))
def test_next_best_candidates_come_in_order(seed):
    loss = random_loss(seed, 7)
    found = best_candidates(loss, 4, 1, keep=6)
    layers = range(1, 7)
    everything = [
        assess(loss, select)
        for count in (1, 2, 3)
        for select in itertools.combinations(layers, count)
        if select[0] + count == 4
    ]
    everything.sort(key=lambda one: (one.loss, one.select))
    assert [c.select for c in found] == [c.select for c in everything[:6]]


@pytest.mark.parametrize("hops", [(2,), (2, 6), (2, 5, 9), (2, 3, 4)])
def test_hops_are_found_for_as_many_layers(hops):
    loss = hops_loss(11, *hops)
    (best,) = best_candidates(loss, 2 + len(hops), 2)
    assert best.select == hops and best.loss == 0
    offered = worth_running(loss, 1 - loss, max_select=4, first_select=2)
    assert min(offered).select == hops
    assert [c.num_full for c in offered] == sorted(c.num_full for c in offered)
    cheapest = next(c for c in offered if c.loss == 0)
    assert cheapest.select == hops


def test_what_is_run_is_also_ranked_by_what_is_not_captured_and_by_squares():
    loss, captured = random_loss(7), random_loss(0)
    by_loss = {c.select for n in (3, 4) for c in best_candidates(loss, n, 2, keep=2)}
    by_others = {best_candidates(m, 4, 2)[0].select for m in (1 - captured, loss**2)}
    assert len(by_others - by_loss) == 2, "else they add nothing"
    offered = {c.select for c in worth_running(loss, captured, 2, 2)}
    assert offered >= by_loss | by_others


def test_a_late_first_select_costs_as_much_as_another_one():
    loss = hops_loss(8, 2, 6)
    assert assess(loss, (3, 6)).num_full == assess(loss, (2, 4, 6)).num_full == 5
    assert assess(loss, (3, 6)).score > assess(loss, (2, 6)).score


def test_candidates_run_out():
    assert [c.select for c in best_candidates(random_loss(0, 3), 3, 2, keep=5)] == [
        (2,)
    ]


def test_stability_counts_prompts_that_disagree():
    one, other = hops_loss(8, 2, 4)[None], hops_loss(8, 2, 6)[None]
    (best,) = best_candidates(one[0], 4, 2)
    assert stability([one] * 5, 0.95, best, 2) == 1.0
    assert stability([one, one, one, other], 0.5, best, 2, seed=1) < 1.0
    assert stability([other] * 5, 0.95, best, 2) == 0.0


def test_quantile_is_of_the_worse_end_and_not_interpolated():
    steps = np.arange(10.0).reshape(10, 1, 1)
    parts = [steps[:3], steps[3:]]
    assert over_steps(parts, 0.95)[0, 0] == 9.0
    assert over_steps(parts, 0.05)[0, 0] == 0.0
    assert over_steps(parts, 0.5)[0, 0] in (4.0, 5.0)


# The other rules


def test_evenly_spaced():
    assert baselines.evenly_spaced(12, 2, 2) == (2, 7)
    assert baselines.evenly_spaced(32, 3, 2) == (2, 12, 22)


def test_mean_overlap_takes_the_highest_mean():
    overlap = 1 - hops_loss(8, 2, 5) * 0.5
    assert baselines.mean_overlap(overlap, 2, 2) == (2, 5)
    overlap[2, 3:] = 0.0
    assert baselines.mean_overlap(overlap, 2, 2) == (2, 3)
    assert baselines.mean_overlap(overlap, 1, 2) == (2,)


def test_adjacent_change_takes_the_largest_changes():
    overlap = 1 - hops_loss(9, 2, 4, 7) * 0.5
    overlap[6, 7] = 0.1
    assert baselines.adjacent_change(overlap, 2, 2) == (2, 7)
    assert baselines.adjacent_change(overlap, 3, 2) == (2, 4, 7)
