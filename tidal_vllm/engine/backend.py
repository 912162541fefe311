"""The backend class vLLM selects, and everything that it refuses at start-up."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

import torch
import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_layout import KVCacheLayout

from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.dense import choose_dense_backend
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.engine.state import choose_implementations
from tidal_vllm.names import ASYNC_SCHEDULER, NAME, SYNC_SCHEDULER
from tidal_vllm.plan.policy import check_pipeline_stage
from tidal_vllm.plan.promises import check_promises, needs_scheduler
from tidal_vllm.plan.resolve import Startup, has_settings, is_selected, resolve
from tidal_vllm.versions import unsupported_vllm

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.tidal.backend")

if _reason := unsupported_vllm():
    raise ImportError(_reason)

TOLD = "TIDAL_VLLM_TOLD"  # warnings, and the process that gave each

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


# Of a model's config: what vLLM builds a model's layers for, where it is there.
_REFUSED_FIELDS = {
    "dual_chunk_attention_config": "dual chunk attention (Qwen2.5-1M)",
    "canvas_length": "block diffusion",
}


@dataclass(frozen=True)
class Support:
    """What one kind of device can do.

    On a GPU the dense backend and the kernels have a say too, once the model is known.
    """

    dtypes: tuple[torch.dtype, ...]
    kv_cache_dtypes: tuple[str, ...]
    layout: KVCacheLayout
    """The preferred one. Any is read right."""
    block_size: int
    """Tokens; what a KV block must be a multiple of."""
    default_block_size: int
    """Tokens of a KV block where the user does not say."""
    head_sizes: tuple[int, ...] = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


ON_CPU = Support(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    kv_cache_dtypes=("auto", "float16", "bfloat16"),
    # The PyTorch ops read a head's block as one run; heads side by side cost them a
    # quarter more (benchmarks/kernels/bench_reference_ops.py).
    layout=KVCacheLayout.LBHNC,
    block_size=1,
    default_block_size=128,
)
ON_GPU = Support(
    dtypes=(torch.bfloat16, torch.float16),
    kv_cache_dtypes=("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"),
    # All heads of a token side by side: a set that they share is read in long runs.
    layout=KVCacheLayout.LBNHC,
    block_size=16,
    default_block_size=16,
)


def supported_here() -> Support:
    return ON_CPU if current_platform.device_type == "cpu" else ON_GPU


def kv_block_size(vllm_config: "VllmConfig") -> int:
    """Tokens of a KV block, as far as the config tells.

    NOTE: vLLM 0.33 makes up its mind once the model is loaded, where the user did not
    say. Until then the config holds a default that may be another.
    """
    cache = vllm_config.cache_config
    if cache.user_specified_block_size or cache.block_size != cache.DEFAULT_BLOCK_SIZE:
        return cache.block_size
    return supported_here().default_block_size


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
        cls, kv_cache_spec=None
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
    def validate_configuration(cls, **asked) -> list[str]:
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


def check_setup(vllm_config: "VllmConfig") -> None:
    """Refuse, before any process is spawned or weight is read, what cannot run.

    Raises:
        ValueError: Names the key, the value and what is allowed.
    """
    model_config = vllm_config.model_config
    if model_config is None:
        return
    if not is_selected(vllm_config):
        if has_settings(vllm_config):
            _warn_once(
                "additional_config['tidal'] has no effect: the attention backend "
                "TIDAL is not selected (--attention-backend tidal)",
            )
        return
    refuse_model(model_config)
    TidalBackend.require_supported(_selector_config(vllm_config), model_config.model)
    startup = resolve(vllm_config)
    cache_config = vllm_config.cache_config
    if supported_here() is ON_CPU:
        # NOTE: on a GPU the kernels ask the device, and a front end that has started
        # CUDA could not fork. There the first layer asks, in its worker.
        choose_implementations(
            vllm_config, model_config.get_head_size(), cache_config.cache_dtype
        )
    startup.config.check_kv_block_size(kv_block_size(vllm_config))
    check_promises(vllm_config, startup)
    _check_pipeline_stages(vllm_config, startup.plan)
    _set_scheduler(vllm_config, startup)
    if startup.plan.warning:
        _warn_once(startup.plan.warning)


def _warn_once(warning: str) -> None:
    """Warn, unless a process above has: the engine's completes the same config again.

    NOTE: the environment is what such a process inherits; vLLM copies the config field
    by field, so nothing can be noted there.
    """
    told, key = json.loads(os.environ.get(TOLD, "{}")), f"{crc32(warning.encode()):x}"
    if told.setdefault(key, os.getpid()) == os.getpid():
        os.environ[TOLD] = json.dumps(told)
        logger.warning(warning)


def refuse_model(model_config: "ModelConfig") -> None:
    """Refuse a model that vLLM would build for kernels which are not here.

    Raises:
        ValueError: Names the field of the model's config and what is allowed.
    """
    both = (model_config.hf_config, model_config.hf_text_config)
    for field, kind in _REFUSED_FIELDS.items():
        value = next((v for c in both if (v := getattr(c, field, None))), None)
        if value:
            raise ValueError(
                f"The {NAME} attention backend cannot run {model_config.model}: "
                f"{field} = {value}: allowed are models without {kind}"
            )


def _selector_config(vllm_config: "VllmConfig") -> AttentionSelectorConfig:
    """What vLLM's layers will ask of the backend, as far as the config tells.

    Sinks, ALiBi slopes, soft caps and KV sharing are known to the layers only:
    those are refused when the model is built.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    layer_types = getattr(model.hf_text_config, "layer_types", None) or ()
    some_slide = (
        model.get_sliding_window() is not None and "sliding_attention" in layer_types
    )
    return AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=None,  # vLLM aligns it with what the backend supports
        use_mla=model.use_mla,
        use_mm_prefix=model.is_mm_prefix_lm,
        # A hybrid model's attention layers are decoders; others do not ask.
        attn_type="decoder" if model.is_hybrid else model.attn_type,
        has_sliding_window=cache.sliding_window is not None or some_slide,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_dcp=parallel.decode_context_parallel_size > 1,
    )


def _set_scheduler(vllm_config: "VllmConfig", startup: Startup) -> None:
    """Choose the scheduler that corrects, or refuse one that cannot keep a promise.

    Nothing happens where every step is dense: there is nothing to correct.
    """
    if not startup.plan.sparse:
        return
    scheduler = vllm_config.scheduler_config
    given = scheduler.scheduler_cls
    if given is None:
        chosen = ASYNC_SCHEDULER if scheduler.async_scheduling else SYNC_SCHEDULER
        scheduler.scheduler_cls = chosen
        return
    if given in (SYNC_SCHEDULER, ASYNC_SCHEDULER):
        return
    from tidal_vllm.engine.scheduler import CorrectionMixin

    cls = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    needed = needs_scheduler(vllm_config, startup)
    if needed and not issubclass(cls, CorrectionMixin):
        raise ValueError(
            f"scheduler_cls = {given}: {needed}; allowed None (chosen with the "
            f"attention backend) or a subclass of {SYNC_SCHEDULER} or {ASYNC_SCHEDULER}"
        )


def _check_pipeline_stages(vllm_config: "VllmConfig", plan) -> None:
    from vllm.distributed.utils import get_pp_indices

    stages = vllm_config.parallel_config.pipeline_parallel_size
    for stage in range(stages):
        first, end = get_pp_indices(len(plan.roles), stage, stages)
        check_pipeline_stage(plan, first, end)
