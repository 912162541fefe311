import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import exact, naive
from tests.kernels.batches import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    batches,
    law,
    make_batch,
)
from tests.kernels.exact import assert_within
from tests.kernels.harness import dense
from tidal_vllm.kernels import reference
from tidal_vllm.kernels.reference import prefill


def starts(query_lens):
    return torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)


def run(batch, query_lens, tile_pairs=8192, window=None):
    with mock.patch.object(prefill, "EXTEND_TILE_PAIRS", tile_pairs):
        return reference.dense_extend(
            *batch.paged, starts(query_lens), scale=batch.scale, sliding_window=window
        )


def check(batch, query_lens, tile_pairs=8192, window=None):
    output = run(batch, query_lens, tile_pairs, window)
    assert output.dtype == batch.query.dtype
    if sum(query_lens) == 0:
        assert output.shape == batch.query.shape
        return
    kv = (batch.keys, batch.values)
    expected = naive.extend(batch.query, *kv, query_lens, batch.scale, window)
    bound = exact.extend(batch.query, *kv, query_lens, batch.scale, window)
    assert_within(output[: len(expected)], expected, bound.output_error)


@pytest.fixture(params=["flash", "plain"])
def either_kernel(request):
    """Torch's CPU kernel, and what runs on devices that lack it."""
    if request.param == "flash":
        yield
    else:
        with mock.patch.object(prefill, "_attend", prefill._attend_plain):
            yield


@st.composite
def extends(draw):
    batch = draw(batches(max_len=70, leave_out=False))
    query_lens = [draw(st.integers(0, min(n, 40))) for n in batch.seq_lens.tolist()]
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    query = torch.randn(sum(query_lens), *batch.query.shape[1:], generator=rng)
    query = query.to(batch.query.dtype)
    return replace(batch, query=query), query_lens


@law
@given(extends(), st.sampled_from((1, 48, 8192)))
def test_it_means_what_the_loops_say(case, tile_pairs):
    batch, query_lens = case
    check(batch, query_lens, tile_pairs)


@pytest.mark.parametrize("tile_pairs", [32, 8192])
def test_both_kernels(either_kernel, tile_pairs):
    check(make_batch([50, 20, 33], num_queries=43), [7, 20, 16], tile_pairs)


@law
@given(extends(), st.sampled_from((1, 48, 8192)), st.integers(1, 80))
def test_a_window_means_what_the_loops_say(case, tile_pairs, window):
    batch, query_lens = case
    check(batch, query_lens, tile_pairs, window)


@pytest.mark.parametrize("window", [1, 9, 16, 17, 64])
def test_both_kernels_with_a_window(either_kernel, window):
    check(make_batch([50, 20, 33], num_queries=43), [7, 20, 16], window=window)


@pytest.mark.parametrize("window_chunk", [1, 7, 512])
def test_a_window_does_not_depend_on_the_chunk(monkeypatch, window_chunk):
    monkeypatch.setattr(prefill, "WINDOW_CHUNK", window_chunk)
    check(make_batch([60, 23], num_queries=41), [29, 12], window=13)


def test_what_lies_before_the_window_is_not_read():
    """vLLM gives the blocks there away; block tables then point to its null block."""
    batch = make_batch([64], num_queries=1)
    size = batch.kv_cache.shape[2]
    expected = run(batch, [1], window=10)
    gone = (64 - 10) // size
    table = batch.block_table.clone()
    batch.kv_cache[table[0, :gone].long()] = math.nan
    assert torch.equal(run(batch, [1], window=10), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(layout, dtype):
    batch = make_batch([37, 12], layout=layout, dtype=dtype, num_queries=14)
    check(batch, [9, 5], tile_pairs=64)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_every_head_grouping(group, num_kv_heads):
    batch = make_batch([40, 9], group=group, num_kv_heads=num_kv_heads, num_queries=11)
    check(batch, [5, 6])


@pytest.mark.parametrize("context", [0, 1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("query_len", [1, 2, 15, 16, 17, 33])
def test_contexts_and_queries_around_block_and_tile_boundaries(context, query_len):
    batch = make_batch([context + query_len], num_queries=query_len)
    check(batch, [query_len], tile_pairs=64)  # 32 tokens


def test_one_new_token_is_a_decode():
    batch = make_batch([1, 16, 45])
    output = run(batch, [1, 1, 1])
    expected, _, _ = dense(reference, batch)
    assert_within(output, expected, 2 * batch.exact().output_error)


def test_chunks_of_a_prefill_give_what_the_whole_gives():
    """Each chunk sees exactly the tokens before it, whatever follows in the cache."""
    batch = make_batch([77], num_queries=77)
    whole = run(batch, [77])
    bound = exact.extend(batch.query, batch.keys, batch.values, [77], batch.scale)
    done = 0
    for size in (5, 32, 1, 39):
        part = replace(
            batch,
            query=batch.query[done : done + size],
            seq_lens=torch.tensor([done + size]),
        )
        rows = slice(done, done + size)
        assert_within(run(part, [size]), whole[rows], 2 * bound.output_error[rows])
        done += size


def test_a_batch_permuted_gives_the_output_permuted_bit_for_bit():
    lens, query_lens, order = [50, 20, 33, 9], [7, 20, 1, 4], [2, 3, 0]
    batch = make_batch(lens, num_queries=sum(query_lens))
    output = run(batch, query_lens).split(query_lens)
    queries = batch.query.split(query_lens)
    permuted = replace(
        batch,
        query=torch.cat([queries[i] for i in order]),
        block_table=batch.block_table[order],
        seq_lens=batch.seq_lens[order],
    )
    expected = torch.cat([output[i] for i in order])
    assert torch.equal(run(permuted, [query_lens[i] for i in order]), expected)


def test_rows_of_no_sequence_are_zeros_and_an_empty_query_is_nothing():
    batch = make_batch([30, 30, 0], num_queries=9)
    output = run(batch, [4, 0, 0])
    assert output[:4].abs().sum() > 0
    assert not output[4:].any()


def test_more_sequences_than_query_ranges_are_left_alone():
    """vLLM pads block table and lengths beyond the batch."""
    batch = make_batch([30, 20, 10], num_queries=6)
    output = run(batch, [4, 2])
    assert torch.equal(output, run(batch, [4, 2, 0]))


def test_sharp_attention_over_many_tiles():
    """Scores of several hundred: no overflow, and the lse decides between tiles."""
    check(make_batch([90], sharpness=30.0, num_queries=20), [20], tile_pairs=16)


def test_a_long_context():
    context, new = 9000, 130
    batch = make_batch([context + new], num_kv_heads=1, num_queries=new)
    kv = (batch.keys, batch.values)
    wanted = exact.extend(batch.query, *kv, [new], batch.scale)
    assert_within(run(batch, [new]), wanted.output, wanted.output_error)


def test_a_query_longer_than_its_sequence_is_refused():
    batch = make_batch([5], num_queries=6)
    with pytest.raises(ValueError, match="6 query tokens in a sequence of 5"):
        run(batch, [6])
