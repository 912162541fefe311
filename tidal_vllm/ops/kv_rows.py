"""Reading a paged KV cache of any strides: one gather for every layout and scope."""

import math
import threading
from collections.abc import Iterator

import torch


class _Scratch(threading.local):
    """Buffers that outlive a call, one per dtype and device of each thread.

    A fresh buffer of a few MiB costs more in page faults than the gather into it, so
    they are kept. They grow to the largest tile read: see `reference.CHUNK_ROWS`.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device):
        """A 1-D buffer of `numel` elements; its content dies with the next take."""
        buffer = self.buffers.get((dtype, device))
        if buffer is None or buffer.numel() < numel:
            # NOTE: an inference tensor could not be written outside inference mode.
            with torch.inference_mode(False):
                buffer = torch.empty(numel, dtype=dtype, device=device)
            self.buffers[dtype, device] = buffer
        return buffer[:numel]


_scratch = _Scratch()


class KVRuns:
    """Reads runs of consecutive tokens from a paged KV cache, as fp32 rows.

    A run is `span` consecutive tokens of one physical block. A read yields
    `[lanes, tokens, 2 * head_size]`, one lane per group of query heads that share both
    their KV head and their tokens, so that K and V feed `bmm` as they lie.

    The cache is viewed as overlapping rows whose distance is the greatest common
    divisor of its strides, so one `index_select` serves every layout, padded and
    sliced ones included. A row is as long as the layout allows (all heads of a run,
    one head of a run, one head of one token): long rows are read about twice as fast.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides.
        span: tokens per run; divides block_size.
        num_sets: how many token lists there are; lane i reads list
            i // (lanes // num_sets) of KV head i // (lanes // num_kv_heads).
    """

    def __init__(self, kv_cache: torch.Tensor, span: int, num_sets: int) -> None:
        num_blocks, num_kv_heads, block_size, width = kv_cache.shape
        block, head, token, element = kv_cache.stride()
        self.lanes = math.lcm(num_kv_heads, num_sets)
        self.num_sets = num_sets
        self.span = span
        self.width = width

        row_of_token = width * element
        self.all_heads = (
            num_sets == 1
            and (num_kv_heads == 1 or head == row_of_token)
            and (span == 1 or token == num_kv_heads * row_of_token)
        )
        self.whole_run = self.all_heads or span == 1 or token == row_of_token
        row_tokens = span if self.whole_run else 1
        row_heads = num_kv_heads if self.all_heads else 1
        last_start = (
            (num_blocks - 1) * block
            + (num_kv_heads - row_heads) * head
            + (block_size - row_tokens) * token
        )
        # A step of 0 comes from expanded caches of one distinct row.
        step = math.gcd(block, head, token) or 1
        self.rows = kv_cache.as_strided(
            (last_start // step + 1, row_tokens * row_heads * width), (step, element)
        )
        self.block_step, self.token_step = block // step, token // step

        device = kv_cache.device
        self.lane_starts = None
        if not self.all_heads:
            heads = torch.arange(num_kv_heads, device=device) * (head // step)
            heads = heads.repeat_interleave(self.lanes // num_kv_heads)
            self.lane_starts = heads[:, None]
        self.token_starts = None
        if not self.whole_run:
            self.token_starts = torch.arange(span, device=device) * self.token_step

    def locate(
        self, blocks: torch.Tensor, first_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Row ids of runs, for `read`; slices of dim 1 are runs.

        Args:
            blocks: [num_sets, num_runs] int64 physical block ids.
            first_tokens: [num_sets, num_runs] int64 offset of each run in its block,
                a multiple of span; 0 when absent.

        Returns:
            int64, [1 or lanes, num_runs] or [lanes, num_runs, span].
        """
        rows = blocks * self.block_step
        if first_tokens is not None:
            rows = rows + first_tokens * self.token_step
        if self.lane_starts is not None:
            rows = rows.repeat_interleave(self.lanes // self.num_sets, 0)
            rows = rows + self.lane_starts
        if self.token_starts is not None:
            rows = rows[..., None] + self.token_starts
        return rows

    def tiles(
        self, ids: torch.Tensor, max_rows: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Slices of row ids for reads of at most max_rows rows, but at least a run.

        Yields:
            The tile's first token, counted along dim 1 of the ids, and its ids.
        """
        step = max(max_rows // (self.lanes * self.span), 1)
        for first in range(0, ids.shape[1], step):
            yield first * self.span, ids[:, first : first + step]

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Gathers runs; the result lives in a scratch buffer until the next read.

        Args:
            ids: what `locate` returned, or a slice of its dim 1.

        Returns:
            [lanes, num_runs * span, 2 * head_size] fp32, writable; not contiguous.
        """
        cache = self.rows
        ids = ids.reshape(-1)
        shape = (ids.numel(), cache.shape[1])
        found = _scratch.take(ids.numel() * shape[1], cache.dtype, cache.device)
        torch.index_select(cache, 0, ids, out=found.view(shape))
        if self.all_heads:
            found = found.view(-1, self.lanes, self.width).transpose(0, 1)
        else:
            found = found.view(self.lanes, -1, self.width)
        if cache.dtype == torch.float32:
            return found
        result = _scratch.take(found.numel(), torch.float32, cache.device)
        return result.view(found.shape).copy_(found)
