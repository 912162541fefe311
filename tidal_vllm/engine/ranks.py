"""Which tensor parallel ranks choose together, and how they add up their masses."""

from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_reduce,
)

from tidal_vllm.config import TidalConfig
from tidal_vllm.methods.ranks import AgreeingRanks
from tidal_vllm.plan.rule import num_sets


def agreeing_ranks(
    config: TidalConfig, vllm_config: VllmConfig, num_heads: int, num_kv_heads: int
) -> AgreeingRanks | None:
    """The ranks that this worker chooses with; None where it chooses by itself.

    vLLM splits the query heads over the ranks, and the KV heads as far as there are
    enough: beyond that several ranks have one KV head, and each some of its query
    heads. So ranks share sets of scope "sequence", and of scope "kv_head" where there
    are more ranks than KV heads.

    Args:
        num_heads, num_kv_heads: Of this rank.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if config.rank_choice == "own" or ranks == 1:
        return None
    all_kv_heads = ranks * num_kv_heads
    if num_kv_heads == 1:
        all_kv_heads = min(ranks, vllm_config.model_config.get_total_num_kv_heads())
    here = num_sets(config.scope, num_heads, num_kv_heads)
    all_sets = num_sets(config.scope, ranks * num_heads, all_kv_heads)
    sharing = ranks * here // all_sets
    if sharing == 1:
        return None
    first = get_tensor_model_parallel_rank() // sharing
    return AgreeingRanks(all_sets, first, tensor_model_parallel_all_reduce)
