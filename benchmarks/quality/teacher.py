"""An engine that is told what to answer, and what it would have answered instead."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

# The engine runs in this process, so that it can be switched, timed and read.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor  # noqa: E402

from tidal_vllm.engine.metrics import CorrectionCounters  # noqa: E402
from tidal_vllm.plan.roles import all_dense  # noqa: E402


class Teacher(AdapterLogitsProcessor):
    """Keeps each step's logits, then leaves one token possible.

    A request names itself and its output: `extra_args={"teacher": [name, token_ids]}`.
    """

    answers: dict[str, dict[int, torch.Tensor]] = {}
    """Per request: fp32 log probabilities `[vocab_size]` of each output token."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        if not (params.extra_args or {}).get("teacher"):
            return None
        name, token_ids = params.extra_args["teacher"]
        answer = self.answers.setdefault(name, {})

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            # A chunk of a correction samples too, and vLLM drops it: the last one
            # to write a position is the one that counts.
            position = len(output_ids)
            answer[position] = logits.float().log_softmax(-1)
            wanted = logits[token_ids[position]].item()
            logits.fill_(-torch.inf)
            logits[token_ids[position]] = wanted
            return logits

        return force


@dataclass
class Run:
    """What one pass over the outputs gave."""

    log_probs: list[torch.Tensor]
    """Per sequence: fp32 `[num_output_tokens, vocab_size]`."""
    step_ms: list[float] = field(default_factory=list)
    """Wall time of each engine step after the first output token."""
    step_tokens: list[int] = field(default_factory=list)
    """Tokens computed in each of them."""
    kv: list[list[tuple[int, torch.Tensor]]] = field(default_factory=list)
    """Per sequence: (end, KV of the positions behind the prompt up to end) as
    `[layers, tokens, num_kv_heads, 2 * head_size]`, at each snapshot."""
    counters: CorrectionCounters = field(default_factory=CorrectionCounters)


class TaughtEngine:
    """A live engine, dense or sparse, under any correction interval."""

    def __init__(self, model: Path | str, tidal: dict, **kwargs) -> None:
        self.llm = LLM(
            str(model),
            attention_backend="TIDAL",
            additional_config={"tidal": tidal},
            skip_tokenizer_init=True,
            logits_processors=[Teacher],
            worker_extension_cls="tidal_vllm.calibrate.worker.CalibrationWorker",
            seed=0,
            **kwargs,
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        worker = self.engine.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        self._find_builder()

    def configure(self, tidal: dict) -> None:
        """Run under other settings from now on; the layers keep their roles."""
        self.llm.collective_rpc("calibration_configure", args=(tidal,))
        self._find_builder()

    def _find_builder(self) -> None:
        (self.builder,) = [
            builder
            for groups in self.runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        self.plan = self.builder.plan
        self.dense_plan = all_dense(self.plan.num_layers, "benchmark", "the baseline")

    def run(
        self,
        prompts: list[list[int]],
        outputs: list[list[int]],
        *,
        sparse: bool,
        interval: int | None,
        snapshot_every: int | None = None,
    ) -> Run:
        """Decode all sequences together along their given outputs.

        Args:
            snapshot_every: Steps between two looks at the KV cache; None: none.
        """
        self.scheduler.correction_interval = interval
        plan = self.plan if sparse else self.dense_plan
        self.builder.plan = self.scheduler.layer_plan = plan
        counters = self.scheduler.correction_counters = CorrectionCounters()
        Teacher.answers = {}
        run = Run([], kv=[[] for _ in prompts], counters=counters)
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            params = SamplingParams(
                temperature=0,
                max_tokens=len(output),
                ignore_eos=True,
                detokenize=False,
                extra_args={"teacher": [str(i), output]},
            )
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        seen = 0
        while self.engine.has_unfinished_requests():
            computed = self._computed()
            decoding = all(r.num_output_tokens for r in self.scheduler.running)
            decoding = decoding and len(self.scheduler.running) == len(prompts)
            rewound = counters.corrected_tokens
            start = time.perf_counter()
            self.engine.step()
            elapsed = time.perf_counter() - start
            if not decoding or len(self.scheduler.running) < len(prompts):
                continue
            run.step_ms.append(1e3 * elapsed)
            again = counters.corrected_tokens - rewound
            run.step_tokens.append(self._computed() - computed + again)
            seen += 1
            if snapshot_every and seen % snapshot_every == 0:
                self._snapshot(run, prompts)
        for i, output in enumerate(outputs):
            answer = Teacher.answers[str(i)]
            run.log_probs.append(torch.stack([answer[t] for t in range(len(output))]))
        return run

    def sample(
        self, prompts: list[list[int]], num_tokens: int, seed: int
    ) -> list[list[int]]:
        """Outputs that the dense model draws at temperature 1."""
        self.builder.plan = self.scheduler.layer_plan = self.dense_plan
        params = [
            SamplingParams(
                temperature=1.0,
                seed=seed + i,
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(inputs, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def _computed(self) -> int:
        return sum(r.num_computed_tokens for r in self.scheduler.running)

    def _snapshot(self, run: Run, prompts: list[list[int]]) -> None:
        manager = self.scheduler.kv_cache_manager
        for request in self.scheduler.running:
            name = int(request.sampling_params.extra_args["teacher"][0])
            (block_ids,) = manager.get_block_ids(request.request_id)
            first, end = len(prompts[name]), request.num_computed_tokens
            run.kv[name].append((end, self.read_kv(block_ids, first, end)))

    def read_kv(self, block_ids: list[int], first: int, end: int) -> torch.Tensor:
        """KV of some positions: `[layers, tokens, num_kv_heads, 2 * head_size]`."""
        caches = self.runner.kv_caches
        size = caches[0].shape[2]
        positions = torch.arange(first, end)
        blocks = torch.tensor(block_ids)[positions // size]
        return torch.stack([c[blocks, :, positions % size].clone() for c in caches])
