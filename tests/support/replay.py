"""Batches as vLLM describes them, and CUDA graphs played without one."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.support.engines import builders, reconfigured, runner
from tidal_vllm.engine.batch import TidalMetadata


def common_metadata(
    query_lens: Sequence[int],
    lens: Sequence[int],
    prefilling: Sequence[bool] | None = None,
    **fields: Any,
) -> CommonAttentionMetadata:
    """A batch as vLLM describes it; rows without query tokens are padding."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    num_tokens = fields.pop("num_tokens", int(starts[-1]))
    defaults = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": seq_lens,
        "seq_lens_cpu_upper_bound": seq_lens,
        "num_reqs": len(lens),
        "num_actual_tokens": num_tokens,
        "max_query_len": max(query_lens),
        "max_seq_len": max(lens),
        "block_table_tensor": torch.arange(len(lens) * 4).int().view(-1, 4),
        "slot_mapping": torch.arange(num_tokens),
        "is_prefilling": torch.tensor(prefilling or [False] * len(lens)),
    }
    return CommonAttentionMetadata(**defaults | fields)


class Graph:
    """What a full CUDA graph does, without one: it runs captured metadata again.

    The model runner's tensors are the same at capture and replay, their contents are
    not; metadata made at capture refers to the tensors.
    """

    def __init__(self, llm: LLM, num_reqs: int, query_len: int = 1) -> None:
        self.llm, (self.builder,) = llm, builders(llm)
        self.query_len = query_len
        self.starts = torch.zeros(num_reqs + 1, dtype=torch.int32)
        self.lens = torch.ones(num_reqs, dtype=torch.int32)
        self.table = torch.zeros(num_reqs, 128, dtype=torch.int32)
        self.captured = self.builder.build_for_cudagraph_capture(
            self._common([query_len] * num_reqs)
        )

    def _common(
        self, lens: Sequence[int], prefilling: Sequence[bool] | None = None
    ) -> CommonAttentionMetadata:
        query_lens = [self.query_len * int(length > 0) for length in lens]
        self.starts[1:] = torch.tensor(query_lens).cumsum(0)
        self.lens.copy_(torch.tensor(lens, dtype=torch.int32))
        return common_metadata(
            query_lens,
            lens,
            prefilling,
            num_tokens=self.query_len * len(lens),
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts,
            seq_lens=self.lens,
            block_table_tensor=self.table,
        )

    def replay(
        self,
        lens: Sequence[int],
        table: torch.Tensor,
        query: torch.Tensor,
        prefilling: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """Outputs of all layers, `[num_layers, num_tokens, num_heads, head_size]`.

        Args:
            lens: One per request; 0 for padding, which comes last.
            query: `[num_reqs * query_len, num_heads, head_size]`.
            prefilling: Requests that vLLM takes for decodes there.
        """
        self.table.copy_(table)
        self.builder.build(0, self._common(lens, prefilling))
        return run_layers(self.llm, self.captured, query)


def run_layers(llm: LLM, batch: TidalMetadata, query: torch.Tensor) -> torch.Tensor:
    """Outputs of all layers, shaped as `Graph.replay` gives them."""
    layers = runner(llm).vllm_config.compilation_config.static_forward_context
    outputs = []
    for layer in layers.values():
        output = torch.full_like(query, math.nan)
        new = query[:, : layer.num_kv_heads]
        layer.impl.forward(layer, query, new, new, layer.kv_cache, batch, output)
        outputs.append(output)
    return torch.stack(outputs)


def random_table(num_rows: int) -> torch.Tensor:
    """A block table of 128 blocks a row; block 0 is in none."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 60, (num_rows, 128), generator=generator).int()


@contextmanager
def captured(
    llm: LLM, sizes: list[int], drafts: int | None = None, **settings: Any
) -> Iterator[LLM]:
    """The engine, with `written_kernels`, as if it had captured some decodes.

    Args:
        sizes: Numbers of tokens of the captured batches.
        drafts: Tokens of a draft that a request verifies; None: no speculation.
        settings: TIDAL's.
    """
    speculation = drafts and SimpleNamespace(
        num_speculative_tokens=drafts, parallel_drafting=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner(llm).vllm_config, "speculative_config", speculation)
        changed = reconfigured(llm, **settings, kernels="triton")
        stack = ExitStack()
        stack.enter_context(changed)
    with stack:
        (builder,) = builders(llm)
        config = copy.copy(builder.vllm_config.compilation_config)
        config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        config.cudagraph_capture_sizes = sizes
        builder.vllm_config.compilation_config = config
        yield llm


def randomize_kv(llm: LLM) -> None:
    """Random keys and values in the whole KV cache, the same in every call."""
    layers = runner(llm).vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        layer.kv_cache.normal_(generator=torch.Generator().manual_seed(1))
