r"""Exact answers from vLLM's engine on a GPU, whatever the batch looks like.

    python -m benchmarks.gpu.planted --correction-interval 16 --out FILE

The planted model in bf16, on the V2 model runner with full CUDA graphs: eight requests
of different lengths at once, each of which must be answered by the words that are
hidden in its prompt. Most of their context is left out by the budget, so a wrong choice
of blocks shows. `--correction-interval 0` turns correction off. `--smoke` runs on the
CPU engine, with short prompts, without graphs.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# The engine runs in this process, so that it can be looked at.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"

LENGTHS = (700, 1501, 2602, 4103, 5204, 6905, 8006, 9807)
ANSWER_WORDS, BUDGET = 24, 512


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--correction-interval", type=int, default=0, help="steps")
    parser.add_argument("--out", type=Path, help="append a JSON line here")
    parser.add_argument("--smoke", action="store_true", help="on the CPU engine")
    args = parser.parse_args()
    if not args.smoke:
        os.environ.setdefault(RUNNER, "1")
    from benchmarks import records
    from benchmarks.machine import describe_run

    with tempfile.TemporaryDirectory() as folder:
        record = ask(Path(folder), args)
    wrong = complaints(record, args)
    record |= {"benchmark": "planted", "wrong": "; ".join(wrong) or None}
    print(
        f"correction {args.correction_interval or 'off'}: {record['exact']} of "
        f"{len(record['lengths'])} answers exact, {record['counters']}"
    )
    for complaint in wrong:
        print(f"wrong: {complaint}", flush=True)
    if args.out:
        records.append(args.out, record | describe_run("vllm", "tidal_vllm"))
    return 1 if wrong else 0


def ask(folder: Path, args: argparse.Namespace) -> dict:
    """Start an engine, ask it everything at once, and say what it did."""
    from vllm import LLM, SamplingParams

    from benchmarks.engine.dummy_engine import quick_start
    from tidal_vllm.engine.metrics import COUNTING_WORKER
    from tidal_vllm.planted import PlantedSpec, build_planted_model, make_prompt

    dtype = "float32" if args.smoke else "bfloat16"
    lengths = [n // 3 for n in LENGTHS] if args.smoke else list(LENGTHS)
    spec = PlantedSpec(hops=2, num_layers=6, dtype=dtype)
    build_planted_model(folder, spec)
    prompts = [
        make_prompt(spec, n, i / (len(lengths) - 1), seed=i, chain_len=ANSWER_WORDS)
        for i, n in enumerate(lengths)
    ]
    tidal = {
        "token_budget": BUDGET // 4 if args.smoke else BUDGET,
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
        "correction_interval": args.correction_interval or None,
    }
    begun = time.monotonic()
    llm = LLM(
        str(folder),
        attention_backend="TIDAL",
        additional_config={"tidal": tidal},
        max_model_len=max(lengths) + 64,
        max_num_seqs=len(lengths),
        kv_cache_memory_bytes=(64 << 20) if args.smoke else (2 << 30),
        worker_extension_cls=COUNTING_WORKER,
        seed=0,
        **quick_start([len(lengths)], args.smoke),
    )
    started = time.monotonic() - begun
    params = [
        SamplingParams(temperature=0, max_tokens=len(prompt.answer_token_ids))
        for prompt in prompts
    ]
    given = [{"prompt_token_ids": prompt.prompt_token_ids} for prompt in prompts]
    outputs = llm.generate(given, params, use_tqdm=False)
    exact = [
        list(output.outputs[0].token_ids) == list(prompt.answer_token_ids)
        for output, prompt in zip(outputs, prompts, strict=True)
    ]
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    corrections = getattr(core.scheduler, "correction_counters", None)
    return {
        "correction_interval": args.correction_interval or None,
        "lengths": lengths,
        "exact": sum(exact),
        "exact_by_request": exact,
        "counters": llm.collective_rpc("decode_counters")[0],
        "corrections": getattr(corrections, "corrections", 0),
        "runner": type(runner).__module__,
        "cudagraph_mode": str(runner.vllm_config.compilation_config.cudagraph_mode),
        "start_s": round(started, 1),
    }


def complaints(record: dict, args: argparse.Namespace) -> list[str]:
    """What is not as it has to be."""
    found = []
    if record["exact"] < len(record["lengths"]):
        found.append(f"exact_by_request {record['exact_by_request']}")
    if not record["counters"]["sparse_steps"]:
        found.append("no step was sparse")
    if bool(args.correction_interval) != bool(record["corrections"]):
        found.append(f"{record['corrections']} corrections")
    if not args.smoke:
        if ".worker.gpu." not in record["runner"]:
            found.append(f"not the V2 model runner: {record['runner']}")
        if "FULL" not in record["cudagraph_mode"]:
            found.append(f"no full graphs: {record['cudagraph_mode']}")
    return found


if __name__ == "__main__":
    sys.exit(main())
