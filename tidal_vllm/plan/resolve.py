"""From a vLLM config to the decisions of this run; the same in every process.

Reads vLLM's config objects but imports nothing of vLLM, so that the front end,
the engine core and each worker come to the same result from the same config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.names import NAME
from tidal_vllm.plan.layer_kinds import LayerKind, correction_obstacle, layer_kinds
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.lengths import limit_plan
from tidal_vllm.plan.roles import LayerPlan, all_dense
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.profiles import Profile, find_profile, near_miss
from tidal_vllm.profiles.fingerprint import config_sha256
from tidal_vllm.registry import METHODS


@dataclass(frozen=True)
class Startup:
    """What was asked for, and what follows from it for this model.

    Attributes:
        kinds: The kind of every layer, over all pipeline stages; empty where TIDAL is
            not selected.
        never_slides: Tokens. A window of so many or more holds every sequence: its
            layer has full attention. None: windows are what the model says.
    """

    config: TidalConfig
    plan: LayerPlan
    rule: SelectionRule
    kinds: tuple[LayerKind, ...] = ()
    never_slides: int | None = None

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers with full attention, ascending."""
        return _full_layers(self.kinds)

    def window(self, sliding_window: int | None) -> int | None:
        """The window that a layer of vLLM's really has; None: full attention."""
        if sliding_window is None or self.never_slides is None:
            return sliding_window
        return sliding_window if sliding_window < self.never_slides else None


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


def drafts_itself(vllm_config: Any) -> bool:
    """Whether the target is its own draft model: lossless mode.

    NOTE: vLLM completes the config of another draft model, too, whose layers are not
    those that the settings name. The mode stands in the settings alone.
    """
    if not is_selected(vllm_config):
        return False
    settings = TidalConfig.from_additional_config(vllm_config.additional_config)
    return settings.mode == "lossless"


def resolve(vllm_config: Any) -> Startup:
    """Read the configuration and decide the role of each layer.

    Raises:
        TidalConfigError: A key, a profile or a layer list that cannot be used.
    """
    model_config = vllm_config.model_config
    num_layers = model_config.get_total_num_hidden_layers()
    if not is_selected(vllm_config):
        return dense("the attention backend TIDAL is not selected", num_layers)
    config = TidalConfig.from_additional_config(vllm_config.additional_config)
    config.check_max_model_len(model_config.max_model_len)
    name, shape = model_config.model, model_sha256(model_config)
    profile = None
    if config.profile is not None or not METHODS[config.method].every_layer:
        profile = find_profile(config.profile, name, num_layers, config_sha256=shape)
    if profile is not None:
        config = _with_settings(config, profile, vllm_config)
    used = profile if config.select_layers is None else None
    kinds, never_slides = _kinds_of_layers(model_config, used)
    plan = plan_layers(config, num_layers, profile, _full_layers(kinds))
    mismatch = near_miss(name, num_layers, config_sha256=shape)
    if profile is None and plan.warning and mismatch:
        plan = replace(plan, warning=f"{mismatch}; {plan.warning}")
    plan = limit_plan(plan, config, model_config.max_model_len)
    rule = SelectionRule.from_config(config)
    return Startup(config, plan, rule, kinds, never_slides)


def dense(reason: str, num_layers: int) -> Startup:
    """No layer decodes sparsely, whatever the settings: for a reason."""
    config = TidalConfig()
    plan = all_dense(num_layers, "nowhere", reason)
    return Startup(config, plan, SelectionRule.from_config(config))


def _kinds_of_layers(
    model_config: Any, profile: Profile | None
) -> tuple[tuple[LayerKind, ...], int | None]:
    """The kind of every layer, and from which length on a window never slides.

    A profile whose layers have full attention whatever the length was measured beside
    windows: those stay what they are.
    """
    model = (
        model_config.hf_text_config,
        model_config.get_total_num_hidden_layers(),
    )
    window, has_state = model_config.get_sliding_window(), model_config.is_hybrid
    kinds = layer_kinds(*model, window, has_state)
    # NOTE: with -1 vLLM lowers max_model_len once the layers are made.
    fitted = model_config.original_max_model_len == -1
    longest = model_config.max_model_len
    if window is None or window < longest or fitted:
        return kinds, None
    named = {*profile.dense_layers, *profile.select_layers} if profile else set()
    if named and named <= {*_full_layers(kinds)}:
        return kinds, None
    return layer_kinds(*model, None, has_state), longest


def has_convolutions(model_config: Any) -> bool:
    """Whether the states that the model keeps are those of short convolutions."""
    return "conv" in (getattr(model_config.hf_text_config, "layer_types", None) or ())


def _full_layers(kinds: tuple[LayerKind, ...]) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(kinds) if kind is LayerKind.FULL)


def uncorrectable(vllm_config: Any, startup: Startup) -> str | None:
    """Why this model's tokens cannot be corrected; None where they can."""
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    return correction_obstacle(
        startup.kinds,
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
