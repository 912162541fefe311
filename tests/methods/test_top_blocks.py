"""The choice of all rows at once is the reference's, row by row."""

import math

import pytest
import torch

from tests.kernels.harness import KEPT, selection_args
from tests.support.rules import rule_of
from tidal_vllm.kernels import reference
from tidal_vllm.methods import top_blocks
from tidal_vllm.methods.top_blocks import choose_by_mass

RULES = {
    "tokens": rule_of(12, sinks=2, recent=3),
    "sinks in two blocks": rule_of(24, 4, sinks=5, recent=1),
    "recent across blocks": rule_of(32, 4, sinks=0, recent=6),
    "forced fill the budget": rule_of(12, 4, sinks=4, recent=4),
    "one block": rule_of(4, 4, recent=0),
    "threshold above the budget": rule_of(8, 4, threshold=30),
}
NUM_SETS = 3


def masses(lens, rule, seed):
    """Of few values, so that ties are many; NaN behind a row's last block."""
    rng = torch.Generator().manual_seed(seed)
    num_blocks = rule.num_blocks(max(1, *lens))
    shape = (len(lens), NUM_SETS, num_blocks)
    mass = torch.randint(-2, 3, shape, generator=rng).float()
    mass = mass.masked_fill(torch.rand(shape, generator=rng) < 0.3, -math.inf)
    for row, seq_len in enumerate(lens):
        mass[row, :, rule.num_blocks(max(seq_len, 0)) :] = math.nan
    return mass


@pytest.mark.parametrize("limit", [1, 12_000, 1 << 30], ids=["1", "some", "all"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_is_the_references(monkeypatch, rule, limit):
    """However many rows fit into the scratch at once."""
    monkeypatch.setattr(top_blocks, "SCRATCH_LIMIT", limit)
    longest = 3 * rule.keep_all_len + 5
    edges = [rule.token_budget, rule.keep_all_len, rule.keep_all_len + 1]
    rng = torch.Generator().manual_seed(longest)
    for seed in range(20):
        drawn = torch.randint(1, longest, (5,), generator=rng).tolist()
        lens = [0, -1, *drawn, -(2**31), *edges]
        if seed == 0:
            lens = [0, -1, 0]  # nobody chooses
        mass = masses(lens, rule, seed)
        seq_lens = torch.tensor([*lens, 10**6], dtype=torch.int32)  # one row too many
        wanted, found = (
            selection_args(mass, mass[..., 0], NUM_SETS, rule.num_blocks(longest))
            for _ in range(2)
        )
        reference.top_blocks(wanted, seq_lens, rule, mass)

        def given(rows, of_rows, num_blocks, mass=mass):
            assert len(of_rows) == len(mass[rows])
            return mass[rows, :, :num_blocks]

        choose_by_mass(found, seq_lens, rule, given, bytes_per_block=0)
        assert torch.equal(found.topk_blocks, wanted.topk_blocks)
        assert torch.equal(found.topk_lens, wanted.topk_lens)
        assert (found.topk_blocks[1] == KEPT).all()
