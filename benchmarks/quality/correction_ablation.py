"""What does correcting the KV of sparse layers buy, and what does it cost?

Long outputs are forced on vLLM's engine token by token, once dense and once for each
correction interval, on one engine in one run. Reported for each interval:

    kl          KL divergence of the next token from the dense run's, in nats; its mean
                over the output, over each quarter of it, and its 99th percentile
    agreement   share of steps whose likeliest token is the dense run's
    kv_error    per layer: norm of the KV's difference from dense over the norm of
                dense, over the output's positions so far, averaged over the run
    tokens      computed per output token: 1 without corrections
    step_ms     wall time per decode step, corrections included, and their share

    python -m benchmarks.quality.correction_ablation --model random --out results.jsonl
    python -m benchmarks.quality.correction_ablation --report results.jsonl

The second command draws the results into docs/images and prints them as tables.

Models: "random" (Llama with random weights, built to drift), "planted" (the demo's,
whose KV cannot drift: for the cost alone), or a folder, whose outputs are then the
continuation of `--text`, one token per byte, or sampled from the dense model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.machine import describe_run

if TYPE_CHECKING:
    from benchmarks.quality.teacher import Run, TaughtEngine

INTERVALS = (None, 4, 8, 16, 32, 64, 128)


def build_random_llama(folder: Path, args) -> Path:
    """Random weights, large enough that attention is far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=args.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1 << 17,
        initializer_range=args.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(args.seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prepare_model(args) -> Path | str:
    if args.model == "random":
        return build_random_llama(args.cache / "ablation-random", args)
    if args.model == "planted":
        from tidal_vllm.planted import PlantedSpec, build_planted_model

        spec = PlantedSpec(num_layers=args.num_layers, num_heads=4, num_kv_heads=2)
        build_planted_model(args.cache / "ablation-planted", spec)
        return args.cache / "ablation-planted"
    return args.model


def start_engine(args) -> TaughtEngine:
    # Imports vLLM, which a report does not need.
    from benchmarks.quality.teacher import TaughtEngine

    length = args.context + args.output_tokens + 16
    tidal = {
        "token_budget": args.token_budget,
        "select_block_size": args.select_block_size,
        "dense_layers": args.dense_layers,
        "select_layers": args.select_layers,
    }
    return TaughtEngine(
        prepare_model(args),
        tidal,
        max_model_len=length,
        max_num_seqs=args.sequences,
        max_num_batched_tokens=4096,
        dtype=args.dtype,
    )


def make_texts(taught: TaughtEngine, args) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the outputs that are forced on every run."""
    if args.text:
        source = list(args.text.read_bytes())
        length = args.context + args.output_tokens
        if len(source) < length * args.sequences:
            sys.exit(
                f"--text {args.text}: {len(source)} bytes, needed are "
                f"{length * args.sequences} (context and output of each sequence)"
            )
        pieces = [source[i * length :][:length] for i in range(args.sequences)]
        return [p[: args.context] for p in pieces], [p[args.context :] for p in pieces]
    generator = torch.Generator().manual_seed(args.seed)
    vocab_size = taught.llm.model_config.get_vocab_size()
    shape = (args.sequences, args.context)
    prompts = torch.randint(8, vocab_size, shape, generator=generator).tolist()
    return prompts, taught.sample(prompts, args.output_tokens, args.seed)


def compare(found: Run, dense: Run) -> dict:
    """Next-token divergence and KV error of a run against the dense one."""
    pairs = list(zip(found.log_probs, dense.log_probs, strict=True))
    by_sequence = torch.stack([(d.exp() * (d - f)).sum(-1) for f, d in pairs])
    kl = by_sequence.flatten()
    quarters = by_sequence.mean(0).tensor_split(4)
    agreement = torch.cat([f.argmax(-1) == d.argmax(-1) for f, d in pairs])
    result = {
        "kl_mean": round(kl.mean().item(), 6),
        "kl_by_quarter": [round(quarter.mean().item(), 6) for quarter in quarters],
        "kl_p99": round(kl.quantile(0.99).item(), 6),
        "agreement": round(agreement.float().mean().item(), 5),
    }
    errors = []
    for looks, (*_, (_, wanted)) in zip(found.kv, filter(None, dense.kv), strict=False):
        for _, kv in looks:
            same = wanted[:, : kv.shape[1]]
            norm = (kv[:, : same.shape[1]] - same).flatten(1).norm(dim=1)
            errors.append(norm / same.flatten(1).norm(dim=1))
    if errors:
        result["kv_error_by_layer"] = [
            round(e, 6) for e in torch.stack(errors).mean(0).tolist()
        ]
    return result


def cost(run: Run) -> dict:
    steps = len(run.step_ms)
    return {
        "tokens": round(sum(run.step_tokens) / (steps * len(run.log_probs)), 4),
        "step_ms": round(sum(run.step_ms) / steps, 3),
        "plain_step_ms": round(statistics.median(run.step_ms), 3),
        "corrections": run.counters.corrections,
    }


def measure(args) -> dict:
    taught = start_engine(args)
    prompts, outputs = make_texts(taught, args)
    every = args.snapshot_every
    runs: dict[str, dict] = {}
    dense = taught.run(
        prompts, outputs, sparse=False, interval=None, snapshot_every=every
    )
    again = taught.run(prompts, outputs, sparse=False, interval=None)
    runs["dense"] = compare(again, dense) | {"trials": [cost(dense), cost(again)]}
    for trial in range(args.trials):
        for interval in args.intervals:
            name = "off" if interval is None else str(interval)
            run = taught.run(
                prompts,
                outputs,
                sparse=True,
                interval=interval,
                snapshot_every=None if trial else every,
            )
            quality = compare(run, dense)
            entry = runs.setdefault(name, quality | {"trials": []})
            assert quality["kl_mean"] == entry["kl_mean"], "trials must agree"
            entry["trials"].append(cost(run))
            print(name, {**quality, **entry["trials"][-1]}, flush=True)
    for entry in runs.values():
        middle = statistics.median(t["step_ms"] for t in entry["trials"])
        entry["step_ms"] = middle
        if "off" in runs:
            ratios = [
                mine["step_ms"] / off["step_ms"]
                for mine, off in zip(
                    entry["trials"], runs["off"]["trials"], strict=False
                )
            ]
            entry["step_time_over_off"] = round(statistics.median(ratios), 4)
    return {
        "benchmark": "correction_ablation",
        "runs": runs,
        "setup": setup_of(args, "snapshot_every"),
        **describe_run("vllm", "tidal_vllm"),
    }


def setup_of(args: argparse.Namespace, *more: str) -> dict:
    """The arguments that a result depends on: those of every ablation, and `more`."""
    keys = (
        *("model", "num_layers", "initializer_range", "context", "dtype"),
        *("output_tokens", "sequences", "token_budget", "select_block_size"),
        *("dense_layers", "select_layers", "seed", *more),
    )
    return {key: getattr(args, key) for key in keys}


def keep(record: dict, out: Path | None) -> None:
    """Append a result to a file of JSON lines, where one was asked for."""
    if out:
        with out.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def name_of(record: dict) -> str:
    setup = record["setup"]
    return f"{Path(setup['model']).name}_{setup['context']}_{setup['token_budget']}"


def drifts(record: dict) -> bool:
    """Whether the model's KV depends on what its sparse layers saw."""
    return record["runs"]["off"]["kl_mean"] > 0


def table(record: dict) -> str:
    """Markdown: a row per interval; quality where there is any, else every trial."""
    head, rows = ["interval", "tokens computed per token"], []
    if drifts(record):
        head += ["mean KL", "last quarter", "99 %", "agreement", "KV error"]
    else:
        head += ["ms per token", "over off, each trial"]
    for name, run in record["runs"].items():
        if name == "dense":
            continue
        row = [name, f"{run['trials'][0]['tokens']:.2f}"]
        if drifts(record):
            row += [
                f"{run['kl_mean']:.4f}",
                f"{run['kl_by_quarter'][-1]:.4f}",
                f"{run['kl_p99']:.3f}",
                f"{run['agreement']:.2%}",
                f"{run['kv_error_by_layer'][-1]:.3f}",
            ]
        else:
            times = [trial["step_ms"] for trial in run["trials"]]
            off = [trial["step_ms"] for trial in record["runs"]["off"]["trials"]]
            ratios = [t / o for t, o in zip(times, off, strict=True)]
            row += [f"{run['step_ms']:.1f}", ", ".join(f"{r:.2f}" for r in ratios)]
        rows.append(row)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(records: list[dict], folder: Path) -> list[Path]:
    """A picture of what drifts per layer, of what it does, and of what it costs."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for record in records:
        setup, runs = record["setup"], dict(record["runs"])
        runs.pop("dense")
        title = f"Model {Path(setup['model']).name}, context {setup['context']}, "
        title += f"budget {setup['token_budget']}"
        stem = f"correction_{name_of(record)}"
        if not drifts(record):
            figure = Figure(figsize=(6, 3.6), layout="constrained")
            axes = figure.subplots()
            axes.bar(list(runs), [r["step_time_over_off"] for r in runs.values()])
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(
                xlabel="correction interval (steps)",
                ylabel="time per output token / off",
                title=title,
            )
            figure.savefig(folder / f"{stem}_cost.png", dpi=110)
            written.append(folder / f"{stem}_cost.png")
            continue
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.suptitle(title)
        names = list(runs)
        left.plot(names, [r["kl_mean"] for r in runs.values()], "o-", label="mean")
        last = [r["kl_by_quarter"][-1] for r in runs.values()]
        left.plot(names, last, "s--", label="last quarter of the output")
        left.set(xlabel="correction interval (steps)", ylabel="KL from dense (nats)")
        left.set_ylim(0, 1.1 * max(last))
        left.legend()
        for name, run in runs.items():
            right.plot(run["kv_error_by_layer"], "o-", label=name)
        right.set(xlabel="layer", ylabel="relative KV error")
        right.legend(title="interval")
        figure.savefig(folder / f"{stem}.png", dpi=110)
        written.append(folder / f"{stem}.png")
    return written


def interval(text: str) -> int | None:
    if text == "off":
        return None
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be >= 1, or off")
    return value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="random")
    add("--text", type=Path, help="bytes to prompt with and to force")
    add("--num-layers", type=int, default=8)
    add("--initializer-range", type=float, default=0.1)
    add("--dense-layers", type=int, nargs="*", default=[0, 1])
    add("--select-layers", type=int, nargs="+", default=[2])
    add("--token-budget", type=int, default=128)
    add("--select-block-size", type=int, default=16)
    add("--context", type=int, default=1024)
    add("--output-tokens", type=int, default=512)
    add("--sequences", type=int, default=4)
    add("--intervals", type=interval, nargs="+", default=list(INTERVALS))
    add("--snapshot-every", type=int, default=16, help="steps between looks at the KV")
    add("--trials", type=int, default=1)
    add("--dtype", default="float32")
    add("--seed", type=int, default=0)
    add("--cache", type=Path, default=Path(".cache"))
    add("--out", type=Path, help="append a JSON line here")
    add("--report", type=Path, help="draw and print this file, and measure nothing")
    add("--images", type=Path, default=Path("docs/images"), help="where to draw")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    if args.report:
        records = [json.loads(line) for line in args.report.read_text().splitlines()]
        for record in records:
            print(f"{name_of(record)}\n\n{table(record)}\n")
        for path in plot(records, args.images):
            print(path)
        return 0
    keep(measure(args), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
