"""The KV that an engine of this process holds, and how far it is from other KV."""

import torch
from vllm import LLM

from tests.support.engines import runner, scheduler


def kv_of(llm: LLM, request_id: str, first: int, end: int) -> torch.Tensor:
    """The KV of a running request, `[num_layers, end - first, heads, 2 * size]`."""
    (block_ids,) = scheduler(llm).kv_cache_manager.get_block_ids(request_id)
    return kv_in(llm, block_ids, first, end)


def kv_in(llm: LLM, block_ids: list[int], first: int, end: int) -> torch.Tensor:
    """The KV at positions of a sequence that has these blocks, shaped as `kv_of`'s."""
    caches = runner(llm).kv_caches
    size = caches[0].shape[2]
    positions = torch.arange(first, end)
    blocks = torch.tensor(block_ids)[positions // size]
    return torch.stack([cache[blocks, :, positions % size].clone() for cache in caches])


def relative_errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Per layer: the norm of the difference over the norm of what is wanted."""
    wanted = wanted.double()
    error = (found.double() - wanted).flatten(1).norm(dim=1)
    return error / wanted.flatten(1).norm(dim=1)
