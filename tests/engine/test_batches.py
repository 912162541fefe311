"""What is decided on a batch: how many requests decode, and whether it is captured."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode

from tests.support.replay import common_metadata
from tidal_vllm.engine.batch import (
    count_decodes,
    find_prefills,
    is_captured,
    is_dummy,
)
from tidal_vllm.engine.prefills import prefills_of, requests_from


@pytest.mark.parametrize(
    ("query_lens", "prefilling", "decodes"),
    [
        ([1, 1, 1], [0, 0, 0], 3),
        ([1, 1, 9], [0, 0, 1], 2),
        ([9, 3], [1, 1], 0),
        ([1, 1, 5], [0, 1, 1], 1),  # a prompt's last token on its own
        ([1, 5], [0, 0], 1),  # a correction
        ([1, 1, 0, 0], [0, 0, 0, 0], 4),  # padded, V1 runner
        ([1, 1, 0, 0], [0, 0], 4),  # padded, V2 runner
        ([1, 1, 0], [0, 1], 1),
        ([1, 1, 5], [1, 0, 1], 2),  # such a token before a decode, V2 runner
        ([9, 1], [1, 0], 0),
    ],
)
def test_count_decodes(query_lens, prefilling, decodes):
    lens = [10 + n for n in query_lens]
    prefilling = [bool(p) for p in prefilling]
    batch = common_metadata(query_lens, lens, prefilling)
    assert count_decodes(batch, find_prefills(batch)) == decodes


@pytest.mark.parametrize(
    ("query_lens", "prefilling", "decodes"),
    [
        ([3, 1, 2], [0, 0, 0], 3),
        ([3, 1, 4], [0, 0, 0], 2),  # a correction, or a resumed request
        ([3, 2, 9], [0, 1, 1], 1),  # a short end of a prompt
        ([3, 3, 0], [0, 0], 3),
        ([3, 1, 1, 9], [1, 0, 0, 1], 3),  # a chunk as long as a draft, V2 runner
    ],
)
def test_count_decodes_with_drafts(query_lens, prefilling, decodes):
    prefilling = [bool(p) for p in prefilling]
    batch = common_metadata(query_lens, [20] * len(query_lens), prefilling)
    assert count_decodes(batch, find_prefills(batch, 3), 3) == decodes


@pytest.mark.parametrize(
    ("query_lens", "lens", "prefilling", "dummy"),
    [
        ([1, 1], [1, 1], [0, 0], True),
        ([3, 3], [3, 3], [0, 0], True),
        ([1, 1, 0], [1, 1, 0], [0, 0], True),
        ([1, 1], [1, 1], [0, 1], False),  # a prompt of one token
        ([1, 3], [1, 4], [0, 0], False),  # a decode
    ],
)
def test_is_dummy(query_lens, lens, prefilling, dummy):
    prefilling = [bool(p) for p in prefilling]
    assert is_dummy(common_metadata(query_lens, lens, prefilling)) is dummy


def test_prefills_before_a_decode():
    """Three requests that do not decode, of five, and a row of padding."""
    prefilling = [True, False, True, False, True]
    whole = common_metadata(
        [2, 1, 2, 1, 3, 0], [20, 30, 2, 40, 3, 0], prefilling, num_tokens=10
    )
    rest, tokens = prefills_of(whole, 4, torch.tensor([*prefilling, False]))
    assert tokens.tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert rest.query_start_loc.tolist() == [0, 2, 4, 7]
    assert rest.query_start_loc_cpu.tolist() == [0, 2, 4, 7]
    assert rest.seq_lens.tolist() == [20, 2, 3]
    assert rest.seq_lens_cpu_upper_bound.tolist() == [20, 2, 3]
    assert (rest.num_reqs, rest.num_actual_tokens) == (3, 7)
    assert rest.block_table_tensor[:, 0].tolist() == [0, 8, 16]
    assert rest.slot_mapping.tolist() == tokens.tolist()
    assert rest.is_prefilling.tolist() == [True, True, True]


def test_requests_from():
    prefilling = [False, False, True, True]
    whole = common_metadata([1, 1, 5, 3], [10, 20, 5, 30], prefilling)
    rest = requests_from(whole, 2)
    assert rest.query_start_loc.tolist() == [0, 5, 8]
    assert rest.query_start_loc_cpu.tolist() == [0, 5, 8]
    assert rest.seq_lens.tolist() == [5, 30]
    assert rest.seq_lens_cpu_upper_bound.tolist() == [5, 30]
    assert (rest.num_reqs, rest.num_actual_tokens) == (2, 8)
    assert rest.block_table_tensor.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert rest.slot_mapping.tolist() == list(range(2, 10))
    assert rest.is_prefilling.tolist() == [True, True]
    assert rest.seq_lens.data_ptr() == whole.seq_lens[2:].data_ptr()


@pytest.mark.parametrize(
    ("query_lens", "mode", "captured"),
    [
        ([1] * 4, "FULL_AND_PIECEWISE", True),
        ([1] * 4, "FULL_DECODE_ONLY", True),
        ([1] * 3, "FULL_AND_PIECEWISE", False),  # of no captured size: not padded
        ([1, 1, 2], "FULL_AND_PIECEWISE", False),
        ([2, 2], "FULL_AND_PIECEWISE", False),
        ([1] * 4, "PIECEWISE", False),
        ([1] * 4, "NONE", False),
    ],
)
def test_is_captured(query_lens, mode, captured):
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], cudagraph_capture_sizes=[1, 2, 4, 8]
    )
    lens = [100] * len(query_lens)
    batch = common_metadata(query_lens, lens)
    assert is_captured(compilation, batch) is captured


@pytest.mark.parametrize(
    ("query_lens", "num_tokens", "captured"),
    [
        ([3, 3], 6, True),
        ([3, 0], 6, True),
        ([3, 3, 3], 9, True),  # V2 runner: the next multiple of 8
        ([3, 3, 3, 3], 12, False),
        ([3, 1], 4, False),  # not uniform
        ([4], 4, False),
    ],
)
def test_is_captured_with_drafts(query_lens, num_tokens, captured):
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        cudagraph_capture_sizes=[4, 6, 8],
    )
    lens = [100] * len(query_lens)
    batch = common_metadata(query_lens, lens, num_tokens=num_tokens)
    assert is_captured(compilation, batch, max_decode_query_len=3) is captured


def test_a_padded_batch_is_captured():
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, cudagraph_capture_sizes=[4]
    )
    batch = common_metadata([1, 1, 1, 0], [9, 9, 9, 0], num_tokens=4)
    assert is_captured(compilation, batch)
