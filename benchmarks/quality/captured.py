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
`--device cuda` has not yet run.

Exits with 1 if anything of blocks of 4 tokens captures more, in any head, layer and
position, than as many blocks that each head and layer chose for itself.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe_run
from benchmarks.quality.attention_mass import (
    LayerAttention,
    last_attention,
    texts,
)
from benchmarks.quality.captured_report import name_of, overview, table
from benchmarks.quality.captured_study import HISTORY, Study
from benchmarks.quality.captured_ways import (
    BASE,
    ORACLE,
    PER_LAYER,
    Way,
    first_ways,
)
from benchmarks.records import append, read


def later_ways(study: Study, num_layers: int, length: int) -> list[Way]:
    """Ways that read as much as one of the first did."""
    found, base = [], Way()
    target = study.found[BASE].kv_read()
    for way in study.ways:
        seen = study.found[way.name]
        if way.top_p:
            blocks = round(float(torch.stack(seen.blocks).mean()))
            name = f"fixed, bytes of {way.name}"
            found.append(replace(base, name=name, group=way.group, blocks=blocks))
        elif not way.age and abs(seen.kv_read() - target) > 0.01:
            factor = 1 + (target - seen.kv_read()) / seen.kept_read()
            rule = way.rule(study.budget)
            blocks = round(factor * rule.budget_blocks)
            if blocks > len(rule.forced_blocks(length)):
                name = f"{way.name}, base's bytes"
                found.append(replace(way, name=name, group="bytes", blocks=blocks))
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
