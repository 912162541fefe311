"""Which KV is polluted, and who is corrected when: pure decisions on integers."""

import dataclasses
from collections.abc import Sequence

from tidal_vllm.plan.roles import LayerPlan
from tidal_vllm.plan.rule import SelectionRule

MIN_REMAINING = 4  # output tokens; a request this close to its end is not corrected


def pollutes(
    plan: LayerPlan,
    rule: SelectionRule,
    query_len: int,
    num_computed_tokens: int,
    num_prompt_tokens: int,
    max_decode_query_len: int = 1,
) -> bool:
    """Whether a request's part of a step writes KV that dense layers would not.

    A decode does, of a sequence too long to keep all its blocks: at most
    ``max_decode_query_len`` tokens behind the prompt (more than one are drafts to
    verify). Everything else is dense, or exact.
    """
    return (
        plan.sparse
        and query_len <= max_decode_query_len
        and num_computed_tokens >= num_prompt_tokens
        and num_computed_tokens + query_len > rule.keep_all_len
    )


def clean_position_after(
    clean_position: int, num_computed_tokens: int, query_len: int, polluted: bool
) -> int:
    """Tokens from the start of a sequence with dense KV, once a step has run.

    Args:
        clean_position: The same before the step.
        num_computed_tokens: Position of the step's first token. Behind the clean
            position, a dense step attends to polluted KV, and makes nothing clean.
        query_len: Tokens that the step computes.
        polluted: Whether they are written by sparse layers (``pollutes``).
    """
    start = min(clean_position, num_computed_tokens)
    if polluted or num_computed_tokens > clean_position:
        return start
    return num_computed_tokens + query_len


def is_due(interval: int | None, num_polluted: int, num_remaining: int) -> bool:
    """Whether a request is due for correction.

    Args:
        interval: ``correction_interval``.
        num_polluted: Tokens decoded sparsely since the last correction.
        num_remaining: Output tokens that the request may still get.
    """
    return (
        interval is not None
        and num_polluted >= interval
        and num_remaining > MIN_REMAINING
    )


@dataclasses.dataclass(frozen=True)
class StepDemand:
    """Tokens that a running request wants computed in the next step.

    Attributes:
        plain: Without a correction: 1 for a decode, 0 where it has to wait.
        corrected: With one: its polluted tokens too. None where it is not due.
    """

    plain: int
    corrected: int | None = None


def choose_corrections(
    demands: Sequence[StepDemand], token_budget: int, chunk_limit: int
) -> list[bool]:
    """Which due requests to correct in the next step: all that fit beside the rest.

    Follows vLLM's scheduler, which serves running requests in order, and leaves a
    token for each request behind a correction. One that would not fit into a step of
    its own either starts nevertheless and is split over steps, unless another
    correction runs.

    Args:
        demands: One per running request, in vLLM's order.
        token_budget: Tokens that a step may compute.
        chunk_limit: Tokens that a step may compute for one request.
    """
    left = token_budget
    waiting = sum(demand.plain > 0 for demand in demands)
    chosen: list[bool] = []
    for demand in demands:
        waiting -= demand.plain > 0
        room = min(left - waiting, chunk_limit)
        wanted, starts, granted = demand.corrected, False, demand.plain
        if wanted is not None:
            fits = wanted <= room
            # NOTE: a chunk of a single token would be taken for a decode.
            too_long = wanted > min(token_budget - len(demands) + 1, chunk_limit)
            starts = fits or (too_long and not any(chosen) and min(left, room) > 1)
            granted = wanted if starts else demand.plain
        chosen.append(starts)
        left -= min(granted, chunk_limit, left)
    return chosen
