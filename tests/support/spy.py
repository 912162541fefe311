"""A spy on the ops: which layer read which tokens of which row, step by step."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.batch import TidalMetadata
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.kernels import reference


@dataclass
class Call:
    """One op of one layer."""

    op: str
    layer: int
    tokens: list[list[int]]
    """How many tokens were read: per row, per set; none of rows that are left out."""
    selects: bool = False


@dataclass
class Step:
    """One step of the engine.

    Its metadata's tensors are buffers of the runner: later steps overwrite them.
    """

    metadata: TidalMetadata
    seq_lens: list[int]
    calls: list[Call] = field(default_factory=list)

    @property
    def num_prefills(self) -> int:
        return len(self.seq_lens) - self.metadata.num_decodes

    @property
    def decode_lens(self) -> list[int]:
        return self.seq_lens[: self.metadata.num_decodes]

    def of(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call.op in names]


@contextmanager
def spying() -> Iterator[list[Step]]:
    """Record every step, and let ops read nothing but what they are said to read.

    Each op gets a copy of the layer's KV cache that holds NaN wherever its arguments
    do not point to: reading one token more would make the output NaN.
    """
    steps: list[Step] = []
    layer = SimpleNamespace(index=None)
    build, forward = TidalMetadataBuilder.build, TidalImpl.forward

    def spied_build(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        steps.append(Step(metadata, metadata.seq_lens.tolist()))
        return metadata

    def spied_forward(self, vllm_layer, *args, **kwargs):
        layer.index = int(vllm_layer.layer_name.split(".")[2])
        output = forward(self, vllm_layer, *args, **kwargs)
        assert not output.isnan().any()
        return output

    def record(op, tokens, selects=False):
        steps[-1].calls.append(Call(op, layer.index, tokens, selects))

    def spied_op(op, run, readable):
        """The op on a copy of its cache, which holds what it may read alone."""

        def spied(args, seq_lens):
            kv_cache = readable(op, args, seq_lens)
            return run(dataclasses.replace(args, kv_cache=kv_cache), seq_lens)

        return spied

    def everything(op, args, seq_lens):
        positions = [[torch.arange(max(n, 0))] for n in seq_lens.tolist()]
        record(op, _counts(positions), selects=args.topk_blocks is not None)
        return _only(args.kv_cache, args.block_table, positions)

    def keys_only(op, args, seq_lens):
        kv_cache = everything(op, args, seq_lens)
        kv_cache[..., kv_cache.shape[3] // 2 :] = torch.nan
        return kv_cache

    def chosen(op, args, seq_lens):
        positions = [
            [
                _positions(blocks[:count], args.select_block_size, seq_len)
                for blocks, count in zip(sets, counts, strict=True)
            ]
            for sets, counts, seq_len in zip(
                args.topk_blocks,
                args.topk_lens.tolist(),
                seq_lens.tolist(),
                strict=True,
            )
        ]
        record(op, _counts(positions))
        return _only(args.kv_cache, args.block_table, positions)

    def extend(query, kv_cache, block_table, seq_lens, *rest, **kwargs):
        positions = [[torch.arange(max(n, 0))] for n in seq_lens.tolist()]
        kv_cache = _only(kv_cache, block_table, positions)
        record("dense_extend", _counts(positions))
        return dense_extend(query, kv_cache, block_table, seq_lens, *rest, **kwargs)

    dense_extend = reference.dense_extend
    readable = {
        "dense_decode": everything,
        "score_blocks": keys_only,
        "sparse_decode": chosen,
    }
    with pytest.MonkeyPatch.context() as patch:
        for op, what in readable.items():
            patch.setattr(reference, op, spied_op(op, getattr(reference, op), what))
        patch.setattr(reference, "dense_extend", extend)
        patch.setattr(TidalMetadataBuilder, "build", spied_build)
        patch.setattr(TidalImpl, "forward", spied_forward)
        yield steps


def _positions(blocks: torch.Tensor, size: int, seq_len: int) -> torch.Tensor:
    """Positions in a set's blocks; each block once."""
    assert (blocks.diff() > 0).all() and (blocks >= 0).all()
    positions = (blocks[:, None].long() * size + torch.arange(size)).flatten()
    return positions[positions < seq_len]


def _counts(positions: list[list[torch.Tensor]]) -> list[list[int]]:
    return [[p.numel() for p in sets] for sets in positions]


def _only(kv_cache, block_table, positions) -> torch.Tensor:
    """A copy of the cache with NaN in all slots but those of some positions."""
    block_size = kv_cache.shape[2]
    copy = torch.full_like(kv_cache, torch.nan)
    for row, sets in enumerate(positions):
        union = torch.cat(sets).unique()
        blocks = block_table[row, union // block_size].long()
        offsets = union % block_size
        copy[blocks, :, offsets] = kv_cache[blocks, :, offsets]
    return copy
