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

    python benchmarks/correction_ablation.py --model random --out results.jsonl
    python benchmarks/correction_ablation.py --plot results.jsonl --plot-dir docs/images

Models: "random" (Llama with random weights, built to drift), "planted" (the demo's,
whose KV cannot drift: for the cost alone), or a folder, whose outputs are then the
continuation of `--text`, one token per byte, or sampled from the dense model.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from machine import describe_run
from teacher import Run, TaughtEngine

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
        "setup": {
            key: getattr(args, key)
            for key in (
                *("model", "num_layers", "initializer_range", "context", "dtype"),
                *("output_tokens", "sequences", "token_budget", "select_block_size"),
                *("dense_layers", "select_layers", "snapshot_every", "seed"),
            )
        },
        **describe_run("vllm", "tidal_vllm"),
    }


def plot(records: list[dict], folder: Path) -> list[Path]:
    """Two pictures per record: divergence and cost by interval, KV error by layer."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for record in records:
        setup, runs = record["setup"], dict(record["runs"])
        runs.pop("dense")
        title = (
            f"{Path(setup['model']).name} model, context {setup['context']}, "
            f"budget {setup['token_budget']}"
        )
        stem = f"correction_{Path(setup['model']).name}_{setup['context']}"
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.suptitle(title)
        names = list(runs)
        left.plot(names, [r["kl_mean"] for r in runs.values()], "o-", label="mean KL")
        left.plot(names, [r["kl_p99"] for r in runs.values()], "s--", label="99 % KL")
        left.set(xlabel="correction interval (steps)", ylabel="nats from dense")
        left.legend()
        right.bar(names, [r["step_time_over_off"] for r in runs.values()])
        right.axhline(1, color="black", linewidth=0.8)
        right.set(
            xlabel="correction interval (steps)", ylabel="time per output token / off"
        )
        figure.savefig(folder / f"{stem}_cost.png", dpi=110)
        written.append(folder / f"{stem}_cost.png")
        with_kv = {n: r for n, r in runs.items() if "kv_error_by_layer" in r}
        if not with_kv:
            continue
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, run in with_kv.items():
            axes.plot(run["kv_error_by_layer"], "o-", label=name)
        axes.set(xlabel="layer", ylabel="relative KV error", title=title)
        axes.legend(title="interval")
        figure.savefig(folder / f"{stem}_kv.png", dpi=110)
        written.append(folder / f"{stem}_kv.png")
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
    add("--plot", type=Path, help="draw the records of this file, and measure nothing")
    add("--plot-dir", type=Path, default=Path("docs/images"))
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    if args.plot:
        records = [json.loads(line) for line in args.plot.read_text().splitlines()]
        for path in plot(records, args.plot_dir):
            print(path)
        return 0
    record = measure(args)
    if args.out:
        with args.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
