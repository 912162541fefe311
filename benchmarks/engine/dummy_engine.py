"""Decode steps of vLLM's whole engine on a GPU, dense and sparse, with dummy weights.

Speed does not need weights that mean anything: a model of Llama 3.1 8B's shape decodes
at full cost. Each engine has the GPU to itself, in a process of its own, and they take
turns; cases of one context share an engine. What a step takes is the difference between
long and short answers to prompts that are in the prefix cache already.

Outputs are checked all the same: with a budget over the whole context and without
graphs every token must be that of the dense engine. `--quick-start` leaves that out,
and what else takes long to start: torch.compile, and graphs of other batches. Both
engines start so, and what is not attention then takes a little longer in both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SHORT, LONG = 2, 66
SMOKE_CASES = ["2x96", "1x96"]
# Each fits into 80 GB: 16 GB of weights, and 128 KiB of KV cache per token.
CASES = ["8x32768", "32x8192", "2x131072", "1x131072", "64x1024"]
MARK = "RESULT "
DEFAULTS = ("select_block_size", "select_attends")


def main(args: argparse.Namespace) -> int:
    """Run every case on every engine, print and keep the results."""
    from benchmarks import records
    from benchmarks.machine import describe_run
    from tidal_vllm.config import PRESETS

    if args.smoke:
        args.cases, args.rounds = SMOKE_CASES, 1
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), TINY if args.smoke else LLAMA_8B)
        exact = "not checked" if args.quick_start else _check_exactness(folder, args)
        print(f"budget over the context, no graphs: {exact}", flush=True)
        for context, batches in _by_context(args.cases or CASES).items():
            runs: dict[str, list[dict]] = {"dense": [], "tidal": []}
            if args.smoke and not args.quick_start:
                del runs["dense"]  # it has run, to be compared with
            for _ in range(args.rounds):
                for name, found in runs.items():
                    found.append(_child(folder, args, name, batches, context))
                    for case in found[-1]["cases"]:
                        shown = f"{case['batch']}x{context} {name}: {case['step_ms']}"
                        print(f"{shown} ms", flush=True)
            if args.smoke:
                continue  # the engines ran; their times mean nothing
            for i, batch in enumerate(batches):
                steps = {
                    name: [run["cases"][i] | _but_cases(run) for run in found]
                    for name, found in runs.items()
                }
                times = {
                    name: statistics.median(run["step_ms"] for run in found)
                    for name, found in steps.items()
                }
                record = {
                    "benchmark": "decode_engine",
                    "weights": "dummy",
                    "model": "Llama 3.1 8B's shape",
                    "batch": batch,
                    "context": context,
                    "token_budget": args.token_budget,
                    **{key: PRESETS["default"][key] for key in DEFAULTS},
                    "dense_backend": args.baseline,
                    "exactness": exact,
                    "quick_start": args.quick_start,
                    **{f"{name}_step_ms": found for name, found in times.items()},
                    "speedup": round(times["dense"] / times["tidal"], 3),
                    "runs": steps,
                    **describe_run("vllm", "tidal_vllm"),
                }
                print(f"{batch}x{context}: {record['speedup']}x", flush=True)
                if args.out:
                    records.append(args.out, record)
    return 0


def _by_context(cases: Sequence[str]) -> dict[int, list[int]]:
    """Batches of each context, the largest first."""
    found: dict[int, list[int]] = {}
    for case in cases:
        batch, context = map(int, case.split("x"))
        found.setdefault(context, []).append(batch)
    return {context: sorted(batches)[::-1] for context, batches in found.items()}


def _but_cases(run: dict) -> dict:
    """What a run says of all its cases together."""
    return {key: value for key, value in run.items() if key != "cases"}


def _write_model(folder: Path, shape: dict) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        **shape,
        max_position_embeddings=1 << 20,
        architectures=["LlamaForCausalLM"],
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    ).save_pretrained(folder)


def _check_exactness(folder: str, args: argparse.Namespace) -> str:
    """Compare greedy tokens; raise where they must be the same and are not."""
    batch, context = (2, 48) if args.smoke else (4, 2048)
    runs = {
        name: _child(folder, args, name, [batch], context, eager=True)["cases"][0]
        for name in ("dense", "exact")
    }
    tokens = {name: case["tokens"] for name, case in runs.items()}
    if tokens["dense"] != tokens["exact"]:
        raise SystemExit("budget over the context, yet other tokens than dense")
    return f"{sum(map(len, tokens['dense']))} tokens of {batch} sequences as dense"


def _child(folder: str, args, engine: str, batches: list, context: int, eager=False):
    job = {
        "folder": folder,
        "engine": engine,
        "batches": batches,
        "context": context,
        "baseline": args.baseline,
        "token_budget": args.token_budget,
        "eager": eager or args.eager,
        "smoke": args.smoke,
        "kernels": args.kernels,
        "quick_start": args.quick_start,
    }
    env = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    # The engine core gets a process of its own, as users have it.
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not args.smoke))
    if args.runner and not args.smoke:  # the V2 runner needs a GPU
        env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(args.runner == "v2"))
    found = None
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine.dummy_engine", json.dumps(job)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        for line in child.stdout or ():
            if line.startswith(MARK):
                found = json.loads(line.removeprefix(MARK))
            else:  # as it comes: a run may be cut short
                print(f"  {engine}: {line}", end="", flush=True)
    if found is None:
        raise SystemExit(f"the {engine} engine failed (exit status {child.returncode})")
    return found


def run(job: dict) -> dict:
    """One engine: tokens and the time of a decode step, for each batch."""
    from vllm import LLM, SamplingParams

    context, batch = job["context"], max(job["batches"])
    longest = context + LONG + 16
    layers = {"dense_layers": [0], "select_layers": [1]}
    if not job["smoke"]:
        layers = {"dense_layers": [0, 1], "select_layers": [2, 13]}
    budget = 64 if job["smoke"] else job["token_budget"]
    tidal = layers | {"token_budget": budget, "kernels": job["kernels"]}
    if job["engine"] == "exact":
        tidal["token_budget"] = -(-longest // 16) * 16
    if job["engine"] == "dense" and job["baseline"] == "TIDAL":
        tidal = {"select_layers": []}
    more: dict = {"attention_backend": job["baseline"]}
    if job["engine"] != "dense" or job["baseline"] == "TIDAL":
        more = {"attention_backend": "TIDAL", "additional_config": {"tidal": tidal}}
    if job["smoke"]:
        more |= {"kv_cache_memory_bytes": 16 << 20, "block_size": 16}
    if job["quick_start"]:
        more |= quick_start(job["batches"], job["smoke"])
    llm = LLM(
        job["folder"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32" if job["smoke"] else "bfloat16",
        max_model_len=longest,
        max_num_seqs=batch,
        enforce_eager=job["eager"],
        gpu_memory_utilization=0.92,
        seed=0,
        **more,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    room = cache.num_gpu_blocks * cache.block_size
    if room < batch * longest:  # requests would wait for each other
        raise SystemExit(
            f"{batch}x{context} needs a KV cache of {batch * longest} tokens; "
            f"{room} fit beside the weights: ask for a smaller case"
        )
    vocab = 500 if job["smoke"] else 128000
    prompts = [
        {
            "prompt_token_ids": [
                (7919 * i + 31 * j + i * j) % vocab for j in range(context)
            ]
        }
        for i in range(batch)
    ]

    def answer(batch: int, tokens: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        outputs = llm.generate(prompts[:batch], params, use_tqdm=False)
        spent = time.perf_counter() - begun
        return spent, [list(output.outputs[0].token_ids) for output in outputs]

    answer(batch, SHORT)  # the prompts into the prefix cache
    cases = []
    for some in job["batches"]:
        steps, tokens = [], None
        for _ in range(1 if job["smoke"] else 3):
            short, _ = answer(some, SHORT)
            long, tokens = answer(some, LONG)
            steps.append(round(1e3 * (long - short) / (LONG - SHORT), 4))
        found = {"step_ms": statistics.median(steps), "steps_ms": steps}
        cases.append({"batch": some, **found, "tokens": tokens})
    counters = llm.collective_rpc(_counters) if job["engine"] != "dense" else None
    return {"cases": cases, "counters": counters}


def quick_start(batches: Sequence[int], smoke: bool) -> dict:
    """Arguments of `LLM`: full graphs of these batch sizes, and no torch.compile.

    The CPU engine of a smoke run takes no graphs; then the values are checked alone.
    """
    from vllm.config import CompilationConfig

    given = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    given |= {"cudagraph_capture_sizes": sorted(batches)}
    checked = CompilationConfig(**given)
    return {} if smoke else {"compilation_config": checked}


def _counters(worker) -> dict:
    from tidal_vllm.engine.metrics import worker_counters

    return worker_counters(worker)


if __name__ == "__main__":
    # NOTE: counters are asked for by a function, which travels as a pickle.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    print(MARK + json.dumps(run(json.loads(sys.argv[1]))), flush=True)
