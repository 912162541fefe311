"""What all layers share in one step: the batch, the roles and the selection."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import (
    CompilationConfig,
    CUDAGraphMode,
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

from tidal_vllm.engine.dense import count_decodes, rows_from
from tidal_vllm.engine.metrics import DecodeCounters
from tidal_vllm.engine.query_rows import QueryRows, row_lens
from tidal_vllm.engine.state import (
    SparseState,
    choose_implementations,
    max_decode_rows,
)
from tidal_vllm.names import NAME
from tidal_vllm.plan.policy import Role, SelectionRule, check_full_layers, runs_sparse
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.table import format_plan

logger = init_logger("vllm.tidal.metadata")


@dataclass
class TidalMetadata(AttentionMetadata):
    """One step's batch, decodes first; one object for all layers of a group."""

    num_decodes: int
    """Requests of the batch that decode: their prompt is done. Those that pad a CUDA
    graph are among them."""
    num_decode_tokens: int
    """Their query tokens, each a row of the decode ops: one per request, and one for
    each token of a draft that it verifies. Rows of padding are among them."""
    num_prefills: int
    seq_lens: torch.Tensor
    """`[>= num_decode_tokens]` int32, tokens of the sequence up to a row's; 0 for
    padding."""
    block_table: torch.Tensor
    """`[>= num_decode_tokens, max_blocks_per_seq]` int32, of each row's sequence."""
    dense: AttentionMetadata
    """The dense backend's, of the whole batch."""
    prefills: AttentionMetadata | None
    """The dense backend's, of the rows behind the decodes; None unless sparse."""
    sparse: bool
    """Whether SELECT and SPARSE layers act as such in this step. Otherwise every
    layer takes the dense path."""
    passes: list[slice]
    """Parts of the decodes that fit into the workspace; none unless sparse."""
    roles: dict[str, Role]
    """Role of each layer by its name, where any is sparse."""
    choices: dict[str, int]
    """Index of the choice in `Selection` that a SELECT layer writes and SPARSE layers
    read, by the layer's name."""
    select_lens: torch.Tensor
    """Like seq_lens, where SELECT layers choose in this step; -1 for
    rows that keep the last step's choice."""
    reuse_lens: torch.Tensor | None
    """Like seq_lens, for those rows; -1 for others. None where all choose."""
    rule: SelectionRule


class TidalMetadataBuilder(AttentionMetadataBuilder[TidalMetadata]):
    """Splits each batch into decodes and prefills, and decides if it runs sparse.

    There is one for each KV cache group, and all see the same batch. What happens once
    per step is done by the one that leads.
    """

    reorder_batch_threshold: int = 1

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        startup = resolve(vllm_config)
        self.plan, self.rule = startup.plan, startup.rule
        impls = _tidal_impls(vllm_config)
        roles = self._roles_of(impls)
        self.roles = {name: roles[name] for name in layer_names}
        choosing = [n for n, r in roles.items() if r in (Role.SELECT, Role.SPARSE)]
        ours = [name for name in choosing if name in self.roles]
        _require_one_state({n: impls[n] for n in choosing})
        self.leads = next(iter(choosing or impls)) in self.roles
        self.counters = DecodeCounters()
        self.state: SparseState | None = None
        self.choices: dict[str, int] = {}
        if ours:
            startup.config.check_kv_block_size(kv_cache_spec.block_size)
            self.state = impls[ours[0]].state
            self.choices = {
                name: self.state.choices[extract_layer_index(name)] for name in ours
            }
        self.num_steps = 0
        self.longest_query = max_decode_query_len(vllm_config)
        if self.plan.sparse:
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.query_rows: QueryRows | None = None
        if self.state is not None and self.longest_query > 1:
            longest = vllm_config.model_config.max_model_len
            self.query_rows = QueryRows.allocate(
                max_decode_rows(vllm_config),
                -(-longest // kv_cache_spec.block_size),
                device,
            )
        # Two, for a builder keeps what its last metadata points to.
        impl = impls[layer_names[0]]
        made = (kv_cache_spec, layer_names, vllm_config, device)
        builder_cls = impl.dense_backend.get_builder_cls()
        self.dense_builder, self.prefill_builder = (
            builder_cls(*made),
            builder_cls(*made),
        )
        if self.leads:
            self._print_plan(startup.config, impl.dense_backend)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Full graphs of decodes, if the kernels can be captured.

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
        if not kernels.capturable:
            return AttentionCGSupport.NEVER
        ours = AttentionCGSupport.UNIFORM_BATCH
        return min(support, ours, key=lambda kind: kind.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TidalMetadata:
        common, args = common_attn_metadata, (common_prefix_len, fast_build)
        # What a captured graph does is fixed: every row decodes, and runs sparse.
        compilation, most = self.vllm_config.compilation_config, self.longest_query
        captured = is_captured(compilation, common, most)
        num_decodes = common.num_reqs if captured else count_decodes(common, most)
        starts = common.query_start_loc_cpu
        num_rows = common.num_actual_tokens if captured else int(starts[num_decodes])
        decode_lens = row_lens(
            (starts[1:] - starts[:-1])[:num_decodes].tolist(),
            common.seq_lens_cpu_upper_bound[:num_decodes].tolist(),
        )
        # A decode has its prompt behind it: 1 is a row of a warm-up.
        decode_lens = [length for length in decode_lens if length > 1]
        longest = max(decode_lens, default=0)
        sparse = self.state is not None and (
            captured or runs_sparse(self.plan, self.rule, longest)
        )
        if self.leads:
            self.counters.count_step(self.rule, decode_lens, sparse)
            self.num_steps += 1
        if sparse and self.leads and self.state.reuse is not None:
            self.state.reuse.advance(
                self.num_steps,
                common.seq_lens[:num_decodes],
                common.block_table_tensor,
                self.kv_cache_spec.block_size,
                self.rule.select_block_size,
                self.state.selection,
            )
        dense = self.dense_builder.build(args[0], common, args[1])
        prefills = None
        if sparse and num_decodes < common.num_reqs:
            rest = rows_from(common, num_decodes)
            prefills = self.prefill_builder.build(args[0], rest, args[1])
        rows = (num_decodes, num_rows)
        return self._metadata(common, rows, sparse, dense, prefills)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TidalMetadata:
        """The batch of a full graph: decodes only, through the sparse path."""
        common, sparse = common_attn_metadata, self.state is not None
        if sparse and common.max_query_len > self.longest_query:
            raise ValueError(
                f"max_query_len = {common.max_query_len} in a full CUDA graph: only "
                f"decodes can be captured, of {self.longest_query} query tokens at "
                "most; allowed cudagraph_mode FULL_DECODE_ONLY, FULL_AND_PIECEWISE, "
                "PIECEWISE or NONE"
            )
        if sparse and self.state.reuse is not None:
            self.state.reuse.choose_anew(common.seq_lens[: common.num_reqs])
        dense = self.dense_builder.build_for_cudagraph_capture(common)
        rows = (common.num_reqs, common.num_actual_tokens)
        return self._metadata(common, rows, sparse, dense, None)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> TidalMetadata:
        """The batch of a draft model, which is no step of ours and always dense."""
        common = common_attn_metadata
        dense = self.dense_builder.build_for_drafting(common, draft_index)
        return self._metadata(common, (0, 0), False, dense, None)

    def _metadata(
        self,
        common: CommonAttentionMetadata,
        rows: tuple[int, int],
        sparse: bool,
        dense: AttentionMetadata,
        prefills: AttentionMetadata | None,
    ) -> TidalMetadata:
        num_decodes, num_rows = rows
        seq_lens, block_table = common.seq_lens, common.block_table_tensor
        if sparse and self.query_rows is not None:
            seq_lens, block_table = self.query_rows.fill(
                num_rows,
                common.query_start_loc[: num_decodes + 1],
                seq_lens[:num_decodes],
                block_table[:num_decodes],
            )
        passes, select_lens, reuse_lens = [], seq_lens, None
        if sparse:
            if self.state.reuse is not None:
                select_lens = self.state.reuse.select_lens
                reuse_lens = self.state.reuse.reuse_lens
            step = self.state.rows_per_pass
            starts = range(0, num_rows, step)
            passes = [slice(first, min(first + step, num_rows)) for first in starts]
        return TidalMetadata(
            num_decodes=num_decodes,
            num_decode_tokens=num_rows,
            num_prefills=common.num_reqs - num_decodes,
            seq_lens=seq_lens,
            block_table=block_table,
            dense=dense,
            prefills=prefills,
            sparse=sparse,
            passes=passes,
            roles=self.roles,
            choices=self.choices,
            select_lens=select_lens,
            reuse_lens=reuse_lens,
            rule=self.rule,
        )

    def _roles_of(self, impls: dict[str, Any]) -> dict[str, Role]:
        """The role of each layer of this worker, once they are what they should be."""
        roles = dict.fromkeys(impls, Role.DENSE)
        # A draft model's layers know their own configuration: none of them is sparse.
        indices = {
            name: extract_layer_index(name)
            for name, impl in impls.items()
            if impl.kernels is not None
        }
        if not indices:
            return roles
        config = self.vllm_config
        stage = config.model_config.get_layers_start_end_indices(config.parallel_config)
        full = [i for name, i in indices.items() if impls[name].sliding_window is None]
        check_full_layers(self.plan, range(*stage), full)
        return roles | {name: self.plan.roles[i] for name, i in indices.items()}

    def _print_plan(self, config, dense_backend: type[AttentionBackend]) -> None:
        from vllm.distributed.parallel_state import is_global_first_rank

        if is_global_first_rank():
            model = self.vllm_config.model_config
            lines = [format_plan(self.plan, config, model.max_model_len, model.model)]
            if self.state is not None:
                lines += [f"kernels: {self.state.kernels.why}", str(self.state)]
            lines.append(f"dense attention: {dense_backend.get_name()}")
            logger.info("%s", "\n".join(lines))
            if self.state is not None and self.state.kernels.advice:
                logger.warning("%s", self.state.kernels.advice)


def _require_one_state(impls: dict[str, Any]) -> None:
    """SPARSE layers need the selection of SELECT layers: one for all of a worker."""
    first = next(iter(impls), None)
    for name, impl in impls.items():
        if impl.state is not impls[first].state:
            shapes = [
                f"{i.num_heads} query and {i.num_kv_heads} KV heads of {i.head_size}"
                for i in (impls[first], impl)
            ]
            raise ValueError(
                f"{first} has {shapes[0]}, {name} {shapes[1]}: sparse decoding needs "
                "full-attention layers of one shape; allowed for other models "
                "tidal.select_layers = []"
            )


def _tidal_impls(vllm_config: VllmConfig) -> dict[str, Any]:
    """The `TidalImpl` of each layer of this worker that has one, in their order."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    return {
        name: layer.impl
        for name, layer in layers.items()
        if layer.attn_backend.get_name() == NAME
    }


def is_captured(
    compilation: CompilationConfig,
    common: CommonAttentionMetadata,
    longest_query: int = 1,
) -> bool:
    """Whether vLLM may replay a full CUDA graph of decodes for this batch.

    Both model runners pad such a batch to a size that was captured, and take short
    chunks of prompts for decodes.

    Args:
        longest_query: Query tokens that a decode may have; one graph has as many for
            all its requests.
    """
    query_len, num_tokens = common.max_query_len, common.num_actual_tokens
    sizes = compilation.cudagraph_capture_sizes or ()
    return (
        query_len <= longest_query
        and common.num_reqs * query_len == num_tokens
        and compilation.cudagraph_mode is not None
        and compilation.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        and any(-(-size // query_len) * query_len == num_tokens for size in sizes)
    )
