"""What the ops mean, in float64, head by head, over K and V that were never paged."""

import math
from collections.abc import Callable, Iterable

import torch

from tidal_vllm.kernels.arguments import Rule

Rows = list[torch.Tensor]
"""One `[seq_len, num_kv_heads, head_size]` per sequence."""
Positions = Callable[[int, int], Iterable[int]]
"""(row, head) to the positions that it attends to."""


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: Iterable[int],
    scale: float,
) -> tuple[torch.Tensor, float, list[float]]:
    """One head: softmax(scale * q.k) over `positions`, its lse and its scores."""
    positions = list(positions)
    if not positions:
        return torch.zeros(len(query), dtype=torch.float64), -math.inf, []
    scores = scale * (keys[positions] @ query)
    top = scores.max()
    weights = (scores - top).exp()
    output = weights @ values[positions] / weights.sum()
    return output, float(top + weights.sum().log()), scores.tolist()


def lse(scores: list[float]) -> float:
    if not scores:
        return -math.inf
    top = max(scores)
    return top + math.log(sum(math.exp(s - top) for s in scores))


def decode(
    query: torch.Tensor,
    keys: Rows,
    values: Rows,
    scale: float,
    positions_of: Positions | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[tuple[int, int], list[float]]]:
    """Output, lse, and scores by (row, head), of every row and head."""
    query = query.double()
    num_rows, num_heads, head_size = query.shape
    output = torch.zeros(num_rows, num_heads, head_size, dtype=torch.float64)
    lses = torch.full((num_rows, num_heads), -math.inf, dtype=torch.float64)
    scores = {}
    for row in range(num_rows):
        k, v = keys[row].double(), values[row].double()
        for head in range(num_heads):
            kv_head = head // (num_heads // k.shape[1])
            positions = (
                range(len(k)) if positions_of is None else positions_of(row, head)
            )
            output[row, head], lses[row, head], scores[row, head] = attend(
                query[row, head], k[:, kv_head], v[:, kv_head], positions, scale
            )
    return output, lses, scores


def block_lse(
    scores: dict[tuple[int, int], list[float]],
    num_rows: int,
    num_heads: int,
    num_blocks: int,
    size: int,
) -> torch.Tensor:
    result = torch.full((num_rows, num_heads, num_blocks), -math.inf).double()
    for (row, head), s in scores.items():
        for block in range(num_blocks):
            result[row, head, block] = lse(s[block * size : (block + 1) * size])
    return result


def extend(
    query: torch.Tensor,
    keys: Rows,
    values: Rows,
    query_lens: list[int],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal: the last query token of a sequence stands at its last position."""
    outputs, first = [], 0
    for k, v, query_len in zip(keys, values, query_lens, strict=True):
        for i in range(query_len):
            seen = len(k) - query_len + i + 1
            one = query[first + i][None]
            near = slice(0 if window is None else max(seen - window, 0), seen)
            outputs.append(decode(one, [k[near]], [v[near]], scale)[0][0])
        first += query_len
    return torch.stack(outputs)


def select(mass: list[float], seq_len: int, rule: Rule) -> list[int]:
    """The blocks that one set keeps; `mass` is a list of floats, one per block."""
    size = rule.select_block_size
    total = len(mass)
    if seq_len <= max(rule.sparse_threshold, rule.token_budget):
        return list(range(total))
    kept = {t // size for t in range(rule.sink_tokens)}
    kept |= {t // size for t in range(seq_len - rule.recent_tokens, seq_len)}
    kept.add((seq_len - 1) // size)
    for block in sorted(range(total), key=lambda b: (-mass[b], b)):
        if len(kept) < rule.token_budget // size:
            kept.add(block)
    return sorted(kept)
