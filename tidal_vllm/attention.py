"""One layer of one step, top to bottom: write KV, prefill, decode by role."""

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from tidal_vllm import ops
from tidal_vllm.metadata import TidalMetadata
from tidal_vllm.policy import Role


class TidalImpl(AttentionImpl[TidalMetadata]):
    """Attention of one layer over the paged KV cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap or None,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        for key, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"{key} = {value}: not supported by the TIDAL attention backend; "
                    "allowed None"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's K and V into the slots that the scheduler gave them."""
        ops.write_kv(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TidalMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the step's decodes come first in the batch, prefills after.

        Args:
            layer: The vLLM layer; its name decides the role.
            query: `[num_tokens, num_heads, head_size]`.
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`,
                any strides, already holding this step's K and V.
            attn_metadata: None in vLLM's profiling run.
            output: `[num_tokens, num_heads, head_size]`, written.
        """
        if attn_metadata is None:
            return output.zero_()
        if attn_metadata.num_prefills:
            self._prefill(query, kv_cache, attn_metadata, output)
        if attn_metadata.num_decodes:
            role = attn_metadata.roles[layer.layer_name]
            self._decode(role, query, kv_cache, attn_metadata, output)
        return output

    def _prefill(self, query, kv_cache, batch: TidalMetadata, output) -> None:
        first, end = batch.num_decodes, batch.num_actual_tokens
        output[first:end] = ops.dense_extend(
            query[first:end],
            kv_cache,
            batch.block_table[first:],
            batch.seq_lens[first:],
            batch.query_start_loc[first:] - first,
            scale=self.scale,
        )

    def _decode(self, role: Role, query, kv_cache, batch: TidalMetadata, output):
        rows = slice(batch.num_decodes)
        sequences = (
            query[rows],
            kv_cache,
            batch.block_table[rows],
        )
        seq_lens = batch.seq_lens[rows]
        rule, chosen = batch.rule, batch.selection
        if not batch.sparse or role is Role.DENSE:
            output[rows], _, _ = ops.dense_decode(
                *sequences, seq_lens, scale=self.scale
            )
        elif role is Role.SELECT:
            output[rows], lse, block_lse = ops.dense_decode(
                *sequences,
                seq_lens,
                scale=self.scale,
                select_block_size=rule.select_block_size,
            )
            ops.select_blocks(
                block_lse,
                lse,
                seq_lens,
                rule=rule,
                topk_blocks=chosen.topk_blocks,
                topk_lens=chosen.topk_lens,
            )
        else:
            output[rows], _ = ops.sparse_decode(
                *sequences,
                chosen.topk_blocks[rows],
                chosen.topk_lens[rows],
                seq_lens,
                scale=self.scale,
                select_block_size=rule.select_block_size,
            )
