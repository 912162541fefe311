"""Runs engines in a process of its own: `python child.py JOBS RESULTS`.

JOBS is a JSON list of `{"kwargs": EngineArgs, "prompts": ..., "max_tokens": ...}`.
"exact_up_to" makes decoded tokens behind it count as polluted, "async" takes the
asynchronous scheduler, which vLLM's CPU platform turns off, "sampling" adds to the
sampling parameters. RESULTS is written.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path


def run(job: dict) -> dict:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    config = EngineArgs(**job["kwargs"]).create_engine_config()
    if job.get("async"):
        from tidal_vllm.names import ASYNC_SCHEDULER

        config.scheduler_config.async_scheduling = True
        config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER
    if method := job.get("start_method"):
        # NOTE: vLLM's CPU platform chose "spawn" while the config was made.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
    engine = LLMEngine.from_vllm_config(config)
    scheduler = engine.engine_core.engine_core.scheduler
    exact = job["exact_up_to"]
    if exact is not None:
        scheduler.selection_rule = dataclasses.replace(
            scheduler.selection_rule, token_budget=exact, sparse_threshold=exact
        )
    sampling = {"temperature": 0.0} | job.get("sampling", {})
    params = SamplingParams(
        max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False, **sampling
    )
    for i, prompt in enumerate(job["prompts"]):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    schedule, ahead = scheduler.schedule, []

    def spied(*args, **kwargs):
        running = scheduler.running
        ahead.append(max((r.num_output_placeholders for r in running), default=0))
        return schedule(*args, **kwargs)

    scheduler.schedule = spied
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    counters = dataclasses.asdict(scheduler.correction_counters)
    pool = scheduler.kv_cache_manager.block_pool
    in_use = sum(block.ref_cnt > 0 for block in pool.blocks if not block.is_null)
    result = {
        "tokens": [tokens[str(i)] for i in range(len(job["prompts"]))],
        "counters": counters,
        "scheduler": type(scheduler).__name__,
        "v2": scheduler.use_v2_model_runner,
        "ahead": max(ahead),
        "workers": engine.collective_rpc("tidal_counters"),
        "left": [len(scheduler._clean_positions), len(scheduler._to_announce), in_use],
    }
    engine.engine_core.shutdown()
    return result


def main() -> None:
    import torch

    # NOTE: where the workers are other processes, vLLM's clean-up in this one asks
    # PyTorch for an accelerator.
    torch.accelerator.empty_cache = torch.accelerator.empty_host_cache = lambda: None
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.append(str(Path(__file__).parents[3]))
        from tests.interpreter import patch_once

        patch_once()
    main()
