"""Steps of full CUDA graphs: what can be captured, and what a replay gives.

Real engines on the CPU; the kernels are the reference ops in a kernel's clothes.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

from tests.support.engines import builders, impls, reconfigured, scheduler
from tests.support.models import NARROW
from tests.support.replay import (
    Graph,
    captured,
    common_metadata,
    random_table,
    randomize_kv,
    run_layers,
)
from tests.support.watching import counters
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.engine.scheduler import tails_decode
from tidal_vllm.engine.torch_dense import ReferenceBackend

pytestmark = pytest.mark.usefixtures("written")
ENGINE_SETTINGS = NARROW


class TestGraphSupport:
    def support(self, llm, **tidal):
        with reconfigured(llm, **NARROW | tidal) as changed:
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

    def test_a_method_that_reads_lengths_cannot(self, llm, monkeypatch):
        builder, always = ReferenceBackend.get_builder_cls(), AttentionCGSupport.ALWAYS
        monkeypatch.setattr(builder, "_cudagraph_support", always)
        found = self.support(llm, kernels="triton", method="lessismore")
        assert found is AttentionCGSupport.NEVER

    def test_without_sparse_layers_it_is_the_dense_backends(self, llm, monkeypatch):
        builder, wanted = ReferenceBackend.get_builder_cls(), AttentionCGSupport.ALWAYS
        monkeypatch.setattr(builder, "_cudagraph_support", wanted)
        assert self.support(llm, select_layers=[]) is wanted


@pytest.fixture
def graphs(llm):
    """Captured decodes of 2 and 4 rows, and random keys and values."""
    with captured(llm, [2, 4], **NARROW):
        randomize_kv(llm)
        yield llm
    llm.reset_prefix_cache()


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
        query, lens = torch.randn(2, 6, 32), [NARROW["token_budget"], 17]
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

    @pytest.mark.parametrize("prefilling", [[True, False], [False, True]])
    def test_a_prompts_last_token_is_dense_without_a_replay(self, graphs, prefilling):
        """Also where the V2 runner has a decode behind it."""
        (builder,) = builders(graphs)
        table, query = random_table(2), torch.randn(2, 6, 32)
        batch = common_metadata([1, 1], [500, 90], prefilling, block_table_tensor=table)
        found = run_layers(graphs, builder.build(0, batch), query)
        for row, is_prefill in enumerate(prefilling):
            alone = common_metadata(
                [1], [[500, 90][row]], [is_prefill], block_table_tensor=table[row, None]
            )
            metadata = builder.build(0, alone)
            assert metadata.sparse is not is_prefill
            wanted = run_layers(graphs, metadata, query[row, None])
            torch.testing.assert_close(found[:, row], wanted[:, 0])

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

    @pytest.mark.parametrize(
        ("mode", "v2", "hybrid", "wanted"),
        [
            ("FULL_AND_PIECEWISE", False, False, True),
            ("PIECEWISE", True, False, False),
            ("PIECEWISE", False, True, False),
            ("NONE", True, True, True),
        ],
    )
    def test_where_such_a_token_decodes(self, mode, v2, hybrid, wanted):
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
            use_v2_model_runner=v2,
            model_config=SimpleNamespace(is_hybrid=hybrid),
        )
        assert tails_decode(config) is wanted

    def test_only_single_tokens_are_captured(self, graphs):
        (builder,) = builders(graphs)
        with pytest.raises(ValueError, match="max_query_len = 2 in a full CUDA graph"):
            builder.build_for_cudagraph_capture(common_metadata([2, 2], [2, 2]))


@pytest.fixture
def drafting(llm):
    """Like `graphs`, of two requests that verify drafts of two tokens."""
    with captured(llm, [6], drafts=2, **NARROW):
        randomize_kv(llm)
        yield llm
    llm.reset_prefix_cache()


class TestDrafts:
    """A draft's tokens are rows: what comes out is what single decodes give."""

    LENS, TABLE = [700, 90], random_table(2)

    def one_by_one(self, llm, query):
        """The same tokens as six decodes of a step."""
        lens = [end - back for end in self.LENS for back in (2, 1, 0)]
        table = self.TABLE.repeat_interleave(3, 0)
        with captured(llm, [], drafts=2, **NARROW):
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

    @pytest.mark.parametrize("prefilling", [[True, False], [False, True], [True] * 2])
    def test_a_replay_takes_chunks_of_prompts_for_drafts(self, drafting, prefilling):
        """vLLM has decided to replay, and a graph has one path."""
        query = torch.randn(6, 6, 32, generator=torch.Generator().manual_seed(3))
        graph = Graph(drafting, 2, query_len=3)
        wanted = graph.replay(self.LENS, self.TABLE, query)
        graph.replay([40, 500], random_table(2).flip(0), query.flip(0))
        found = graph.replay(self.LENS, self.TABLE, query, prefilling)
        assert torch.equal(found, wanted)

    @pytest.mark.parametrize(
        ("query_lens", "prefilling"),
        [
            ([3, 3], [True, True]),  # as many tokens as a captured batch has
            ([3, 3], [True, False]),
            ([3, 1, 1, 9], [True, False, False, True]),  # the V2 runner's order
            ([3, 2, 1, 0], [False, True, False, False]),
        ],
    )
    def test_chunks_of_prompts_are_dense_without_one(
        self, drafting, query_lens, prefilling
    ):
        """And the decodes behind them sparse, as if they stood alone."""
        (builder,) = builders(drafting)
        table, query = random_table(4), torch.randn(sum(query_lens), 6, 32)
        lens = [300, 290, 500, 410][: len(query_lens)]
        table = table[: len(query_lens)]
        batch = common_metadata(query_lens, lens, prefilling, block_table_tensor=table)
        metadata = builder.build(0, batch)
        assert metadata.sparse is (not all(prefilling))
        found = run_layers(drafting, metadata, query)
        parts = zip(query.split(query_lens), found.split(query_lens, 1), strict=True)
        for row, (rows, got) in enumerate(parts):
            if query_lens[row]:
                alone = common_metadata(
                    query_lens[row : row + 1],
                    lens[row : row + 1],
                    prefilling[row : row + 1],
                    block_table_tensor=table[row, None],
                )
                metadata = builder.build(0, alone)
                assert metadata.sparse is not prefilling[row]
                torch.testing.assert_close(got, run_layers(drafting, metadata, rows))

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
