"""What all layers share in one step: the batch, the roles and the selection."""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import (
    get_num_attention_heads_from_layers,
    split_decodes_and_prefills,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from tidal_vllm import ops
from tidal_vllm.metrics import DecodeCounters
from tidal_vllm.policy import Role, SelectionRule, format_plan, num_sets, runs_sparse
from tidal_vllm.startup import resolve

logger = init_logger("vllm.tidal.metadata")


@dataclass(frozen=True)
class Selection:
    """The chosen blocks of every decoding sequence, handed from layer to layer.

    A SELECT layer writes the rows of the step's decodes, the SPARSE layers after
    it read them. The buffers live as long as the engine, at fixed addresses.
    """

    topk_blocks: torch.Tensor
    """`[max_num_seqs, num_sets, max_blocks]` int32, logical selection blocks,
    ascending; -1 behind the last."""
    topk_lens: torch.Tensor
    """`[max_num_seqs, num_sets]` int32, how many of them are in use."""

    @classmethod
    def allocate(
        cls, num_seqs: int, num_sets: int, max_blocks: int, device: torch.device
    ) -> "Selection":
        shape = (num_seqs, num_sets, max_blocks)
        blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        return cls(blocks, torch.zeros(shape[:2], dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        return self.topk_blocks.nbytes + self.topk_lens.nbytes


@dataclass
class TidalMetadata(AttentionMetadata):
    """One step's batch, decodes first; one object for all layers of the model."""

    num_actual_tokens: int
    num_decodes: int
    """Rows of the batch that decode: one query token each, its prompt done."""
    num_prefills: int
    query_start_loc: torch.Tensor
    """`[num_reqs + 1]` int32 on the CPU."""
    seq_lens: torch.Tensor
    """`[num_reqs]` int32, context and query tokens."""
    block_table: torch.Tensor
    """`[num_reqs, max_blocks_per_seq]` int32."""
    sparse: bool
    """Whether SELECT and SPARSE layers act as such in this step. Otherwise every
    layer takes the dense path."""
    roles: dict[str, Role]
    """Role of each layer by its name."""
    rule: SelectionRule
    selection: Selection | None


class TidalMetadataBuilder(AttentionMetadataBuilder[TidalMetadata]):
    """Splits each batch into decodes and prefills; owns the selection buffers."""

    # The PyTorch ops read sequence lengths on the host.
    _cudagraph_support = AttentionCGSupport.NEVER
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
        startup.config.check_kv_block_size(kv_cache_spec.block_size)
        self.plan, self.rule = startup.plan, startup.rule
        self.roles = {
            name: self.plan.roles[extract_layer_index(name)] for name in layer_names
        }
        self._require_one_group(layer_names)
        self.counters = DecodeCounters()
        self.selection: Selection | None = None
        if self.plan.sparse:
            longest = vllm_config.model_config.max_model_len
            num_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
            self.selection = Selection.allocate(
                vllm_config.scheduler_config.max_num_seqs,
                num_sets(startup.config.scope, num_heads, kv_cache_spec.num_kv_heads),
                min(startup.config.max_blocks, self.rule.num_blocks(longest)),
                device,
            )
        self._print_plan(startup.config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TidalMetadata:
        common = common_attn_metadata
        # A prompt's last token may come as a chunk of its own. It is prefill
        # all the same: dense, so that its KV is what a dense model writes.
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(
            common, decode_threshold=1, treat_short_extends_as_decodes=False
        )
        decode_lens = common.seq_lens_cpu_upper_bound[:num_decodes].tolist()
        sparse = runs_sparse(self.plan, self.rule, max(decode_lens, default=0))
        self.counters.count_step(self.rule, decode_lens, sparse)
        return TidalMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            query_start_loc=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            sparse=sparse,
            roles=self.roles,
            rule=self.rule,
            selection=self.selection,
        )

    def _require_one_group(self, layer_names: list[str]) -> None:
        """SPARSE layers need the selection of SELECT layers: one group for all."""
        indices = sorted(extract_layer_index(name) for name in layer_names)
        if self.plan.sparse and indices != list(range(indices[0], indices[-1] + 1)):
            raise ValueError(
                f"layers {indices} form one KV cache group of several: TIDAL needs "
                "all attention layers of a pipeline stage in one group; allowed are "
                "models whose layers all attend to the whole sequence"
            )

    def _print_plan(self, config) -> None:
        from vllm.distributed.parallel_state import is_global_first_rank

        if is_global_first_rank():
            model = self.vllm_config.model_config.model
            table = format_plan(self.plan, config, model_name=model)
            logger.info("%s\nkernels: %s", table, ops.describe(self.device))
