"""Rules of what a selection keeps, in few words."""

from tidal_vllm.plan.rule import SelectionRule


def rule_of(
    budget: int, size: int = 1, sinks: int = 0, recent: int = 1, threshold: int = 0
) -> SelectionRule:
    """A rule in tokens: the budget, a selection block, sinks, recent, threshold."""
    return SelectionRule(
        token_budget=budget,
        select_block_size=size,
        sink_tokens=sinks,
        recent_tokens=recent,
        sparse_threshold=threshold,
    )
