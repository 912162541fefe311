"""Dense attention on PyTorch ops, in the roles of a vLLM backend: for the CPU."""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from tidal_vllm.engine.batch import find_prefills
from tidal_vllm.kernels import DecodeArgs, reference


@dataclass
class ReferenceMetadata(AttentionMetadata):
    """A batch for `ReferenceImpl`, decodes first."""

    num_decodes: int
    num_actual_tokens: int
    query_start_loc: torch.Tensor
    """`[num_reqs + 1]` int32 on the CPU."""
    seq_lens: torch.Tensor
    """`[num_reqs]` int32, context and query tokens."""
    block_table: torch.Tensor
    """`[num_reqs, max_blocks_per_seq]` int32."""


class ReferenceBuilder(AttentionMetadataBuilder[ReferenceMetadata]):
    """Takes the batch as it is."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ReferenceMetadata:
        common = common_attn_metadata
        return ReferenceMetadata(
            num_decodes=_first_decodes(common),
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
        )


def _first_decodes(common: CommonAttentionMetadata) -> int:
    """Requests before the first that does not decode."""
    is_prefill = find_prefills(common)
    return common.num_reqs if is_prefill is None else int(is_prefill.int().argmax())


class ReferenceImpl(AttentionImpl[ReferenceMetadata]):
    """Dense attention on PyTorch ops."""

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
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.scale, self.sliding_window = scale, sliding_window

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        reference.write_kv(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ReferenceMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch = attn_metadata
        first, end = batch.num_decodes, batch.num_actual_tokens
        if self.sliding_window is not None:
            first = 0  # a decode is an extend by one token
        if first:
            args = DecodeArgs(
                query[:first],
                kv_cache,
                batch.block_table[:first],
                output[:first],
                self.scale,
            )
            reference.dense_decode(args, batch.seq_lens[:first])
        if first < batch.seq_lens.shape[0]:
            output[first:end] = reference.dense_extend(
                query[first:end],
                kv_cache,
                batch.block_table[first:],
                batch.seq_lens[first:],
                batch.query_start_loc[first:] - first,
                scale=self.scale,
                sliding_window=self.sliding_window,
            )
        return output


class ReferenceBackend(AttentionBackend):
    """vLLM's backend interface over the PyTorch ops."""

    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "PyTorch reference ops"

    @staticmethod
    def get_impl_cls() -> type[ReferenceImpl]:
        return ReferenceImpl

    @staticmethod
    def get_builder_cls() -> type[ReferenceBuilder]:
        return ReferenceBuilder
