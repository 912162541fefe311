"""What only a GPU can show. `kernels` in conftest.py runs the other tests there too."""

import pytest
import torch

from tests.kernels.cuda.cases import (
    CASES,
    SMALL,
    make_sets,
    run_dense,
    run_score,
    run_sparse,
)
from tests.kernels.cuda.gpu import Gpu
from tests.kernels.cuda.op_arguments import (
    OPS,
    call,
    decode_args,
    good_arguments,
    good_seq_lens,
)
from tests.kernels.cuda.test_select_blocks import masses, select
from tests.support.rules import rule_of
from tidal_vllm.kernels.cuda_limits import HEAD_SIZES

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU and the extension built for it"
)


def on_gpu(op: str) -> dict:
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in good_arguments(op).items()
    }


def results(name: str) -> list[torch.Tensor]:
    case = CASES[name]
    batch = case.make()
    dense = run_dense(Gpu(), batch, case)
    scored = run_score(Gpu(), batch, case)
    sets = make_sets(batch, case, "kv_head")
    sparse = run_sparse(Gpu(), batch, case, *sets)
    mass, lens = masses(3, 8, 9000, levels=50), [9000, -1, 8999]
    chosen, _, _ = select(Gpu(), mass, lens, rule_of(500, 1), num_sets=2)
    found = [dense[n] for n in ("output", "lse", "block_lse")]
    found += [scored[n] for n in ("lse", "block_lse")]
    return [*found, sparse["output"], sparse["lse"], chosen["topk_blocks"]]


@pytest.mark.parametrize("name", SMALL)
def test_two_runs_give_the_same_bits(name):
    for first, again in zip(results(name), results(name), strict=True):
        assert torch.equal(first.nan_to_num(7.0), again.nan_to_num(7.0))


@pytest.mark.parametrize("op", OPS)
def test_a_graph_replayed_gives_the_bits_of_an_eager_call(op):
    """The graph replays over other lengths than it was captured with."""
    import tidal_vllm.kernels.cuda as cuda

    args, seq_lens = decode_args("cuda"), good_seq_lens(op).cuda()
    call(cuda, op, args, seq_lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(cuda, op, args, seq_lens)
    seq_lens.copy_(torch.tensor([0, 17, -1]))
    graph.replay()
    torch.cuda.synchronize()
    workspace = args.workspace
    written = [args.output, workspace.lse, workspace.block_lse]
    written += [args.topk_blocks, args.topk_lens]
    replayed = [tensor.clone() for tensor in written]
    call(cuda, op, args, seq_lens)
    torch.cuda.synchronize()
    for tensor, before in zip(written, replayed, strict=True):
        assert torch.equal(tensor, before)
    assert not workspace.arrivals.any()
    assert not workspace.digit_counts.any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cache", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_kernel_fits_without_local_memory(op, cache, head_size):
    import tidal_vllm.kernels.cuda  # noqa: F401

    use = torch.ops.tidal.occupancy(op, "bfloat16", cache, head_size, 0)
    blocks, _, _, _, local_bytes, *_ = use
    assert blocks >= 1 and local_bytes == 0, use


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    import tidal_vllm.kernels.cuda  # noqa: F401

    torch.library.opcheck(getattr(torch.ops.tidal, op).default, (), on_gpu(op))


@pytest.mark.parametrize("op", OPS)
def test_tensors_on_two_devices_are_refused(op):
    import tidal_vllm.kernels.cuda as cuda

    with pytest.raises(ValueError, match="seq_lens.device is cpu; allowed: cuda"):
        call(cuda, op, decode_args("cuda"), good_seq_lens(op))
