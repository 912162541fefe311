"""dense_decode, and score_blocks, which leaves the same scores without an output."""

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.cases import (
    CASES,
    EVERY,
    SMALL,
    KernelCase,
    assert_output,
    assert_scores,
    exact_of,
    run_dense,
    run_score,
)


def check(kernels, case):
    batch = case.make()
    got, wanted = run_dense(kernels, batch, case), exact_of(batch, case)
    assert_output(got, wanted, batch)
    assert_scores(got, wanted, batch, case)
    assert (got["output"][batch.seq_lens == 0] == 0).all()


def check_score(kernels, case):
    """score_blocks over values that are all NaN."""
    batch = case.make()
    got = run_score(kernels, batch, case)
    assert_scores(got, exact_of(batch, case), batch, case)


@pytest.mark.parametrize("name", EVERY)
def test_it_means_what_the_reference_says(kernels, name):
    """And so does score_blocks, whatever V holds."""
    check(kernels, CASES[name])
    check_score(kernels, CASES[name])


@pytest.mark.extended
@pytest.mark.parametrize("name", SMALL[-2:])
def test_scores_are_the_bits_of_dense_decode(kernels, name):
    case = CASES[name]
    batch = case.make()
    dense, scored = run_dense(kernels, batch, case), run_score(kernels, batch, case)
    for name in ("lse", "block_lse"):
        assert torch.equal(scored[name].nan_to_num(7.0), dense[name].nan_to_num(7.0))


@pytest.mark.extended
def test_nothing_else_is_written(kernels):
    """The output is part of a wider tensor, which holds NaN."""
    case = KernelCase(lens=(20, 600))
    got = run_dense(kernels, case.make(), case)
    wide = got["output"]
    base = torch.empty(0, dtype=wide.dtype).set_(wide.untyped_storage())
    assert int((~base.isnan()).sum()) == wide.numel()


@pytest.mark.extended
@pytest.mark.parametrize("name", SMALL[-2:])
def test_without_block_lse_the_results_are_the_same_bits(kernels, name):
    case = CASES[name]
    batch = case.make()
    scored = run_dense(kernels, batch, case)
    plain = run_dense(kernels, batch, case, scores=False)
    assert torch.equal(scored["output"], plain["output"])
    assert torch.equal(scored["lse"], plain["lse"])


@pytest.mark.extended
@pytest.mark.parametrize("splits, size", [(1, 16), (2, 1), (7, 32), (64, 16)])
def test_any_number_of_splits(kernels, splits, size):
    case = KernelCase(
        2,
        1,
        64,
        lens=(3000, 0, 900, 512),
        splits=splits,
        select_block_size=size,
        block_size=32,
    )
    check(kernels, case)
    check_score(kernels, case)


@pytest.mark.extended
def test_a_batch_permuted_gives_the_results_permuted_bit_for_bit(kernels):
    case = KernelCase(4, 2, 64, lens=(1300, 0, 33, 700, 16))
    batch = case.make()
    first = run_dense(kernels, batch, case)
    order = [3, 1, 4, 0, 2]
    again = run_dense(
        kernels,
        batch.rows(order),
        replace(case, lens=tuple(case.lens[i] for i in order)),
    )
    for name in ("output", "lse"):
        assert torch.equal(again[name], first[name][order])
    scores = first["block_lse"][order]
    assert torch.equal(again["block_lse"].nan_to_num(7.0), scores.nan_to_num(7.0))


@pytest.mark.extended
def test_the_other_rows_do_not_matter(kernels):
    case = KernelCase(4, 2, 64, lens=(900, 40))
    batch = case.make()
    first = run_dense(kernels, batch, case)
    changed = replace(
        batch,
        query=torch.stack((batch.query[0], -batch.query[1])),
        seq_lens=torch.tensor([900, 3], dtype=torch.int32),
    )
    again = run_dense(kernels, changed, case)
    for name in ("output", "lse", "block_lse"):
        assert torch.equal(again[name][0, ..., :57], first[name][0, ..., :57])
        assert not torch.equal(again[name][1, ..., :1], first[name][1, ..., :1])


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_fp8_number_is_itself(kernels, dtype):
    """A row of one token gives its value; all 256 codes in two rows, NaN among them."""
    for first in (0, 128):
        case = KernelCase(1, 1, 128, dtype=dtype, fp8=True, lens=(1,))
        batch = case.make()
        codes = torch.arange(first, first + 128, dtype=torch.uint8)
        codes = codes.view(torch.float8_e4m3fn)
        batch.kv_cache[int(batch.block_table[0, 0]), 0, 0, 128:] = codes
        batch = replace(batch, k_scale=1.0, v_scale=1.0)
        got = run_dense(kernels, batch, case)["output"][0, 0]
        assert torch.equal(got.float().nan_to_num(7e4), codes.float().nan_to_num(7e4))


@pytest.mark.extended
@pytest.mark.parametrize("size, power", [(128, 40), (128, -40), (256, 40)])
def test_a_power_of_two_in_the_query_changes_no_bit_beside_fp8(kernels, size, power):
    """bf16 holds 2.0**40 and 2.0**-40; fp16, which fp8 is multiplied in, does not."""
    case = KernelCase(4, 2, size, fp8=True, lens=(90, 17))
    batch = case.make()
    plain = run_dense(kernels, batch, case)
    factor = 2.0**power
    scaled = replace(batch, query=batch.query * factor, scale=batch.scale / factor)
    again = run_dense(kernels, scaled, case)
    assert torch.equal(again["output"], plain["output"])
    assert torch.equal(again["lse"], plain["lse"])


@pytest.mark.extended
@pytest.mark.parametrize("size", [128, 256])
def test_a_huge_head_beside_fp8_takes_no_precision_from_another(kernels, size):
    case = KernelCase(4, 2, size, fp8=True, lens=(90, 17))
    batch = case.make()
    plain = run_dense(kernels, batch, case)
    huge = batch.query.clone()
    huge[:, 1] *= 2.0**30
    again = run_dense(kernels, replace(batch, query=huge), case)
    others = [0, 2, 3]
    assert torch.equal(again["output"][:, others], plain["output"][:, others])
    assert torch.equal(again["lse"][:, others], plain["lse"][:, others])


@pytest.mark.extended
def test_many_small_weights_are_not_lost_in_fp16(kernels):
    """999 weights of exp(-18), of which fp16 holds none beside a weight of 1."""
    case = KernelCase(1, 1, 64, dtype=torch.float16, lens=(1000,))
    batch = case.make()
    batch.kv_cache.zero_()
    block = batch.kv_cache[int(batch.block_table[0, 0]), 0]
    block[0, 0] = 18.0
    batch.kv_cache[..., 64:] = 500.0
    block[0, 64:] = 0.0
    query = torch.zeros_like(batch.query)
    query[..., 0] = 1.0
    got = run_dense(kernels, replace(batch, query=query, scale=1.0), case)
    wanted = 999 * math.exp(-18) * 500
    torch.testing.assert_close(
        got["output"].float(), torch.full((1, 1, 64), wanted), rtol=2e-3, atol=0
    )
