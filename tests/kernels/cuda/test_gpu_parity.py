"""On a GPU only. The parity tables run there too: `kernels` in conftest.py."""

import pytest
import torch

from tests.kernels.cuda.bad_inputs import good_arguments
from tests.kernels.cuda.cases import (
    CASES,
    SMALL,
    make_sets,
    run_dense,
    run_score,
    run_sparse,
)
from tests.kernels.cuda.gpu import Gpu
from tests.kernels.cuda.test_select_blocks import masses, rule_of, select

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU and the extension built for it"
)
OPS = ("dense_decode", "score_blocks", "sparse_decode", "select_blocks")


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
    """Replayed over other lengths than it was captured with, a row left out."""
    import tidal_vllm.kernels.cuda as cuda

    arguments = on_gpu(op)
    function = getattr(cuda, op)
    function(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(**arguments)
    arguments["seq_lens"].copy_(torch.tensor([0, 17, -1]))
    graph.replay()
    torch.cuda.synchronize()
    replayed = {n: t.clone() for n, t in arguments.items() if hasattr(t, "clone")}
    function(**arguments)
    torch.cuda.synchronize()
    for name, tensor in replayed.items():
        if name not in ("partial_out", "partial_lse", "mass"):
            assert torch.equal(tensor.float(), arguments[name].float()), name


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    import tidal_vllm.kernels.cuda  # noqa: F401

    torch.library.opcheck(getattr(torch.ops.tidal, op).default, (), on_gpu(op))


@pytest.mark.parametrize("op", OPS)
def test_tensors_on_two_devices_are_refused(op):
    import tidal_vllm.kernels.cuda as cuda

    arguments = on_gpu(op) | {"seq_lens": good_arguments(op)["seq_lens"]}
    with pytest.raises(ValueError, match="seq_lens.device is cpu; allowed: cuda"):
        getattr(cuda, op)(**arguments)
