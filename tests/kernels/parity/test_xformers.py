"""Decoding against xformers' paged split-K attention: an oracle of another project.

It knows neither our reference nor our formulas, and reads the same cache in place.
"""

import pytest
import torch
import triton
from packaging.version import Version

from benchmarks.kernels.baselines import xformers_arguments
from benchmarks.kernels.decode_batch import DecodeBatch, Shape
from tests.kernels.batches import Batch
from tests.kernels.conftest import INTERPRETED
from tests.kernels.exact import Exact, assert_within
from tests.kernels.harness import batch_on, dense, exact_of, sparse

fmha = pytest.importorskip("xformers.ops").fmha

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(
        Version(triton.__version__) >= Version("3.9"),
        reason="xformers 0.0.35 uses block pointers, which Triton 3.9 has no more",
    ),
]

SIZE = 16  # tokens of a page, and of a selection block
SHAPE = dict(num_kv_heads=2, group=4, head_size=64, dtype=torch.float16)
CASES = [pytest.param({}, id="fp16, d64")]
if not INTERPRETED:  # xformers asks the GPU for its architecture
    CASES += [pytest.param(dict(head_size=128, dtype=torch.bfloat16), id="bf16, d128")]


def theirs(batch: Batch, blocks: list[list[int]] | None = None):
    """The output and lse of xformers, over these logical blocks of each row.

    Args:
        blocks: In ascending order, since only the last block of a page table may be
            partly filled; None: all.
    """
    table, lens = batch.block_table, batch.seq_lens
    if blocks is not None:
        most = max(map(len, blocks))
        chosen = [row + [0] * (most - len(row)) for row in blocks]
        table = table.gather(1, torch.tensor(chosen, device=batch.device))
        kept = [
            sum(min(SIZE, seq_len - SIZE * block) for block in row)
            for row, seq_len in zip(blocks, batch.lens, strict=True)
        ]
        lens = torch.tensor(kept, dtype=torch.int32, device=batch.device)
    num_rows, num_heads, head_size = batch.query.shape
    shape = Shape(num_heads, batch.num_kv_heads, head_size, SIZE)
    decodes = DecodeBatch(
        shape, num_rows, int(lens.max()), batch.query, batch.kv_cache, table, lens
    )
    given = xformers_arguments(decodes) | {"scale": batch.scale}
    storage = batch.kv_cache.untyped_storage().data_ptr()
    assert given["key"].untyped_storage().data_ptr() == storage, "copied the cache"
    attend = fmha.memory_efficient_attention_forward_requires_grad
    output, lse = attend(**given)
    return output.view(batch.query.shape), lse.view(num_heads, num_rows).t()


def assert_agree(ours, theirs, exact: Exact) -> None:
    """Both may err, and both round their weights and their output."""
    (output, lse), (their_output, their_lse) = ours, theirs
    bound = (their_output.cpu(), 2 * exact.output_error)
    assert_within(output, *bound, "output", roundings=2)
    assert_within(lse, their_lse.cpu(), 2 * exact.lse_error, "lse")


@pytest.mark.parametrize("setup", CASES)
def test_dense_and_sparse_decode(kernels, device, setup):
    batch = batch_on(device, (301, 17, 640, 16), **SHAPE | setup)
    output, lse, _ = dense(kernels, batch, SIZE)
    assert_agree((output, lse), theirs(batch), exact_of(batch))

    blocks = [[0, 3, 11, 18], [1], [0, 1, 20, 21, 39], [0]]
    sets = [[row] for row in blocks]
    wanted = exact_of(batch, batch.positions(sets, SIZE))
    assert_agree(sparse(kernels, batch, sets, SIZE), theirs(batch, blocks), wanted)
