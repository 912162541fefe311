"""The settings that are measured beside the main one."""

from __future__ import annotations

import dataclasses
from typing import Any

from tidal_vllm.config import SCOPES, TidalConfig
from tidal_vllm.validators import TidalConfigError

BUDGETS = (0.25, 0.5, 1, 2)  # times the budget asked for
BLOCK_SIZES = (4, 16)


def settings_grid(
    config: TidalConfig, longest: int, kv_block_size: int
) -> list[TidalConfig]:
    """The settings to measure, the main one first; one thing changes at a time.

    Args:
        config: The main setting.
        longest: Length of the longest prompt, tokens; a budget must be smaller.
        kv_block_size: Tokens; block sizes of a selection have to divide it.
    """
    size = config.select_block_size
    changes: list[dict[str, Any]] = [
        {"token_budget": round(config.token_budget * times / size) * size}
        for times in BUDGETS
    ]
    changes += [{"select_block_size": s} for s in BLOCK_SIZES if kv_block_size % s == 0]
    changes += [{"scope": scope} for scope in SCOPES]
    grid = [config]
    for change in changes:
        try:
            other = dataclasses.replace(config, **change)
        except TidalConfigError:
            continue  # a budget too small for what is forced, or not of whole blocks
        if other not in grid and other.token_budget < longest:
            grid.append(other)
    return grid


def recorder_settings(config: TidalConfig) -> dict[str, Any]:
    """The keywords of `TidalConfig` that decide what a selection keeps."""
    names = ("token_budget", "select_block_size", "scope", "sink_tokens")
    return {name: getattr(config, name) for name in (*names, "recent_fraction")}


def same_but_budget(config: TidalConfig, main: TidalConfig) -> bool:
    """Whether a setting differs from the main one in its budget at most."""
    return dataclasses.replace(main, token_budget=config.token_budget) == config
