"""What runs everything but sparse decoding: vLLM's own dense backend, by composition.

Prefills, DENSE layers and steps that need no selection go to FlashAttention or Triton
attention as vLLM ships them: their backend class, their metadata builder, their impl.
Where neither runs, the PyTorch ops take the same three roles.
"""

from dataclasses import dataclass

import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tidal_vllm.kernels import Kernels, dense_decode, dense_extend, write_kv


def choose_dense_backend(
    asked: AttentionSelectorConfig,
    kernels: Kernels | None,
    capability: DeviceCapability | None = None,
) -> type[AttentionBackend]:
    """The dense backend to compose with.

    On an NVIDIA GPU FlashAttention where it covers the layer, else, and on other GPUs,
    Triton attention. On a CPU the PyTorch ops, except beside Triton kernels: both then
    run under Triton's interpreter.

    Raises:
        ValueError: Neither covers the layer; says why, backend by backend.
    """
    interpreted = kernels is not None and kernels.name == "triton"
    if current_platform.device_type == "cpu" and not interpreted:
        return ReferenceBackend
    reasons = {}
    for name in _candidates():
        try:
            backend = AttentionBackendEnum[name].get_class()
            found = backend.validate_configuration(
                device_capability=capability
                or current_platform.get_device_capability(),
                **asked._asdict(),
            )
            if not found and name == "FLASH_ATTN" and not _has_flash(asked.head_size):
                found = ["its compiled part does not load here"]
        except (ImportError, OSError) as error:
            found = [f"{type(error).__name__}: {error}"]
        if not found:
            return backend
        reasons[name] = ", ".join(found)
    raise ValueError(
        "no dense attention backend covers this set-up: "
        + "; ".join(f"{name}: {why}" for name, why in reasons.items())
    )


def _candidates() -> tuple[str, ...]:
    # On other GPUs vLLM's FLASH_ATTN is somebody else's, and not what it picks.
    return (*(["FLASH_ATTN"] if current_platform.is_cuda() else []), "TRITON_ATTN")


def _has_flash(head_size: int) -> bool:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    found = get_flash_attn_version(head_size=head_size, supports_fa4_hd256=True)
    return found is not None


def count_decodes(common: CommonAttentionMetadata, longest_query: int = 1) -> int:
    """Rows at the front of a batch that decode: few query tokens, their prompt done.

    Args:
        longest_query: Query tokens that a decode may have; more than one are drafts
            to verify.

    Rows that pad a CUDA graph have no query token; they count as decodes, behind
    which nothing follows. A prompt's last token may come as a chunk of its own. It is
    prefill all the same: dense, so that its KV is what a dense model writes.
    """
    if common.max_query_len <= longest_query and common.is_prefilling is None:
        return common.num_reqs
    starts = common.query_start_loc_cpu
    is_prefill = starts[1:] - starts[:-1] > longest_query
    if common.is_prefilling is not None:
        # NOTE: the V2 model runner pads the other rows, but not this one.
        known = common.is_prefilling[: common.num_reqs]
        is_prefill[: known.shape[0]] |= known
    if not is_prefill.any():
        return common.num_reqs
    return int(is_prefill.int().argmax())


def rows_from(common: CommonAttentionMetadata, first: int) -> CommonAttentionMetadata:
    """The batch without its first rows, as a batch of its own."""
    start = int(common.query_start_loc_cpu[first])

    def tail(rows):
        return None if rows is None else rows[first:]

    return common.replace(
        query_start_loc=common.query_start_loc[first:] - start,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - start,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - start,
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[start:],
        positions=None if common.positions is None else common.positions[start:],
        is_prefilling=tail(common.is_prefilling),
        seq_lens_cpu_upper_bound=tail(common.seq_lens_cpu_upper_bound),
        req_idx=tail(common.req_idx),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


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

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ReferenceMetadata:
        common = common_attn_metadata
        return ReferenceMetadata(
            num_decodes=count_decodes(common),
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
        )


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
        write_kv(key, value, kv_cache, slot_mapping)

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
            output[:first], _, _ = dense_decode(
                query[:first],
                kv_cache,
                batch.block_table[:first],
                batch.seq_lens[:first],
                scale=self.scale,
            )
        if first < batch.seq_lens.shape[0]:
            output[first:end] = dense_extend(
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
