"""The methods of choosing blocks: their names, and what is known of each in advance.

The front end plans and refuses with this table alone, before a tensor exists. The
class of a method does the rest, in the worker.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def all_keys(select_block_size: int) -> float:
    """Scoring reads every key: half of a sequence's KV."""
    return 0.5


def two_vectors_per_block(select_block_size: int) -> float:
    """As much as the key and the value of one token, for each selection block."""
    return 1 / select_block_size


def nothing(select_block_size: int) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """What planning has to know of a method.

    Attributes:
        path: The class, a `tidal_vllm.methods.base.Method`.
        preset: The settings of the method's paper: what the preset of its name sets.
        every_layer: Whether every full-attention layer that is not DENSE is a SELECT
            layer. Otherwise few are: those that the settings or a profile name.
        dense_layers: With every_layer, how many of the first full-attention layers are
            DENSE where the settings do not say.
        scoring_reads: What a SELECT layer reads to score the blocks before it attends
            to what it chose, as a share of a sequence's KV, by select_block_size.
        keeps_beside: What the method keeps in device memory beside the KV cache, as a
            share of the cache, by select_block_size.
        captures_graphs: Whether a CUDA graph can hold how the method chooses. Otherwise
            there are no full graphs, whatever the kernels are.
        follows_keys: Whether the method keeps something of each key that is written,
            so that KV may not arrive in another way, nor in fp8.
        ranks_agree: Whether tensor parallel ranks can come to one choice: by the sum of
            their masses, or because no head is asked.
    """

    path: str
    preset: dict[str, Any] = field(default_factory=dict)
    every_layer: bool = False
    dense_layers: int = 0
    scoring_reads: Callable[[int], float] = all_keys
    keeps_beside: Callable[[int], float] = nothing
    captures_graphs: bool = False
    follows_keys: bool = False
    ranks_agree: bool = False


METHODS: dict[str, MethodEntry] = {
    # Every query head keeps its own top-k tokens; nothing is forced (the authors' code
    # has attention_sink=0), except that the current token must attend to itself. 4096
    # is the larger of the paper's two LongBench budgets (arXiv 2410.05076).
    "tidaldecode": MethodEntry(
        path="tidal_vllm.methods.tidaldecode.TidalDecode",
        preset={
            "token_budget": 4096,
            "select_block_size": 1,
            "scope": "query_head",
            "sink_tokens": 0,
            "recent_fraction": 0.0,
            "select_attends": "everything",
        },
        captures_graphs=True,
        ranks_agree=True,
    ),
    # One set of tokens for all heads, r = 0.25 of the budget for the newest tokens and
    # "four tokens as attention sinks in all experiments" (arXiv 2508.07101v2, section
    # 4.1). Its budgets are 1K to 8K.
    "lessismore": MethodEntry(
        path="tidal_vllm.methods.lessismore.LessIsMore",
        preset={
            "token_budget": 4096,
            "select_block_size": 1,
            "scope": "sequence",
            "sink_tokens": 4,
            "recent_fraction": 0.25,
            "select_attends": "everything",
        },
    ),
    # Every query head keeps its own top pages of 16 tokens (arXiv 2406.10774); in the
    # authors' code the first two layers are dense, and nothing is forced. The budget is
    # the default one, for comparison.
    "quest": MethodEntry(
        path="tidal_vllm.methods.quest.Quest",
        preset={
            "token_budget": 4096,
            "select_block_size": 16,
            "scope": "query_head",
            "sink_tokens": 0,
            "recent_fraction": 0.0,
            "select_attends": "chosen",
        },
        every_layer=True,
        dense_layers=2,
        scoring_reads=two_vectors_per_block,
        keeps_beside=two_vectors_per_block,
        follows_keys=True,
    ),
    # StreamingLLM (arXiv 2309.17453): four sinks and a window of the newest tokens.
    "sliding_window": MethodEntry(
        path="tidal_vllm.methods.sliding_window.SlidingWindow",
        preset={
            "token_budget": 4096,
            "select_block_size": 16,
            "scope": "sequence",
            "sink_tokens": 4,
            "recent_fraction": 0.25,
            "select_attends": "chosen",
        },
        every_layer=True,
        scoring_reads=nothing,
        ranks_agree=True,
    ),
    # What exact scores in every layer would give: a bound for the other methods.
    "oracle": MethodEntry(
        path="tidal_vllm.methods.oracle.Oracle",
        preset={
            "token_budget": 4096,
            "select_block_size": 1,
            "scope": "query_head",
            "sink_tokens": 0,
            "recent_fraction": 0.0,
            "select_attends": "chosen",
        },
        every_layer=True,
        captures_graphs=True,
        ranks_agree=True,
    ),
}
