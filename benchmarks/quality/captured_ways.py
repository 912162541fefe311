"""The ways to choose that `benchmarks.quality.captured` compares, and their scores."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.quality.attention_mass import LayerAttention, Rows
from tidal_vllm.config import TidalConfig
from tidal_vllm.methods.lessismore import merge_rankings
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.registry import METHODS

Tensor = torch.Tensor
BASE, ORACLE = "base", "oracle, query_head, nothing forced"
TOP_P, PER_LAYER = (0.90, 0.95, 0.98), "as each layer needs"
EVERY_LAYER = 1  # as `every`: each layer behind the DENSE ones chooses
CALIBRATED = (2, 7, 11, 14, 21)


@dataclass(frozen=True)
class Way:
    """One way to choose blocks; the defaults are the base that others differ from."""

    name: str = BASE
    group: str = BASE
    dense: int = 2
    """Layers in front that are DENSE; the next one is the first that chooses."""
    every: int = 4
    """Every which layer chooses from there on."""
    select: tuple[int, ...] = ()
    """The layers that choose, where they are named one by one."""
    attends: str = "everything"
    method: str = "tidaldecode"
    """Of `registry.METHODS`: what it reads to score is counted."""
    score: str = "sum"
    size: int = 4
    scope: str = "sequence"
    recent_fraction: float = 0.25
    sink_tokens: int = 4
    pool: str = ""
    """Over three neighbouring blocks: "max" or "mean"."""
    queries: tuple[float, ...] = (1.0,)
    """Weights of the masses of the last queries, the newest one last."""
    age: int = 0
    """Steps since the choice was made."""
    interval: int = 1
    """Steps for which a choice holds, all ages alike."""
    top_p: float = 0.0
    """As many blocks as have this share of the mass, up to twice the budget."""
    blocks: int = 0
    """As many blocks, whatever the budget is."""
    layer_blocks: tuple[tuple[int, ...], ...] = ()
    """By fold of the texts: the blocks that each layer reads."""

    def rule(self, budget: int) -> SelectionRule:
        config = TidalConfig(
            token_budget=budget,
            select_block_size=self.size,
            scope=self.scope,
            sink_tokens=self.sink_tokens,
            recent_fraction=self.recent_fraction,
            min_sparse_len=0,
        )
        return SelectionRule.from_config(config)

    def chooses(self, layer: int) -> bool:
        if self.select:
            return layer in self.select
        return layer >= self.dense and (layer - self.dense) % self.every == 0

    @property
    def carried(self) -> bool:
        """Whether choices of earlier steps are used."""
        return self.age > 0 or self.interval > 1

    @property
    def scoring_reads(self) -> float:
        """What a layer reads to choose, as a share of its sequence's KV."""
        return METHODS[self.method].scoring_reads(self.size)


def first_ways() -> list[Way]:
    """All but those that need to know what others read."""
    every = replace(Way(), every=EVERY_LAYER, attends="chosen")
    free = replace(every, scope="query_head", sink_tokens=0, recent_fraction=0.0)
    quest = replace(every, method="quest", score="quest", size=16)
    window = replace(every, method="sliding_window", score="window")

    who = {
        ORACLE: free,
        "oracle": every,
        **{f"every {n}. layer": replace(Way(), every=n) for n in (2, 3, 6, 8, 14)},
        "layer 2 alone": replace(Way(), select=(2,)),
        "layers 2, 7, 11, 14, 21": replace(Way(), select=CALIBRATED),
        "1 DENSE layer": replace(Way(), dense=1),
        "3 DENSE layers": replace(Way(), dense=3),
        "SELECT attends to chosen": replace(Way(), attends="chosen"),
    }
    forced = {f"recent {f}": {"recent_fraction": f} for f in (0.0, 0.125, 0.5)}
    forced |= {f"{n} sinks": {"sink_tokens": n} for n in (0, 16)}
    scores = {
        "largest head": replace(Way(), score="max"),
        "LessIsMore's merge": replace(Way(), score="merge"),
        "value-weighted": replace(Way(), score="value"),
        "Quest, blocks of 16": quest,
        "Quest, query_head": replace(quest, scope="query_head"),
        "Quest, blocks of 4, query_head": replace(quest, size=4, scope="query_head"),
        "sliding window": window,
    }
    smooth = {
        "largest of 3 blocks": {"pool": "max"},
        "mean of 3 blocks": {"pool": "mean"},
        "sum of 4 queries": {"queries": (1.0,) * 4},
        "sum of 8 queries": {"queries": (1.0,) * 8},
        "decay 0.75 a query": {"queries": _decay(0.75)},
        "decay 0.875 a query": {"queries": _decay(0.875)},
    }
    old = {f"{n} step{'s' * (n > 1)} old": {"age": n} for n in (1, 4, 8, 16)}
    old |= {f"reselect_interval {n}": {"interval": n} for n in (2, 4, 8, 16)}
    groups: dict[str, dict] = {
        "who chooses": who,
        "block size": {f"blocks of {n}": {"size": n} for n in (1, 2, 8, 16, 32)},
        "scope": {name: {"scope": name} for name in ("kv_head", "query_head")},
        "forced": forced,
        "score": scores,
        "smoothed": smooth,
        "age": old,
        "budget": {f"top-p {p:.2f}": {"top_p": p} for p in TOP_P},
    }
    found = [Way()]
    for group, ways in groups.items():
        for name, way in ways.items():
            way = replace(Way(), **way) if isinstance(way, dict) else way
            found.append(replace(way, name=name, group=group))
    return found


def _decay(factor: float) -> tuple[float, ...]:
    return tuple(factor**n for n in range(15, -1, -1))


def score(
    way: Way, seen: LayerAttention, weights: Tensor, sets: int, about: Rows
) -> Tensor:
    """What each block is worth: [P, sets, N] fp32.

    Args:
        seen: The layer's attention at P positions.
        weights: `[P, H, N]`, the attention mass of each block.
        about: What the rule says of these positions.
    """
    found = SCORES[way.score](way, seen, weights, sets, about)
    if way.pool == "max":
        found = torch.nn.functional.max_pool1d(found, 3, stride=1, padding=1)
    elif way.pool == "mean":
        found = torch.nn.functional.avg_pool1d(found, 3, stride=1, padding=1)
    if len(way.queries) > 1:
        by_query = found.unfold(0, len(way.queries), 1)
        found = by_query @ found.new_tensor(way.queries)
    return found


def _sum(way, seen, weights, sets, about) -> Tensor:
    return weights.unflatten(1, (sets, -1)).sum(2)


def _max(way, seen, weights, sets, about) -> Tensor:
    return weights.unflatten(1, (sets, -1)).amax(2)


def _merge(way, seen, weights, sets, about) -> Tensor:
    """LessIsMore's merge of the heads' rankings."""
    by_set = weights.log().unflatten(1, (sets, -1))
    seq_lens = torch.tensor(about.seq_lens, device=weights.device)
    return merge_rankings(by_set, seq_lens, about.rule)


def _value(way, seen, weights, sets, about) -> Tensor:
    """Mass times the mean length of a block's values, normalised per head."""
    norms = seen.value_norms
    padded = torch.nn.functional.pad(norms, (0, -norms.shape[1] % way.size))
    mean = padded.unflatten(1, (-1, way.size)).mean(-1)
    weighted = weights * mean.repeat_interleave(weights.shape[1] // len(mean), 0)
    weighted = weighted / weighted.sum(-1, keepdim=True)
    return weighted.unflatten(1, (sets, -1)).sum(2)


def _quest(way, seen, weights, sets, about) -> Tensor:
    """What a block's keys score at most; heads of a set as Quest in this package.

    The block of a position itself may hold keys behind it here. It is forced.
    """
    padding = -seen.key.shape[1] % way.size
    key = torch.nn.functional.pad(seen.key, (0, 0, 0, padding))
    blocks = key.unflatten(1, (-1, way.size))  # [kv_heads, N, size, D]
    low, high = blocks.amin(2).transpose(1, 2), blocks.amax(2).transpose(1, 2)
    query = seen.query.unflatten(1, (len(key), -1)).transpose(0, 1)
    bounds = query.clamp(min=0).flatten(1, 2) @ high
    bounds += query.clamp(max=0).flatten(1, 2) @ low  # [kv_heads, P * group, N]
    bounds = bounds.unflatten(1, query.shape[1:3]).transpose(0, 1).flatten(1, 2)
    bounds = bounds * seen.query.shape[2] ** -0.5
    bounds = bounds.masked_fill((about.forced | about.absent)[:, None], -torch.inf)
    by_set = bounds.unflatten(1, (sets, -1))
    if by_set.shape[2] == 1:
        return by_set[:, :, 0]
    return by_set.log_softmax(3).logsumexp(2)


def _window(way, seen, weights, sets, about) -> Tensor:
    nth = torch.arange(weights.shape[2], device=weights.device)
    return nth.float().expand(len(weights), sets, -1)


SCORES: dict[str, Callable[[Way, LayerAttention, Tensor, int, Rows], Tensor]] = {
    "sum": _sum,
    "max": _max,
    "merge": _merge,
    "value": _value,
    "quest": _quest,
    "window": _window,
}
