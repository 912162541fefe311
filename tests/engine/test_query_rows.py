"""Query tokens of decodes as rows, against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidal_vllm.engine.query_rows import QueryRows, row_lens

MAX_ROWS, WIDTH = 16, 5


def fill(query_lens, seq_lens, num_rows=None, rows=None, width=WIDTH + 2):
    """Rows of decodes whose block tables hold 100, 101, ... and 200, 201, ..."""
    rows = rows or QueryRows.allocate(MAX_ROWS, WIDTH, torch.device("cpu"))
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    table = 100 * torch.arange(1, len(query_lens) + 1)[:, None] + torch.arange(width)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    num_rows = int(starts[-1]) if num_rows is None else num_rows
    return rows.fill(num_rows, starts, lens, table.int())


def test_a_row_per_query_token_as_long_as_the_sequence_up_to_it():
    lens, table = fill([3, 1, 2], [50, 7, 20])
    assert lens.tolist() == [48, 49, 50, 7, 19, 20]
    assert table[:, 0].tolist() == [100, 100, 100, 200, 300, 300]
    assert table[1].tolist() == [100, 101, 102, 103, 104]
    assert (lens.dtype, table.dtype) == (torch.int32, torch.int32)


def test_rows_behind_the_last_token_are_padding():
    lens, _ = fill([3, 3, 0, 0], [50, 20, 0, 0], num_rows=12)
    assert lens.tolist() == [48, 49, 50, 18, 19, 20] + 6 * [0]


def test_a_padded_sequence_with_query_tokens_is_padding():
    """It may count tokens, but none of its own length."""
    lens, _ = fill([2, 2], [50, 0])
    assert lens.tolist() == [49, 50, 0, 0]


def test_results_stand_where_the_last_ones_stood():
    rows = QueryRows.allocate(MAX_ROWS, WIDTH, torch.device("cpu"))
    first = fill([2, 2], [9, 8], rows=rows)
    again = fill([1, 3], [5, 7], rows=rows)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in again]
    assert first[0].tolist() == [5, 5, 6, 7]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(4, 60)), min_size=1, max_size=4)
)
def test_host_and_device_agree(decodes):
    query_lens, seq_lens = zip(*decodes, strict=True)
    lens, _ = fill(query_lens, seq_lens)
    wanted = [end - count + 1 + i for count, end in decodes for i in range(count)]
    assert lens.tolist() == row_lens([*query_lens], [*seq_lens]) == wanted
