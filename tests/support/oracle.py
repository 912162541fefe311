"""Sparse decoding by its definition: transformers' model, whose attention obeys roles.

It shares nothing with the package: no paging, no batches, no log-sum-exp, every score
and every mask in full.
"""

import math
from dataclasses import dataclass
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
        reselect_interval, select_attends, method: Likewise.
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
        select_attends: str = "chosen",
        method: str = "tidaldecode",
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
        self.block_masses = {
            "tidaldecode": self._by_mass,
            "oracle": self._by_mass,
            "lessismore": self._by_rank,
            "quest": self._by_bounds,
            "sliding_window": self._by_age,
        }[method]
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
            step = LayerStep(query[0, :, 0] * scaling, key, weights[:, 0])
            visible = self._visible(layer, step, group)[:, None]
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ value).transpose(0, 1)[None], weights[None]

    def _visible(self, layer: int, step: "LayerStep", group: int) -> torch.Tensor:
        """What a SELECT or SPARSE layer attends to: [heads, tokens]."""
        if layer not in self.select:
            return self.kept
        if self.chooses:
            num_heads = len(step.weights)
            sharing = {"sequence": num_heads, "kv_head": group, "query_head": 1}
            self.kept = self._choose(step, sharing[self.scope])
            self.choices[layer] = self.kept
            if self.attends == "everything":
                return torch.ones_like(self.kept)
        old = self.choices[layer]
        newer = old.new_ones(len(old), step.weights.shape[1] - old.shape[1])
        self.kept = torch.cat((old, newer), 1)
        return self.kept

    def _choose(self, step: "LayerStep", sharing: int) -> torch.Tensor:
        """Which tokens each head keeps: [heads, tokens]."""
        num_heads, length = step.weights.shape
        if length <= self.budget:
            return torch.ones_like(step.weights, dtype=torch.bool)
        position = torch.arange(length)
        forced = (position < self.sinks) | (position >= length - self.recent)
        block = position // self.size
        kept = torch.zeros_like(step.weights, dtype=torch.bool)
        for first in range(0, num_heads, sharing):
            heads = slice(first, first + sharing)
            mine = LayerStep(step.query[heads], step.keys[heads], step.weights[heads])
            mass = self.block_masses(mine, block, block[forced].unique().tolist())
            mass[block[forced].unique()] = torch.inf
            top = mass.topk(self.budget // self.size).indices
            kept[heads] = torch.isin(block, top)
        return kept

    def _by_mass(self, step: "LayerStep", block: torch.Tensor, forced: list[int]):
        num_blocks = int(block[-1]) + 1
        return torch.zeros(num_blocks).index_add(0, block, step.weights.sum(0))

    def _by_rank(self, step: "LayerStep", block: torch.Tensor, forced: list[int]):
        """First come the first choices of all heads, then the second ones, ..."""
        num_blocks = int(block[-1]) + 1
        free = [b for b in range(num_blocks) if b not in forced]
        lists = []
        for weights in step.weights:
            mass = torch.zeros(num_blocks).index_add(0, block, weights)
            lists.append(sorted(free, key=lambda b, m=mass: -m[b].item()))
        merged = [b for rank in zip(*lists, strict=True) for b in rank]
        order = {b: nth for nth, b in reversed([*enumerate(merged)])}
        return torch.tensor([-float(order.get(b, 0)) for b in range(num_blocks)])

    def _by_bounds(self, step: "LayerStep", block: torch.Tensor, forced: list[int]):
        found = []
        for b in range(int(block[-1]) + 1):
            keys = step.keys[:, block == b]  # [heads, tokens, head_size]
            low, high = keys.amin(1), keys.amax(1)
            products = torch.maximum(step.query * low, step.query * high)
            found.append(products.double().sum(-1))
        scores = torch.stack(found, 1)
        scores[:, forced] = -torch.inf
        return scores.softmax(1).sum(0)

    def _by_age(self, step: "LayerStep", block: torch.Tensor, forced: list[int]):
        return torch.arange(int(block[-1]) + 1).double()


@dataclass(frozen=True)
class LayerStep:
    """One decode step of one layer."""

    query: torch.Tensor
    """`[heads, head_size]`, scaled."""
    keys: torch.Tensor
    """`[heads, tokens, head_size]`, repeated for the heads of a group."""
    weights: torch.Tensor
    """`[heads, tokens]`, the softmax over all tokens."""
