"""What the longest sequence that vLLM allows makes of a plan."""

from __future__ import annotations

import dataclasses

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.roles import LayerPlan, Role, all_dense
from tidal_vllm.plan.rule import SelectionRule

K = 1024
SHOWN = (32 * K, 128 * K)  # tokens, where the start-up table shows what is read


def limit_plan(plan: LayerPlan, config: TidalConfig, max_model_len: int) -> LayerPlan:
    """The plan, or why it comes to nothing at the lengths that can occur.

    Args:
        max_model_len: vLLM's. A request ends when it has so many tokens, and its last
            one is not decoded.

    Returns:
        Off, with a warning, where no sequence can be long enough to be decoded
        sparsely. The same plan with a warning where each keeps all its blocks.
    """
    if not plan.sparse:
        return plan
    rule, longest = SelectionRule.from_config(config), max_model_len - 1
    key = "token_budget" if config.min_sparse_len is None else "min_sparse_len"
    allowed = f"must be below max_model_len - 1 = {longest}, the longest decode"
    if rule.sparse_threshold >= longest:
        reason = (
            f"tidal.{key} = {rule.sparse_threshold}, and no longer sequence is "
            f"decoded: {allowed}"
        )
        full = [i for i, role in enumerate(plan.roles) if role is not Role.OTHER]
        off = all_dense(plan.num_layers, plan.source, reason, full)
        warning = f"sparse decoding is off: {reason} (or raise --max-model-len)"
        return dataclasses.replace(off, warning=warning)
    if rule.keep_all_len >= longest:
        warning = (
            f"tidal.token_budget = {rule.token_budget} holds all of every sequence, so "
            f"sparse layers read as much as dense ones: {allowed}"
        )
        return dataclasses.replace(plan, warning=warning)
    return plan


def shown_lengths(max_model_len: int) -> list[int]:
    """Lengths of a decode for the start-up table, the longest one last."""
    return [n for n in SHOWN if n < max_model_len] + [max_model_len]


def format_length(tokens: int) -> str:
    return f"{tokens // K}K" if tokens % K == 0 else f"{tokens} tokens"
