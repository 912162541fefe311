"""A worker that prints its counters, where nobody can ask it for them.

For vLLM's `worker_extension_cls` by name alone: to import this module changes how its
process counts.
"""

from dataclasses import asdict
from typing import Any

from tidal_vllm.engine.metrics import DecodeCounters

_count_step = DecodeCounters.count_step


def _count_and_print(counters: DecodeCounters, *step: Any) -> None:
    _count_step(counters, *step)
    print(f"counted: {asdict(counters)}", flush=True)


DecodeCounters.count_step = _count_and_print  # type: ignore[method-assign]


class LoggingWorker:
    """Adds nothing: its module does."""
