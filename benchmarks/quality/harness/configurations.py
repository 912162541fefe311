"""The configurations that are compared, and the budget of each in a cell."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidal_vllm.config import PRESETS, TidalConfig
from tidal_vllm.plan.layers import safest_roles
from tidal_vllm.plan.resolve import Startup
from tidal_vllm.plan.steps import kv_read_share
from tidal_vllm.validators import TidalConfigError


@dataclass(frozen=True)
class Configuration:
    """One way to decode.

    Attributes:
        name: For tables; unique in a run.
        settings: `additional_config["tidal"]`, complete but for the budget where
            `budget` is what a cell has to find.
        budget: How `token_budget` was found: "equal budget", "equal bytes" or "given".
    """

    name: str
    settings: dict[str, Any]
    budget: str = "given"


def peers(layers: Sequence[int]) -> dict[str, dict[str, Any]]:
    """This project's choice and its peers, by name, for any model.

    TidalDecode and LessIsMore have two DENSE layers, a SELECT layer behind them and
    another in the middle, where the published ones lie (Llama 3 8B: 13 of 32, Llama 3
    70B: 31 of 80, Qwen3 8B: 12 of 36; arXiv 2410.05076 and 2508.07101).

    Args:
        layers: Indices of the full-attention layers, ascending.
    """
    dense, select = safest_roles(layers)
    found = {"default": {"dense_layers": list(dense), "select_layers": list(select)}}
    if len(layers) > 4:  # fewer leave no SPARSE layer behind two SELECT ones
        few = {
            "dense_layers": list(layers[:2]),
            "select_layers": [layers[2], layers[max(len(layers) // 2 - 1, 3)]],
        }
        found |= {n: {"preset": n} | few for n in ("tidaldecode", "lessismore")}
    return found | {
        "quest": {"preset": "quest"},
        "sliding_window": {"preset": "sliding_window"},
        "oracle": {"preset": "oracle"},
    }


def read_file(path: Path) -> dict[str, dict[str, Any]]:
    """Configurations by name from a JSON object of settings without token_budget.

    Raises:
        ValueError: No such object, or settings that are refused; names the file.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict) or not all(
        isinstance(settings, dict) for settings in found.values()
    ):
        raise ValueError(
            f'{path}: must hold an object such as {{"name": {{"scope": "kv_head"}}}}'
        )
    for name, settings in found.items():
        try:
            TidalConfig.from_additional_config({"tidal": settings})
        except TidalConfigError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from error
    return found


class Reads:
    """The KV bytes that a decode step reads under some settings.

    Args:
        startup: What the settings make of the model: `Engine.startup`.
    """

    def __init__(self, startup: Callable[[dict[str, Any]], Startup]) -> None:
        self.startup = startup

    def share(self, settings: dict[str, Any], seq_len: int) -> float:
        """KV bytes read at a length, as a share of dense attention's.

        Everything counts: DENSE and SELECT layers, scores and bounds. Where query heads
        of a KV head keep different tokens, each is counted as if all kept the same:
        `"query_head"` reads at least so much.
        """
        startup = self.startup(settings)
        return kv_read_share(startup.plan, startup.config, seq_len)

    def budget_for(
        self, settings: dict[str, Any], share: float, seq_len: int
    ) -> dict[str, Any] | None:
        """The settings with the largest budget that reads no more; None: none does."""
        size = block_size(settings)
        blocks = [*range(1, seq_len // size + 1)]
        low, high = 0, len(blocks)  # the first so many fit
        while low < high:
            middle = (low + high) // 2
            made = with_budget(settings, blocks[middle] * size)
            # A budget without room for what is forced is too small, not too large.
            fits = made is None or self.share(made, seq_len) <= share
            low, high = (middle + 1, high) if fits else (low, middle)
        return with_budget(settings, blocks[low - 1] * size) if low else None


def block_size(settings: dict[str, Any]) -> int:
    return TidalConfig(**settings).select_block_size


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with nothing left to a preset, whose values may change."""
    config = TidalConfig(**settings)
    kept = {key: getattr(config, key) for key in PRESETS["default"]}
    del kept["token_budget"]
    return {k: v for k, v in settings.items() if k != "preset"} | kept


def with_budget(settings: dict[str, Any], tokens: int) -> dict[str, Any] | None:
    """Settings with a budget, of whole blocks; None where it cannot hold the forced."""
    size = block_size(settings)
    made = settings | {"token_budget": tokens // size * size}
    try:
        TidalConfig(**made)
    except TidalConfigError:
        return None
    return made


def in_cell(
    named: dict[str, dict[str, Any]],
    reads: Reads,
    context: int,
    share: float,
    read_shares: Sequence[float] = (),
    equal_to: str | None = None,
) -> list[Configuration]:
    """All configurations of a cell.

    Args:
        named: Settings without a budget, by name.
        context: Tokens.
        share: Of the context: the budget of "equal budget".
        read_shares: KV bytes read as shares of dense: "equal bytes".
        equal_to: A name: what it reads at the budget is one more of them.
    """
    found, seen = [], set()
    shares = [*read_shares]
    if equal_to is not None:
        own = with_budget(named[equal_to], int(share * context))
        if own is not None:
            shares.append(reads.share(own, context))
    for name, given in named.items():
        settings = complete(given)
        made = {"equal budget": with_budget(settings, int(share * context))}
        for read in shares:
            made[f"equal bytes {read:.3f}"] = reads.budget_for(settings, read, context)
        for how, found_settings in made.items():
            if found_settings is None:
                said = f"{name}, {how}: left out, no budget of {context} tokens fits"
                print(said, file=sys.stderr)
            key = json.dumps(found_settings, sort_keys=True)
            if found_settings is not None and (name, key) not in seen:
                seen.add((name, key))
                found.append(Configuration(name, found_settings, how))
    return found
