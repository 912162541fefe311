"""Dense decode attention of others, on the same paged KV cache, in the same process.

Each maker returns a call that launches one decode and returns its output; it raises
whatever keeps it from running here, which the benches print as the reason.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.kernels import flash_attention
from benchmarks.kernels.decode_batch import DecodeBatch

Call = Callable[[], torch.Tensor]


def split_cache(decodes: DecodeBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, each `[num_blocks, block_size, num_kv_heads, head_size]`, as views."""
    return decodes.kv_cache.transpose(1, 2).split(decodes.shape.head_size, -1)


def flash_attn(decodes: DecodeBatch) -> Call:
    """vLLM's FLASH_ATTN, with the ahead-of-time schedule of its metadata builder."""
    shape, device = decodes.shape, decodes.query.device
    found = flash_attention.load(device, shape.head_size)
    key, value = split_cache(decodes)
    starts = torch.arange(decodes.num_rows + 1, dtype=torch.int32, device=device)
    output, schedule = torch.empty_like(decodes.query), None
    if found.version == 3:
        schedule = found.schedule(
            batch_size=decodes.num_rows,
            max_seqlen_q=1,
            max_seqlen_k=decodes.context,
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_kv_heads,
            headdim=shape.head_size,
            cache_seqlens=decodes.seq_lens,
            qkv_dtype=decodes.query.dtype,
            cu_seqlens_q=starts,
            page_size=shape.block_size,
            causal=True,
            num_splits=32,  # vLLM's bound under CUDA graphs
        )

    def run() -> torch.Tensor:
        found.attend(
            q=decodes.query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=decodes.seq_lens,
            max_seqlen_k=decodes.context,
            softmax_scale=decodes.scale,
            causal=True,
            block_table=decodes.block_table,
            scheduler_metadata=schedule,
            fa_version=found.version,
            num_splits=32 if found.version == 3 else 0,
        )
        return output

    return run


def triton_attn(decodes: DecodeBatch) -> Call:
    """vLLM's TRITON_ATTN, as its impl calls it for a batch of decodes."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    key, value = split_cache(decodes)
    shape, device = decodes.shape, key.device
    starts = torch.arange(decodes.num_rows + 1, dtype=torch.int32, device=device)
    output = torch.empty_like(decodes.query)
    # What TritonAttentionMetadataBuilder allocates.
    threshold, segments = 128 // shape.num_kv_heads, 16
    parts = (threshold, shape.num_heads, segments)

    def run() -> torch.Tensor:
        unified_attention(
            q=decodes.query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=decodes.seq_lens,
            max_seqlen_k=decodes.context,
            softmax_scale=decodes.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=decodes.block_table,
            softcap=0,
            q_descale=None,
            k_descale=ones,
            v_descale=ones,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=segments,
            softmax_segm_output=scratch.out,
            softmax_segm_max=scratch.top,
            softmax_segm_expsum=scratch.total,
        )
        return output

    ones = torch.ones((), device=device).expand(decodes.num_rows, shape.num_kv_heads)
    scratch = SimpleNamespace(
        out=torch.empty(*parts, shape.head_size, device=device),
        top=torch.empty(parts, device=device),
        total=torch.empty(parts, device=device),
    )
    return run


def xformers_arguments(decodes: DecodeBatch) -> dict[str, Any]:
    """What xformers' attention is given for these decodes, over views of the cache.

    A token's place in its memory has to follow from the number of its page alone, as in
    the layout LBNHC; of another layout the views become copies.
    """
    from xformers.ops import fmha

    bias = fmha.attn_bias
    shape, size = decodes.shape, decodes.shape.block_size

    class SplitK(fmha.triton_splitk.FwOp):
        """The operator with tiles that fit into a page; its own have 64 tokens."""

        BLOCK_N = math.gcd(size, fmha.triton_splitk.FwOp.BLOCK_N)
        SUPPORTED_DEVICES = {"cuda", "cpu"}  # the latter by Triton's interpreter

    seq_lens = decodes.seq_lens.tolist()
    padded = bias.BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * decodes.num_rows,
        kv_seqlen=seq_lens,
        kv_padding=decodes.block_table.shape[1] * size,
        device=decodes.query.device,
    )
    groups = shape.num_heads // shape.num_kv_heads
    key, value = (
        part.reshape(1, -1, shape.num_kv_heads, 1, shape.head_size).expand(
            -1, -1, -1, groups, -1
        )
        for part in split_cache(decodes)
    )
    return {
        "query": decodes.query.view(
            1, decodes.num_rows, shape.num_kv_heads, groups, shape.head_size
        ),
        "key": key,
        "value": value,
        "attn_bias": padded.make_paged(
            decodes.block_table, size, bias.PagedBlockDiagonalPaddedKeysMask
        ),
        "scale": decodes.scale,
        "op": SplitK,
    }


def xformers_split_k(decodes: DecodeBatch) -> Call:
    """xformers' Triton split-K decode over pages."""
    from xformers.ops import fmha

    given = xformers_arguments(decodes)

    def run() -> torch.Tensor:
        output = fmha.memory_efficient_attention_forward(**given)
        return output.view(decodes.query.shape)

    return run


def flashinfer(decodes: DecodeBatch) -> Call:
    """FlashInfer's paged decode on tensor cores; compiles itself on first use."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape, device = decodes.shape, decodes.query.device
    buffer = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(buffer, "NHD", use_tensor_cores=True)
    per_row = decodes.block_table.shape[1]
    starts = torch.arange(decodes.num_rows + 1, dtype=torch.int32, device=device)
    starts *= per_row
    wrapper.plan(
        starts,
        decodes.block_table.flatten(),
        (decodes.seq_lens - 1) % shape.block_size + 1,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        shape.block_size,
        q_data_type=decodes.query.dtype,
        kv_data_type=decodes.kv_cache.dtype,
        sm_scale=decodes.scale,
    )
    key, value = split_cache(decodes)
    return lambda: wrapper.run(decodes.query, (key, value))


BASELINES: dict[str, Callable[[DecodeBatch], Call]] = {
    "flash_attn": flash_attn,
    "triton_attn": triton_attn,
    "xformers": xformers_split_k,
    "flashinfer": flashinfer,
}
"""Makers of a call by name."""
