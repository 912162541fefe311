"""The engine with kernels that write into given tensors, as they do on a GPU.

Real engines on the CPU; the kernels are the reference ops in a kernel's clothes.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.support.asking import generate, serve
from tests.support.engines import builders, impls, reconfigured, runner
from tests.support.models import NARROW, random_arrivals, random_prompt
from tests.support.replay import captured, common_metadata, random_table
from tests.support.watching import counters
from tidal_vllm.config import SCOPES
from tidal_vllm.engine import attention, metadata, state
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.engine.state import choose_implementations
from tidal_vllm.engine.torch_dense import ReferenceBackend

pytestmark = pytest.mark.usefixtures("written")
ENGINE_SETTINGS = NARROW
ARRIVALS = random_arrivals(
    *((0, 200, 12), (0, 7, 20), (2, 333, 9)),
    *((5, 60, 14), (6, 481, 6), (9, 65, 8)),
)


@pytest.fixture(scope="module", params=SCOPES)
def reference(request, llm):
    """The scope, and the answers of the reference path."""
    settings = NARROW | {"scope": request.param, "kernels": "reference"}
    with reconfigured(llm, **settings):
        llm.reset_prefix_cache()
        return request.param, serve(llm, ARRIVALS, logprobs=3)


@pytest.mark.parametrize("limit", [None, 1])
def test_kernels_give_the_answers_of_the_reference(llm, reference, monkeypatch, limit):
    """Bit by bit, and also where the workspace holds one sequence at a time."""
    scope, wanted = reference
    if limit is not None:
        monkeypatch.setattr(state, "WORKSPACE_LIMIT", limit)
    with reconfigured(llm, **NARROW, scope=scope, kernels="triton"):
        (shared,) = {id(impl.state): impl.state for impl in impls(llm)}.values()
        assert shared.kernels.name == "written"
        assert shared.max_part_rows == (4 if limit is None else 1)
        llm.reset_prefix_cache()
        assert serve(llm, ARRIVALS, logprobs=3) == wanted
        counted = counters(llm)
    assert counted["sparse_steps"] > 10


def test_short_batches_run_dense_bit_by_bit(llm):
    prompts = [random_prompt(n, seed=n) for n in (5, 33)]
    with reconfigured(llm, **NARROW, kernels="reference"):
        wanted = generate(llm, prompts, logprobs=3)
    llm.reset_prefix_cache()
    with reconfigured(llm, **NARROW, kernels="triton"):
        assert generate(llm, prompts, logprobs=3) == wanted
        assert counters(llm)["sparse_steps"] == 0


def test_an_engine_whose_every_decode_is_captured(llm):
    """Exact where all blocks are kept; prompts' last tokens among the decodes."""
    exact = {"token_budget": 2048, "min_sparse_len": 2048, "kernels": "reference"}
    with reconfigured(llm, **NARROW | exact):
        llm.reset_prefix_cache()
        wanted = serve(llm, ARRIVALS, logprobs=2)
        decoded = counters(llm)
    all_kept = {"token_budget": 2048, "min_sparse_len": 2046}
    with captured(llm, [1, 2, 3, 4], **NARROW | all_kept):
        llm.reset_prefix_cache()
        found = serve(llm, ARRIVALS, logprobs=2)
        counted = counters(llm)
    assert decoded["sparse_steps"] == 0 < decoded["dense_steps"]
    assert counted["sparse_steps"] > 10  # batches of decodes alone
    assert counted["dense_steps"] > 5  # decodes beside prompts: not captured
    assert counted["decode_tokens"] >= decoded["decode_tokens"]
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]


class TestWorkspace:
    def test_layers_share_one_of_bounded_size(self, llm, monkeypatch):
        with reconfigured(llm, **NARROW, kernels="triton"):
            states = {id(impl.state) for impl in impls(llm)}
            assert len(states) == 1
            whole = impls(llm)[0].state
            assert whole.workspace.block_lse.shape == (4, 6, 2048 // 8)
            assert whole.selection.topk_blocks.shape == (1, 4, 1, 64 // 8)
            monkeypatch.setattr(state, "WORKSPACE_LIMIT", whole.workspace.nbytes - 1)
            config = builders(llm)[0].vllm_config
            half = impls(llm)[0].make_state(config)
        assert half.workspace.nbytes < whole.workspace.nbytes
        assert (whole.max_part_rows, half.max_part_rows) == (4, 2)
        assert half.selection.topk_blocks.shape == whole.selection.topk_blocks.shape
        assert "for 2 query tokens at a time" in str(half)

    def test_a_second_layer_takes_that_of_the_first(self, llm):
        found = impls(llm)[3]._find_state(runner(llm).vllm_config)
        assert found is impls(llm)[0].state is impls(llm)[5].state

    def test_layers_of_two_shapes_are_refused(self, llm):
        """They would hand on selections of their own."""
        with reconfigured(llm, **NARROW), pytest.MonkeyPatch.context() as patch:
            (builder,), other = builders(llm), impls(llm)[4]
            config = builder.vllm_config
            patch.setattr(other, "num_heads", 12)
            patch.setattr(other, "state", other.make_state(config))
            made = (builder.kv_cache_spec, builder.layer_names, config, builder.device)
            with pytest.raises(ValueError, match="6 query and 2 KV heads of 32, .*12"):
                TidalMetadataBuilder(*made)

    def test_a_builder_that_is_made_again_says_nothing(self, llm, monkeypatch):
        """vLLM makes builders twice where it measures what CUDA graphs take."""
        said = []
        monkeypatch.setattr(metadata.logger, "info", lambda *line: said.append(line))
        with reconfigured(llm, **NARROW, sink_tokens=5):
            (old,) = builders(llm)
            made = (old.kv_cache_spec, old.layer_names, old.vllm_config, old.device)
            TidalMetadataBuilder(*made)
        ((_, text),) = said
        assert "first 5 tokens" in text

    def test_no_sparse_layer_no_workspace(self, llm):
        with reconfigured(llm, **NARROW | {"select_layers": []}):
            assert impls(llm)[0].state is None
            kernels, dense_backend = choose_implementations(
                builders(llm)[0].vllm_config, 32, "auto"
            )
        assert kernels is None
        assert dense_backend is ReferenceBackend


class TestComposition:
    def test_dense_calls_get_all_that_vllm_gave(self, llm, monkeypatch):
        """The whole batch in DENSE layers, in others its prefills only."""
        calls = []

        def forward(self, layer, query, key, value, kv_cache, batch, output):
            calls.append((query.shape, key.shape, value.shape, batch))
            return output.fill_(7)

        monkeypatch.setattr(ReferenceBackend.get_impl_cls(), "forward", forward)
        with reconfigured(llm, **NARROW, kernels="triton"):
            (builder,) = builders(llm)
            lens, table = [100, 200, 5], random_table(3)
            batch = builder.build(
                0,
                common_metadata(
                    *([1, 1, 5], lens, [False, False, True]), block_table_tensor=table
                ),
            )
            query = torch.randn(7, 6, 32)
            layers = runner(llm).vllm_config.compilation_config.static_forward_context
            first, second = list(layers.values())[:2]  # DENSE, SELECT
            for layer in (first, second):
                output = torch.zeros_like(query)
                keys = query[:, :2]
                layer.impl.forward(
                    *(layer, query, keys, keys, layer.kv_cache, batch, output)
                )
                assert (output[2:] == 7).all()
                assert (output[:2] == 7).all() == (layer is first)
        whole, rest = calls
        assert [shape[0] for shape in whole[:3]] == [7, 7, 7]
        assert whole[3] is batch.dense
        assert [shape[0] for shape in rest[:3]] == [5, 5, 5]
        assert rest[3] is batch.prefills
        assert rest[3].seq_lens.tolist() == [5]

    def test_vllm_finds_its_own_implementation_inside(self, llm):
        impl = impls(llm)[0]
        assert impl.get_impl_variants() == (impl, impl.dense)

    def test_queries_are_quantised_for_flash_attention(self, llm, monkeypatch):
        """Its fp8 kernels take fp8 queries; ours take them as they are."""
        seen = []
        impl = copy.copy(impls(llm)[0])
        impl.quantizes_query = True
        forward = lambda layer, query, *rest: seen.append(query)  # noqa: E731
        impl.dense = SimpleNamespace(forward=forward)
        monkeypatch.setattr(
            "vllm._custom_ops.scaled_fp8_quant",
            lambda flat, scale: ((flat / scale).to(torch.float8_e4m3fn), scale),
        )
        query = torch.randn(3, 6, 32)
        layer = SimpleNamespace(_q_scale=torch.tensor(2.0))
        with pytest.MonkeyPatch.context() as patch:  # memory profiling sees the copy
            patch.setattr(attention, "_to_fp8", lambda *given: seen.append(given))
            impl.forward(layer, query, query, query, None, None, query.clone())
            assert seen.pop()[0] is query
        impl._attend_densely(layer, query, query, query, None, None, None)
        assert seen[0].dtype is torch.float8_e4m3fn
        assert torch.equal(seen[0], (query / 2).to(torch.float8_e4m3fn))
        assert attention.is_quantized_kv_cache("fp8")
        assert not attention.is_quantized_kv_cache("auto")

    def test_scales_of_the_cache_reach_the_kernels(self, llm, monkeypatch, written):
        given = []
        monkeypatch.setattr(
            written.ops, "sparse_decode", lambda args, seq_lens: given.append(args)
        )
        with reconfigured(llm, **NARROW, kernels="triton"):
            (builder,) = builders(llm)
            batch = builder.build(0, common_metadata([1], [100]))
            given.clear()  # what a new builder launches
            layer = SimpleNamespace(
                layer_name="model.layers.2.self_attn.attn",
                _k_scale_float=0.5,
                _v_scale_float=0.25,
            )
            query = torch.randn(1, 6, 32)
            impls(llm)[2].forward(layer, query, query, query, None, batch, query)
        (args,) = given
        assert (args.k_scale, args.v_scale) == (0.5, 0.25)
