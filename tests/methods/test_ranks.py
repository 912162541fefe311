"""One choice of several tensor parallel ranks is that of one rank with all heads."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.rules import rule_of
from tidal_vllm.config import SCOPES, TidalConfig
from tidal_vllm.engine import ranks as engine_ranks
from tidal_vllm.kernels import DecodeArgs, Workspace, choose
from tidal_vllm.methods.ranks import AgreeingRanks
from tidal_vllm.methods.tidaldecode import TidalDecode
from tidal_vllm.plan.rule import num_sets

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, KV_BLOCK, SIZE = 8, 2, 16, 8, 4
RULE = rule_of(24, SIZE, sinks=2, recent=3)
LENS = torch.tensor([70, 41, 0, -1, 64, 12], dtype=torch.int32)
CPU_DEVICE = torch.device("cpu")
CPU = choose(CPU_DEVICE, head_size=HEAD_SIZE, dtype=torch.float32)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


QUERY = random(len(LENS), NUM_HEADS, HEAD_SIZE, seed=1)
KV_CACHE = random(60, NUM_KV_HEADS, KV_BLOCK, 2 * HEAD_SIZE, seed=2)
TABLE = torch.randperm(60, generator=torch.Generator().manual_seed(3))
TABLE = TABLE[: len(LENS) * 9].int().view(len(LENS), 9)


def chosen(scope, rank, size, ranks=None):
    """The sets of one of `size` ranks, `[num_rows, its sets, 6]`; -7: untouched."""
    heads, kv_heads = NUM_HEADS // size, max(NUM_KV_HEADS // size, 1)
    first_kv = rank * NUM_KV_HEADS // size
    query = QUERY[:, rank * heads : (rank + 1) * heads]
    shape = (len(LENS), num_sets(scope, heads, kv_heads))
    args = DecodeArgs(
        query=query,
        kv_cache=KV_CACHE[:, first_kv : first_kv + kv_heads],
        block_table=TABLE,
        output=torch.zeros_like(query),
        scale=0.7,
        select_block_size=SIZE,
        topk_blocks=torch.full((*shape, 6), -7, dtype=torch.int32),
        topk_lens=torch.full(shape, -7, dtype=torch.int32),
    )
    method = TidalDecode(CPU, RULE, attends_to_chosen=False, ranks=ranks)
    method.select("", args, LENS)
    return args.topk_blocks


def agreeing(monkeypatch, scope, rank, size, sum_over_ranks, **settings):
    """What the engine makes of its configuration for one rank."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=size),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: NUM_KV_HEADS),
    )
    monkeypatch.setattr(engine_ranks, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(
        engine_ranks, "tensor_model_parallel_all_reduce", sum_over_ranks
    )
    return engine_ranks.agreeing_ranks(
        TidalConfig(scope=scope, **settings),
        *(config, NUM_HEADS // size, max(NUM_KV_HEADS // size, 1)),
    )


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_does_not_depend_on_the_number_of_ranks(monkeypatch, scope, size):
    """Also where several ranks have one KV head, and each some of its query heads."""
    masses, apart = [], []

    def put_down(mass):
        masses.append(mass.clone())
        return mass

    for rank in range(size):
        apart.append(agreeing(monkeypatch, scope, rank, size, put_down))
        chosen(scope, rank, size, apart[-1])
    shares = scope == "sequence" or (scope == "kv_head" and size > NUM_KV_HEADS)
    assert [ranks is not None for ranks in apart] == [shares] * size
    assert len(masses) == size * shares
    wanted = chosen(scope, 0, 1)
    together, alone = [], []
    for rank in range(size):
        ranks = agreeing(monkeypatch, scope, rank, size, lambda _: sum(masses))
        together.append(chosen(scope, rank, size, ranks))
        alone.append(chosen(scope, rank, size))
    per_set = size * together[0].shape[1] // wanted.shape[1]
    wanted = wanted.repeat_interleave(per_set, 1)
    assert torch.equal(torch.cat(together, 1), wanted)
    assert torch.equal(torch.cat(alone, 1), wanted) == (not shares)


@pytest.mark.parametrize(("size", "choice"), [(2, "own"), (1, "agreed")])
def test_chooses_by_itself(monkeypatch, size, choice):
    found = agreeing(monkeypatch, "sequence", 0, size, None, rank_choice=choice)
    assert found is None


def test_what_select_blocks_gets_has_one_head_for_each_set():
    """Buffers with a column for each head, and the kernels' others as they were."""
    rows, blocks = 3, 18
    workspace = Workspace.allocate(4, NUM_HEADS, 1, HEAD_SIZE, blocks, CPU_DEVICE)
    workspace.lse.zero_()
    workspace.block_lse.zero_()
    query = torch.zeros(rows, NUM_HEADS, HEAD_SIZE)
    args = DecodeArgs(query, KV_CACHE, TABLE, query, 1.0, workspace)
    args.topk_blocks = torch.zeros(rows, 1, 6, dtype=torch.int32)
    found = AgreeingRanks(1, 0, lambda mass: 2 * mass).weighed(args)
    assert found.query.shape[1] == 1
    assert found.workspace.block_lse.exp().allclose(torch.full((rows, 1, blocks), 16.0))
    assert found.workspace.mass is workspace.mass
    per_head = {n: b for n, b in vars(found.workspace).items() if torch.is_tensor(b)}
    for name, buffer in per_head.items():
        if buffer.dim() == 2:
            assert buffer.shape[0] >= rows and buffer.shape[1] == 1, name
            assert buffer.is_contiguous() and not buffer.any(), name
