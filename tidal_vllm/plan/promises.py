"""What vLLM's set-up must leave true, so that sparse decoding does what it says.

Checked where vLLM completes its config, and again where the scheduler is made: vLLM
changes its config in between.
"""

from typing import Any

from tidal_vllm.names import NAME
from tidal_vllm.plan.resolve import Startup, uncorrectable
from tidal_vllm.plan.roles import Role, format_layers
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import TidalConfigError


def check_promises(vllm_config: Any, startup: Startup) -> None:
    """Refuse what would break a promise. Nothing is promised where all is dense.

    Raises:
        ValueError: Names the key, the value and what is allowed.
    """
    if startup.config.mode == "lossless":
        _check_lossless(vllm_config, startup)
    if not startup.plan.sparse:
        return
    _check_microbatches(vllm_config)
    if startup.config.mode == "sparse":
        _check_speculation(vllm_config, startup)
    _check_connector(vllm_config, startup)
    _check_correction(vllm_config, startup)


def needs_scheduler(vllm_config: Any, startup: Startup) -> str:
    """Why TIDAL's scheduler is needed; empty where any scheduler will do."""
    config = startup.config
    if config.correction_interval is not None:
        return (
            f"it does not run corrections (tidal.correction_interval = "
            f"{config.correction_interval}; null turns them off)"
        )
    caching = vllm_config.cache_config.enable_prefix_caching is not False
    if caching and not config.publish_polluted:
        return (
            "it would publish the KV of sparse layers in the prefix cache "
            "(--no-enable-prefix-caching or tidal.publish_polluted = true would do)"
        )
    return ""


def _check_microbatches(vllm_config: Any) -> None:
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError(
            "enable_dbo = True: both halves of a batch would write the one selection "
            "that its layers hand on; allowed False, or tidal.select_layers = []"
        )


def _check_lossless(vllm_config: Any, startup: Startup) -> None:
    """Refuse what the model cannot draft for itself beside."""
    if not startup.plan.sparse:
        allowed = (
            f"no layer could draft sparsely ({startup.plan.off_reason}): must be "
            "'sparse'"
        )
        raise TidalConfigError("tidal.mode", "lossless", allowed)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            f"pipeline_parallel_size = {stages}: drafts are made on the last stage, "
            "which holds a part of the model; allowed 1, or tidal.mode = sparse"
        )
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method != "draft_model":
        given = None if speculation is None else speculation.method
        raise ValueError(
            f"speculative_config.method = {given}: with tidal.mode = lossless the "
            "config of drafts is made of --attention-backend tidal, and of no other "
            "way to choose it; allowed that, or tidal.mode = sparse"
        )
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    spread = parallel.data_parallel_size > 1 or parallel.enable_expert_parallel
    refused = {
        "enable_lora": vllm_config.lora_config is not None,
        "enable_prompt_embeds": model.enable_prompt_embeds,
        "data or expert parallel experts": model.is_moe and spread,
        "M-RoPE": model.uses_mrope,
        "a window that never slides": startup.never_slides is not None,
    }
    for what, given in refused.items():
        if given:
            allowed = f"does not know {what}: must be 'sparse'"
            raise TidalConfigError("tidal.mode", "lossless", allowed)
    others = startup.plan.layers(Role.OTHER)
    if others:
        allowed = (
            f"layers {format_layers(others)} of this model have windows or states, "
            "which a draft would change: must be 'sparse'"
        )
        raise TidalConfigError("tidal.mode", "lossless", allowed)


def _check_speculation(vllm_config: Any, startup: Startup) -> None:
    speculation, config = vllm_config.speculative_config, startup.config
    if speculation is None:
        return
    backend = speculation.attention_backend
    if backend is not None and backend.name == NAME:
        raise ValueError(
            f"speculative_config.attention_backend = {NAME}: a draft model decodes "
            "densely; allowed None or another backend"
        )
    for key, allowed in {"reselect_interval": 1, "correction_interval": None}.items():
        value = getattr(config, key)
        if value != allowed:
            raise ValueError(
                f"tidal.{key} = {value}: speculative decoding takes back tokens and "
                "moves from step to step by more than one; allowed with "
                f"speculative_config: {'null' if allowed is None else allowed}"
            )


def _check_connector(vllm_config: Any, startup: Startup) -> None:
    config = startup.config
    if METHODS[config.method].follows_keys:
        allowed = (
            f"brings KV that method {config.method!r} has not seen written; allowed "
            "None, or another tidal.method"
        )
    elif config.publish_polluted and config.correction_interval is None:
        return
    else:
        allowed = (
            "copies blocks out before they are corrected; allowed None, or "
            "tidal.publish_polluted = true without tidal.correction_interval"
        )
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    # NOTE: vLLM makes a connector of it after the platform's check, and replaces the
    # one that was given.
    if cache.kv_offloading_size is not None:
        raise ValueError(
            f"kv_offloading_size = {cache.kv_offloading_size}: the KV connector that "
            f"vLLM makes of it (kv_offloading_backend = {cache.kv_offloading_backend}) "
            f"{allowed}"
        )
    if transfer is not None:
        raise ValueError(
            f"kv_transfer_config = {transfer.kv_connector}: a KV connector {allowed}"
        )


def _check_correction(vllm_config: Any, startup: Startup) -> None:
    interval = startup.config.correction_interval
    if interval is None:
        return
    if reason := uncorrectable(vllm_config, startup):
        raise TidalConfigError("tidal.correction_interval", interval, reason)
    scheduler = vllm_config.scheduler_config
    limits = {
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
    }
    for key, limit in limits.items():
        if limit == 1:
            raise ValueError(
                f"{key} = 1: a correction computes at least 2 tokens of a sequence "
                "in one step; allowed >= 2, or tidal.correction_interval = null"
            )
