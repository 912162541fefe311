"""Sparse decoding by its definition: transformers' model, whose attention obeys roles.

It shares nothing with the package: no paging, no batches, no log-sum-exp, every score
and every mask in full.
"""

import math
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
)
from transformers.masking_utils import eager_mask

NAME = "by_role"


class Oracle:
    """A model that selects in some layers and follows the selection in others.

    Args:
        folder: The checkpoint.
        dense_layers, select_layers: Roles; the other layers are SPARSE, but for those
            that have a sliding window, or no attention.
        scope: Who shares a selection: "sequence", "kv_head" or "query_head".
        token_budget, select_block_size, sink_tokens, recent_fraction: As configured.
        reselect_interval, select_attends: Likewise.
    """

    def __init__(
        self,
        folder: Path,
        dense_layers: list[int],
        select_layers: list[int],
        scope: str,
        token_budget: int,
        select_block_size: int,
        sink_tokens: int = 4,
        recent_fraction: float = 0.25,
        reselect_interval: int = 1,
        select_attends: str = "everything",
    ) -> None:
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=NAME
        ).eval()
        self.dense, self.select = dense_layers, select_layers
        self.scope, self.budget = scope, token_budget
        self.size, self.sinks = select_block_size, sink_tokens
        self.recent = max(1, math.floor(recent_fraction * token_budget))
        self.interval, self.attends = reselect_interval, select_attends
        self.choices: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def generate(self, prompt: list[int], max_tokens: int):
        """Greedy tokens, and the logprobs they were chosen from."""
        tokens, logprobs, cache = [], [], None
        asked = prompt
        for step in range(max_tokens):
            self.chooses = (step - 1) % self.interval == 0  # the first is the prompt's
            out = self.model(torch.tensor([asked]), past_key_values=cache)
            cache = out.past_key_values
            logprobs.append(out.logits[0, -1].log_softmax(-1))
            tokens.append(int(logprobs[-1].argmax()))
            asked = tokens[-1:]
        return tokens, logprobs

    def _attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (x[0].repeat_interleave(group, 0) for x in (key, value))
        scores = query[0] @ key.mT * scaling  # [heads, queries, tokens]
        num_queries, length = scores.shape[1:]
        visible = torch.ones(num_queries, length, dtype=torch.bool)
        visible = visible.tril(length - num_queries).expand(scores.shape)
        window = kwargs.get("sliding_window")
        if window is not None:
            visible = visible.triu(length - num_queries - window + 1)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        layer = module.layer_idx
        if num_queries == 1 and window is None and layer not in self.dense:
            visible = self._visible(layer, weights[:, 0], group)[:, None]
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ value).transpose(0, 1)[None], weights[None]

    def _visible(self, layer: int, weights: torch.Tensor, group: int) -> torch.Tensor:
        """What a SELECT or SPARSE layer attends to: [heads, tokens]."""
        if layer not in self.select:
            return self.kept
        if self.chooses:
            sharing = {"sequence": len(weights), "kv_head": group, "query_head": 1}
            self.kept = self._choose(weights, sharing[self.scope])
            self.choices[layer] = self.kept
            if self.attends == "everything":
                return torch.ones_like(self.kept)
        old = self.choices[layer]
        newer = old.new_ones(len(old), weights.shape[1] - old.shape[1])
        self.kept = torch.cat((old, newer), 1)
        return self.kept

    def _choose(self, weights: torch.Tensor, sharing: int) -> torch.Tensor:
        """Which tokens each head keeps: [heads, tokens], of the heads' weights."""
        length = weights.shape[1]
        if length <= self.budget:
            return torch.ones_like(weights, dtype=torch.bool)
        position = torch.arange(length)
        forced = (position < self.sinks) | (position >= length - self.recent)
        block = position // self.size
        kept = torch.zeros_like(weights, dtype=torch.bool)
        for first in range(0, len(weights), sharing):
            mass = weights[first : first + sharing].sum(0)
            by_block = torch.zeros(int(block[-1]) + 1).index_add(0, block, mass)
            by_block[block[forced].unique()] = torch.inf
            top = by_block.topk(self.budget // self.size).indices
            kept[first : first + sharing] = torch.isin(block, top)
        return kept
