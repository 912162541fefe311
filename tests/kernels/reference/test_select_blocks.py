"""select_blocks, and the two functions that it is made of."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import harness, naive
from tests.kernels.batches import law, make_batch
from tests.kernels.harness import selection_args
from tests.support.rules import rule_of
from tidal_vllm.kernels import reference


def forced_at_most(rule):
    size = rule.select_block_size
    recent = max(rule.recent_tokens, 1)
    return -(-rule.sink_tokens // size) + -(-(recent - 1) // size) + 1


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(mass, seq_lens, rule, num_sets, max_blocks=None):
    """The blocks [row][set] that are kept by given masses, one head per set."""
    lse = torch.zeros(mass.shape[:2])
    block_lse = mass.float().log()
    return harness.select(
        reference, block_lse, lse, seq_lens, rule, num_sets, max_blocks
    )


@st.composite
def rules(draw, max_budget_blocks=6):
    size = draw(st.sampled_from((1, 4, 16)))
    budget = draw(st.integers(1, max_budget_blocks)) * size
    rule = rule_of(
        budget,
        size,
        sinks=draw(st.integers(0, budget)),
        recent=draw(st.integers(1, budget)),
        threshold=draw(st.sampled_from((0, budget, 2 * budget))),
    )
    while forced_at_most(rule) > budget // size:
        rule = replace(
            rule,
            sink_tokens=rule.sink_tokens // 2,
            recent_tokens=max(rule.recent_tokens // 2, 1),
        )
    return rule


@st.composite
def problems(draw, max_blocks=14):
    """A rule, lengths and masses; few distinct masses, so ties are common."""
    rule = draw(rules())
    limit = max_blocks * rule.select_block_size
    seq_lens = draw(st.lists(st.integers(0, limit), min_size=1, max_size=3))
    num_sets = draw(st.sampled_from((1, 2, 4)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    levels = draw(st.sampled_from((1, 3, 1000)))
    shape = (len(seq_lens), num_sets, max_blocks)
    mass = torch.randint(0, levels, shape, generator=rng) / levels
    return rule, seq_lens, num_sets, mass


@law
@given(problems())
def test_it_means_what_the_loops_say(problem):
    rule, seq_lens, num_sets, mass = problem
    chosen = run(mass, seq_lens, rule, num_sets)
    seen = mass.float().log().exp()  # the masses as the op computes them
    for row, seq_len in enumerate(seq_lens):
        total = -(-seq_len // rule.select_block_size)
        for i in range(num_sets):
            expected = naive.select(seen[row, i, :total].tolist(), seq_len, rule)
            assert chosen[row][i] == expected


@law
@given(problems())
def test_ascending_without_duplicates_within_budget_forced_included(problem):
    rule, seq_lens, num_sets, mass = problem
    chosen = run(mass, seq_lens, rule, num_sets)
    for seq_len, of_row in zip(seq_lens, chosen, strict=True):
        for blocks in of_row:
            assert blocks == sorted(set(blocks))
            assert len(blocks) == rule.num_kept_blocks(seq_len)
            assert all(0 <= b < rule.num_blocks(seq_len) for b in blocks)
            if seq_len > rule.keep_all_len:
                assert len(blocks) * rule.select_block_size <= rule.token_budget
            assert {*rule.forced_blocks(seq_len)} <= {*blocks}
            if seq_len:
                assert (seq_len - 1) // rule.select_block_size in blocks


@law
@given(problems(max_blocks=9))
def test_no_set_with_the_forced_blocks_holds_more_mass(problem):
    rule, seq_lens, num_sets, mass = problem
    chosen = run(mass, seq_lens, rule, num_sets)
    for row, seq_len in enumerate(seq_lens):
        forced = rule.forced_blocks(seq_len)
        others = [b for b in range(rule.num_blocks(seq_len)) if b not in forced]
        free = rule.num_kept_blocks(seq_len) - len(forced)
        for i in range(num_sets):
            weights = mass[row, i].double()
            best = max(
                float(weights[[*forced, *some]].sum())
                for some in itertools.combinations(others, free)
            )
            assert float(weights[chosen[row][i]].sum()) == pytest.approx(best)


def test_ties_go_to_the_smaller_index():
    mass = torch.tensor([[[1.0, 5, 5, 1, 5, 5, 1, 0]]])
    assert run(mass, [8], rule_of(4, 1), 1) == [[[1, 2, 4, 7]]]
    assert run(torch.ones(1, 1, 9), [9], rule_of(4, 1), 1) == [[[0, 1, 2, 8]]]
    assert run(torch.zeros(1, 1, 9), [9], rule_of(4, 1), 1) == [[[0, 1, 2, 8]]]


def test_the_current_token_is_kept_without_recent_tokens():
    mass = torch.tensor([[[5.0, 4, 3, 2, 1]]])
    assert run(mass, [5], rule_of(2, 1, recent=0), 1) == [[[0, 4]]]


@pytest.mark.parametrize("seq_len", [0, 1, 31, 32, 33, 47, 48])
def test_a_row_up_to_the_threshold_keeps_all_its_blocks(seq_len):
    mass = random(1, 2, 6)
    everything = list(range(-(-seq_len // 16)))
    assert run(mass, [seq_len], rule_of(32, 16, threshold=48), 2) == [[everything] * 2]


def test_a_threshold_below_the_budget_changes_nothing():
    """What fits the budget is kept whole anyhow."""
    mass = random(1, 1, 6)
    assert run(mass, [32], rule_of(32, 16, threshold=5), 1) == [[[0, 1]]]
    assert len(run(mass, [33], rule_of(32, 16, threshold=5), 1)[0][0]) == 2


def test_heads_weigh_alike_whatever_their_lse():
    """Head 0 has e**50 times head 1's sum; its blocks must not win by that."""
    share = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.75, 0.05]]])
    lse = torch.tensor([[50.0, 0.0]])
    block_lse = share.log() + lse[..., None]
    rule = rule_of(2, 1)
    assert harness.select(reference, block_lse, lse, [4], rule) == [[[2, 3]]]


@pytest.mark.parametrize("num_sets", [1, 2, 4, 8])
def test_a_set_sums_the_mass_of_its_own_heads(num_sets):
    batch = make_batch([150, 90], num_kv_heads=2, group=4)
    _, lse, block_lse = harness.dense(reference, batch, 4)
    rule = rule_of(40, 4, sinks=4, recent=8)
    found = harness.select(reference, block_lse, lse, batch.lens, rule, num_sets)
    _, exact_lse, scores = naive.decode(
        batch.query, batch.keys, batch.values, batch.scale
    )
    exact = naive.block_lse(scores, *block_lse.shape, 4) - exact_lse[..., None]
    mass = exact.exp().unflatten(1, (num_sets, -1)).sum(2)
    for row, seq_len in enumerate(batch.seq_lens.tolist()):
        near = mass[row, :, : -(-seq_len // 4)].sort(-1).values.diff().min()
        assert near > 1e-6, "two blocks that rounding could exchange"
        for i in range(num_sets):
            total = -(-seq_len // 4)
            expected = naive.select(mass[row, i, :total].tolist(), seq_len, rule)
            assert found[row][i] == expected
            assert len(expected) == 10


def test_a_batch_permuted_gives_the_selection_permuted():
    mass = random(4, 2, 40)
    lens, rule = [40, 7, 23, 31], rule_of(10, 1, sinks=2, recent=3)
    chosen = run(mass, lens, rule, 2)
    order = [2, 0, 3]
    again = run(mass[order], [lens[i] for i in order], rule, 2)
    assert again == [chosen[i] for i in order]


def test_a_nan_weighs_nothing():
    mass = torch.tensor([[[math.nan, 0.1, math.nan, 0.3, 0.2, 0.0]]])
    assert run(mass, [6], rule_of(3, 1), 1) == [[[3, 4, 5]]]
    assert run(torch.full((1, 1, 6), math.nan), [6], rule_of(3, 1), 1) == [[[0, 1, 5]]]


def test_rows_beyond_the_batch_are_left_alone():
    """Neither their sets nor, where there are more, their lengths are looked at."""
    args = selection_args(torch.zeros(2, 4, 9), torch.zeros(2, 4), max_blocks=3)
    reference.select_blocks(args, torch.tensor([9, 0, 2**20]), rule_of(3, 1))
    assert harness.chosen_blocks(args, [9, 0]) == [[[0, 1, 8]], [[]]]


@pytest.mark.parametrize("lens", [[-1, 9, 0, -9, 7], [-1, -30]])
def test_rows_left_out_stay_as_they_were(lens):
    mass = random(5, 2, 9)
    found = run(mass[: len(lens)], lens, rule_of(3, 1), 2)
    rows = [row for row, seq_len in enumerate(lens) if seq_len >= 0]
    alone = run(mass[rows], [lens[row] for row in rows], rule_of(3, 1), 2)
    assert [of_row for of_row in found if of_row is not None] == alone


def test_too_few_columns_are_refused():
    mass = random(1, 1, 9)
    assert run(mass, [9], rule_of(3, 1), 1, max_blocks=3)
    with pytest.raises(ValueError, match="max_blocks = 2 is too small"):
        run(mass, [9], rule_of(3, 1), 1, max_blocks=2)
    with pytest.raises(ValueError, match="9 tokens keeps 9 blocks of 1"):
        run(mass, [9], rule_of(3, 1, threshold=9), 1, max_blocks=8)


def test_a_budget_without_room_for_the_forced_blocks_is_refused():
    mass = random(1, 1, 4)
    rule = rule_of(32, 16, sinks=1, recent=16)
    assert run(mass, [64], rule, 1) == [[[0, 3]]]
    with pytest.raises(ValueError, match="2 blocks of 16, but 3 are forced at 63"):
        run(mass, [63], rule, 1)


def test_sets_that_do_not_divide_the_heads_are_refused():
    args = selection_args(torch.zeros(1, 4, 9), torch.zeros(1, 4), num_sets=3)
    with pytest.raises(ValueError, match="num_sets = 3 must divide num_heads = 4"):
        reference.select_blocks(args, torch.tensor([9]), rule_of(3, 1))


class TestBlockMass:
    def mass(self, block_lse, lse, num_sets):
        return reference.block_mass(selection_args(block_lse, lse, num_sets))

    def test_a_block_weighs_its_share_of_the_softmax(self):
        """The masses themselves, not only their order."""
        scores = random(2, 4, 5, 8) * 20
        lse = scores.flatten(2).logsumexp(-1)
        found = self.mass(scores.logsumexp(-1), lse, num_sets=2)
        share = scores.double().flatten(2).softmax(-1).view(2, 4, 5, 8).sum(-1)
        wanted = torch.stack([share[:, :2].sum(1), share[:, 2:].sum(1)], 1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
        assert found.sum().item() == pytest.approx(2 * 4)

    def test_a_nan_weighs_nothing(self):
        block_lse = torch.tensor([[[0.0, math.nan], [0.0, 0.0]]])
        assert self.mass(block_lse, torch.zeros(1, 2), 1).tolist() == [[[2.0, 0.0]]]

    def test_the_scores_stay_as_they_were(self):
        block_lse, lse = random(1, 2, 3), random(1, 2)
        before = block_lse.clone(), lse.clone()
        self.mass(block_lse, lse, 2)
        assert torch.equal(block_lse, before[0]) and torch.equal(lse, before[1])


class TestTopBlocks:
    """What a method with masses of its own relies on."""

    def top(self, mass, seq_lens, rule):
        scores = torch.full(mass.shape, math.nan)  # nobody's business here
        args = selection_args(scores, scores[..., 0], mass.shape[1])
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        reference.top_blocks(args, lens, rule, mass)
        return harness.chosen_blocks(args, seq_lens)

    def test_masses_need_not_be_shares(self):
        """Scores, bounds of scores: of any sign, and infinite."""
        mass = torch.tensor([[[-5.0, -1.0, -3.0, -math.inf, -2.0, -9.0]]])
        assert self.top(mass, [6], rule_of(3, 1)) == [[[1, 4, 5]]]
        assert self.top(mass, [6], rule_of(3, 1, sinks=1)) == [[[0, 1, 5]]]
        mass[0, 0, 2] = math.inf
        assert self.top(mass, [6], rule_of(2, 1)) == [[[2, 5]]]

    def test_the_masses_stay_as_they_were(self):
        """The forced blocks are forced in a copy: a method may keep its masses."""
        mass = random(2, 3, 9)
        before = mass.clone()
        self.top(mass, [9, -1], rule_of(4, 1, sinks=2, recent=2))
        assert torch.equal(mass, before)

    def test_more_blocks_than_a_row_has_are_not_looked_at(self):
        mass = torch.tensor([[[0.3, 0.1, 0.2, 0.0, 9.0, math.nan]]])
        assert self.top(mass, [4], rule_of(2, 1)) == [[[0, 3]]]

    def test_each_set_by_its_own_masses(self):
        mass = torch.tensor([[[3.0, 2, 1, 0], [1.0, 2, 3, 0]]])
        assert self.top(mass, [4], rule_of(2, 1)) == [[[0, 3], [2, 3]]]
