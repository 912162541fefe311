"""How many tokens to draft before they are verified (lossless mode)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The gain that drafts have to promise. A step does more than it reads, and more so with
# few tokens, so what promises less may lose.
ENOUGH = 1.1


@dataclass(frozen=True)
class StepCosts:
    """What a step of the batch reads, in bytes: weights, and KV of all requests.

    Decoding waits for memory, on a CPU as on a GPU, so bytes stand for time.

    Attributes:
        dense: A dense decode step.
        draft: A step that drafts one token of each request.
        verify: The dense pass over a draft, with the reads by which SELECT layers
            choose. It reads all KV once, however long the draft is.
    """

    dense: float
    draft: float
    verify: float

    @classmethod
    def of_batch(
        cls,
        weight_bytes: float,
        token_bytes: float,
        seq_lens: Sequence[int],
        kept: Sequence[int],
        select_share: float,
    ) -> StepCosts:
        """The costs for some requests.

        Args:
            token_bytes: KV of one token in all layers.
            seq_lens: Tokens of each request.
            kept: Tokens of each request that a draft attends to.
            select_share: KV that SELECT layers read to choose, as a share of all.
        """
        context, drafted = token_bytes * sum(seq_lens), token_bytes * sum(kept)
        dense = weight_bytes + context
        return cls(dense, weight_bytes + drafted, dense + select_share * context)


def gain(survival: Sequence[float], costs: StepCosts, draft_tokens: int) -> float:
    """Tokens per byte with drafts of a length, over those of dense decoding.

    With chance `survival[i]` the first i + 1 tokens of a draft are all kept, and one
    token more comes of the verification (Leviathan et al., arXiv 2211.17192).
    """
    tokens = 1 + sum(survival[:draft_tokens])
    return tokens * costs.dense / (costs.verify + draft_tokens * costs.draft)


def best_draft_length(survival: Sequence[float], costs: StepCosts) -> int:
    """The length of the largest gain; 0 where no draft gains enough."""
    lengths = range(1, len(survival) + 1)
    best = max(lengths, key=lambda n: gain(survival, costs, n))
    return best if gain(survival, costs, best) >= ENOUGH else 0


@dataclass
class Acceptance:
    """How often a draft's tokens are kept, by their place.

    A rate is the mean of a first guess, which counts as `GUESSES` drafts, and of what
    was seen, of which the last 1 / `WEIGHT` drafts count most. The guess is what was
    measured: SmolLM2-135M at 4K keeps 1.74 of 2 tokens with a budget of 10 %
    (benchmarks/results/lossless.jsonl).

    Attributes:
        rates: The chance of each token to be kept if those before it are.
        seen: Drafts that each rate comes of.
    """

    rates: list[float]
    seen: list[int]
    FIRST_GUESS = 0.9
    GUESSES = 4
    WEIGHT = 0.02
    FORGETTING = 0.002

    @classmethod
    def unknown(cls, draft_tokens: int) -> Acceptance:
        return cls([cls.FIRST_GUESS] * draft_tokens, [0] * draft_tokens)

    def count(self, drafted: int, kept: int) -> None:
        """A draft of so many tokens was verified."""
        for place in range(min(kept + 1, drafted)):
            self.seen[place] += 1
            weight = max(self.WEIGHT, 1 / (self.GUESSES + self.seen[place]))
            self.rates[place] += weight * ((place < kept) - self.rates[place])

    def rest(self) -> None:
        """Nothing was drafted in a step; what was seen is slowly forgotten.

        So another text gets its chance, after some hundred steps.
        """
        for place, rate in enumerate(self.rates):
            self.rates[place] += self.FORGETTING * (self.FIRST_GUESS - rate)
            self.seen[place] = min(self.seen[place], self.GUESSES)

    @property
    def survival(self) -> list[float]:
        """The chance of each place that it and all before it are kept."""
        found, chance = [], 1.0
        for rate in self.rates:
            chance *= rate
            found.append(chance)
        return found
