"""select_blocks: exactly the sets that its definition names, and the reference's."""

import math
from unittest.mock import Mock

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels import naive
from tests.kernels.conftest import INTERPRETED
from tests.kernels.harness import KEPT, batch_on, dense, select, selection_args
from tests.support.rules import rule_of
from tidal_vllm.kernels import reference


def chosen_on(kernels, device, scores, lens, rule, num_sets=1):
    """The blocks that are kept on a device, as many as the rule says.

    Args:
        scores: block_lse and lse.
    """
    kept = [rule.num_kept_blocks(max(n, 0)) for n in lens]
    scores = [tensor.to(device) for tensor in scores]
    most = max(rule.budget_blocks, rule.num_blocks(rule.keep_all_len))
    found = select(kernels, *scores, lens, rule, num_sets, most + 3)
    for of_row, count, seq_len in zip(found, kept, lens, strict=True):
        assert (of_row is None) == (seq_len < 0)
        assert of_row is None or all(len(blocks) == count for blocks in of_row)
    return found


def scores_of(masses: torch.Tensor, num_heads: int, shift: bool = False):
    """block_lse and lse whose masses are `masses` [rows, sets, blocks] times heads.

    All heads of a set see the same, so equal masses stay equal bit for bit.
    """
    per_head = (
        masses.float().log().repeat_interleave(num_heads // masses.shape[1], dim=1)
    )
    lse = torch.zeros(per_head.shape[:2])
    if shift:
        lse += torch.arange(num_heads) * 8.0 - 100.0
    return per_head + lse[..., None], lse


def random_masses(lens, num_sets, num_blocks, rule, most=40, seed=0):
    """Whole numbers, many of them equal; NaN past a row's last block."""
    rng = torch.Generator().manual_seed(seed)
    masses = torch.randint(0, most, (len(lens), num_sets, num_blocks), generator=rng)
    masses = masses.float()
    for row, seq_len in enumerate(lens):
        masses[row, :, rule.num_blocks(max(seq_len, 0)) :] = math.nan
    return masses


def expected(masses, lens, rule):
    return [
        None
        if n < 0
        else [
            naive.select(one[: rule.num_blocks(n)].tolist(), n, rule)
            for one in masses[row]
        ]
        for row, n in enumerate(lens)
    ]


extended = pytest.mark.extended
# With the number of sets.
RULES = {
    "tokens": (rule_of(32, sinks=4, recent=8), 2),
    "sinks in two blocks": (rule_of(160, 16, sinks=20, recent=1), 1),
    "blocks of 16": (rule_of(160, 16, sinks=4, recent=40), 4),
    "blocks of 3": (rule_of(30, 3, sinks=4, recent=7), 1),
    "forced fill the budget": (rule_of(48, 16, sinks=4, recent=12), 2),
    "one block": (rule_of(16, 16), 1),
    "threshold above the budget": (rule_of(64, 16, sinks=4, threshold=300), 1),
    "threshold below the budget": (rule_of(64, 16, sinks=4, threshold=10), 1),
}


class TestExactSets:
    @pytest.mark.parametrize("rule, num_sets", RULES.values(), ids=RULES)
    def test_against_the_definition(self, kernels, device, rule, num_sets):
        budget, size = rule.token_budget, rule.select_block_size
        lens = [-1, 0, 1, size, budget - 1, budget, budget + 1, -(2**31)]
        lens += [budget + size, 2 * budget]
        lens += [rule.keep_all_len, rule.keep_all_len + 1, 7 * budget + 5]
        num_blocks = rule.num_blocks(max(lens)) + 1
        masses = random_masses(lens, num_sets, num_blocks, rule)
        scores = scores_of(masses, 4, shift=True)
        found = chosen_on(kernels, device, scores, lens, rule, num_sets)
        assert found == expected(masses, lens, rule)

    @pytest.mark.parametrize("most", [1, 3], ids=["zeros", "three values"])
    def test_ties_go_to_the_smaller_index(self, kernels, device, most):
        rule = rule_of(48, sinks=2, recent=5)
        masses = random_masses([200, 131], 2, 200, rule, most)
        found = chosen_on(kernels, device, scores_of(masses, 2), [200, 131], rule, 2)
        assert found == expected(masses, [200, 131], rule)

    @extended
    @pytest.mark.parametrize(
        "seq_len, most", [(512, 500), (513, 2), (1025, 2), (2560, 500)]
    )
    def test_more_blocks_than_a_tile(self, kernels, device, monkeypatch, seq_len, most):
        """The same in several tiles, by making them small where that can be done."""
        small_tiles(monkeypatch, device)
        rule = rule_of(40, sinks=3, recent=6)
        masses = random_masses([seq_len] * 2, 1, seq_len, rule, most)
        found = chosen_on(kernels, device, scores_of(masses, 3), [seq_len] * 2, rule)
        assert found == expected(masses, [seq_len] * 2, rule)

    @extended
    def test_a_million_tokens(self, kernels, device):
        """Of many blocks that weigh the same, some are kept: those of small indices."""
        lens, rule = [2**20 - 5], rule_of(16384, 4, sinks=4, recent=1024)
        masses = random_masses(lens, 1, 2**18, rule, most=300)
        found = chosen_on(kernels, device, scores_of(masses, 1), lens, rule)
        assert found == expected(masses, lens, rule)

    @pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")
    @pytest.mark.parametrize("scale, passes", [(0, 6), (1, 2), (2**-8, 1)])
    def test_a_row_is_read_few_times(self, kernels, device, monkeypatch, scale, passes):
        """Once for each digit: up to three of masses, three of equal masses' blocks.

        Of masses from 2**-56 to 2**8 the first digit is counted while they are weighed.
        Two digits tell these masses apart.
        """
        small_tiles(monkeypatch, device)
        counted = Mock(wraps=InterpreterBuilder().create_histogram)
        monkeypatch.setattr(InterpreterBuilder, "create_histogram", counted)
        rule = rule_of(64, sinks=3, recent=6)
        rng = torch.Generator().manual_seed(0)
        masses = torch.randperm(2560, generator=rng)[None, None] * float(scale)
        found = chosen_on(kernels, device, scores_of(masses, 1), [2560], rule)
        assert found == expected(masses, [2560], rule)
        assert 0 < counted.call_count <= passes * 2560 // 512

    @extended
    def test_a_set_keeps_many_tiles_of_blocks(self, kernels, device, monkeypatch):
        small_tiles(monkeypatch, device)
        lens, rule = [1400, 1900], rule_of(1100, threshold=1600)
        masses = random_masses(lens, 1, 1900, rule)
        found = chosen_on(kernels, device, scores_of(masses, 1), lens, rule)
        assert found == expected(masses, lens, rule)

    def test_tiny_and_huge_masses_keep_their_order(self, kernels, device):
        rule = rule_of(4)
        block_lse = torch.tensor([-1e30, -60.0, -70.0, -50.0, 80.0, 70.0, -math.inf, 0])
        scores = block_lse[None, None], torch.zeros(1, 1)
        found = chosen_on(kernels, device, scores, [8], rule)
        assert found == [[[3, 4, 5, 7]]]

    def test_masses_too_large_for_a_float_are_equal(self, kernels, device):
        rule = rule_of(3)
        block_lse = torch.tensor([1.0, 100.0, 200.0, math.inf, 80.0, 0.0])
        scores = block_lse[None, None], torch.zeros(1, 1)
        found = chosen_on(kernels, device, scores, [6], rule)
        assert found == [[[1, 2, 5]]]

    def test_a_nan_weighs_nothing(self, kernels, device):
        rule = rule_of(3)
        block_lse = torch.zeros(1, 2, 8)
        block_lse[0, :, 2] = 1.0
        block_lse[0, 1, :2] = math.nan
        scores = block_lse, torch.zeros(1, 2)
        found = chosen_on(kernels, device, scores, [8], rule)
        assert found == [[[2, 3, 7]]]

    def test_heads_weigh_alike_after_their_softmax(self, kernels, device):
        """Block 1 has the larger scores, block 0 the larger share of its heads."""
        rule = rule_of(2)
        block_lse = torch.tensor(
            [[[0.0, -9.0, -9.0], [0.0, -9.0, -9.0], [50, 90, 0.0]]]
        )
        lse = torch.tensor([[0.1, 0.1, 90.0]])
        found = chosen_on(kernels, device, (block_lse, lse), [3], rule)
        assert found == [[[0, 2]]]

    def test_heads_are_summed_in_parts(self, kernels, device, monkeypatch):
        """Each head has its own masses; a set, more heads than are loaded at once."""
        if device.type == "cpu":
            launch = "tidal_vllm.kernels.triton.select"
            monkeypatch.setattr(f"{launch}.MAX_WEIGH_HEADS", 2)
        lens, rule = [150, 90], rule_of(20, sinks=1, recent=2)
        of_head = random_masses(lens, 10, 150, rule, most=2**16)
        masses = of_head.unflatten(1, (2, 5)).sum(2)
        scores = of_head.log(), torch.zeros(2, 10)
        found = chosen_on(kernels, device, scores, lens, rule, num_sets=2)
        assert found == expected(masses, lens, rule)

    def test_all_rows_left_out(self, kernels, device):
        scores = torch.zeros(2, 2, 5), torch.zeros(2, 2)
        assert chosen_on(kernels, device, scores, [-1, -5], rule_of(4)) == [None, None]

    def test_an_empty_batch(self, kernels, device):
        scores = torch.zeros(0, 2, 5), torch.zeros(0, 2)
        assert chosen_on(kernels, device, scores, [], rule_of(4)) == []

    def test_what_has_no_room_is_left_out(self, kernels, device):
        """The config rules it out; memory behind the buffer stays as it is."""
        if kernels.__name__.endswith(".cuda"):
            pytest.skip("a precondition there")
        rule = rule_of(8)
        masses = random_masses([20, 6], 1, 20, rule)
        scores = [tensor.to(device) for tensor in scores_of(masses, 1)]
        args = selection_args(*scores, max_blocks=9)
        whole, args.topk_blocks = args.topk_blocks, args.topk_blocks[..., :4]
        lens = torch.tensor([20, 6], dtype=torch.int32, device=device)
        kernels.select_blocks(args, lens, rule)
        assert args.topk_lens[:2].flatten().tolist() == [4, 4]
        assert (whole[..., 4:] == KEPT).all()
        args.topk_blocks = whole[..., :0]
        kernels.select_blocks(args, lens, rule)
        assert not args.topk_lens[:2].any() and not args.workspace.digit_counts.any()
        assert whole[1, 0, :4].tolist() == [0, 1, 2, 3]


def small_tiles(monkeypatch, device) -> None:
    if device.type == "cpu":
        launch = "tidal_vllm.kernels.triton.select"
        monkeypatch.setattr(f"{launch}.CHOOSE_TILE", 512)
        monkeypatch.setattr(f"{launch}.MAX_WEIGH_BLOCKS", 64)


@extended
class TestAfterDenseDecode:
    RULE = rule_of(96, 16, sinks=4, recent=20)

    def test_captures_what_the_reference_captures(self, kernels, device):
        lens = (400, 0, 96, 333)
        batch = batch_on(device, lens, num_kv_heads=2, group=3, head_size=64)
        _, lse, block_lse = dense(kernels, batch, 16)
        given = (lens, self.RULE, 2)
        found = chosen_on(kernels, device, (block_lse, lse), *given)
        block_lse, lse = block_lse.cpu(), lse.cpu()
        wanted = select(reference, block_lse, lse, *given)
        mass = (block_lse - lse[..., None]).exp()
        mass = mass.view(4, 2, -1, mass.shape[2]).sum(2)
        for row in range(4):
            for i in range(2):
                ours, exact = found[row][i], wanted[row][i]
                assert len(ours) == len(exact)
                captured, best = mass[row, i, ours].sum(), mass[row, i, exact].sum()
                assert abs(captured - best) <= 1e-6 * best
