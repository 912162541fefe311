"""The engine with kernels that write into given tensors, as they do on a GPU.

Real engines on the CPU; the kernels are the reference ops in a kernel's clothes.
"""

import copy
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

from tests.support.asking import generate, serve
from tests.support.engines import builders, impls, reconfigured, runner, scheduler
from tests.support.models import ROLES, random_prompt
from tests.support.replay import Graph, common_metadata, random_table, run_layers
from tests.support.watching import counters
from tests.support.written_kernels import written_kernels
from tidal_vllm.engine import attention
from tidal_vllm.engine import state as sparse_state
from tidal_vllm.engine.batch import count_decodes, is_captured, rows_from
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.engine.state import choose_implementations
from tidal_vllm.engine.torch_dense import ReferenceBackend

BUDGET = 64
SETTINGS = ROLES | {"token_budget": BUDGET, "select_block_size": 8}
ARRIVALS = [
    (step, random_prompt(length, seed=length), max_tokens)
    for step, length, max_tokens in [
        *((0, 200, 12), (0, 7, 20), (2, 333, 9)),
        *((5, 60, 14), (6, 481, 6), (9, 65, 8)),
    ]
]


@pytest.fixture(scope="module")
def llm(engine, random_llama):
    # Chunks of 128 tokens: prompts arrive in parts, beside decodes.
    return engine(random_llama, tidal=SETTINGS, max_num_batched_tokens=128)


@pytest.fixture(autouse=True)
def kernels():
    with written_kernels() as made:
        yield made


class TestBatches:
    """The pure decisions on a batch."""

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
        ],
    )
    def test_count_decodes(self, query_lens, prefilling, decodes):
        lens = [10 + n for n in query_lens]
        prefilling = [bool(p) for p in prefilling]
        assert count_decodes(common_metadata(query_lens, lens, prefilling)) == decodes

    @pytest.mark.parametrize(
        ("query_lens", "prefilling", "decodes"),
        [
            ([3, 1, 2], [0, 0, 0], 3),
            ([3, 1, 4], [0, 0, 0], 2),  # a correction, or a resumed request
            ([3, 2, 9], [0, 1, 1], 1),  # a short end of a prompt
            ([3, 3, 0], [0, 0], 3),
        ],
    )
    def test_count_decodes_with_drafts(self, query_lens, prefilling, decodes):
        prefilling = [bool(p) for p in prefilling]
        batch = common_metadata(query_lens, [20] * len(query_lens), prefilling)
        assert count_decodes(batch, max_decode_query_len=3) == decodes

    def test_rows_from(self):
        prefilling = [False, False, True, True]
        whole = common_metadata([1, 1, 5, 3], [10, 20, 5, 30], prefilling)
        rest = rows_from(whole, 2)
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
    def test_is_captured(self, query_lens, mode, captured):
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
    def test_is_captured_with_drafts(self, query_lens, num_tokens, captured):
        compilation = SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            cudagraph_capture_sizes=[4, 6, 8],
        )
        lens = [100] * len(query_lens)
        batch = common_metadata(query_lens, lens, num_tokens=num_tokens)
        assert is_captured(compilation, batch, max_decode_query_len=3) is captured

    def test_a_padded_batch_is_captured(self):
        compilation = SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, cudagraph_capture_sizes=[4]
        )
        batch = common_metadata([1, 1, 1, 0], [9, 9, 9, 0], num_tokens=4)
        assert is_captured(compilation, batch)


class TestGraphSupport:
    def support(self, llm, **tidal):
        with reconfigured(llm, **SETTINGS | tidal) as changed:
            (builder,) = builders(changed)
            return TidalMetadataBuilder.get_cudagraph_support(
                builder.vllm_config, builder.kv_cache_spec
            )

    def test_reference_ops_cannot_be_captured(self, llm, monkeypatch):
        builder, always = ReferenceBackend.get_builder_cls(), AttentionCGSupport.ALWAYS
        monkeypatch.setattr(builder, "_cudagraph_support", always)
        assert self.support(llm, kernels="reference") is AttentionCGSupport.NEVER

    @pytest.mark.parametrize(
        ("of_dense", "wanted"),
        [
            ("ALWAYS", "UNIFORM_BATCH"),
            ("UNIFORM_BATCH", "UNIFORM_BATCH"),
            ("UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_SINGLE_TOKEN_DECODE"),
            ("NEVER", "NEVER"),
        ],
    )
    def test_kernels_can(self, llm, monkeypatch, of_dense, wanted):
        builder, support = ReferenceBackend.get_builder_cls(), AttentionCGSupport
        monkeypatch.setattr(builder, "_cudagraph_support", support[of_dense])
        assert self.support(llm, kernels="triton") is AttentionCGSupport[wanted]

    def test_without_sparse_layers_it_is_the_dense_backends(self, llm, monkeypatch):
        builder, wanted = ReferenceBackend.get_builder_cls(), AttentionCGSupport.ALWAYS
        monkeypatch.setattr(builder, "_cudagraph_support", wanted)
        assert self.support(llm, select_layers=[]) is wanted


@pytest.fixture(scope="module", params=["sequence", "kv_head", "query_head"])
def reference(request, llm):
    """The scope, and the answers of the reference path."""
    settings = SETTINGS | {"scope": request.param, "kernels": "reference"}
    with reconfigured(llm, **settings):
        llm.reset_prefix_cache()
        return request.param, serve(llm, ARRIVALS, logprobs=3)


@pytest.mark.parametrize("limit", [None, 1])
def test_kernels_give_the_answers_of_the_reference(llm, reference, monkeypatch, limit):
    """Bit by bit, and also where the workspace holds one sequence at a time."""
    scope, wanted = reference
    if limit is not None:
        monkeypatch.setattr(sparse_state, "WORKSPACE_LIMIT", limit)
    with reconfigured(llm, **SETTINGS, scope=scope, kernels="triton"):
        (state,) = {id(impl.state): impl.state for impl in impls(llm)}.values()
        assert state.kernels.name == "written"
        assert state.max_part_rows == (4 if limit is None else 1)
        llm.reset_prefix_cache()
        assert serve(llm, ARRIVALS, logprobs=3) == wanted
        counted = counters(llm)
    assert counted["sparse_steps"] > 10


def test_short_batches_run_dense_bit_by_bit(llm):
    prompts = [random_prompt(n, seed=n) for n in (5, 33)]
    with reconfigured(llm, **SETTINGS, kernels="reference"):
        wanted = generate(llm, prompts, logprobs=3)
    llm.reset_prefix_cache()
    with reconfigured(llm, **SETTINGS, kernels="triton"):
        assert generate(llm, prompts, logprobs=3) == wanted
        assert counters(llm)["sparse_steps"] == 0


class TestWorkspace:
    def test_layers_share_one_of_bounded_size(self, llm, monkeypatch):
        with reconfigured(llm, **SETTINGS, kernels="triton"):
            states = {id(impl.state) for impl in impls(llm)}
            assert len(states) == 1
            whole = impls(llm)[0].state
            assert whole.workspace.block_lse.shape == (4, 6, 2048 // 8)
            assert whole.selection.topk_blocks.shape == (1, 4, 1, BUDGET // 8)
            monkeypatch.setattr(
                sparse_state, "WORKSPACE_LIMIT", whole.workspace.nbytes - 1
            )
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
        with reconfigured(llm, **SETTINGS), pytest.MonkeyPatch.context() as patch:
            (builder,), other = builders(llm), impls(llm)[4]
            config = builder.vllm_config
            patch.setattr(other, "num_heads", 12)
            patch.setattr(other, "state", other.make_state(config))
            made = (builder.kv_cache_spec, builder.layer_names, config, builder.device)
            with pytest.raises(ValueError, match="6 query and 2 KV heads of 32, .*12"):
                TidalMetadataBuilder(*made)

    def test_no_sparse_layer_no_workspace(self, llm):
        with reconfigured(llm, **SETTINGS | {"select_layers": []}):
            assert impls(llm)[0].state is None
            kernels, dense_backend = choose_implementations(
                builders(llm)[0].vllm_config, 32, "auto"
            )
        assert kernels is None
        assert dense_backend is ReferenceBackend


@contextmanager
def captured(llm, sizes, drafts=None, **settings):
    """The engine as if it had captured decodes of some numbers of tokens.

    Args:
        drafts: Tokens of a draft that a request verifies; None: no speculation.
    """
    speculation = drafts and SimpleNamespace(
        num_speculative_tokens=drafts, parallel_drafting=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner(llm).vllm_config, "speculative_config", speculation)
        changed = reconfigured(llm, **settings, kernels="triton")
        stack = ExitStack()
        stack.enter_context(changed)
    with stack:
        (builder,) = builders(llm)
        config = copy.copy(builder.vllm_config.compilation_config)
        config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        config.cudagraph_capture_sizes = sizes
        builder.vllm_config.compilation_config = config
        yield llm


@pytest.fixture
def graphs(llm):
    """Captured decodes of 2 and 4 rows, and random keys and values."""
    with captured(llm, [2, 4], **SETTINGS):
        layers = runner(llm).vllm_config.compilation_config.static_forward_context
        for layer in layers.values():
            layer.kv_cache.normal_(generator=torch.Generator().manual_seed(1))
        yield llm
    llm.reset_prefix_cache()


def test_an_engine_whose_every_decode_is_captured(llm):
    """Exact where all blocks are kept; prompts' last tokens among the decodes."""
    exact = {"token_budget": 2048, "min_sparse_len": 2048, "kernels": "reference"}
    with reconfigured(llm, **SETTINGS | exact):
        llm.reset_prefix_cache()
        wanted = serve(llm, ARRIVALS, logprobs=2)
        decoded = counters(llm)
    all_kept = {"token_budget": 2048, "min_sparse_len": 2046}
    with captured(llm, [1, 2, 3, 4], **SETTINGS | all_kept):
        llm.reset_prefix_cache()
        found = serve(llm, ARRIVALS, logprobs=2)
        counted = counters(llm)
    assert decoded["sparse_steps"] == 0 < decoded["dense_steps"]
    assert counted["sparse_steps"] > 10  # batches of decodes alone
    assert counted["dense_steps"] > 5  # decodes beside prompts: not captured
    assert counted["decode_tokens"] >= decoded["decode_tokens"]
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]


@pytest.fixture
def drafting(llm):
    """Like `graphs`, of two requests that verify drafts of two tokens."""
    with captured(llm, [6], drafts=2, **SETTINGS):
        layers = runner(llm).vllm_config.compilation_config.static_forward_context
        for layer in layers.values():
            layer.kv_cache.normal_(generator=torch.Generator().manual_seed(1))
        yield llm
    llm.reset_prefix_cache()


class TestDrafts:
    """A draft's tokens are rows: what comes out is what single decodes give."""

    LENS, TABLE = [700, 90], random_table(2)

    def one_by_one(self, llm, query):
        """The same tokens as six decodes of a step."""
        lens = [end - back for end in self.LENS for back in (2, 1, 0)]
        table = self.TABLE.repeat_interleave(3, 0)
        with captured(llm, [], drafts=2, **SETTINGS):
            (builder,) = builders(llm)
            batch = builder.build(
                0, common_metadata([1] * 6, lens, block_table_tensor=table)
            )
            assert batch.sparse and batch.num_decodes == 6
            return run_layers(llm, batch, query)

    def test_a_replay_is_the_decodes_one_by_one(self, drafting):
        query = torch.randn(6, 6, 32, generator=torch.Generator().manual_seed(3))
        graph = Graph(drafting, 2, query_len=3)
        graph.replay([40, 500], random_table(2).flip(0), query.flip(0))
        found = graph.replay(self.LENS, self.TABLE, query)
        wanted = self.one_by_one(drafting, query)
        # The dense layer extends, where decodes have an op of their own.
        torch.testing.assert_close(found[0], wanted[0])
        assert torch.equal(found[1:], wanted[1:])

    def test_padding_comes_out_as_zeros(self, drafting):
        query = torch.randn(6, 6, 32, generator=torch.Generator().manual_seed(3))
        graph = Graph(drafting, 2, query_len=3)
        found = graph.replay([700, 0], self.TABLE, query)
        assert (found[1:, 3:] == 0).all()
        assert torch.equal(found[1:, :3], self.one_by_one(drafting, query)[1:, :3])

    def test_every_row_counts(self, drafting):
        before = counters(drafting)
        graph = Graph(drafting, 2, query_len=3)
        graph.replay([700, 0], self.TABLE, torch.randn(6, 6, 32))
        counted = counters(drafting) - before
        assert (counted["sparse_steps"], counted["decode_tokens"]) == (1, 3)
        assert counted["context_tokens"] == 700 + 699 + 698

    def test_selection_has_room_for_every_row(self, drafting):
        state = impls(drafting)[0].state
        assert state.selection.topk_blocks.shape[1] == 4 * 3
        assert state.max_part_rows == 4 * 3

    def test_longer_queries_are_not_captured(self, drafting):
        (builder,) = builders(drafting)
        with pytest.raises(ValueError, match="of 3 query tokens at most"):
            builder.build_for_cudagraph_capture(common_metadata([4], [4]))


class TestReplay:
    def test_a_replay_is_the_eager_step(self, graphs):
        """Padded rows come out as zeros, and change nothing in the others."""
        graph, table = Graph(graphs, 4), random_table(4)
        query = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(3))
        lens = [700, 40, 65, 0]
        found = graph.replay(lens, table, query)
        assert (found[:, 3] == 0).all()

        builder = graph.builder
        builder.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        eager = builder.build(
            0, common_metadata([1, 1, 1], lens[:3], block_table_tensor=table[:3])
        )
        assert eager.sparse and eager.num_decodes == 3
        assert torch.equal(found[:, :3], run_layers(graphs, eager, query[:3]))

    def test_another_replay_sees_none_of_the_last(self, graphs):
        graph, table = Graph(graphs, 4), random_table(4)
        query = torch.randn(4, 6, 32)
        wanted = graph.replay([300, 90, 500, 64], table, query)
        graph.replay([700, 800, 0, 0], table.flip(0), query.flip(0))
        assert torch.equal(graph.replay([300, 90, 500, 64], table, query), wanted)

    def test_short_sequences_are_exact_all_the_same(self, graphs):
        graph, table = Graph(graphs, 2), random_table(2)
        query, lens = torch.randn(2, 6, 32), [BUDGET, 17]
        found = graph.replay(lens, table, query)
        batch = common_metadata([1, 1], lens, block_table_tensor=table)
        compilation = graph.builder.vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        eager = graph.builder.build(0, batch)
        assert not eager.sparse
        torch.testing.assert_close(found, run_layers(graphs, eager, query))

    def test_counters_know_the_real_rows(self, graphs):
        graph, table = Graph(graphs, 4), random_table(4)
        before = counters(graphs)
        graph.replay([700, 40, 65, 0], table, torch.randn(4, 6, 32))
        graph.replay([10, 20, 30, 40], table, torch.randn(4, 6, 32))
        assert counters(graphs) - before == {
            "sparse_steps": 2,
            "decode_tokens": 7,
            "context_tokens": 805 + 100,
            # 64 tokens in 8 blocks, the last of them partly filled.
            "sparse_context_tokens": (64 - 4) + 40 + (64 - 7) + 100,
        }

    def test_a_warm_up_is_not_counted(self, graphs):
        Graph(graphs, 4).replay([1, 1, 1, 1], random_table(4), torch.randn(4, 6, 32))
        assert counters(graphs)["decode_tokens"] == 0

    def test_a_prompts_last_token_is_a_decode_there(self, graphs):
        """The graph is fixed, so the builder must not claim otherwise."""
        (builder,) = builders(graphs)
        batch = common_metadata([1, 1], [100, 90], [False, True])
        assert builder.build(0, batch).num_prefills == 0
        batch = common_metadata([1, 1, 1], [100, 90, 90], [False, False, True])
        assert builder.build(0, batch).num_prefills == 1

    @pytest.mark.parametrize("tails_decode", [False, True])
    def test_the_prefix_cache_does_not_get_such_a_token(
        self, llm, monkeypatch, tails_decode
    ):
        found = scheduler(llm)
        assert not found._tails_decode  # there are no graphs here
        monkeypatch.setattr(found, "_tails_decode", tails_decode)
        request = SimpleNamespace(request_id="tail", num_prompt_tokens=257)
        clean = found._clean_position_after(request, 256, 1)
        assert clean == (256 if tails_decode else 257)

    def test_only_single_tokens_are_captured(self, graphs):
        (builder,) = builders(graphs)
        with pytest.raises(ValueError, match="max_query_len = 2 in a full CUDA graph"):
            builder.build_for_cudagraph_capture(common_metadata([2, 2], [2, 2]))


class TestComposition:
    def test_dense_calls_get_all_that_vllm_gave(self, llm, monkeypatch):
        """The whole batch in DENSE layers, in others its prefills only."""
        calls = []

        def forward(self, layer, query, key, value, kv_cache, batch, output):
            calls.append((query.shape, key.shape, value.shape, batch))
            return output.fill_(7)

        monkeypatch.setattr(ReferenceBackend.get_impl_cls(), "forward", forward)
        with reconfigured(llm, **SETTINGS, kernels="triton"):
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
        impl._dense(layer, (query, query, query), None, None, None)
        assert seen[0].dtype is torch.float8_e4m3fn
        assert torch.equal(seen[0], (query / 2).to(torch.float8_e4m3fn))
        assert attention.is_quantized_kv_cache("fp8")
        assert not attention.is_quantized_kv_cache("auto")

    def test_scales_of_the_cache_reach_the_kernels(self, llm, monkeypatch, kernels):
        given = []
        monkeypatch.setattr(
            type(kernels), "sparse_decode", lambda *args, **more: given.append(more)
        )
        with reconfigured(llm, **SETTINGS, kernels="triton"):
            (builder,) = builders(llm)
            batch = builder.build(0, common_metadata([1], [100]))
            layer = SimpleNamespace(
                layer_name="model.layers.2.self_attn.attn",
                _k_scale_float=0.5,
                _v_scale_float=0.25,
            )
            query = torch.randn(1, 6, 32)
            impls(llm)[2].forward(layer, query, query, query, None, batch, query)
        (more,) = given
        assert (more["k_scale"], more["v_scale"]) == (0.5, 0.25)
