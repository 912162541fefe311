"""From a vLLM config to the decisions of this run; the same in every process.

Reads vLLM's config objects but imports nothing of vLLM, so that the front end,
the engine core and each worker come to the same result from the same config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.layer_kinds import LayerKind, layer_kinds, why_not_correctable
from tidal_vllm.plugin import NAME
from tidal_vllm.policy import LayerPlan, SelectionRule, all_dense, plan_layers
from tidal_vllm.profiles import Profile, find_profile, near_miss
from tidal_vllm.profiles.fingerprint import config_sha256


@dataclass(frozen=True)
class Startup:
    """What was asked for, and what follows from it for this model."""

    config: TidalConfig
    plan: LayerPlan
    rule: SelectionRule


def chosen_backends(vllm_config: Any) -> set[str]:
    """Names of the attention backends the user chose; empty if none."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return {member.name for member in chosen if member is not None}


def is_selected(vllm_config: Any) -> bool:
    """Whether the user chose the TIDAL attention backend."""
    return NAME in chosen_backends(vllm_config)


def has_settings(vllm_config: Any) -> bool:
    """Whether the user gave `additional_config["tidal"]`."""
    additional = vllm_config.additional_config
    return isinstance(additional, Mapping) and "tidal" in additional


def resolve(vllm_config: Any) -> Startup:
    """Read the configuration and decide the role of each layer.

    Raises:
        TidalConfigError: A key, a profile or a layer list that cannot be used.
    """
    model_config = vllm_config.model_config
    num_layers = model_config.get_total_num_hidden_layers()
    if not is_selected(vllm_config):
        config = TidalConfig()
        plan = all_dense(
            num_layers, "nowhere", "the attention backend TIDAL is not selected"
        )
    else:
        config = TidalConfig.from_additional_config(vllm_config.additional_config)
        config.check_max_model_len(model_config.max_model_len)
        name, shape = model_config.model, model_sha256(model_config)
        profile = find_profile(config.profile, name, num_layers, config_sha256=shape)
        if profile is not None:
            config = _with_settings(config, profile, vllm_config)
        full = full_layers(model_config)
        plan = plan_layers(config, num_layers, profile, full)
        mismatch = near_miss(name, num_layers, config_sha256=shape)
        if profile is None and plan.warning and mismatch:
            plan = replace(plan, warning=f"{mismatch}; {plan.warning}")
    return Startup(config, plan, SelectionRule.from_config(config))


def kinds_of_layers(model_config: Any) -> tuple[LayerKind, ...]:
    """The kind of every layer of vLLM's model, over all pipeline stages."""
    return layer_kinds(
        model_config.hf_text_config,
        model_config.get_total_num_hidden_layers(),
        model_config.get_sliding_window(),
        model_config.is_hybrid,
    )


def full_layers(model_config: Any) -> tuple[int, ...]:
    """Indices of the layers with full attention, ascending."""
    kinds = kinds_of_layers(model_config)
    return tuple(i for i, kind in enumerate(kinds) if kind is LayerKind.FULL)


def uncorrectable(vllm_config: Any) -> str | None:
    """Why this model's tokens cannot be corrected; None where they can."""
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    return why_not_correctable(
        kinds_of_layers(model_config),
        has_state=model_config.is_hybrid,
        # NOTE: None until vLLM's configuration is complete; then mostly False.
        frees_blocks=not scheduler.disable_hybrid_kv_cache_manager,
    )


def model_sha256(model_config: Any) -> str:
    """The hash that measured profiles know this model by."""
    return config_sha256(model_config.hf_text_config.to_dict())


def _with_settings(
    config: TidalConfig, profile: Profile, vllm_config: Any
) -> TidalConfig:
    """The profile's settings below what the user gave; a preset replaces them all."""
    given = (vllm_config.additional_config or {}).get("tidal", {})
    if "preset" in given:
        return config
    settings = dict(profile.settings)
    longest = vllm_config.model_config.max_model_len - 1
    no_output_is_that_long = (settings.get("correction_interval") or 0) > longest
    if no_output_is_that_long or vllm_config.speculative_config is not None:
        settings.pop("correction_interval", None)
    return TidalConfig(**{**settings, **given})
