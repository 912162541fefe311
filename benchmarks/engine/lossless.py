r"""Lossless mode: how much of a draft is kept, and how fast the answers come.

    python -m benchmarks.engine.lossless acceptance --model FOLDER --out FILE
    python -m benchmarks.engine.lossless speed --out FILE
    python -m benchmarks.engine.lossless --report FILE

`acceptance` continues natural text greedily with drafts of fixed lengths; `speed` lets
three engines, dense, sparse and lossless, answer the same prompts of a planted model,
or continue the text with `--model`, in turns in one process. Every answer is compared
with the dense engine's. A record is one engine and one length of drafts, or one context
with all trials. Times are milliseconds of a token after the first of one sequence.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The engines run in this process, so that they can take turns.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

from benchmarks import records  # noqa: E402
from benchmarks.engine.lossless_report import MODES, PAGE, tables  # noqa: E402
from benchmarks.machine import describe_run  # noqa: E402
from benchmarks.model.page import written  # noqa: E402

NAME = "lossless"
SHARES, DRAFTS = (0.05, 0.1, 0.2), (2, 4, 8, 16)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("measure", nargs="?", choices=["acceptance", "speed"])
    add("--model", help="a folder with a tokenizer; speed: without, a planted model")
    add("--contexts", type=int, nargs="+", default=[2048, 4096, 7168])
    add("--sequences", type=int, default=4, help="of each context, one by one")
    add("--tokens", type=int, default=128, help="of each answer")
    add("--token-budget", type=int, default=2048, help="of speed, with planted models")
    add("--trials", type=int, default=3)
    add("--model-dir", type=Path, default=Path(".cache/bench-lossless"))
    add("--out", type=Path, help="append JSON lines here")
    add("--report", type=Path, metavar="FILE", help="print the tables of a file")
    add("--write-page", action="store_true", help=f"with --report: {PAGE.name}")
    args = parser.parse_args()
    if args.report:
        made = tables(records.read(args.report))
        print("\n\n".join(made.values()))
        if args.write_page:
            PAGE.write_text(written(PAGE.read_text(), made))
        return 0
    if args.measure is None or (args.measure == "acceptance" and not args.model):
        parser.error("acceptance with --model, speed, or --report is needed")
    found = acceptance(args) if args.measure == "acceptance" else speed(args)
    return int(any(record["different"] for record in found))


def engine(model: Path | str, longest: int, tidal: dict[str, Any], cache: int) -> Any:
    from vllm import LLM

    return LLM(
        str(model),
        attention_backend="TIDAL",
        additional_config={"tidal": tidal},
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=cache,
        seed=0,
    )


def answer(llm: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """What an engine says, and milliseconds of each token after the first."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    core = llm.llm_engine
    core.add_request(str(time.monotonic_ns()), {"prompt_token_ids": prompt}, params)
    given: list[int] = []
    begun = first = 0.0
    while core.has_unfinished_requests():
        outputs = core.step()
        if outputs:
            given = list(outputs[0].outputs[0].token_ids)
            if not begun:
                begun, first = time.perf_counter(), len(given)
    return given, 1e3 * (time.perf_counter() - begun) / (len(given) - first)


def texts(model: str, context: int, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    from benchmarks.quality.harness.texts import cuts
    from tidal_vllm.natural_text import python_documentation

    encode = AutoTokenizer.from_pretrained(model)
    ids = encode(python_documentation(), verbose=False)["input_ids"]
    return [cut.prompt for cut in cuts(ids, count, context + 1, 1)]


def runner_of(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def acceptance(args: argparse.Namespace) -> list[dict]:
    """Drafts of each length under each budget; all answers beside the dense one's."""
    found = []
    longest = max(args.contexts) + args.tokens + 2 * max(DRAFTS)
    cache = 3 << 30
    dense_engine = engine(args.model, longest, {"select_layers": []}, cache)
    for context in args.contexts:
        prompts = texts(args.model, context, args.sequences)
        dense = [answer(dense_engine, p, args.tokens)[0] for p in prompts]
        for share in SHARES:
            budget = int(share * context) // 4 * 4
            tidal = {"mode": NAME, "draft_tokens": max(DRAFTS), "token_budget": budget}
            llm = engine(args.model, longest, tidal, cache)
            for length in DRAFTS:
                record = {
                    "benchmark": NAME,
                    "measure": "acceptance",
                    "model": Path(args.model).name,
                    "context": context,
                    "token_budget": budget,
                    "share": share,
                    **_kept(llm, length, prompts, dense, args.tokens),
                    **describe_run("vllm", "tidal_vllm"),
                }
                found.append(record)
                keys = ("context", "share", "draft_tokens", "mean_kept", "different")
                print({key: record[key] for key in keys}, flush=True)
                if args.out:
                    records.append(args.out, record)
            llm.llm_engine.engine_core.shutdown()
    return found


def _kept(
    llm: Any,
    length: int,
    prompts: Sequence[list[int]],
    dense: Sequence[list[int]],
    tokens: int,
) -> dict[str, Any]:
    drafter, drafts = runner_of(llm).drafter, []
    count = drafter.acceptance.count

    def counted(drafted: int, kept: int) -> None:
        drafts.append((drafted, kept))
        count(drafted, kept)

    drafter.acceptance.count = counted
    drafter.draft_length = lambda seq_lens: length
    given = [answer(llm, prompt, tokens)[0] for prompt in prompts]
    del drafter.acceptance.count
    whole = [kept for drafted, kept in drafts if drafted == length]
    return {
        "draft_tokens": length,
        "drafts": len(whole),
        "mean_kept": round(statistics.mean(whole), 3),
        "kept_by_place": [
            round(sum(kept > place for kept in whole) / len(whole), 4)
            for place in range(length)
        ],
        "answered": sum(map(len, given)),
        "different": sum(a != b for a, b in zip(given, dense, strict=True)),
    }


def speed(args: argparse.Namespace) -> list[dict]:
    """All three engines in turns, over each context."""
    found = []
    for context in args.contexts:
        model, prompt, budget, roles = _task(args, context)
        longest = context + args.tokens + 64
        cache = (longest + 512) * _token_bytes(model)
        settings: dict[str, dict] = {
            "dense": {"select_layers": []},
            "sparse": roles | {"token_budget": budget},
            "lossless": roles | {"token_budget": budget, "mode": NAME},
        }
        engines = {m: engine(model, longest, settings[m], cache) for m in MODES}
        wanted = answer(engines["dense"], prompt, args.tokens)[0]
        for mode in MODES[1:]:
            answer(engines[mode], prompt, 2)  # the prompt into the prefix cache
        trials: dict[str, list[float]] = {mode: [] for mode in MODES}
        given: dict[str, list[int]] = {}
        for _ in range(args.trials):
            for mode, llm in engines.items():
                given[mode], spent = answer(llm, prompt, args.tokens)
                trials[mode].append(round(spent, 3))
        median = {mode: statistics.median(times) for mode, times in trials.items()}
        counters = runner_of(engines[NAME]).drafter.builder.counters
        record = {
            "benchmark": NAME,
            "measure": "speed",
            "model": Path(args.model).name if args.model else "planted",
            "context": context,
            "token_budget": budget,
            "tokens": args.tokens,
            **{f"{mode}_ms": round(time, 2) for mode, time in median.items()},
            "speedup": round(median["dense"] / median[NAME], 3),
            "sparse_speedup": round(median["dense"] / median["sparse"], 3),
            "different": int(given[NAME] != wanted),
            "sparse_as_dense": given["sparse"] == wanted,
            "drafted": counters.draft_tokens,
            "undrafted_steps": counters.undrafted_steps,
            "trials_ms": trials,
            **describe_run("vllm", "tidal_vllm"),
        }
        found.append(record)
        print({k: v for k, v in record.items() if k not in ("machine", "command")})
        if args.out:
            records.append(args.out, record)
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()
    return found


def _task(args: argparse.Namespace, context: int) -> tuple[Any, list[int], int, dict]:
    """The model, a prompt of it, the budget, and the roles."""
    if args.model:
        (prompt,) = texts(args.model, context, 1)
        return args.model, prompt, context // 10 // 4 * 4, {}
    from tidal_vllm.planted import PlantedSpec, build_planted_model, make_prompt

    spec = PlantedSpec(num_layers=32, num_heads=4, num_kv_heads=2, hops=1)
    build_planted_model(args.model_dir, spec)
    made = make_prompt(spec, context, 0.3, seed=0, chain_len=args.tokens)
    roles = {
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
    }
    return args.model_dir, made.prompt_token_ids, args.token_budget, roles


def _token_bytes(model: Any) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(model))
    size = config.num_key_value_heads * config.head_dim
    return 2 * 4 * size * config.num_hidden_layers


if __name__ == "__main__":
    sys.exit(main())
