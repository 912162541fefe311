"""What a set of blocks keeps of a sequence: arithmetic on tokens and blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tidal_vllm.config import NUM_SETS, TidalConfig


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """What a set keeps of a sequence; all fields in tokens.

    Precondition, held by ``TidalConfig``: ``token_budget`` is a multiple of
    ``select_block_size`` and has room for the forced tokens.
    """

    token_budget: int
    select_block_size: int
    sink_tokens: int
    recent_tokens: int
    sparse_threshold: int

    @classmethod
    def from_config(cls, config: TidalConfig) -> SelectionRule:
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @property
    def budget_blocks(self) -> int:
        """Blocks that a sequence longer than ``keep_all_len`` keeps."""
        return self.token_budget // self.select_block_size

    @property
    def keep_all_len(self) -> int:
        """Longest sequence that keeps all its blocks."""
        return max(self.token_budget, self.sparse_threshold)

    def num_blocks(self, seq_len: int) -> int:
        """Blocks of a sequence, the last one perhaps partly filled."""
        return -(-seq_len // self.select_block_size)

    def num_kept_blocks(self, seq_len: int) -> int:
        """Blocks that a set keeps of a sequence: all, or the budget's."""
        if seq_len <= self.keep_all_len:
            return self.num_blocks(seq_len)
        return self.budget_blocks

    def kept_tokens(self, seq_len: int) -> int:
        """Tokens in the kept blocks, the perhaps partly filled last one among them."""
        kept = self.num_kept_blocks(seq_len)
        unfilled = -seq_len % self.select_block_size
        return kept * self.select_block_size - unfilled

    def forced_blocks(self, seq_len: int) -> tuple[int, ...]:
        """Blocks with a sink or recent token, ascending; they are always kept."""
        total = self.num_blocks(seq_len)
        sink_end = min(self.num_blocks(self.sink_tokens), total)
        recent_start = max(seq_len - self.recent_tokens, 0) // self.select_block_size
        return (*range(sink_end), *range(max(recent_start, sink_end), total))


def num_sets(scope: str, num_heads: int, num_kv_heads: int) -> int:
    """Sets that are kept for one sequence on one rank."""
    return NUM_SETS[scope](num_heads, num_kv_heads)


def may_differ_in_group(scope: str) -> bool:
    """Whether the query heads of one KV head may keep different blocks.

    They then read up to group-size times the K and V that one set holds.
    """
    return num_sets(scope, num_heads=2, num_kv_heads=1) > 1
