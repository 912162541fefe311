"""Runs engines in a process of its own, as users do: `python child.py JOBS RESULTS`.

JOBS is a JSON list of `{"kwargs": EngineArgs, "prompts": ..., "max_tokens": ...}`;
"start_method" may name how the engine's processes are started, "ray" asks for a Ray
cluster of this process with that many slots for workers. RESULTS is written.
"""

import json
import os
import sys
from pathlib import Path


def run(job: dict) -> dict:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    if slots := job.get("ray"):
        import ray

        ray.init(num_cpus=slots, num_gpus=slots, include_dashboard=False)
    config = EngineArgs(**job["kwargs"]).create_engine_config()
    if method := job.get("start_method"):
        # NOTE: vLLM's CPU platform chose "spawn" while the config was made.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
    engine = LLMEngine.from_vllm_config(config)
    params = SamplingParams(
        max_tokens=job["max_tokens"],
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
    )
    for i, prompt in enumerate(job["prompts"]):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    counters = engine.collective_rpc("tidal_counters")
    engine.engine_core.shutdown()
    return {
        "tokens": [tokens[str(i)] for i in range(len(job["prompts"]))],
        "counters": counters,
    }


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
