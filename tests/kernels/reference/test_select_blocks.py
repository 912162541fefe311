import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.reference import naive
from tests.kernels.reference.cases import law, make_batch
from tidal_vllm.kernels.reference.decode import dense_decode, select_blocks
from tidal_vllm.plan.rule import SelectionRule


def rule_of(budget, size, sinks=0, recent=1, threshold=0):
    return SimpleNamespace(
        token_budget=budget,
        select_block_size=size,
        sink_tokens=sinks,
        recent_tokens=recent,
        sparse_threshold=threshold,
    )


def forced_at_most(rule):
    size = rule.select_block_size
    recent = max(rule.recent_tokens, 1)
    return -(-rule.sink_tokens // size) + -(-(recent - 1) // size) + 1


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(mass, seq_lens, rule, num_sets, capacity=None):
    """Selects by given masses, one head per set; returns [row][set][block] lists.

    None for a row that is left out, which must be as it was.
    """
    num_seqs, num_blocks = len(seq_lens), mass.shape[2]
    blocks = torch.full((num_seqs, num_sets, capacity or num_blocks), 77)
    blocks = blocks.to(torch.int32)
    lens = torch.full((num_seqs, num_sets), 77, dtype=torch.int32)
    select_blocks(
        mass.float().log(),
        torch.zeros(mass.shape[:2]),
        torch.tensor(seq_lens, dtype=torch.int32),
        rule=rule,
        topk_blocks=blocks,
        topk_lens=lens,
    )
    result = []
    for row, seq_len in enumerate(seq_lens):
        if seq_len < 0:
            assert (blocks[row] == 77).all() and (lens[row] == 77).all()
            result.append(None)
            continue
        counts = lens[row].tolist()
        used = [blocks[row, i, :n].tolist() for i, n in enumerate(counts)]
        for i, n in enumerate(counts):
            assert (blocks[row, i, n:] == -1).all(), "tail"
        result.append(used)
    return result


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
        rule.sink_tokens = rule.sink_tokens // 2
        rule.recent_tokens = max(rule.recent_tokens // 2, 1)
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
    policy = SelectionRule(**vars(rule))
    chosen = run(mass, seq_lens, rule, num_sets)
    for seq_len, of_row in zip(seq_lens, chosen, strict=True):
        for blocks in of_row:
            assert blocks == sorted(set(blocks))
            assert len(blocks) == policy.num_kept_blocks(seq_len)
            assert all(0 <= b < policy.num_blocks(seq_len) for b in blocks)
            if seq_len > policy.keep_all_len:
                assert len(blocks) * rule.select_block_size <= rule.token_budget
            assert {*policy.forced_blocks(seq_len)} <= {*blocks}
            if seq_len:
                assert (seq_len - 1) // rule.select_block_size in blocks


@law
@given(problems(max_blocks=9))
def test_no_set_with_the_forced_blocks_holds_more_mass(problem):
    rule, seq_lens, num_sets, mass = problem
    policy = SelectionRule(**vars(rule))
    chosen = run(mass, seq_lens, rule, num_sets)
    for row, seq_len in enumerate(seq_lens):
        forced = policy.forced_blocks(seq_len)
        others = [b for b in range(policy.num_blocks(seq_len)) if b not in forced]
        free = policy.num_kept_blocks(seq_len) - len(forced)
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
    blocks = torch.zeros(1, 1, 2, dtype=torch.int32)
    lens = torch.zeros(1, 1, dtype=torch.int32)
    select_blocks(
        share.log() + lse[..., None],
        lse,
        torch.tensor([4]),
        rule=rule_of(2, 1),
        topk_blocks=blocks,
        topk_lens=lens,
    )
    assert blocks.tolist() == [[[2, 3]]]


@pytest.mark.parametrize("num_sets", [1, 2, 4, 8])
def test_a_set_sums_the_mass_of_its_own_heads(num_sets):
    batch = make_batch([150, 90], num_kv_heads=2, group=4)
    _, lse, block_lse = dense_decode(
        *batch.paged, scale=batch.scale, select_block_size=4
    )
    rule = rule_of(40, 4, sinks=4, recent=8)
    blocks = torch.zeros(2, num_sets, 10, dtype=torch.int32)
    lens = torch.zeros(2, num_sets, dtype=torch.int32)
    select_blocks(
        block_lse,
        lse,
        batch.seq_lens,
        rule=rule,
        topk_blocks=blocks,
        topk_lens=lens,
    )
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
            assert blocks[row, i].tolist() == expected
    assert (lens == 10).all()


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
    blocks = torch.full((5, 1, 3), 42, dtype=torch.int32)
    lens = torch.full((5, 1), 42, dtype=torch.int32)
    select_blocks(
        torch.zeros(2, 4, 9),
        torch.zeros(2, 4),
        torch.tensor([9, 0]),
        rule=rule_of(3, 1),
        topk_blocks=blocks,
        topk_lens=lens,
    )
    assert blocks[:2].tolist() == [[[0, 1, 8]], [[-1, -1, -1]]]
    assert lens[:2].tolist() == [[3], [0]]
    assert (blocks[2:] == 42).all()
    assert (lens[2:] == 42).all()


@pytest.mark.parametrize("lens", [[-1, 9, 0, -9, 7], [-1, -30]])
def test_rows_left_out_stay_as_they_were(lens):
    mass = random(5, 2, 9)
    found = run(mass[: len(lens)], lens, rule_of(3, 1), 2)
    rows = [row for row, seq_len in enumerate(lens) if seq_len >= 0]
    alone = run(mass[rows], [lens[row] for row in rows], rule_of(3, 1), 2)
    assert [of_row for of_row in found if of_row is not None] == alone


def test_too_few_columns_are_refused():
    mass = random(1, 1, 9)
    assert run(mass, [9], rule_of(3, 1), 1, capacity=3)
    with pytest.raises(ValueError, match="max_blocks = 2 is too small"):
        run(mass, [9], rule_of(3, 1), 1, capacity=2)
    with pytest.raises(ValueError, match="9 tokens keeps 9 blocks of 1"):
        run(mass, [9], rule_of(3, 1, threshold=9), 1, capacity=8)


def test_a_budget_without_room_for_the_forced_blocks_is_refused():
    mass = random(1, 1, 4)
    rule = rule_of(32, 16, sinks=1, recent=16)
    assert run(mass, [64], rule, 1) == [[[0, 3]]]
    with pytest.raises(ValueError, match="2 blocks of 16, but 3 are forced at 63"):
        run(mass, [63], rule, 1)


def test_sets_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="num_sets = 3 must divide num_heads = 4"):
        select_blocks(
            torch.zeros(1, 4, 9),
            torch.zeros(1, 4),
            torch.tensor([9]),
            rule=rule_of(3, 1),
            topk_blocks=torch.zeros(1, 3, 9, dtype=torch.int32),
            topk_lens=torch.zeros(1, 3, dtype=torch.int32),
        )
