"""The scratch of the kernels: its sizes, and what a batch gets of it."""

import pytest
import torch

from tidal_vllm.kernels import Kernels, Workspace, choose, reference
from tidal_vllm.kernels.workspace import FIRST_DIGITS

CPU = torch.device("cpu")


class TestWorkspace:
    def test_shapes_and_bytes(self):
        work = Workspace.allocate(16, 32, 8, 128, 100, CPU)
        assert work.lse.shape == (16, 32)
        assert work.block_lse.shape == (16, 32, 100)
        assert work.mass.shape == (16, 8, 100)
        floats = 16 * 32 + 16 * 32 * 100 + 16 * 8 * 100 + 1024 * 32 * 129
        counters = 16 * 32 + 16 * 8 * FIRST_DIGITS
        assert work.nbytes == 4 * (floats + counters)

    def test_a_line_of_any_length_begins_at_16_bytes(self):
        """So that the CUDA kernels can load four numbers at once."""
        work = Workspace.allocate(3, 2, 1, 8, 101, CPU)
        assert work.block_lse.shape == (3, 2, 101) and work.mass.shape == (3, 1, 101)
        assert work.block_lse.stride() == (208, 104, 1)
        assert work.mass.stride(0) == 104
        partials, counters = 3 * 128 * 2 * 9, 3 * 2 + 3 * FIRST_DIGITS
        assert work.nbytes == 4 * (3 * 2 + 3 * 208 + 3 * 104 + partials + counters)

    def test_counters_begin_as_zeros(self):
        work = Workspace.allocate(5, 3, 1, 8, 4, CPU)
        assert work.arrivals.shape == (5, 3) and work.arrivals.dtype == torch.int32
        assert not work.arrivals.any()
        assert work.digit_counts.shape == (5, 1, FIRST_DIGITS)
        assert work.digit_counts.dtype == torch.int32 and not work.digit_counts.any()

    def test_renewed_counters_are_zeros_elsewhere(self):
        work = Workspace.allocate(5, 3, 1, 8, 4, CPU)
        old = [work.arrivals.fill_(7), work.digit_counts.fill_(7)]
        work.renew_counters()
        for counters, before in zip(
            (work.arrivals, work.digit_counts), old, strict=True
        ):
            assert not counters.any() and counters.shape == before.shape
            assert counters.data_ptr() != before.data_ptr()

    @pytest.mark.parametrize("max_num_rows", [1, 7, 16, 100, 257, 1024])
    def test_every_batch_fits_and_has_splits(self, max_num_rows):
        work = Workspace.allocate(max_num_rows, 2, 1, 4, 3, CPU)
        for num_rows in range(1, max_num_rows + 1):
            out, lse = work.partials(num_rows)
            assert out.shape[:2] == lse.shape[:2] == (num_rows, 2)
            assert out.shape[2] == lse.shape[2] >= 8
            assert out.shape[3] == 4
            assert out.is_contiguous() and lse.is_contiguous()
            assert out.data_ptr() == work.partial_out.data_ptr()

    def test_without_any_selection(self):
        work = Workspace.allocate(4, 2, 0, 8, 0, CPU)
        assert work.block_lse.numel() == work.mass.numel() == 0

    def test_more_rows_than_it_has_room_for_are_refused(self):
        work = Workspace.allocate(4, 2, 1, 8, 3, CPU)
        with pytest.raises(ValueError, match="room for 1024 partial results: 5 rows"):
            work.partials(5)
        with pytest.raises(ValueError, match="room for 0 partial results: 1 rows"):
            Workspace().partials(1)


def test_the_reference_needs_none():
    kernels = choose(CPU, head_size=8, dtype=torch.float32)
    assert kernels.allocate_workspace(4, 4, 1, 8, 100, CPU).nbytes == 0


def test_kernels_get_theirs():
    kernels = Kernels("some", "", reference, capturable=True)
    assert kernels.allocate_workspace(4, 4, 1, 8, 100, CPU).block_lse.shape[2] == 100
