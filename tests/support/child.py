"""Runs engines in a process of its own, as users do; its arguments are JOBS RESULTS.

JOBS is a JSON list of `{"kwargs": EngineArgs, "prompts": ..., "max_tokens": ...}`, and
a job may have more keys:
    "sampling": More fields of `SamplingParams`.
    "start_method": How the engine's processes are started.
    "ray": A Ray cluster of this process with that many slots for workers.
    "async": The asynchronous scheduler, which vLLM's CPU platform turns off.
    "exact_up_to": The longest sequence whose decoded tokens count as clean, or null for
        what the settings say. The scheduler is then looked at, so the engine core has
        to be in this process.
    "chosen": Whether to tell which blocks each worker chose last.
RESULTS is written: for each job the tokens, the workers' counters, and what was seen of
the scheduler.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from tidal_vllm.engine.metrics import CountingWorker


def run(job: dict) -> dict:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    if slots := job.get("ray"):
        import ray

        ray.init(num_cpus=slots, num_gpus=slots, include_dashboard=False)
    if job.get("chosen"):
        job["kwargs"]["worker_extension_cls"] = f"{__package__}.child.ChoosingWorker"
    config = EngineArgs(**job["kwargs"]).create_engine_config()
    if job.get("async"):
        from tidal_vllm.names import ASYNC_SCHEDULER

        config.scheduler_config.async_scheduling = True
        config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER
    if method := job.get("start_method"):
        # NOTE: vLLM's CPU platform chose "spawn" while the config was made.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
    engine = LLMEngine.from_vllm_config(config)
    looked = "exact_up_to" in job
    look = Look(engine, job["exact_up_to"]) if looked else None
    params = SamplingParams(
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        **{"temperature": 0.0} | job.get("sampling", {}),
    )
    for i, prompt in enumerate(job["prompts"]):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    result = {
        "tokens": [tokens[str(i)] for i in range(len(job["prompts"]))],
        "counters": engine.collective_rpc("decode_counters"),
        "scheduler": look.found() if look else None,
    }
    if job.get("chosen"):
        result["chosen"] = engine.collective_rpc("chosen_blocks")
    engine.engine_core.shutdown()
    return result


class ChoosingWorker(CountingWorker):
    """Tells, beside its counters, which blocks its SELECT layers chose last."""

    def chosen_blocks(self) -> list:
        """Those of the first row, [selection][set][block]."""
        layers = self.model_runner.compilation_config.static_forward_context.values()
        state = next(layer.impl.state for layer in layers)
        return state.selection.topk_blocks[:, 0].tolist()


class Look:
    """At the scheduler of an engine whose core is in this process."""

    def __init__(self, engine: Any, exact_up_to: int | None) -> None:
        self._scheduler = scheduler = engine.engine_core.engine_core.scheduler
        if exact_up_to is not None:
            scheduler.selection_rule = dataclasses.replace(
                scheduler.selection_rule,
                token_budget=exact_up_to,
                sparse_threshold=exact_up_to,
            )
        self._schedule, self._ahead = scheduler.schedule, []
        scheduler.schedule = self._spied

    def _spied(self, *args: Any, **kwargs: Any) -> Any:
        running = self._scheduler.running
        self._ahead.append(max((r.num_output_placeholders for r in running), default=0))
        return self._schedule(*args, **kwargs)

    def found(self) -> dict:
        scheduler = self._scheduler
        blocks = scheduler.kv_cache_manager.block_pool.blocks
        in_use = sum(block.ref_cnt > 0 for block in blocks if not block.is_null)
        polluted = scheduler._clean_positions, scheduler._to_announce
        return {
            "name": type(scheduler).__name__,
            "counters": dataclasses.asdict(scheduler.correction_counters),
            "v2": scheduler.use_v2_model_runner,
            "ahead": max(self._ahead),
            "left": [*map(len, polluted), in_use],
        }


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support.interpreter import patch_once

        patch_once()
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
