r"""How much faster does vLLM's engine decode long contexts through TIDAL?

One engine, one prompt per context length; dense and sparse decoding alternate on
it, so that both see the same KV cache, the same machine and the same minute. The
shorter contexts are prefixes of the longest, so only that one is ever prefilled.
Every answer is checked against what was planted in the prompt.

    python -m benchmarks.engine.decode_engine \
        --out benchmarks/results/decode_engine.jsonl

One JSON line per case, every trial kept. Times are milliseconds of one decode step
of one sequence: `step` is the whole engine step (scheduler, model, sampling),
`attention` the sum over the layers' attention, KV writes excluded.

`--dummy-weights` is for a GPU: see `dummy_engine.py`.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The engine runs in this process, so that it can be switched and timed.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

from benchmarks.machine import describe_run  # noqa: E402
from tidal_vllm.config import PRESETS  # noqa: E402
from tidal_vllm.planted import (  # noqa: E402
    PlantedSpec,
    build_planted_model,
    make_prompt,
)

NEEDLE_SPAN = 0.6
"""The needle lies in the first part of the shortest context, so in all of them."""


@dataclass
class Trial:
    """One generation: the time of each decode step after the first token."""

    step_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    exact: bool = False


class Engine:
    """A live vLLM engine that can be switched between dense and sparse decoding."""

    def __init__(self, model_dir: Path, spec: PlantedSpec, args) -> None:
        from vllm import LLM

        longest = max(args.contexts) + args.answer_words + 256
        token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_size * 4
        self.llm = LLM(
            str(model_dir),
            attention_backend="TIDAL",
            additional_config={
                "tidal": {
                    "token_budget": args.token_budget,
                    "dense_layers": list(spec.dense_layers),
                    "select_layers": list(spec.select_layers),
                }
            },
            max_model_len=longest,
            max_num_seqs=1,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=(longest + 512) * token_bytes,
        )
        self.core = self.llm.llm_engine
        worker = self.core.model_executor.driver_worker.worker
        (self.builder,) = [
            builder
            for groups in worker.model_runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        self.sparse_plan = self.builder.plan
        self.kv_bytes = sum(tensor.nbytes for tensor in worker.model_runner.kv_caches)
        self.attention_s = _time_attention()

    def switch(self, sparse: bool) -> None:
        from tidal_vllm.plan.roles import all_dense

        layers = self.sparse_plan.num_layers
        dense_plan = all_dense(layers, "benchmark", "the dense half of a pair")
        self.builder.plan = self.sparse_plan if sparse else dense_plan

    def generate(self, prompt_ids: list[int], answer_ids: list[int]) -> Trial:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=len(answer_ids))
        self.core.add_request(
            str(time.monotonic_ns()), {"prompt_token_ids": prompt_ids}, params
        )
        trial, given = Trial(), []
        while self.core.has_unfinished_requests():
            self.attention_s[0] = 0.0
            start = time.perf_counter()
            outputs = self.core.step()
            elapsed = time.perf_counter() - start
            decoding = len(given) > 0
            given = outputs[0].outputs[0].token_ids if outputs else given
            if decoding:
                trial.step_ms.append(1e3 * elapsed)
                trial.attention_ms.append(1e3 * self.attention_s[0])
        trial.exact = list(given) == answer_ids
        return trial


def _time_attention() -> list[float]:
    """Add up the wall time of all attention calls in the returned cell."""
    from tidal_vllm.engine.attention import TidalImpl

    total, forward = [0.0], TidalImpl.forward

    def timed(*args, **kwargs):
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        total[0] += time.perf_counter() - start
        return output

    TidalImpl.forward = timed
    return total


def measure(engine: Engine, spec: PlantedSpec, args) -> list[dict]:
    """Run every context length, longest first; return one record per case."""
    depth = NEEDLE_SPAN * min(args.contexts) / max(args.contexts)
    whole = make_prompt(
        spec, max(args.contexts), depth, seed=0, chain_len=args.answer_words
    )
    records = []
    for context in sorted(args.contexts, reverse=True):
        ids = [*whole.prompt_token_ids[: context - 1], whole.prompt_token_ids[-1]]
        start = time.perf_counter()
        engine.switch(sparse=False)
        engine.generate(ids, whole.answer_token_ids)
        print(f"{context}: prefill {time.perf_counter() - start:.0f} s", flush=True)
        trials = {"dense": [], "sparse": []}
        memory = {}
        for _ in range(args.trials):
            for mode in trials:
                engine.switch(sparse=mode == "sparse")
                trials[mode].append(engine.generate(ids, whole.answer_token_ids))
                memory.setdefault(mode, _peak_memory())
        records.append(_record(context, trials, memory, engine, spec, args))
        print(json.dumps(records[-1]["summary"]), flush=True)
        if args.out:
            with args.out.open("a") as out:
                out.write(json.dumps(records[-1]) + "\n")
    return records


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _record(context, trials, memory, engine: Engine, spec: PlantedSpec, args) -> dict:
    def median(mode: str, what: str) -> float:
        return statistics.median(
            statistics.median(getattr(trial, what)) for trial in trials[mode]
        )

    summary = {
        "context": context,
        "exact": all(t.exact for mode in trials.values() for t in mode),
        "dense_step_ms": round(median("dense", "step_ms"), 2),
        "sparse_step_ms": round(median("sparse", "step_ms"), 2),
        "dense_attention_ms": round(median("dense", "attention_ms"), 2),
        "sparse_attention_ms": round(median("sparse", "attention_ms"), 2),
    }
    for what in ("step", "attention"):
        ratio = summary[f"dense_{what}_ms"] / summary[f"sparse_{what}_ms"]
        summary[f"{what}_speedup"] = round(ratio, 2)
    read = spec.num_kv_heads * spec.head_size * 2 * 4 * context * spec.num_layers
    summary["dense_attention_gb_per_s"] = round(
        read / summary["dense_attention_ms"] / 1e6, 2
    )
    summary["memory_above_dense"] = round(
        (engine.builder.state.selection.nbytes + memory["sparse"] - memory["dense"])
        / engine.kv_bytes,
        5,
    )
    return {
        "benchmark": "decode_engine",
        "summary": summary,
        "trials": {m: [_rounded(asdict(t)) for t in ts] for m, ts in trials.items()},
        "setup": {
            "token_budget": args.token_budget,
            "select_block_size": engine.builder.rule.select_block_size,
            "select_attends": PRESETS["default"]["select_attends"],
            "dense_layers": spec.dense_layers,
            "select_layers": spec.select_layers,
            "model": "planted",
            **{k: getattr(spec, k) for k in ("num_layers", "num_heads", "hops")},
            "num_kv_heads": spec.num_kv_heads,
            "head_size": spec.head_size,
            "dtype": spec.dtype,
            "batch": 1,
            "kv_cache_bytes": engine.kv_bytes,
            "selection_bytes": engine.builder.state.selection.nbytes,
        },
        **describe_run("vllm", "tidal_vllm"),
    }


def _rounded(trial: dict) -> dict:
    return {
        key: [round(v, 3) for v in value] if isinstance(value, list) else value
        for key, value in trial.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[4096, 16384, 32768, 65536]
    )
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--hops", type=int, default=1)
    parser.add_argument("--answer-words", type=int, default=12)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--model-dir", type=Path, default=Path(".cache/bench-model"))
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    gpu = parser.add_argument_group("on a GPU, with dummy weights")
    gpu.add_argument("--dummy-weights", action="store_true")
    gpu.add_argument("--cases", nargs="+", help="batch x context, such as 16x32768")
    gpu.add_argument("--rounds", type=int, default=1, help="engines take turns")
    gpu.add_argument("--baseline", default="FLASH_ATTN", help="the dense backend")
    gpu.add_argument("--kernels", default="auto")
    gpu.add_argument("--runner", choices=["v1", "v2"])
    gpu.add_argument("--eager", action="store_true")
    gpu.add_argument(
        "--quick-start", action="store_true", help="no torch.compile, no exactness"
    )
    gpu.add_argument("--smoke", action="store_true", help="tiny sizes, nothing timed")
    args = parser.parse_args()
    if args.dummy_weights:
        from benchmarks.engine import dummy_engine

        return dummy_engine.main(args)
    spec = PlantedSpec(
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        hops=args.hops,
    )
    build_planted_model(args.model_dir, spec)
    records = measure(Engine(args.model_dir, spec, args), spec, args)
    return 0 if all(record["summary"]["exact"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
