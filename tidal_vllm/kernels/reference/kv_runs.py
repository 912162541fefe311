"""Reading a paged KV cache of any strides: one gather for every layout and scope."""

import math
import threading
from collections.abc import Iterator

import torch


class _Scratch(threading.local):
    """Buffers that outlive a call, one per dtype and device of each thread.

    A fresh buffer of a few MiB costs more in page faults than the gather into it, so
    they are kept. They grow to the largest tile read, `prefill.EXTEND_TILE_PAIRS`
    pairs: 8 MiB in fp32 at head_size 128, and half of that more for a 16-bit cache.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def take(
        self, numel: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
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
    """Reads runs of consecutive tokens from a paged KV cache, in fp32.

    A pair is K and V of one token and one KV head, 2 * head_size elements. A run is
    the pairs of `span` consecutive tokens of one physical block and one KV head. A
    head group is the query heads that share both their KV head and their set, so their
    tokens too; a read yields `[num_head_groups, tokens, 2 * head_size]`, so that K and
    V feed `bmm` as they lie.

    The cache is viewed as overlapping strips whose distance is the greatest common
    divisor of its strides, so one `index_select` serves every layout, padded and
    sliced ones included. A strip is a whole run where the layout keeps it together
    (LBHNC: read up to twice as fast), else one pair.

    NOTE: in LBNHC a strip could be a run of all heads. With one thread that reads
    faster still; with more, the thread that gathers a token is not the one that
    multiplies it, and 32K tokens took 18 ms instead of 10 on 2 cores.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, any strides.
        span: Tokens per run; divides block_size.
        num_sets: How many token lists there are; head group i reads list
            i // (num_head_groups // num_sets) of KV head
            i // (num_head_groups // num_kv_heads).
    """

    def __init__(self, kv_cache: torch.Tensor, span: int, num_sets: int) -> None:
        num_blocks, num_kv_heads, block_size, width = kv_cache.shape
        block, head, token, element = kv_cache.stride()
        self.num_head_groups = math.lcm(num_kv_heads, num_sets)
        self.num_sets, self.span, self.width = num_sets, span, width

        whole_run = span == 1 or token == width * element
        strip_tokens = span if whole_run else 1
        last_start = (
            (num_blocks - 1) * block
            + (num_kv_heads - 1) * head
            + (block_size - strip_tokens) * token
        )
        # 0 where all strides are: an expanded cache.
        step = math.gcd(block, head, token) or 1
        self.strips = kv_cache.as_strided(
            (last_start // step + 1, strip_tokens * width), (step, element)
        )
        self.block_step, self.token_step = block // step, token // step
        heads = torch.arange(num_kv_heads, device=kv_cache.device) * (head // step)
        self.group_starts = heads.repeat_interleave(
            self.num_head_groups // num_kv_heads
        )
        self.token_starts = None
        if not whole_run:
            tokens = torch.arange(span, device=kv_cache.device)
            self.token_starts = tokens * self.token_step

    def locate(
        self, blocks: torch.Tensor, first_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids of the strips of runs, for `read`; slices of dim 1 are runs.

        Args:
            blocks: `[num_sets, num_runs]` int64 physical block ids.
            first_tokens: `[num_sets, num_runs]` int64 offset of each run in its block,
                a multiple of span; 0 when absent.

        Returns:
            int64, `[num_head_groups, num_runs]` or `[num_head_groups, num_runs, span]`.
        """
        ids = blocks * self.block_step
        if first_tokens is not None:
            ids = ids + first_tokens * self.token_step
        ids = ids.repeat_interleave(self.num_head_groups // self.num_sets, 0)
        ids = ids + self.group_starts[:, None]
        if self.token_starts is not None:
            ids = ids[..., None] + self.token_starts
        return ids

    def tiles(
        self, ids: torch.Tensor, max_pairs: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Slices of ids for reads of at most max_pairs pairs, but at least a run.

        Yields:
            The tile's first token, counted along dim 1 of the ids, and its ids.
        """
        step = max(max_pairs // (self.num_head_groups * self.span), 1)
        for first in range(0, ids.shape[1], step):
            yield first * self.span, ids[:, first : first + step]

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Gather runs; the result lives in a scratch buffer until the next read.

        Args:
            ids: What `locate` returned, or a slice of its dim 1.

        Returns:
            `[num_head_groups, num_runs * span, 2 * head_size]` fp32, contiguous,
            writable.
        """
        strips = self.strips
        ids = ids.reshape(-1)
        shape = (ids.numel(), strips.shape[1])
        found = _scratch.take(shape[0] * shape[1], strips.dtype, strips.device)
        torch.index_select(strips, 0, ids, out=found.view(shape))
        if strips.dtype != torch.float32:
            result = _scratch.take(found.numel(), torch.float32, strips.device)
            found = result.copy_(found)
        return found.view(self.num_head_groups, -1, self.width)
