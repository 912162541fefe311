"""Everything that is refused or set where vLLM completes its configuration.

Changes vLLM at run time: `scheduler_config.scheduler_cls`, where nobody chose a
scheduler, and the environment variable `TIDAL_VLLM_TOLD`.
"""

import json
import os
from typing import TYPE_CHECKING
from zlib import crc32

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.selector import AttentionSelectorConfig

from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.engine.drafts import is_made_again
from tidal_vllm.engine.state import choose_implementations
from tidal_vllm.engine.support import ON_CPU, kv_block_size, supported_here
from tidal_vllm.names import (
    ASYNC_SCHEDULER,
    CPU_PLATFORM_PATH,
    NAME,
    SYNC_SCHEDULER,
    TOLD,
)
from tidal_vllm.plan.promises import check_promises, needs_scheduler
from tidal_vllm.plan.resolve import Startup, has_settings, is_selected, resolve
from tidal_vllm.plan.roles import LayerPlan
from tidal_vllm.plan.stages import check_pipeline_stage
from tidal_vllm.validators import TidalConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.tidal.backend")

# Fields of a model's config that make vLLM build layers for kernels that this package
# lacks.
_REFUSED_FIELDS = {
    "dual_chunk_attention_config": "dual chunk attention (Qwen2.5-1M)",
    "canvas_length": "block diffusion",
}


def check_setup(vllm_config: "VllmConfig") -> None:
    """Refuse, before any process is spawned or weight is read, what cannot run.

    A config that vLLM makes again for a draft model is left alone: the target's was
    checked.

    Raises:
        ValueError: Names the key, the value and what is allowed.
    """
    model_config = vllm_config.model_config
    if model_config is None or is_made_again(vllm_config):
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
    if startup.config.mode == "lossless":
        _check_runner()
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


def _check_runner() -> None:
    """Refuse lossless mode where no model runner of this package's is in use.

    Raises:
        TidalConfigError: On a GPU, on another platform, with the V2 runner.
    """
    platform_cls = type(current_platform)
    path = f"{platform_cls.__module__}.{platform_cls.__name__}"
    where = ""
    if path != CPU_PLATFORM_PATH:
        where = f"on {current_platform.device_name} it is not there yet"
    elif envs.VLLM_USE_V2_MODEL_RUNNER:
        where = "with VLLM_USE_V2_MODEL_RUNNER = 1 it is not there yet"
    if where:
        allowed = (
            f"{where}, only with the CPU default of this package: must be 'sparse'"
        )
        raise TidalConfigError("tidal.mode", "lossless", allowed)


def _warn_once(warning: str) -> None:
    """Warn, unless a parent process already has.

    The engine's process completes the same config again.

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
    if not startup.plan.sparse or startup.config.mode == "lossless":
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


def _check_pipeline_stages(vllm_config: "VllmConfig", plan: LayerPlan) -> None:
    from vllm.distributed.utils import get_pp_indices

    stages = vllm_config.parallel_config.pipeline_parallel_size
    for stage in range(stages):
        first, end = get_pp_indices(len(plan.roles), stage, stages)
        check_pipeline_stage(plan, first, end)
