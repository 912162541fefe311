"""The attention of a pretrained model, and what part of it a choice of blocks captures.

Attention is taken from a dense forward pass of transformers, at the last positions of a
text, and everything here runs on the device of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pydoc_data.topics import topics

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tidal_vllm.plan.rule import SelectionRule

Tensor = torch.Tensor


@dataclass
class Mean:
    """Of numbers between 0 and 1."""

    values: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        self.values.append(values.flatten().float())

    def describe(self) -> dict:
        found = torch.cat(self.values)
        low = found.kthvalue(max(1, len(found) // 100)).values
        return {"mean": round(float(found.mean()), 5), "p1": round(float(low), 4)}


@dataclass
class LayerAttention:
    """One layer's attention at the last P positions of a text of T tokens, in fp32."""

    logits: Tensor
    """`[P, num_heads, T]`, scaled; -inf for tokens behind a position."""
    query: Tensor
    """`[P, num_heads, head_size]`, not scaled."""
    key: Tensor
    """`[num_kv_heads, T, head_size]`."""
    value_norms: Tensor
    """`[num_kv_heads, T]`, the length of each value."""


def last_attention(model, tokens: Tensor, positions: int) -> Iterator[LayerAttention]:
    """Each layer's attention at the last positions of a text."""
    seen: list[LayerAttention] = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(groups, 1)
        last = query[:, :, -positions:].float()
        logits = (last @ keys.float().transpose(-1, -2))[0] * scaling
        nth = torch.arange(keys.shape[2], device=keys.device)
        hidden = nth[None] > nth[-positions:, None]
        seen.append(
            LayerAttention(
                logits=logits.masked_fill(hidden, -torch.inf).transpose(0, 1),
                query=last[0].transpose(0, 1),
                key=key[0].float(),
                value_norms=value[0].float().norm(dim=-1),
            )
        )
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            value.repeat_interleave(groups, 1),
            is_causal=True,
            scale=scaling,
        )
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("benchmark_attention_mass", attend)
    model.set_attn_implementation("benchmark_attention_mass")
    with torch.inference_mode():
        model.model(tokens[None], use_cache=False)
    yield from seen


def block_lses(logits: Tensor, size: int) -> Tensor:
    """The log-sum-exp of each selection block: [P, H, N] from logits [P, H, T]."""
    padded = torch.nn.functional.pad(
        logits, (0, -logits.shape[2] % size), value=-torch.inf
    )
    return padded.unflatten(2, (-1, size)).logsumexp(-1)


@dataclass(frozen=True)
class Rows:
    """What a rule says of P sequences with room for N blocks each."""

    rule: SelectionRule
    seq_lens: tuple[int, ...]
    forced: Tensor
    """`[P, N]` bool, blocks that are always kept."""
    absent: Tensor
    """`[P, N]` bool, blocks behind the end of the sequence."""
    tokens: Tensor
    """`[P, N]` int64, tokens of each block."""
    kept_blocks: Tensor
    """`[P]` int64, how many blocks are kept."""


@lru_cache(maxsize=256)
def rows(
    rule: SelectionRule, seq_lens: tuple[int, ...], num_blocks: int, device: str
) -> Rows:
    """The rule, for sequences of these lengths."""
    lens = torch.tensor(seq_lens)[:, None]
    starts = torch.arange(num_blocks) * rule.select_block_size
    forced = torch.zeros(len(seq_lens), num_blocks, dtype=torch.bool)
    for row, seq_len in enumerate(seq_lens):
        forced[row, list(rule.forced_blocks(seq_len))] = True
    kept_blocks = torch.tensor([rule.num_kept_blocks(n) for n in seq_lens])
    return Rows(
        rule,
        seq_lens,
        forced.to(device),
        (starts >= lens).to(device),
        (lens - starts).clamp(0, rule.select_block_size).to(device),
        kept_blocks.to(device),
    )


def ranked(mass: Tensor, about: Rows) -> Tensor:
    """Blocks in the order in which they are kept: int64 [P, S, N] from mass [P, S, N].

    Forced blocks come first. Of equal ones the first comes first.
    """
    weights = mass.masked_fill(about.forced[:, None], torch.inf)
    weights = weights.masked_fill(about.absent[:, None], -torch.inf)
    return weights.sort(dim=-1, descending=True, stable=True).indices


def keep(order: Tensor, counts: Tensor) -> Tensor:
    """The first blocks of an order [P, S, N], `counts` [P, S] or [P, 1]: bool."""
    first = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    kept = torch.zeros_like(order, dtype=torch.bool)
    return kept.scatter_(-1, order, first.expand_as(order))


def choose(mass: Tensor, seq_lens: Sequence[int], rule: SelectionRule) -> Tensor:
    """Which blocks are kept: bool [P, S, N] from masses [P, S, N], by the rule."""
    about = rows(rule, tuple(seq_lens), mass.shape[-1], str(mass.device))
    return keep(ranked(mass, about), about.kept_blocks[:, None])


def captured(weights: Tensor, kept: Tensor) -> Tensor:
    """The attention mass [P, H] of the kept blocks.

    Args:
        weights: `[P, H, N]`, the mass of each block.
        kept: `[P, S, N]` bool; neighbouring heads share one of the S sets.
    """
    by_set = weights.unflatten(1, (kept.shape[1], -1))
    return (by_set * kept[:, :, None]).sum(-1).flatten(1)


def texts(tokenizer, count: int, length: int) -> Iterator[Tensor]:
    """Cuts of Python's documentation, one behind another; they do not overlap."""
    everything = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor(tokenizer(everything).input_ids)
    step = len(tokens) // count
    if step < length:
        raise SystemExit(f"{len(tokens)} tokens are not {count} texts of {length}")
    for nth in range(count):
        yield tokens[nth * step : nth * step + length]
