"""The metadata builder: what each step's batch means for the layers."""

import functools
from typing import Any

import torch
from vllm.config import (
    VllmConfig,
    get_layers_from_vllm_config,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from tidal_vllm.config import TidalConfig
from tidal_vllm.engine.batch import (
    TidalMetadata,
    count_decodes,
    find_prefills,
    is_captured,
    is_dummy,
    query_lens,
    rows_of,
)
from tidal_vllm.engine.drafts import draft_startup
from tidal_vllm.engine.metrics import DecodeCounters
from tidal_vllm.engine.parts import parts_of
from tidal_vllm.engine.prefills import prefills_of
from tidal_vllm.engine.query_rows import QueryRows, row_lens
from tidal_vllm.engine.reuse import EveryStep
from tidal_vllm.engine.self_draft import choose_for_drafts, draft_metadata
from tidal_vllm.engine.state import (
    SparseState,
    choose_implementations,
    max_num_decode_tokens,
    require_one_state,
)
from tidal_vllm.engine.warm_up import warm_up
from tidal_vllm.names import NAME
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.stages import check_full_layers
from tidal_vllm.plan.steps import runs_sparse
from tidal_vllm.plan.table import format_plan
from tidal_vllm.registry import METHODS

logger = init_logger("vllm.tidal.metadata")


class TidalMetadataBuilder(AttentionMetadataBuilder[TidalMetadata]):
    """Splits each batch into decodes and prefills, and decides if it runs sparse.

    There is one builder for each KV cache group, and all see the same batch. The
    primary one also does what is done once per step.
    """

    reorder_batch_threshold: int = 1
    requires_block_table_width = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        block_table_width: int | None = None,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impls = _tidal_impls(vllm_config)
        of_draft = all(impls[name].is_draft for name in layer_names)
        startup = draft_startup(vllm_config) if of_draft else resolve(vllm_config)
        self.plan, self.rule = startup.plan, startup.rule
        roles = self._roles_of(impls)
        self.roles = {name: roles[name] for name in layer_names}
        selective = [n for n, r in roles.items() if r in (Role.SELECT, Role.SPARSE)]
        selective_here = [name for name in selective if name in self.roles]
        require_one_state({name: impls[name] for name in selective})
        # Of the group with the first SELECT layer, or with the first layer of all.
        self.is_primary = not of_draft and next(iter(selective or impls)) in self.roles
        self.counters = DecodeCounters()
        self.num_steps = 0
        self.chooses = True  # for drafts, which `SelfDraft` decides on
        self.state: SparseState | None = None
        self.selection_index: dict[str, int] = {}
        if selective_here:
            startup.config.check_kv_block_size(kv_cache_spec.block_size)
            self.state = impls[selective_here[0]].state
            self.selection_index = {
                name: self.state.selection_index[extract_layer_index(name)]
                for name in self.roles
                if extract_layer_index(name) in self.state.selection_index
            }
        max_model_len = vllm_config.model_config.max_model_len
        max_blocks_per_seq = -(-max_model_len // kv_cache_spec.block_size)
        self.max_decode_query_len = max_decode_query_len(vllm_config)
        if self.plan.sparse or of_draft:  # one threshold serves all groups
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.query_rows: QueryRows | None = None
        drafts = self.state is not None and self.state.drafts is not None
        if self.state is not None and self.max_decode_query_len > 1 and not drafts:
            self.query_rows = QueryRows.allocate(
                max_num_decode_tokens(vllm_config), max_blocks_per_seq, device
            )
        # Two builders: each may keep what its last metadata points to.
        backend = impls[layer_names[0]].dense_backend
        new_builder = functools.partial(
            backend.get_builder_cls(), kv_cache_spec, layer_names, vllm_config, device
        )
        self.dense_builder, self.prefill_builder = new_builder(), new_builder()
        # What the V2 runner records a draft's steps by, in one CUDA graph.
        self.supports_draft_decode_metadata_update = (
            of_draft and self.dense_builder.supports_draft_decode_metadata_update
        )
        if self.is_primary:
            self._print_plan(startup.config, backend, next(iter(impls.values())))
        if self.state is not None and self.state.kernels.capturable:
            self.state.workspace.renew_counters()
            width = block_table_width or max_blocks_per_seq
            table = torch.zeros(1, width, dtype=torch.int32, device=device)
            if self.query_rows is not None:
                table = self.query_rows.block_table
            layers = vllm_config.compilation_config.static_forward_context
            warm_up(
                layers[selective_here[0]],
                *(vllm_config, kv_cache_spec, table, self.state.selection, self.rule),
            )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Full graphs of decodes, if the kernels and the method can be captured.

        Where no layer is sparse, whatever the dense backend supports.
        """
        slides = (
            isinstance(kv_cache_spec, SlidingWindowSpec)
            and resolve(vllm_config).window(kv_cache_spec.sliding_window) is not None
        )
        kernels, backend = choose_implementations(
            vllm_config,
            vllm_config.model_config.get_head_size(),
            vllm_config.cache_config.cache_dtype,
            slides,
        )
        support = backend.get_builder_cls().get_cudagraph_support(
            vllm_config, kv_cache_spec
        )
        if kernels is None or slides:
            return support
        method = resolve(vllm_config).config.method
        if not (kernels.capturable and METHODS[method].captures_graphs):
            return AttentionCGSupport.NEVER
        ours = AttentionCGSupport.UNIFORM_BATCH
        return min(support, ours, key=lambda kind: kind.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TidalMetadata:
        """The metadata of one step, for all layers of this builder's group.

        Where a graph is replayed its layers have the metadata of the capture, and of
        this step what stands in fixed buffers. There every row decodes, and runs
        sparse. So where chunks of prompts are in a batch that may be replayed, the
        buffers take them for decodes, and the metadata, for eager layers, does not.
        """
        common, query_len = common_attn_metadata, self.max_decode_query_len
        captured = is_captured(self.vllm_config.compilation_config, common, query_len)
        is_prefill = find_prefills(common, query_len)
        num_decodes = count_decodes(common, is_prefill, query_len)
        decode_lens = _lens_of_decodes(common, num_decodes, is_prefill)
        drafts = None if self.state is None else self.state.drafts
        sparse = (
            self.state is not None
            and drafts is None
            and (
                (captured and is_prefill is None)
                or runs_sparse(self.plan, self.rule, max(decode_lens, default=0))
            )
        )
        num_rows = int(common.query_start_loc_cpu[num_decodes])
        in_buffers = num_decodes, num_rows
        if captured:
            in_buffers = common.num_reqs, common.num_actual_tokens
            num_rows = in_buffers[1] if is_prefill is None else num_rows
        if self.is_primary:
            self._advance_step(
                common, in_buffers[0], is_prefill, decode_lens, sparse, captured
            )
        dense = self.dense_builder.build(common_prefix_len, common, fast_build)
        batch = self._metadata(common, num_decodes, num_rows, sparse, dense)
        if self.state is not None and drafts is not None:
            if self.chooses:
                choose_for_drafts(self.state, batch, common, is_prefill)
            self.latest = batch
            return batch
        if not (sparse or captured) or self.state is None:
            return batch
        batch.seq_lens, batch.block_table = self._rows(common, *in_buffers)
        left_out = None
        if sparse and is_prefill is not None:
            rest, batch.prefill_tokens = prefills_of(common, num_decodes, is_prefill)
            batch.prefills = self.prefill_builder.build(
                common_prefix_len, rest, fast_build
            )
            left_out = rows_of(common, is_prefill[:num_decodes])
        if sparse:
            batch.parts = parts_of(self.state, batch, left_out)
        return batch

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TidalMetadata:
        """The metadata of a full graph: decodes only, through the sparse path.

        vLLM asks for it at capture, and for a dummy step that replays a graph.
        """
        common, sparse = common_attn_metadata, self.state is not None
        if sparse and common.max_query_len > self.max_decode_query_len:
            raise ValueError(
                f"max_query_len = {common.max_query_len} in a full CUDA graph: only "
                f"decodes can be captured, of {self.max_decode_query_len} query tokens "
                "at most; allowed cudagraph_mode FULL_DECODE_ONLY, FULL_AND_PIECEWISE, "
                "PIECEWISE or NONE"
            )
        dense = self.dense_builder.build_for_cudagraph_capture(common)
        size = common.num_reqs, common.num_actual_tokens
        batch = self._metadata(common, *size, sparse, dense)
        if self.state is not None:
            self.state.reuse.leave_out(common.num_reqs)
            batch.seq_lens, batch.block_table = self._rows(common, *size)
            batch.parts = parts_of(self.state, batch)
        return batch

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> TidalMetadata:
        """The metadata of a draft model's step, which is dense and not counted."""
        common = common_attn_metadata
        dense = self.dense_builder.build_for_drafting(common, draft_index)
        return self._metadata(common, 0, 0, False, dense)

    def build_for_self_draft(
        self, seq_lens: torch.Tensor, block_table: torch.Tensor
    ) -> TidalMetadata:
        """The metadata of a draft by the target itself: see `self_draft`."""
        assert self.state is not None  # a mode for models with sparse layers
        return draft_metadata(self.state, self.latest, seq_lens, block_table)

    def update_draft_decode_metadata(self, metadata: TidalMetadata) -> None:
        """Bring a draft's metadata to its next step, in place."""
        self.dense_builder.update_draft_decode_metadata(metadata.dense)

    def _advance_step(
        self,
        common: CommonAttentionMetadata,
        num_reqs: int,
        is_prefill: torch.Tensor | None,
        decode_lens: list[int],
        sparse: bool,
        captured: bool,
    ) -> None:
        """What happens once per step, however many KV cache groups there are.

        Args:
            num_reqs: Requests that decode, or would where a graph is replayed.
        """
        reuse = EveryStep() if self.state is None else self.state.reuse
        if is_dummy(common):
            reuse.leave_out(num_reqs)
            return
        self.counters.count_step(self.rule, decode_lens, sparse)
        self.num_steps += 1
        if self.state is None or not (sparse or captured):
            return
        reuse.advance(
            self.num_steps,
            common.seq_lens[:num_reqs],
            common.block_table_tensor,
            self.kv_cache_spec.block_size,
            self.rule.select_block_size,
            self.state.selection,
        )
        if is_prefill is not None:
            # Whether it has chosen depends on whether a graph was replayed.
            reuse.forget(is_prefill[:num_reqs].to(common.seq_lens.device))

    def _rows(
        self, common: CommonAttentionMetadata, num_reqs: int, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Length and block table of each row of the first requests, at fixed places."""
        if self.query_rows is None:
            return common.seq_lens, common.block_table_tensor
        return self.query_rows.fill(
            num_rows,
            common.query_start_loc[: num_reqs + 1],
            common.seq_lens[:num_reqs],
            common.block_table_tensor[:num_reqs],
        )

    def _metadata(
        self,
        common: CommonAttentionMetadata,
        num_decodes: int,
        num_rows: int,
        sparse: bool,
        dense: AttentionMetadata,
    ) -> TidalMetadata:
        """The metadata of a step; of a sparse one without its rows and prefills."""
        return TidalMetadata(
            num_decodes=num_decodes,
            num_decode_tokens=num_rows,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            dense=dense,
            prefills=None,
            prefill_tokens=slice(0),
            sparse=sparse,
            parts=[],
            roles=self.roles,
            selection_index=self.selection_index,
            rule=self.rule,
        )

    def _roles_of(self, impls: dict[str, Any]) -> dict[str, Role]:
        """The role of each layer of this worker, once they are those of the plan."""
        roles = dict.fromkeys(impls, Role.DENSE)
        indices = {
            name: extract_layer_index(name)
            for name, impl in impls.items()
            if impl.kernels is not None  # a draft model's layers have none
        }
        if not indices:
            return roles
        config = self.vllm_config
        stage = config.model_config.get_layers_start_end_indices(config.parallel_config)
        full = [i for name, i in indices.items() if impls[name].sliding_window is None]
        check_full_layers(self.plan, range(*stage), full)
        return roles | {name: self.plan.roles[i] for name, i in indices.items()}

    def _print_plan(
        self, config: TidalConfig, dense_backend: type[AttentionBackend], first: Any
    ) -> None:
        """Log the plan, unless `first`, the engine's first impl, says that it was.

        vLLM makes builders again once it has measured what CUDA graphs take.
        """
        from vllm.distributed.parallel_state import is_global_first_rank

        if is_global_first_rank():
            model = self.vllm_config.model_config
            ranks = self.vllm_config.parallel_config.tensor_parallel_size
            told = (model.max_model_len, model.model, ranks)
            lines = [format_plan(self.plan, config, *told)]
            if self.state is not None:
                lines += [f"kernels: {self.state.kernels.reason}", str(self.state)]
            lines.append(f"dense attention: {dense_backend.get_name()}")
            if (text := "\n".join(lines)) == first.told_plan:
                return
            first.told_plan = text
            logger.info("%s", text)
            if self.state is not None and self.state.kernels.advice:
                logger.warning("%s", self.state.kernels.advice)


def _lens_of_decodes(
    common: CommonAttentionMetadata, num_decodes: int, is_prefill: torch.Tensor | None
) -> list[int]:
    """The length of each row of requests that decode, on the host."""
    counts = query_lens(common)[:num_decodes]
    lens = common.seq_lens_cpu_upper_bound[:num_decodes]
    real = lens > counts  # not so in a warm-up: a decode has its prompt behind it
    if is_prefill is not None:
        real &= ~is_prefill[:num_decodes]
    return row_lens(counts[real].tolist(), lens[real].tolist())


def _tidal_impls(vllm_config: VllmConfig) -> dict[str, Any]:
    """The `TidalImpl` of each layer of this worker that has one, in their order."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    return {
        name: layer.impl
        for name, layer in layers.items()
        if layer.attn_backend.get_name() == NAME
    }
