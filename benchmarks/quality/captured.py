r"""Which way to choose captures how much of a model's attention, and what does it read?

    python -m benchmarks.quality.captured --model FOLDER \
        --out benchmarks/results/captured.jsonl
    python -m benchmarks.quality.captured --report benchmarks/results/captured.jsonl

FOLDER and the texts are those of `benchmarks.quality.choice`. The model reads each text
densely, and every way of `captured_ways.py` chooses from the attention that it had
there: one change at a time from one base. A record is a cell, a length and a budget.
For each way it has the captured mass (mean and 1st percentile over heads, layers,
positions and texts; DENSE layers and SELECT layers that attend to everything capture
1), the same of those layers alone that attend to a choice, and the KV that is read, as
a share of dense: counted in tokens, what scoring reads included, and once per KV head
where its query heads keep different ones. Nothing is timed.

Exits with 1 if anything of blocks of 4 tokens captures more, in any head, layer and
position, than as many blocks that each head and layer chose for itself.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe_run
from benchmarks.quality.attention_mass import (
    LayerAttention,
    Mean,
    Rows,
    block_lses,
    captured,
    keep,
    last_attention,
    ranked,
    rows,
    texts,
)
from benchmarks.quality.captured_report import name_of, overview, table
from benchmarks.quality.captured_ways import (
    BASE,
    ORACLE,
    PER_LAYER,
    Way,
    first_ways,
    score,
)
from benchmarks.records import append, read
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

    def kv_read(self) -> float:
        return float(torch.stack(self.reads).mean())


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
        return rows(way.rule(self.budget), seq_lens, weights.shape[2], device)

    def _choose(self, way: Way, seen: LayerAttention, weights: Tensor) -> Choice:
        num_rows, num_heads, num_blocks = weights.shape
        length = seen.logits.shape[2]
        sets = num_sets(way.scope, num_heads, len(seen.key))
        about = self._rows(way, weights, length, num_rows)
        mass = score(way, seen, weights, sets, about)
        ages = torch.arange(self.positions, device=weights.device) % way.interval
        ages = ages + way.age
        carried = way.age or way.interval > 1
        if not carried:
            mass = mass[-self.positions :]
            about = self._rows(way, weights, length, self.positions)
        order = ranked(mass, about)
        kept = keep(order, self._counts(way, about, weights, order))
        if carried:
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
        about = self._rows(way, weights, length, self.positions)
        by_kv_head = choice.kept
        if by_kv_head.shape[1] > len(seen.key):
            by_kv_head = by_kv_head.unflatten(1, (len(seen.key), -1)).any(2)
        tokens = (by_kv_head * about.tokens[:, None]).sum(2).float().mean(1)
        reads = tokens / about.tokens.sum(1)
        mass = captured(weights[-self.positions :], choice.kept)
        everything = choice.fresh & (chooses and way.attends == "everything")
        if chooses and way.attends == "chosen":
            reads = reads + way.scoring_reads
        found.mass.add(mass.masked_fill(everything[:, None], 1.0))
        found.of_choice.add(mass[~everything])
        found.reads.append(reads.masked_fill(everything, 1.0))
        if not everything.all():
            found.blocks.append(choice.kept[~everything].sum(2).float().mean())
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


def later_ways(study: Study, num_layers: int, length: int) -> list[Way]:
    """Ways that read as much as one of the first did."""
    found, base = [], Way()
    for way in study.ways:
        if way.top_p:
            blocks = round(float(torch.stack(study.found[way.name].blocks).mean()))
            name = f"fixed, bytes of {way.name}"
            found.append(replace(base, name=name, group=way.group, blocks=blocks))
        elif way.name in ("Quest, blocks of 16", "sliding window"):
            behind = num_layers - way.dense
            share = study.found[BASE].kv_read() * num_layers - way.dense
            share = share / behind - way.scoring_reads
            blocks = max(1, round(share * length / way.size))
            found.append(replace(way, name=f"{way.name}, base's bytes", blocks=blocks))
    folds = {fold for fold, _ in study.curves}
    if len(folds) == 2:
        by_fold = tuple(_layer_blocks(study, 1 - f, num_layers, length) for f in (0, 1))
        way = replace(base, name=PER_LAYER, group="budget", layer_blocks=by_fold)
        found.append(way)
    return found


def _layer_blocks(
    study: Study, fold: int, num_layers: int, length: int
) -> tuple[int, ...]:
    """The blocks of each layer that capture most, as measured on one fold's texts.

    As many in sum as with the budget in every SPARSE layer. A SELECT layer's own
    number means nothing: it attends to everything.
    """
    curves = {
        layer: torch.stack(seen).mean(0)
        for (of, layer), seen in study.curves.items()
        if of == fold
    }
    rule = Way().rule(study.budget)
    forced = len(rule.forced_blocks(length)) + 1  # their number differs by one
    gains = torch.stack(list(curves.values())).diff(dim=1)[:, forced - 1 :]
    gains = gains.cummin(1).values
    free = len(curves) * (rule.budget_blocks - forced)
    taken = torch.zeros_like(gains, dtype=torch.bool).flatten()
    best = gains.flatten().sort(descending=True, stable=True).indices[:free]
    taken[best] = True
    counts = forced + taken.view_as(gains).sum(1)
    by_layer = dict(zip(curves, counts.tolist(), strict=True))
    return tuple(by_layer.get(layer, rule.budget_blocks) for layer in range(num_layers))


def study_cell(
    all_texts: list[list[LayerAttention]], budget: int, positions: int
) -> tuple[list[dict], int]:
    """The results of all ways in their order, and how often the oracle was beaten."""
    first = Study(first_ways(), budget, positions)
    num_layers, length = len(all_texts[0]), all_texts[0][0].logits.shape[2]
    for nth, layers in enumerate(all_texts):
        first.see_text(layers, nth % 2)
    oracle = next(way for way in first.ways if way.name == ORACLE)
    more = later_ways(first, num_layers, length)
    later = Study([oracle, *more], budget, positions)
    for nth, layers in enumerate(all_texts):
        later.see_text(layers, nth % 2)
    found = later.results() | first.results()
    names: dict[str, list[str]] = {}
    for way in (*first_ways(), *more):
        names.setdefault(way.group, []).append(way.name)
    ordered = [found[name] for group in names.values() for name in group]
    return ordered, first.above_oracle + later.above_oracle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="print this file's tables")
    parser.add_argument("--model", help="folder of a pretrained model")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--positions", type=int, default=16, help="the last of a text")
    parser.add_argument("--budget-shares", type=float, nargs="+", default=[0.1])
    args = parser.parse_args()
    if args.report:
        records = read(args.report)
        for record in records:
            print(f"{name_of(record)}\n\n{table(record)}\n")
        if len(records) > 1:
            print(overview(records))
        return 0
    if not args.model:
        parser.error("--model or --report is needed")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(args.device)
    failed = False
    for length in args.lengths:
        all_texts = [
            list(last_attention(model, text.to(args.device), args.positions + HISTORY))
            for text in texts(tokenizer, args.texts, length)
        ]
        for share in args.budget_shares:
            budget = int(length * share) // 32 * 32
            ways, above = study_cell(all_texts, budget, args.positions)
            record = {
                "benchmark": "captured",
                "model": Path(args.model).name,
                "texts": args.texts,
                "length": length,
                "positions": args.positions,
                "budget_share": share,
                "token_budget": budget,
                "above_oracle": above,
                "ways": ways,
            }
            print(f"{name_of(record)}\n\n{table(record)}\n", flush=True)
            if args.out:
                append(args.out, record | describe_run("transformers"))
            if above:
                print(f"the oracle was beaten {above} times", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
