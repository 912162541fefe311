"""What a method of choosing blocks is, and how an engine gets one by its name."""

import pkgutil

import torch

from tidal_vllm.config import TidalConfig
from tidal_vllm.kernels import DecodeArgs, Kernels
from tidal_vllm.methods.ranks import AgreeingRanks
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.registry import METHODS


class Method:
    """Chooses the blocks that a set keeps; one object serves all layers of a worker.

    A method fills `args.topk_blocks` and `args.topk_lens` for a SELECT layer. Each
    method has a mass of its own for a block; the ops are common: scoring blocks by
    attention mass, taking the top blocks of given masses, attending to them. Which
    layers choose, and what is known of a method before there are tensors, stands in
    `tidal_vllm.registry.METHODS`.

    The selection and the workspace are the engine's, at fixed addresses. Buffers in
    proportion to the KV cache a method makes when the first keys of a layer are
    written: how many blocks the cache has is unknown before. vLLM's memory profiling
    does not count them, so the start-up log says what they take.

    Args:
        kernels: The decode ops of this engine.
        rule: How many tokens a set keeps, and which of them are forced.
        attends_to_chosen: Whether a SELECT layer attends to what it chose. Otherwise
            it attends to everything while it scores, and has written its output.
        ranks: The tensor parallel ranks that choose together; None where each chooses
            by its own heads.
    """

    def __init__(
        self,
        kernels: Kernels,
        rule: SelectionRule,
        attends_to_chosen: bool,
        ranks: AgreeingRanks | None = None,
    ) -> None:
        self.kernels, self.rule, self.ranks = kernels, rule, ranks
        self.attends_to_chosen = attends_to_chosen

    def keys_written(
        self, layer_name: str, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Take notice of keys that one layer of this step has written.

        Called for a method that `follows_keys`, before the layer attends.

        Args:
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
            slot_mapping: `[num_tokens]` int64, block * block_size + offset of each
                token; negative for padding.
        """

    def take_over(self, former: "Method") -> None:
        """Keep what another object of this class has noticed of the keys so far.

        Called where an engine gets other settings while it runs, of a method that
        `follows_keys`; the class and `select_block_size` are the same.
        """

    def select(self, layer_name: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Fill `args.topk_blocks` and `args.topk_lens`.

        Args:
            seq_lens: `[num_rows]` int32; 0 for padding, negative for a row that keeps
                the selection that it has.
        """
        raise NotImplementedError

    def score_by_attention(self, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Leave block_lse and lse in the workspace, the exact attention of this layer.

        Where a SELECT layer attends to everything, its output comes with them.
        """
        if self.attends_to_chosen:
            self.kernels.ops.score_blocks(args, seq_lens)
        else:
            self.kernels.ops.dense_decode(args, seq_lens)

    def choose_by_attention(self, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Choose the blocks of the most mass, after `score_by_attention`."""
        if self.ranks is not None:
            args = self.ranks.weighed(args)
        self.kernels.ops.select_blocks(args, seq_lens, self.rule)


def create_method(
    config: TidalConfig,
    rule: SelectionRule,
    kernels: Kernels,
    ranks: AgreeingRanks | None = None,
) -> Method:
    """The method that the configuration names."""
    cls: type[Method] = pkgutil.resolve_name(METHODS[config.method].path)
    chosen = config.select_attends == "chosen"
    return cls(kernels, rule, attends_to_chosen=chosen, ranks=ranks)
