"""How often decoding was sparse, how much it read, and what was corrected."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from tidal_vllm.plan.rule import SelectionRule


@dataclass
class DecodeCounters:
    """Counts since start-up, of decode rows only (prefill is always dense)."""

    sparse_steps: int = 0
    """Steps in which SPARSE layers attended to the selection."""
    dense_steps: int = 0
    """Decode steps in which all layers attended to everything."""
    decode_tokens: int = 0
    """Decoded tokens, over all sequences."""
    context_tokens: int = 0
    """Tokens a dense layer attended to, summed over decoded tokens."""
    sparse_context_tokens: int = 0
    """Tokens a SPARSE layer attended to, summed over decoded tokens. The partial
    last block counts with what it holds."""
    draft_tokens: int = 0
    """Tokens that the model drafted for itself, over all sequences: lossless mode."""
    undrafted_steps: int = 0
    """Steps of lossless mode after which nothing was drafted: it would not have paid,
    or every sequence was amid its prompt."""

    def count_step(
        self, rule: SelectionRule, seq_lens: list[int], sparse: bool
    ) -> None:
        """Count one step's decodes.

        Args:
            rule: How many tokens a selection keeps.
            seq_lens: Length of each decoding sequence, in tokens.
            sparse: Whether the step ran sparse.
        """
        if not seq_lens:
            return
        self.sparse_steps += sparse
        self.dense_steps += not sparse
        self.decode_tokens += len(seq_lens)
        self.context_tokens += sum(seq_lens)
        if sparse:
            self.sparse_context_tokens += sum(map(rule.kept_tokens, seq_lens))
        else:
            self.sparse_context_tokens += sum(seq_lens)


@dataclass
class CorrectionCounters:
    """Counts since start-up, of one scheduler."""

    corrections: int = 0
    """Corrections started, over all requests."""
    corrected_tokens: int = 0
    """Polluted tokens that corrections compute again."""
    longest_polluted_run: int = 0
    """Most polluted tokens that a sequence ever had."""

    def saw_run(self, num_polluted: int) -> None:
        """A sequence has this many polluted tokens."""
        self.longest_polluted_run = max(self.longest_polluted_run, num_polluted)

    def __str__(self) -> str:
        """Every field with its value, as vLLM logs its statistics."""
        counts = asdict(self).items()
        return ", ".join(
            f"{name.capitalize().replace('_', ' ')}: {count}" for name, count in counts
        )


def worker_counters(worker: Any) -> dict[str, int]:
    """The counters of one vLLM worker, over all its metadata builders."""
    total = dict.fromkeys((field.name for field in fields(DecodeCounters)), 0)
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                counters = getattr(builder, "counters", None)
                if isinstance(counters, DecodeCounters):
                    for name, count in asdict(counters).items():
                        total[name] += count
    return total


class CountingWorker:
    """For vLLM's `worker_extension_cls`: any platform's worker tells its counters."""

    def decode_counters(self) -> dict[str, int]:
        """As `worker_counters`."""
        return worker_counters(self)


COUNTING_WORKER = f"{__name__}.{CountingWorker.__name__}"
