"""Each decode op once before the first request: Triton compiles, CUDA loads modules.

Where vLLM captures no full graph (PIECEWISE, NONE, eager), nothing else would run the
ops before a sequence has outgrown the threshold, and that request would wait for it.
"""

import time
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from tidal_vllm.engine.batch import DecodePart, TidalMetadata
from tidal_vllm.engine.selection import Selection
from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.rule import SelectionRule

logger = init_logger("vllm.tidal.warm_up")


def warm_up(
    layer: Any,
    vllm_config: VllmConfig,
    kv_cache_spec: AttentionSpec,
    block_table: torch.Tensor,
    selection: Selection,
    rule: SelectionRule,
) -> None:
    """Run a layer as a SELECT and as a SPARSE layer, on a row that is left out.

    No op writes anything of such a row. dtypes, shapes and strides are those of
    serving, so Triton compiles what serving launches. The KV cache does not exist yet
    when metadata builders are made: one of a single block stands in for it.

    Args:
        layer: vLLM's, of a `TidalImpl`.
        kv_cache_spec: Of the layer; its block_size is that of the block table.
        block_table: `[>= 1, max_blocks_per_seq]` int32, as wide as in serving.
    """
    start, impl, device = time.perf_counter(), layer.impl, block_table.device
    kv_cache = _one_block(vllm_config, kv_cache_spec, device)
    dtype = vllm_config.model_config.dtype
    query, key, output = (
        torch.zeros(1, heads, impl.head_size, dtype=dtype, device=device)
        for heads in (impl.num_heads, impl.num_kv_heads, impl.num_heads)
    )
    left_out = torch.full((1,), -1, dtype=torch.int32, device=device)
    topk = zip(selection.topk_blocks, selection.topk_lens, strict=True)
    part = DecodePart(
        rows=slice(1),
        block_table=block_table[:1],
        seq_lens=left_out,
        select_lens=left_out,
        lens_after_select=left_out,
        topk=[(blocks[:1], lens[:1]) for blocks, lens in topk],
    )
    for role in (Role.SELECT, Role.SPARSE):
        batch = TidalMetadata(
            num_decodes=1,
            num_decode_tokens=1,
            seq_lens=left_out,
            block_table=part.block_table,
            dense=AttentionMetadata(),
            prefills=None,
            prefill_tokens=slice(0),
            sparse=True,
            parts=[part],
            roles={layer.layer_name: role},
            selection_index={layer.layer_name: 0},
            rule=rule,
        )
        impl.forward(layer, query, key, key, kv_cache, batch, output)
    seconds = time.perf_counter() - start
    logger.info("decode kernels launched once: %.1f s", seconds)


def _one_block(
    vllm_config: VllmConfig, spec: AttentionSpec, device: torch.device
) -> torch.Tensor:
    """`[1, num_kv_heads, block_size, 2 * head_size]`, in the KV cache's layout."""
    shape = (1, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
    order = vllm_config.cache_config.get_resolved_kv_cache_layout().layer_view_order
    block = torch.zeros([shape[i] for i in order], dtype=spec.dtype, device=device)
    return block.permute(*(order.index(axis) for axis in range(4)))
