"""Which kernels are chosen, what is refused and why, and the reference behind them."""

import math
from types import ModuleType

import pytest
import torch

from tests.kernels.reference.cases import make_batch, without_values
from tests.kernels.reference.exact import assert_within
from tidal_vllm import kernels as ops
from tidal_vllm.kernels import dispatch, reference
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.validators import TidalConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODEL = {"head_size": 128, "dtype": torch.bfloat16}
RULE = SelectionRule(
    token_budget=64,
    select_block_size=16,
    sink_tokens=4,
    recent_tokens=16,
    sparse_threshold=64,
)


def stub(reason: str = "") -> ModuleType:
    module = ModuleType("kernels")
    module.why_not = lambda case: reason
    return module


@pytest.fixture
def built(monkeypatch):
    """Pretend which modules of kernels can be imported, and on NVIDIA's torch."""

    def pretend(**modules: ModuleType | str) -> None:
        def load(name):
            found = modules[name.rsplit(".")[-1].removesuffix("_ops")]
            return (None, found) if isinstance(found, str) else (found, "")

        monkeypatch.setattr(dispatch, "_load", load)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return pretend


class TestAuto:
    def test_the_reference_on_a_cpu(self):
        kernels = ops.choose(CPU, **MODEL)
        assert (kernels.name, kernels.why) == (
            "reference",
            "PyTorch reference ops (CPU)",
        )
        assert not kernels.capturable

    def test_cuda_where_it_is_built(self, built):
        cuda = stub()
        built(cuda=cuda, triton=stub())
        kernels = ops.choose(GPU, **MODEL)
        assert (kernels.name, kernels.why) == ("cuda", "CUDA extension")
        assert kernels.module is cuda
        assert kernels.capturable

    def test_triton_where_it_is_not_and_says_so(self, built):
        built(cuda="No module named 'x'", triton=stub())
        kernels = ops.choose(GPU, **MODEL)
        assert kernels.name == "triton"
        assert kernels.why == (
            "Triton kernels on cuda (the CUDA extension is not built: "
            "No module named 'x')"
        )

    def test_triton_where_cuda_does_not_cover_the_model(self, built):
        built(cuda=stub("head_size = 80"), triton=stub())
        kernels = ops.choose(GPU, **MODEL)
        assert kernels.name == "triton"
        assert "the CUDA extension does not cover head_size = 80" in kernels.why

    def test_the_reference_where_none_covers_it_with_every_reason(self, built):
        built(cuda=stub("torch.float32"), triton=stub("compute capability 7.5"))
        kernels = ops.choose(GPU, **MODEL)
        assert kernels.name == "reference"
        for words in ("not fast", "torch.float32", "compute capability 7.5"):
            assert words in kernels.why

    def test_nothing_for_a_cache_that_no_implementation_reads(self, built):
        built(cuda="gone", triton=stub("kv_cache_dtype = nvfp4"))
        with pytest.raises(TidalConfigError) as caught:
            ops.choose(GPU, **MODEL, kv_cache_dtype="nvfp4")
        message = str(caught.value)
        assert message.startswith("tidal.kernels = 'auto': no implementation covers")
        for words in ("not built: gone", "cover kv_cache_dtype = nvfp4", "reference"):
            assert words in message

    def test_passes_the_case_on(self, built):
        seen = []
        module = stub()
        module.why_not = lambda case: seen.append(case) or ""
        built(cuda=module, triton=stub())
        ops.choose(GPU, **MODEL, kv_cache_dtype="fp8", select_block_size=32)
        case = seen[0]
        assert (case.head_size, case.dtype) == (128, torch.bfloat16)
        assert (case.fp8, case.cache_dtype) == (True, None)
        assert (case.device, case.select_block_size) == (GPU, 32)


def refused(requested: str, device=CPU, **case) -> str:
    with pytest.raises(TidalConfigError) as caught:
        ops.choose(device, requested=requested, **{**MODEL, **case})
    message = str(caught.value)
    assert message.startswith(f"tidal.kernels = {requested!r}: ")
    return message


class TestRefused:
    def test_cuda_on_a_cpu(self):
        message = refused("cuda")
        assert "the CUDA extension needs an NVIDIA GPU, not cpu" in message
        assert "allowed here: 'auto', 'reference'" in message

    def test_cuda_that_is_not_built(self, built):
        built(cuda="libcudart.so.13: cannot open", triton=stub())
        message = refused("cuda", GPU)
        assert "not built: libcudart.so.13: cannot open" in message
        assert "allowed here: 'auto', 'triton', 'reference'" in message

    def test_cuda_on_an_amd_gpu(self, built, monkeypatch):
        built(cuda=stub(), triton=stub())
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "needs an NVIDIA GPU" in refused("cuda", GPU)
        assert ops.choose(GPU, **MODEL).name == "triton"

    def test_triton_that_cannot_be_imported(self, built):
        built(cuda="gone", triton="No module named 'triton'")
        message = refused("triton", GPU)
        assert "Triton cannot be imported: No module named 'triton'" in message

    def test_the_reference_with_a_quantised_cache(self):
        message = refused("reference", kv_cache_dtype="fp8")
        assert "do not read kv_cache_dtype = fp8; allowed here: 'none'" in message

    @pytest.mark.parametrize("given", ["cud", "CUDA", "", None, 3])
    def test_what_is_no_name(self, given):
        assert "must be one of 'auto', 'cuda', 'triton', 'reference'" in refused(given)


def test_describes_what_the_doctor_asks():
    assert ops.describe("cpu").why == "PyTorch reference ops (CPU)"


def test_a_module_that_breaks_on_import_counts_as_not_built(tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text("raise OSError('no libfoo.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert dispatch._load("broken_kernels") == (None, "no libfoo.so")


class TestTheReferenceBehindIt:
    kernels = ops.choose(CPU, requested="reference", **MODEL)

    def workspace(self):
        return self.kernels.allocate_workspace(4, 4, 1, 8, 100, CPU)

    def test_allocates_nothing(self):
        assert self.workspace().nbytes == 0

    def test_means_what_the_reference_says(self):
        batch = make_batch([100, 0, 200], dtype=torch.bfloat16)
        work, output = self.workspace(), torch.full_like(batch.query, math.nan)
        decode = {"scale": batch.scale, "output": output, "workspace": work}
        topk_blocks = torch.full((4, 1, 4), 7, dtype=torch.int32)
        topk_lens = torch.zeros(4, 1, dtype=torch.int32)
        chosen = {"topk_blocks": topk_blocks, "topk_lens": topk_lens}

        out, lse, block_lse = reference.dense_decode(
            *batch.paged, scale=batch.scale, select_block_size=16
        )
        self.kernels.dense_decode(*batch.paged, **decode, select_block_size=16)
        assert torch.equal(output, out)
        assert torch.equal(work.lse, lse)
        assert torch.equal(work.block_lse, block_lse)

        self.kernels.select_blocks(batch.seq_lens, rule=RULE, workspace=work, **chosen)
        expected = [torch.full_like(topk_blocks, 7), torch.zeros_like(topk_lens)]
        reference.select_blocks(
            block_lse,
            lse,
            batch.seq_lens,
            rule=RULE,
            topk_blocks=expected[0],
            topk_lens=expected[1],
        )
        assert torch.equal(topk_blocks, expected[0])
        assert torch.equal(topk_lens, expected[1])
        assert topk_lens[:, 0].tolist() == [4, 0, 4, 0]

        out, lse = reference.sparse_decode(
            *batch.paged[:3],
            *(t[:3] for t in expected),
            batch.seq_lens,
            scale=batch.scale,
            select_block_size=16,
        )
        self.kernels.sparse_decode(
            *batch.paged[:3],
            topk_blocks,
            topk_lens,
            batch.seq_lens,
            **decode,
            select_block_size=16,
        )
        assert torch.equal(output, out)
        assert torch.equal(work.lse, lse)

    def test_rows_left_out_stay_as_they_were(self):
        batch = make_batch([100, -1, 0, -30])
        query, cache, table, lens = batch.paged
        work, output = self.workspace(), torch.full_like(query, 42.0)
        given = {"scale": batch.scale, "workspace": work, "select_block_size": 16}
        topk_blocks = torch.full((4, 1, 7), 42, dtype=torch.int32)
        topk_lens = torch.full((4, 1), 42, dtype=torch.int32)
        rows, others = [0, 2], [1, 3]

        self.kernels.dense_decode(*batch.paged, **given, output=output)
        whole, _, _ = reference.dense_decode(*batch.paged, scale=batch.scale)
        assert torch.equal(output[rows], whole[rows])
        assert (output[others] == 42).all()

        self.kernels.score_blocks(query, without_values(cache), table, lens, **given)
        exact = batch.exact(size=16)
        assert_within(work.lse, exact.lse, exact.lse_error)
        assert_within(work.block_lse, exact.block_lse, exact.block_lse_error)

        self.kernels.select_blocks(
            lens,
            rule=RULE,
            workspace=work,
            topk_blocks=topk_blocks,
            topk_lens=topk_lens,
        )
        assert topk_lens.flatten().tolist() == [4, 42, 0, 42]
        assert (topk_blocks[others] == 42).all()

        output.fill_(42.0)
        self.kernels.sparse_decode(
            *(query, cache, table, topk_blocks, topk_lens, lens),
            **given,
            output=output,
        )
        assert output[0].any() and not output[2].any()
        assert (output[others] == 42).all()

    def test_a_plain_decode_leaves_the_scores_of_the_last_select_layer(self):
        batch = make_batch([40])
        work, output = self.workspace(), torch.empty_like(batch.query)
        kept = work.block_lse = torch.zeros(1)
        self.kernels.dense_decode(
            *batch.paged, scale=batch.scale, output=output, workspace=work
        )
        assert work.block_lse is kept


class TestWorkspace:
    def test_shapes_and_bytes(self):
        work = ops.Workspace.allocate(16, 32, 8, 128, 100, CPU)
        assert work.lse.shape == (16, 32)
        assert work.block_lse.shape == (16, 32, 100)
        assert work.mass.shape == (16, 8, 100)
        floats = 16 * 32 + 16 * 32 * 100 + 16 * 8 * 100 + 1024 * 32 * 129
        assert work.nbytes == 4 * floats

    @pytest.mark.parametrize("max_num_seqs", [1, 7, 16, 100, 257, 1024])
    def test_every_batch_fits_and_has_splits(self, max_num_seqs):
        work = ops.Workspace.allocate(max_num_seqs, 2, 1, 4, 3, CPU)
        for num_seqs in range(1, max_num_seqs + 1):
            out, lse = work.partials(num_seqs)
            assert out.shape[:2] == lse.shape[:2] == (num_seqs, 2)
            assert out.shape[2] == lse.shape[2] >= 8
            assert out.shape[3] == 4
            assert out.is_contiguous() and lse.is_contiguous()
            assert out.data_ptr() == work.partial_out.data_ptr()

    def test_without_any_selection(self):
        work = ops.Workspace.allocate(4, 2, 0, 8, 0, CPU)
        assert work.block_lse.numel() == work.mass.numel() == 0
