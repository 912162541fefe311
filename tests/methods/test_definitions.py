"""What each method computes, against its definition in plain Python."""

import itertools
import math

import pytest
import torch

from tests.support.rules import rule_of
from tidal_vllm.kernels import DecodeArgs, choose
from tidal_vllm.methods.lessismore import merge_rankings
from tidal_vllm.methods.quest import Quest, share_scores, upper_bounds
from tidal_vllm.methods.sliding_window import SlidingWindow

KV_BLOCK, SIZE, NUM_KV_HEADS, HEAD_SIZE = 8, 4, 2, 3
CPU = choose("cpu", head_size=HEAD_SIZE, dtype=torch.float32)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestMergedRankings:
    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize(("num_sets", "num_heads"), [(1, 4), (2, 3), (5, 1)])
    def test_first_choices_of_all_heads_then_second_ones(
        self, seed, num_sets, num_heads
    ):
        """Ties, NaN and -inf among them; a head without a score lists nothing."""
        rule, seq_lens = rule_of(24, 2, sinks=3, recent=5), [41, 0, 30, -1]
        scores = random(4, num_sets, num_heads, 21, seed=seed).mul(2).round()
        scores[0, 0, 0, 7], scores[0, -1, -1, 9] = math.nan, -math.inf
        if seed % 2:
            scores[0, 0, -1] = math.nan
            scores[0, -1, 0, 5:15] = -math.inf  # fewer scores than room
        scores[2, ..., 15:] = math.inf  # what another layer left
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        found = merge_rankings(scores, lens, rule)
        for row, num_forced in ((0, 5), (2, 5)):
            forced = rule.forced_blocks(seq_lens[row])
            others = {*range(rule.num_blocks(seq_lens[row]))} - {*forced}
            assert len(forced) == num_forced
            room = 12 - num_forced
            for of_set, mass in zip(
                scores[row].tolist(), found[row].tolist(), strict=True
            ):
                lists = []
                for head in of_set:
                    free = [b for b in sorted(others) if head[b] > -math.inf]
                    ranked = sorted(free, key=lambda b, head=head: -head[b])[:room]
                    lists.append(ranked + [None] * (room - len(ranked)))
                places = [b for rank in zip(*lists, strict=True) for b in rank]
                for block, weight in enumerate(mass):
                    listed = block in places
                    assert weight == (-places.index(block) if listed else -math.inf)

    def test_a_budget_that_is_forced_has_no_room(self):
        rule = rule_of(8, 2, sinks=2, recent=5)
        lens = torch.tensor([30], dtype=torch.int32)
        found = merge_rankings(random(1, 1, 2, 15), lens, rule)
        assert (found == -math.inf).all()


class TestBounds:
    def test_are_the_best_that_any_corner_of_the_box_scores(self):
        queries = random(2, 4, HEAD_SIZE, seed=1)
        of_rows = random(2, 5, 6, 2, HEAD_SIZE, seed=2)
        bounds = torch.stack((of_rows.amin(2), of_rows.amax(2)), 3)
        of_row = zip(queries, of_rows, upper_bounds(queries, bounds), strict=True)
        for query, keys, found in of_row:
            low, high = keys.amin(1), keys.amax(1)  # [blocks, kv_heads, D]
            for head, block in itertools.product(range(4), range(5)):
                pairs = zip(
                    query[head].tolist(),
                    low[block, head // 2].tolist(),
                    high[block, head // 2].tolist(),
                    strict=True,
                )
                wanted = sum(max(q * a, q * b) for q, a, b in pairs)
                assert found[head, block].item() == pytest.approx(wanted, abs=1e-5)
                scores = keys[block, :, head // 2] @ query[head]
                assert found[head, block] >= scores.max() - 1e-5

    def test_heads_of_a_set_weigh_alike(self):
        """By the sum of their softmax; far below the best, the order stays."""
        scores = random(4, 30, seed=3) * torch.tensor([1.0, 40.0, 3.0, 0.1])[:, None]
        scores = torch.stack((random(4, 30), scores))
        left_out = torch.zeros(2, 30, dtype=torch.bool)
        left_out[1, [0, 29]] = True

        def of_last_row(scores, num_sets):
            return share_scores(scores, num_sets, left_out)[1, :, 1:29]

        found, scores = of_last_row(scores, 2), scores[1]
        wanted = scores[:, 1:29].double().softmax(1).view(2, 2, 28).sum(1).log()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
        both = torch.stack((random(4, 30), scores))
        assert torch.equal(of_last_row(1e4 * both, 4), 1e4 * scores[:, 1:29])
        both[1, 1, 29] = 1e6  # a draft's key in the newest block
        assert torch.equal(of_last_row(both, 2), found)


class TestBoundsOfWrittenKeys:
    """KV blocks with owners that change, written in pieces, rewound and re-used."""

    @pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
    def test_follow_the_cache(self, layout):
        shape = (6, NUM_KV_HEADS, KV_BLOCK, 2 * HEAD_SIZE)
        stored = torch.full([shape[i] for i in layout], math.nan)
        cache = stored.permute([layout.index(i) for i in range(4)])
        quest = Quest(CPU, rule_of(8, SIZE), attends_to_chosen=True)
        steps = [
            ([0, 5], 0, 13),  # a prompt, in two KV blocks
            ([0, 5], 13, 14),
            ([2], 0, 3),
            ([0, 5], 14, 15),
            ([0, 5], 9, 12),  # a rewind, of which 12.. follows later
            ([2], 3, 8),
            ([5, 1], 0, 10),  # block 5 has another owner now
        ]
        for nth, (blocks, first, end) in enumerate(steps):
            position = torch.arange(first, end)
            slots = torch.tensor(blocks)[position // KV_BLOCK] * KV_BLOCK
            slots += position % KV_BLOCK
            kv = random(end - first, NUM_KV_HEADS, 2 * HEAD_SIZE, seed=nth)
            cache.transpose(1, 2)[slots // KV_BLOCK, slots % KV_BLOCK] = kv
            padded = torch.cat((slots, torch.tensor([-1, -1])))
            quest.keys_written("layer", cache, padded)
            for b in range(first // SIZE, -(-end // SIZE)):
                physical = blocks[b * SIZE // KV_BLOCK]
                inside = b * SIZE % KV_BLOCK
                written = min(end - b * SIZE, SIZE)
                keys = cache[physical, :, inside : inside + written, :HEAD_SIZE]
                bounds = quest.bounds["layer"][physical * 2 + inside // SIZE]
                assert torch.equal(bounds[:, 0], keys.amin(1))
                assert torch.equal(bounds[:, 1], keys.amax(1))


def test_bounds_follow_a_kv_cache_of_another_size():
    """vLLM replaces a small KV cache, in which nothing was written, by the real one."""
    quest = Quest(CPU, rule_of(8, SIZE), attends_to_chosen=True)
    cache = random(6, NUM_KV_HEADS, KV_BLOCK, 2 * HEAD_SIZE)
    quest.keys_written("layer", cache[:1], torch.tensor([-1, -1]))
    quest.keys_written("layer", cache[:1], torch.tensor([0]))
    quest.keys_written("layer", cache, torch.tensor([5 * KV_BLOCK]))
    key = cache[5, :, :1, :HEAD_SIZE]
    assert torch.equal(quest.bounds["layer"][10], key.expand(-1, 2, -1))


def test_heads_of_a_row_weigh_by_its_own_blocks_beside_a_longer_row():
    """In block 0 of the cache, of the longer row, head 0 has far higher bounds."""
    quest = Quest(CPU, rule_of(8, SIZE), attends_to_chosen=True)
    cache = torch.zeros(5, NUM_KV_HEADS, KV_BLOCK, 2 * HEAD_SIZE)
    cache[0, 0, :, 0] = 100.0
    cache[1, 0, :SIZE, 0] = 5.0  # head 0 wants the first block
    cache[1, 1, SIZE:, 0] = 0.4  # head 1 rather has the second one
    quest.keys_written("layer", cache, torch.arange(5 * KV_BLOCK))
    query = torch.zeros(2, NUM_KV_HEADS, HEAD_SIZE)
    query[..., 0] = 1.0
    args = DecodeArgs(
        query=query,
        kv_cache=cache,
        block_table=torch.tensor([[1, 2, 9], [0, 3, 4]], dtype=torch.int32),
        output=query,
        scale=1.0,
        topk_blocks=torch.zeros(2, 1, 2, dtype=torch.int32),
        topk_lens=torch.zeros(2, 1, dtype=torch.int32),
    )
    quest.select("layer", args, torch.tensor([12, 20], dtype=torch.int32))
    assert args.topk_blocks[0].tolist() == [[0, 2]]


def test_a_sliding_window_keeps_sinks_and_the_newest():
    rule = rule_of(12, 4, sinks=4, recent=3)
    topk_blocks = torch.full((4, 2, 3), 77, dtype=torch.int32)
    topk_lens = torch.full((4, 2), 77, dtype=torch.int32)
    args = DecodeArgs(
        query=torch.zeros(4, 2, 4),
        kv_cache=torch.zeros(1, 1, 4, 8),
        block_table=torch.zeros(4, 1, dtype=torch.int32),
        output=torch.zeros(4, 2, 4),
        scale=1.0,
        topk_blocks=topk_blocks,
        topk_lens=topk_lens,
    )
    lens = torch.tensor([41, 12, -1, 0], dtype=torch.int32)
    SlidingWindow(CPU, rule, attends_to_chosen=True).select("layer", args, lens)
    assert topk_blocks[0].tolist() == [[0, 9, 10]] * 2
    assert topk_blocks[1].tolist() == [[0, 1, 2]] * 2
    assert (topk_blocks[2] == 77).all() and (topk_lens[2] == 77).all()
    assert topk_lens[:2].tolist() == [[3, 3]] * 2
    assert topk_lens[3].tolist() == [0, 0]
