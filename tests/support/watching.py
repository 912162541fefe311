"""What an engine of this process counts, schedules and corrects."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vllm import LLM

from tests.support.engines import scheduler
from tidal_vllm.engine.metrics import CorrectionCounters


def counters(llm: LLM) -> Counter:
    """Decode counters since the builders were made; subtract to get a difference."""
    (counts,) = llm.collective_rpc("decode_counters")
    return Counter(counts)


@dataclasses.dataclass
class Watched:
    """What the scheduler decided while it was watched."""

    steps: list[dict[str, tuple[int, int]]]
    """Per step: each scheduled request's first position and number of tokens."""
    num_preemptions: int = 0

    @property
    def tokens(self) -> list[list[int]]:
        """Per step: the number of tokens of each scheduled request."""
        return [[count for _, count in step.values()] for step in self.steps]


@contextmanager
def watched(llm: LLM) -> Iterator[Watched]:
    """The engine's scheduler, watched in every step that schedules a token."""
    seen = Watched([])
    schedule = scheduler(llm).schedule

    def spied(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        requests = scheduler(llm).requests
        if output.num_scheduled_tokens:
            seen.steps.append(
                {
                    request_id: (
                        requests[request_id].num_computed_tokens - count,
                        count,
                    )
                    for request_id, count in output.num_scheduled_tokens.items()
                }
            )
        seen.num_preemptions += len(output.preempted_req_ids or ())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler(llm), "schedule", spied)
        yield seen


@contextmanager
def correcting(
    llm: LLM, interval: int | None, exact_up_to: int | None = None
) -> Iterator[CorrectionCounters]:
    """The engine under another correction interval; gives the counters of this time.

    Args:
        interval: In decoded tokens; None for no correction.
        exact_up_to: Longest sequence whose decoded tokens count as clean. Below what
            the attention keeps, the engine is exact but corrects all the same.
    """
    found = scheduler(llm)
    rule = found.selection_rule
    if exact_up_to is not None:
        rule = dataclasses.replace(
            rule, token_budget=exact_up_to, sparse_threshold=exact_up_to
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, "correction_interval", interval)
        patch.setattr(found, "selection_rule", rule)
        patch.setattr(found, "correction_counters", CorrectionCounters())
        yield found.correction_counters
        assert not found._clean_positions
        assert not found._to_announce
