"""The settings that are measured beside the main one."""

from __future__ import annotations

import dataclasses
from typing import Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.validators import TidalConfigError

BUDGETS = (0.25, 0.5, 1, 2)  # times the budget asked for
BLOCK_SIZES = (4, 16)
SCOPES = ("sequence", "kv_head", "query_head")


def settings_grid(config: TidalConfig, longest: int, kv_block_size: int):
    """The settings to measure, the main one first; one thing changes at a time.

    Args:
        longest: Tokens of the longest prompt; a budget must be smaller.
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
    """The keywords of `TidalConfig` that decide what a set keeps."""
    keys = ("token_budget", "select_block_size", "scope", "sink_tokens")
    return {key: getattr(config, key) for key in (*keys, "recent_fraction")}


def same_but_budget(config: TidalConfig, main: TidalConfig) -> bool:
    return dataclasses.replace(main, token_budget=config.token_budget) == config
