"""Other settings for an engine that runs, without a new start.

Changes vLLM at run time: the `metadata_builders` of the model runner's attention groups
are made anew.
"""

import copy
import pkgutil
from collections.abc import Callable
from typing import Any

from tidal_vllm.engine.attention import TidalImpl, impls_made
from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.engine.state import choose_implementations
from tidal_vllm.plan.resolve import Startup, resolve
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import TidalConfigError


def reconfigure(model_runner: Any, settings: dict[str, Any]) -> Callable[[], None]:
    """Let the model runner of one worker decode under other settings from now on.

    The kernels and the state of the layers with full attention are made anew, and so
    are the metadata builders of TIDAL. The scheduler keeps its settings: corrections
    and the prefix cache follow those that the engine was started with.

    Args:
        model_runner: vLLM's, between two steps.
        settings: What `additional_config["tidal"]` would hold. A key that is left out
            may come from a profile.

    Returns:
        A function that brings the former settings back.

    Raises:
        ValueError: The settings are refused. The engine is then as it was.
    """
    config = copy.copy(model_runner.vllm_config)
    config.additional_config = {"tidal": settings}
    impls = _full_attention(config)
    startup = resolve(config)
    _check_mode(startup, impls[0])
    _check_method(startup, impls[0])
    groups = [
        group
        for groups in model_runner.attn_groups
        for group in groups
        if group.backend is TidalBackend
    ]
    kept = [(impl, impl.kernels, impl.state) for impl in impls]
    kept_builders = [(group, group.metadata_builders) for group in groups]

    def undo() -> None:
        for impl, kernels, state in kept:
            impl.kernels, impl.state = kernels, state
        for group, builders in kept_builders:
            group.metadata_builders = builders

    first = impls[0]
    try:
        first.kernels, _ = choose_implementations(
            config, first.head_size, first.kv_cache_dtype
        )
        former, first.state = first.state, first.make_state(config)
        if first.follows_keys and former and first.state:
            first.state.method.take_over(former.method)
        for impl in impls:
            impl.kernels, impl.state = first.kernels, first.state
        for group, builders in kept_builders:
            group.metadata_builders = [
                type(old)(old.kv_cache_spec, old.layer_names, config, old.device)
                for old in builders
            ]
    except Exception:
        undo()
        raise
    return undo


def _check_mode(startup: Startup, first: TidalImpl) -> None:
    """Refuse to begin to draft, or to end it: vLLM was started for it, or was not."""
    drafts = first.state is not None and first.state.drafts is not None
    if drafts or startup.config.mode == "lossless":
        allowed = (
            "an engine that runs keeps its mode, and its settings in lossless mode"
        )
        raise TidalConfigError("tidal.mode", startup.config.mode, allowed)


def _check_method(startup: Startup, first: TidalImpl) -> None:
    """Refuse to leave a method that knows every key, or to come to one."""
    method, size = startup.config.method, startup.rule.select_block_size
    if not METHODS[method].follows_keys and not first.follows_keys:
        return
    allowed = (
        "a method that keeps something of every key that is written stays as the "
        "engine was started: must be another one, before and after, or the same with "
        "the same select_block_size and sparse layers"
    )
    state = first.state
    if state is None or not startup.plan.sparse:
        raise TidalConfigError("tidal.method", method, allowed)
    same = type(state.method) is pkgutil.resolve_name(METHODS[method].path)
    if not same or state.method.rule.select_block_size != size:
        raise TidalConfigError("tidal.method", method, allowed)


def _full_attention(vllm_config: Any) -> list[TidalImpl]:
    """TIDAL's implementations of the target's layers without a sliding window."""
    return [
        impl
        for impl in impls_made(vllm_config)
        if impl.sliding_window is None and not impl.is_draft
    ]
