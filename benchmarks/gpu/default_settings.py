r"""Do vLLM's default settings work with TIDAL, and what do they pick?

    python -m benchmarks.gpu.default_settings MODEL --out FILE

Three engines in turn, started as users start them: torch.compile, CUDA graphs and the
model runner are what vLLM picks. One has FLASH_ATTN, one TIDAL with a budget that holds
every prompt, so that every step is dense, and one TIDAL with a small budget. Each
continues eight prompts of different lengths at once, greedily, from Python's
documentation. Exits with 1 if a token of the second engine differs from the first's, or
if no step of the third was sparse. With `--baseline TIDAL`, for a machine without a
GPU, the first engine has no sparse layer.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MARK = "RESULT "
LENGTHS = (300, 900, 2100, 3000, 4100, 5000, 6100, 6400)
TOKENS = 96
ENGINES = ("dense", "exact", "sparse")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with a tokenizer")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--baseline", default="FLASH_ATTN", help="the dense backend")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--token-budget", type=int, default=512, help="of the third")
    parser.add_argument("--kv-cache-gib", type=float, default=3)
    parser.add_argument("--out", type=Path, help="append a JSON line here")
    args = parser.parse_args()
    from benchmarks import records
    from benchmarks.machine import describe_run
    from tidal_vllm.demo.engines import equal_tokens

    dense, exact, sparse = (_child(args, name) for name in ENGINES)
    tokens = [engine.pop("tokens") for engine in (dense, exact, sparse)]
    pairs = [*zip(*tokens[:2], strict=True)]
    record = {
        "benchmark": "default_settings",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "lengths": list(args.lengths),
        "tokens": args.tokens,
        "equal": sum(a == b for a, b in pairs),
        "token_budget": args.token_budget,
        "sparse_equal_tokens": [
            equal_tokens(*pair) for pair in zip(tokens[0], tokens[2], strict=True)
        ],
        "dense": dense | {"attention_backend": args.baseline},
        "exact": exact,
        "sparse": sparse,
    }
    print(json.dumps(record))
    if args.out:
        records.append(args.out, record | describe_run("vllm", "tidal_vllm"))
    wrong = record["equal"] < len(pairs) or not sparse["counters"]["sparse_steps"]
    return int(wrong)


def _child(args: argparse.Namespace, name: str) -> dict:
    job = vars(args) | {"out": None, "engine": name}
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.default_settings",
        "--",
        json.dumps(job),
    ]
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as child:
        found = None
        for line in child.stdout or ():
            if line.startswith(MARK):
                found = json.loads(line.removeprefix(MARK))
    if found is None:
        raise SystemExit(f"the {name} engine failed (exit status {child.returncode})")
    return found


def run(job: dict) -> dict:
    """Start one engine, continue the prompts, and say what vLLM picked."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from tidal_vllm.engine.metrics import COUNTING_WORKER
    from tidal_vllm.natural_text import python_documentation

    lengths, longest = job["lengths"], max(job["lengths"]) + job["tokens"] + 16
    encode = AutoTokenizer.from_pretrained(job["model"])
    ids = encode(python_documentation(), verbose=False)["input_ids"]
    prompts = [
        {"prompt_token_ids": ids[i * longest : i * longest + length]}
        for i, length in enumerate(lengths)
    ]
    tidal: dict = {"token_budget": -(-longest // 16) * 16}
    backend = "TIDAL"
    if job["engine"] == "sparse":
        tidal = {"token_budget": job["token_budget"]}
    if job["engine"] == "dense":
        tidal, backend = {"dense_layers": [], "select_layers": []}, job["baseline"]
    more: dict = {"attention_backend": backend}
    if backend == "TIDAL":
        more |= {"additional_config": {"tidal": tidal}}
        more |= {"worker_extension_cls": COUNTING_WORKER}
    begun = time.monotonic()
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=longest,
        kv_cache_memory_bytes=int(job["kv_cache_gib"] * 2**30),
        seed=0,
        **more,
    )
    started = time.monotonic() - begun
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    config = runner.vllm_config.compilation_config
    counted = backend == "TIDAL"
    return {
        "start_s": round(started, 1),
        "runner": type(runner).__module__,
        "compilation_mode": str(config.mode),
        "cudagraph_mode": str(config.cudagraph_mode),
        "captured_sizes": len(config.cudagraph_capture_sizes or ()),
        "counters": llm.collective_rpc("decode_counters")[0] if counted else None,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        print(MARK + json.dumps(run(json.loads(sys.argv[2]))), flush=True)
        sys.exit(0)
    sys.exit(main())
