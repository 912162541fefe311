"""What ways to choose capture of a model's attention, and what they read."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from benchmarks.quality.attention_mass import (
    LayerAttention,
    Mean,
    Rows,
    block_lses,
    captured,
    keep,
    ranked,
    rows,
)
from benchmarks.quality.captured_ways import BASE, ORACLE, Way, score
from tidal_vllm.plan.rule import num_sets

Tensor = torch.Tensor
HISTORY = 16  # positions in front of the measured ones, whose choices are carried on
TOLERANCE = 1e-5


@dataclass
class Found:
    """What one way captured and read."""

    mass: Mean = field(default_factory=Mean)
    of_choice: Mean = field(default_factory=Mean)
    """The mass of the layers that attend to a choice."""
    reads: list[Tensor] = field(default_factory=list)
    """By text and layer, `[P]`: KV read as a share of dense."""
    blocks: list[Tensor] = field(default_factory=list)
    """By text and layer that attends to a choice: its blocks, on average."""

    kept_reads: list[Tensor] = field(default_factory=list)
    """By text and layer, `[P]`: what of these reads more blocks would add to."""

    def kv_read(self) -> float:
        return float(torch.stack(self.reads).mean())

    def kept_read(self) -> float:
        return float(torch.stack(self.kept_reads).mean())


@dataclass
class Choice:
    """Of P positions and S sets of N blocks."""

    order: Tensor
    """`[P, S, N]`, blocks in the order in which they are kept."""
    kept: Tensor
    """`[P, S, N]` bool."""
    fresh: Tensor
    """`[P]` bool, where the choice was made in this step."""


class Study:
    """Several ways to choose, at one budget."""

    def __init__(self, ways: Iterable[Way], budget: int, positions: int):
        # What the others are compared with comes first.
        self.ways = sorted(ways, key=lambda way: way.name != ORACLE)
        self.budget, self.positions = budget, positions
        self.rules = {way: way.rule(budget) for way in self.ways}
        self.found = {way.name: Found() for way in self.ways}
        self.curves: dict[tuple[int, int], list[Tensor]] = {}
        """By fold and layer: what the base's first blocks capture, `[2 * budget]`."""
        self.above_oracle = 0
        """Heads, layers and positions where another way captures more than it."""

    def see_text(self, layers: list[LayerAttention], fold: int) -> None:
        held: dict[str, Choice] = {}
        above = torch.zeros((), dtype=torch.int64, device=layers[0].logits.device)
        for layer, seen in enumerate(layers):
            by_size = self._weights(seen)
            best = None
            for way in self.ways:
                found, weights = self.found[way.name], by_size[way.size]
                if layer < way.dense:
                    self._attend_to_all(found, weights)
                    continue
                chooses = way.chooses(layer)
                if chooses:
                    held[way.name] = self._choose(way, seen, weights)
                choice = held[way.name]
                if way.layer_blocks:
                    counts = torch.tensor([[way.layer_blocks[fold][layer]]])
                    choice.kept = keep(choice.order, counts.to(choice.order.device))
                mass = self._attend(way, choice, seen, weights, chooses)
                if way.name == ORACLE:
                    best = mass
                elif best is not None and way.size == self.ways[0].size:
                    above += self._above(mass, best, choice.kept)
                if way.name == BASE and not chooses:
                    self._note_curve(fold, layer, choice, weights)
        self.above_oracle += int(above)

    def _weights(self, seen: LayerAttention) -> dict[int, Tensor]:
        """The attention mass of each block, by block size: `[R, H, N]`."""
        found = {}
        for size in {way.size for way in self.ways}:
            block_lse = block_lses(seen.logits, size)
            found[size] = (block_lse - block_lse.logsumexp(-1, keepdim=True)).exp()
        return found

    def _rows(self, way: Way, weights: Tensor, length: int, count: int) -> Rows:
        """The rule for the last positions of a text, `count` of them."""
        seq_lens = tuple(range(length - count + 1, length + 1))
        device = str(weights.device)
        return rows(self.rules[way], seq_lens, weights.shape[2], device)

    def _choose(self, way: Way, seen: LayerAttention, weights: Tensor) -> Choice:
        num_rows, num_heads, num_blocks = weights.shape
        length = seen.logits.shape[2]
        sets = num_sets(way.scope, num_heads, len(seen.key))
        about = self._rows(way, weights, length, num_rows)
        mass = score(way, seen, weights, sets, about)
        ages = torch.arange(self.positions, device=weights.device) % way.interval
        ages = ages + way.age
        if not way.carried:
            mass = mass[-self.positions :]
            about = self._rows(way, weights, length, self.positions)
        order = ranked(mass, about)
        kept = keep(order, self._counts(way, about, weights, order))
        if way.carried:
            now = torch.arange(self.positions, device=weights.device) + HISTORY
            then = now - ages
            newer = about.absent[then] & ~about.absent[now]
            order, kept = order[then], kept[then] | newer[:, None]
        return Choice(order, kept, ages == 0)

    def _counts(self, way: Way, about: Rows, weights: Tensor, order: Tensor) -> Tensor:
        """How many blocks are kept: `[P, S]` or `[P, 1]`."""
        if way.blocks:
            return torch.full_like(about.kept_blocks, way.blocks)[:, None]
        if not way.top_p:
            return about.kept_blocks[:, None]
        by_set = weights[-len(order) :].unflatten(1, (order.shape[1], -1)).mean(2)
        reached = by_set.gather(2, order).cumsum(2)
        enough = (reached < way.top_p).sum(2) + 1
        forced = about.forced.sum(1)[:, None]
        return enough.maximum(forced).minimum(2 * about.kept_blocks[:, None])

    def _attend_to_all(self, found: Found, weights: Tensor) -> None:
        ones = weights.new_ones(self.positions, weights.shape[1])
        found.mass.add(ones)
        found.reads.append(ones[:, 0])
        found.kept_reads.append(torch.zeros_like(ones[:, 0]))

    def _attend(
        self,
        way: Way,
        choice: Choice,
        seen: LayerAttention,
        weights: Tensor,
        chooses: bool,
    ) -> Tensor:
        """Note what a layer captures and reads. Returns `[P, H]`, what is captured."""
        found, length = self.found[way.name], seen.logits.shape[2]
        mass = captured(weights[-self.positions :], choice.kept)
        to_all = chooses and way.attends == "everything"
        if to_all and not way.carried:
            self._attend_to_all(found, weights)
            return mass
        about = self._rows(way, weights, length, self.positions)
        by_kv_head = choice.kept
        if by_kv_head.shape[1] > len(seen.key):
            by_kv_head = by_kv_head.unflatten(1, (len(seen.key), -1)).any(2)
        tokens = (by_kv_head * about.tokens[:, None]).sum(2).float().mean(1)
        reads = tokens / about.tokens.sum(1)
        full = choice.fresh & to_all
        found.mass.add(mass.masked_fill(full[:, None], 1.0))
        found.of_choice.add(mass[~full] if to_all else mass)
        found.kept_reads.append(reads.masked_fill(full, 0.0))
        if chooses and way.attends == "chosen":
            reads = reads + way.scoring_reads
        found.reads.append(reads.masked_fill(full, 1.0))
        found.blocks.append(choice.kept.sum(2).float().mean())
        return mass

    def _above(self, mass: Tensor, best: Tensor, kept: Tensor) -> Tensor:
        """Heads and positions that capture more than the best ones of the budget."""
        size = self.ways[0].size
        allowed = kept.sum(2) <= self.budget // size
        allowed = allowed.repeat_interleave(mass.shape[1] // kept.shape[1], 1)
        return ((mass > best + TOLERANCE) & allowed).sum()

    def _note_curve(
        self, fold: int, layer: int, choice: Choice, weights: Tensor
    ) -> None:
        first = choice.order[..., : 2 * self.budget // Way().size]
        by_set = weights[-self.positions :].mean(1, keepdim=True)
        curve = by_set.gather(2, first).cumsum(2).mean((0, 1))
        self.curves.setdefault((fold, layer), []).append(curve)

    def results(self) -> dict[str, dict]:
        """By the name of a way."""
        return {
            way.name: {
                "group": way.group,
                "way": way.name,
                "captured_mass": self.found[way.name].mass.describe(),
                "of_choice": self.found[way.name].of_choice.describe(),
                "kv_read": round(self.found[way.name].kv_read(), 4),
            }
            for way in self.ways
        }
