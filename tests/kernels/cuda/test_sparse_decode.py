"""sparse_decode: attention to the chosen blocks, and to nothing else."""

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.cases import (
    CASES,
    EVERY,
    KernelCase,
    assert_lse,
    assert_output,
    exact_of,
    make_sets,
    positions_of,
    run_sparse,
)
from tests.kernels.exact import half_unit
from tidal_vllm.kernels.reference import merge_states


def check(kernels, case, batch, blocks, lens):
    got = run_sparse(kernels, batch, case, blocks, lens)
    counts = lens.where(batch.seq_lens[:, None] >= 0, 0)
    wanted = exact_of(batch, case, positions_of(case, blocks, counts))
    assert_output(got, wanted, batch)
    assert_lse(got, wanted, batch)
    rows = batch.seq_lens >= 0
    assert (got["output"][rows][wanted.lse[rows] == -math.inf] == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_it_means_what_the_reference_says(kernels, name):
    case = CASES[name]
    batch = case.make()
    check(kernels, case, batch, *make_sets(batch, case, "sequence"))


@pytest.mark.extended
@pytest.mark.parametrize(
    "name, scope",
    [
        ("Llama-3 heads, 32 on 8", "kv_head"),
        ("Qwen2.5-7B heads, 28 on 4, group 7", "query_head"),
        ("multi-query, 20 on 1: a second tile of four", "query_head"),
        ("fp8, head size 64", "kv_head"),
        ("every edge, single tokens", "query_head"),
        ("selection blocks of 48 in 96", "kv_head"),
    ],
)
def test_every_scope(kernels, name, scope):
    case = CASES[name]
    batch = case.make()
    check(kernels, case, batch, *make_sets(batch, case, scope))


@pytest.mark.extended
@pytest.mark.parametrize("num_sets", [2, 8])
def test_sets_that_are_no_scope(kernels, num_sets):
    """Several KV heads on one set, and several sets within a KV head."""
    case = KernelCase(8, 4, 64)
    batch = case.make()
    blocks, lens = make_sets(batch, case, "query_head")
    check(kernels, case, batch, blocks[:, :num_sets], lens[:, :num_sets])


@pytest.mark.extended
@pytest.mark.parametrize("splits, size", [(2, 1), (5, 16), (32, 1)])
def test_any_number_of_splits(kernels, splits, size):
    case = KernelCase(
        4, 2, 64, lens=(900, 300, 0), splits=splits, select_block_size=size
    )
    batch = case.make()
    check(kernels, case, batch, *make_sets(batch, case, "kv_head", most=700))


def test_sets_of_one_row_that_are_split_differently(kernels):
    """Into five and three; each head group counts its own splits to the end."""
    case = KernelCase(4, 2, 64, lens=(900,), splits=5)
    batch = case.make()
    blocks, _ = all_blocks(case, 2)
    check(kernels, case, batch, blocks, torch.tensor([[57, 20]], dtype=torch.int32))


def all_blocks(case: KernelCase, num_sets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_blocks and topk_lens of sets that hold every block."""
    counts = [-(-n // case.select_block_size) for n in case.lens]
    rows = torch.arange(max(counts), dtype=torch.int32).expand(
        len(counts), num_sets, -1
    )
    lens = torch.tensor(counts, dtype=torch.int32)[:, None].repeat(1, num_sets)
    return rows.contiguous(), lens


@pytest.mark.extended
def test_the_order_within_a_set_changes_nothing(kernels):
    case = KernelCase(4, 2, 64, lens=(500,))
    batch = case.make()
    blocks, lens = make_sets(batch, case, "kv_head")
    lens[:] = 20
    blocks[0, :, :20] = torch.randperm(32)[:20].to(torch.int32)
    check(kernels, case, batch, blocks, lens)
    blocks[0, :, :20] = blocks[0, :, :20].flip(-1)
    check(kernels, case, batch, blocks, lens)


@pytest.mark.extended
def test_two_disjoint_sets_merged_are_their_union(kernels):
    case = KernelCase(4, 2, 64, dtype=torch.float16, lens=(500, 90))
    batch = case.make()
    blocks, lens = all_blocks(case, 2)
    lens[:] = torch.tensor([[32, 32], [6, 6]])
    even, odd = blocks[:, :, ::2], blocks[:, :, 1::2]
    even, odd = even.contiguous(), odd.contiguous()
    parts = [run_sparse(kernels, batch, case, b, lens // 2) for b in (even, odd)]
    states = [part[name] for part in parts for name in ("output", "lse")]
    merged = dict(zip(("output", "lse"), merge_states(*states), strict=True))
    wanted = exact_of(batch, case)
    # The two outputs were rounded; they are no larger than the largest value.
    largest = max(float(v.abs().max()) for v in batch.values)
    wanted.output_error.add_(half_unit(torch.tensor(largest), case.dtype))
    assert_output(merged, wanted, batch)
    assert_lse(merged, wanted, batch)


@pytest.mark.extended
def test_a_batch_permuted_gives_the_results_permuted_bit_for_bit(kernels):
    case = KernelCase(4, 2, 64, lens=(700, 0, 33, 300))
    batch = case.make()
    blocks, lens = make_sets(batch, case, "kv_head")
    first = run_sparse(kernels, batch, case, blocks, lens)
    order = [3, 1, 0, 2]
    permuted = replace(case, lens=tuple(case.lens[i] for i in order))
    again = run_sparse(kernels, batch.rows(order), permuted, blocks[order], lens[order])
    assert torch.equal(again["output"], first["output"][order])
    assert torch.equal(again["lse"], first["lse"][order])


@pytest.mark.extended
def test_a_padded_row_ignores_its_stale_set(kernels):
    case = KernelCase(4, 2, 64, lens=(0, 40))
    batch = case.make()
    blocks, lens = make_sets(batch, case, "sequence")
    lens[0] = 3
    blocks[0, 0, :3] = torch.tensor([5, 900, 7])
    got = run_sparse(kernels, batch, case, blocks, lens)
    assert (got["output"][0] == 0).all()
    assert (got["lse"][0] == -math.inf).all()


def test_blocks_past_the_end_hold_nothing(kernels):
    case = KernelCase(4, 2, 64, lens=(40,))
    batch = case.make()
    blocks = torch.tensor([[[1, 50, 2, 3]]], dtype=torch.int32)
    lens = torch.tensor([[4]], dtype=torch.int32)
    check(kernels, case, batch, blocks, lens)
    blocks[0, 0] = torch.tensor([3, 4, 5, 6])
    got = run_sparse(kernels, batch, case, blocks, lens)
    assert (got["output"] == 0).all()
    assert (got["lse"] == -math.inf).all()
