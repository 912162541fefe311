"""What a decode step does under a plan: which path it takes, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.roles import LayerPlan, Role
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.registry import METHODS


def runs_sparse(plan: LayerPlan, rule: SelectionRule, max_decode_seq_len: int) -> bool:
    """Whether a batch takes the sparse path: any decode row above the threshold."""
    return plan.sparse and max_decode_seq_len > rule.sparse_threshold


def kv_read_share(plan: LayerPlan, config: TidalConfig, seq_len: int) -> float:
    """KV bytes that a decode step reads, as a share of dense, on average over steps.

    Of the full-attention layers alone: what OTHER layers read is the same either way.
    Exact for scopes "sequence" and "kv_head"; with "query_head" the heads of a group
    may keep different tokens, so under GQA up to group-size times the sparse part.
    """
    rule = SelectionRule.from_config(config)
    if not runs_sparse(plan, rule, seq_len):
        return 1.0
    kept, interval = rule.kept_tokens(seq_len), config.reselect_interval
    if config.select_attends == "chosen":
        share = METHODS[config.method].scoring_reads(rule.select_block_size)
        selecting = seq_len * share / interval + kept
    else:
        selecting = (seq_len + (interval - 1) * kept) / interval
    read = {Role.DENSE: seq_len, Role.SELECT: selecting, Role.SPARSE: kept}
    total = sum(plan.count(role) * tokens for role, tokens in read.items())
    return total / (plan.num_full_layers * seq_len)


def draft_read_share(plan: LayerPlan, config: TidalConfig, seq_len: int) -> float:
    """KV bytes that one token of a draft reads, as a share of dense.

    Every layer attends to what was chosen while the last draft was verified. That
    reads all KV once, and the keys of SELECT layers again.
    """
    return SelectionRule.from_config(config).kept_tokens(seq_len) / seq_len


def draft_selection_indices(plan: LayerPlan, layers: Sequence[int]) -> dict[int, int]:
    """Which selection each layer writes, or reads when it drafts, by layer.

    Each SELECT layer has one of its own. When a layer drafts it reads that of the last
    SELECT layer up to it, or of the first one of all.

    Args:
        layers: Of the model, ascending.
    """
    found, latest = {}, -1
    for layer in layers:
        latest += plan.roles[layer] is Role.SELECT
        found[layer] = max(latest, 0)
    return found


def selection_indices(
    plan: LayerPlan, layers: Sequence[int], reselect_interval: int
) -> dict[int, int]:
    """Which of the engine's selections each layer writes or reads, by layer.

    Args:
        layers: The layers of a pipeline stage, ascending.
        reselect_interval: Steps for which a selection holds. Where that is 1, the
            SELECT layers overwrite a single selection in turn.
    """
    found: dict[int, int] = {}
    latest = -1
    for layer in layers:
        if plan.roles[layer] is Role.SELECT and (latest < 0 or reselect_interval > 1):
            latest += 1
        if plan.roles[layer] in (Role.SELECT, Role.SPARSE):
            found[layer] = latest
    return found
