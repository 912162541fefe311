"""The attention backend class that vLLM selects, and what it can run."""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.dense import choose_dense_backend
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.engine.support import ON_GPU, supported_here
from tidal_vllm.names import NAME
from tidal_vllm.versions import unsupported_vllm

if _reason := unsupported_vllm():
    raise ImportError(_reason)

# vLLM's words for a layer's property, and what it should have said.
_EXPLAINED = {
    "MLA not supported": (
        "use_mla = True: allowed are models with separate K and V heads (MHA, GQA, MQA)"
    ),
    "attention sinks not supported": (
        "has_sink = True: allowed are models without attention sinks"
    ),
    "partial multimodal token full attention not supported": (
        "use_mm_prefix = True: allowed are models that are causal over all tokens"
    ),
    "sparse not supported": (
        "use_sparse = True: allowed are models without sparse attention of their own"
    ),
    "per-head quant scales not supported": (
        "use_per_head_quant_scales = True: allowed are KV caches with one scale for "
        "all heads, or none"
    ),
    "non-causal attention not supported": (
        "use_non_causal = True: allowed are causal models"
    ),
    "R-SWA not supported": "use_rswa = True: allowed are models without R-SWA",
    "batch invariance not supported": "VLLM_BATCH_INVARIANT = 1: allowed 0",
    "PCP not supported": "prefill_context_parallel_size > 1: allowed 1",
    "DCP not supported": "decode_context_parallel_size > 1: allowed 1",
}


class TidalBackend(AttentionBackend):
    """Dense, selecting and sparse attention over vLLM's paged KV cache."""

    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[TidalImpl]:
        return TidalImpl

    @staticmethod
    def get_builder_cls() -> type[TidalMetadataBuilder]:
        return TidalMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(
        cls, kv_cache_spec: KVCacheSpec | None = None
    ) -> list[int | MultipleOf]:
        if current_platform.is_cuda():  # it may be the dense backend
            from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

            return FlashAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
        return [MultipleOf(supported_here().block_size)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [*supported_here().head_sizes]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in supported_here().dtypes

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in (None, *supported_here().kv_cache_dtypes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        first = supported_here().layout
        # Next best are those that keep a layer's blocks together.
        order = (first, KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, *KVCacheLayout)
        return tuple(dict.fromkeys(order))

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Say why a layer cannot run here; an empty list means that it can.

        Takes vLLM's selector fields as keywords. Each reason names the field,
        its value and what is allowed.
        """
        attn_type, here = asked["attn_type"], supported_here()
        explained = _EXPLAINED | {
            "head_size not supported": (
                f"head_size = {asked['head_size']}: allowed {[*here.head_sizes]}"
            ),
            "dtype not supported": (
                f"dtype = {asked['dtype']}: allowed {[*here.dtypes]}"
            ),
            "kv_cache_dtype not supported": (
                f"kv_cache_dtype = {asked['kv_cache_dtype']}: "
                f"allowed {[*here.kv_cache_dtypes]}"
            ),
            "block_size not supported": (
                f"block_size = {asked['block_size']}: allowed are multiples of "
                f"{here.block_size}"
            ),
            f"attention type {attn_type} not supported": (
                f"attn_type = {attn_type}: allowed {AttentionType.DECODER.value}"
            ),
        }
        reasons = super().validate_configuration(**asked)
        if asked["use_mla"]:  # its head size is that of the latents
            reasons = ["MLA not supported"]
        if not reasons and here is ON_GPU:
            try:
                capability = asked.pop("device_capability")
                choose_dense_backend(AttentionSelectorConfig(**asked), None, capability)
            except ValueError as error:
                reasons = [str(error)]
        return [explained.get(reason, reason) for reason in reasons]

    @classmethod
    def require_supported(
        cls, asked: AttentionSelectorConfig, model: str = "this model"
    ) -> None:
        """Raise a ValueError with every reason why a layer cannot run here."""
        capability = current_platform.get_device_capability()
        reasons = cls.validate_configuration(
            device_capability=capability, **asked._asdict()
        )
        if reasons:
            raise ValueError(
                f"The {NAME} attention backend cannot run {model}: "
                + "; ".join(reasons)
            )
