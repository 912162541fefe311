"""Correction and the publish rule: vLLM's schedulers, aware of polluted KV.

A correction is a rewind: vLLM schedules the rewound tokens again as a short extend
over the same KV slots, which is dense, and samples the next token at its end.

Changes vLLM at run time: `allocate_slots` of the KV cache manager and `cache_blocks`
of its coordinator, on the instances of this scheduler.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import max_decode_query_len
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from tidal_vllm.engine.metrics import CorrectionCounters
from tidal_vllm.plan.pollution import (
    StepDemand,
    choose_corrections,
    clean_position_after,
    is_due,
    pollutes,
)
from tidal_vllm.plan.promises import check_promises
from tidal_vllm.plan.resolve import Startup, resolve
from tidal_vllm.registry import METHODS

logger = init_logger("vllm.tidal.scheduler")


if TYPE_CHECKING:
    # The mixin stands before one of vLLM's schedulers, whose attributes it uses.
    _Base: TypeAlias = Scheduler
else:
    _Base = object


class CorrectionMixin(_Base):
    """What `TidalScheduler` and `TidalAsyncScheduler` add to vLLM's schedulers.

    Each request has a clean position: the tokens before it have dense KV. Polluted
    are those from there to `num_computed_tokens`.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        startup = resolve(vllm_config)
        # Again, and before vLLM makes what would break a promise.
        check_promises(vllm_config, startup)
        super().__init__(vllm_config, *args, **kwargs)
        self._require_keys_to_be_written(startup)
        self.layer_plan, self.selection_rule = startup.plan, startup.rule
        sparse = self.layer_plan.sparse
        self.correction_interval = (
            startup.config.correction_interval if sparse else None
        )
        self.correction_counters = CorrectionCounters()
        self._tails_decode = tails_decode(self.vllm_config)
        self._max_decode_query_len = max_decode_query_len(self.vllm_config)
        self._clean_positions: dict[str, int] = {}
        # For the V2 runner, which keeps its own count of computed tokens and
        # ignores a lowered one, except in a request that is announced as new.
        self._to_announce: set[str] = set()
        self._last_log = (time.monotonic(), replace(self.correction_counters))
        if sparse and not startup.config.publish_polluted:
            self._publish_clean_blocks_only()

    def _require_keys_to_be_written(self, startup: Startup) -> None:
        """Refuse prefix-cache hits of a part of a block: vLLM serves them by a copy."""
        method, cache = startup.config.method, self.vllm_config.cache_config
        follows = startup.plan.sparse and METHODS[method].follows_keys
        if follows and self.kv_cache_manager.coordinator.enable_partial_hash_hits:
            raise ValueError(
                f"prefix_match_unit = {cache.prefix_match_unit} with mamba_cache_mode "
                f"= {cache.mamba_cache_mode}: vLLM copies KV blocks of which a part is "
                f"found in the prefix cache, and tidal.method = {method!r} has not "
                "seen their keys written; allowed: another method, or "
                "--no-enable-prefix-caching"
            )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.correction_interval is not None:
            self._start_corrections()
        output = super().schedule(*args, **kwargs)
        if self._to_announce:
            self._announce_again(output)
        return output

    def clean_position(self, request: Request) -> int:
        """Tokens from the start of the request that have dense KV.

        What a request finds in the prefix cache is clean.
        """
        computed = request.num_computed_tokens
        return min(self._clean_positions.get(request.request_id, computed), computed)

    def num_polluted_tokens(self) -> int:
        """Polluted tokens of all running requests."""
        return sum(
            request.num_computed_tokens - self.clean_position(request)
            for request in self.running
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.correction_interval is not None:
            self._log_counters()
        return stats

    def _start_corrections(self) -> None:
        if self.pause_state == PauseState.PAUSED_ALL:
            return
        demands = [self._demand(request) for request in self.running]
        if all(demand.corrected is None for demand in demands):
            return
        budget = self.max_num_scheduled_tokens
        limit = self.scheduler_config.long_prefill_token_threshold or budget
        chosen = choose_corrections(demands, budget, limit)
        for request, starts in zip(self.running, chosen, strict=True):
            if starts:
                self._rewind(request)

    def _demand(self, request: Request) -> StepDemand:
        total = request.num_tokens_with_spec + request.num_output_placeholders
        plain = max(total - request.num_computed_tokens, 0)
        clean = self.clean_position(request)
        remaining = min(
            request.max_tokens - request.num_output_tokens,
            self.max_model_len - request.num_tokens,
        )
        num_polluted = request.num_computed_tokens - clean
        if not is_due(self.correction_interval, num_polluted, remaining):
            return StepDemand(plain)
        if plain > 1:  # being computed again already
            return StepDemand(plain)
        if request.num_in_flight_tokens:
            # Asynchronous scheduling runs ahead of the tokens that it computes;
            # a rewind needs to know them all. NOTE: vLLM skips a running request
            # until the step in this field; it counts the step up first.
            request.next_decode_eligible_step = max(
                request.next_decode_eligible_step, self.current_step + 2
            )
            return StepDemand(0)
        return StepDemand(plain, request.num_tokens - clean)

    def _rewind(self, request: Request) -> None:
        clean = self.clean_position(request)
        self.correction_counters.corrections += 1
        self.correction_counters.corrected_tokens += request.num_computed_tokens - clean
        request.num_computed_tokens = clean
        if self.use_v2_model_runner:
            self._to_announce.add(request.request_id)

    def _announce_again(self, output: SchedulerOutput) -> None:
        """Turn this step's rewound requests into new ones, for the V2 runner."""
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        again = self._to_announce & starts.keys()
        for req_id in starts:
            if req_id not in again:
                continue
            request = self.requests[req_id]
            data = NewRequestData.from_request(
                request,
                self.kv_cache_manager.get_block_ids(req_id),
                list(request.all_token_ids),
                uses_mrope=self.model_uses_mrope,
            )
            # The request itself is already a step further.
            data.num_computed_tokens = starts[req_id]
            output.scheduled_new_reqs.append(data)
        output.scheduled_cached_reqs = _without(cached, again)
        self._to_announce -= again

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self.layer_plan.sparse:
            for req_id, query_len in scheduler_output.num_scheduled_tokens.items():
                request = self.requests[req_id]
                start = request.num_computed_tokens
                clean = self._clean_position_after(request, start, query_len)
                self._clean_positions[req_id] = clean
                self.correction_counters.saw_run(start + query_len - clean)
        super()._update_after_schedule(scheduler_output)

    def _clean_position_after(
        self, request: Request, start: int, query_len: int
    ) -> int:
        polluted = pollutes(
            self.layer_plan,
            self.selection_rule,
            query_len,
            start,
            0 if self._tails_decode else request.num_prompt_tokens,
            self._max_decode_query_len,
        )
        clean = self._clean_positions.get(request.request_id, start)
        return clean_position_after(clean, start, query_len, polluted)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._forget(request)  # its blocks are freed: it comes back as a prefill
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._forget(request)
        return super()._free_request(request, *args, **kwargs)

    def _forget(self, request: Request) -> None:
        self._clean_positions.pop(request.request_id, None)
        self._to_announce.discard(request.request_id)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """Correct the last turn of a streaming session with the next one's prompt."""
        super()._update_request_as_session(session, update)
        clean = self.clean_position(session)
        if self.correction_interval is not None and clean < session.num_computed_tokens:
            self._rewind(session)
            # The next turn of a session is announced as a new request by vLLM itself.
            self._to_announce.discard(session.request_id)

    def _publish_clean_blocks_only(self) -> None:
        """Let the prefix cache have a request's blocks up to its clean position.

        vLLM publishes blocks where it allocates the slots of a step, and, under
        asynchronous scheduling, where it learns the step's tokens.

        NOTE: it does so for all KV cache groups, and for a state (Mamba) by a length
        that the running state may be past: so only in steps that make KV clean.
        """
        manager = self.kv_cache_manager
        allocate, publish = manager.allocate_slots, manager.coordinator.cache_blocks

        def allocate_slots(
            request: Request,
            num_new_tokens: int,
            num_new_computed_tokens: int = 0,
            *,
            num_external_computed_tokens: int = 0,
            delay_cache_blocks: bool = False,
            **kwargs: Any,
        ) -> KVCacheBlocks | None:
            blocks = allocate(
                request,
                num_new_tokens,
                num_new_computed_tokens,
                num_external_computed_tokens=num_external_computed_tokens,
                delay_cache_blocks=True,
                **kwargs,
            )
            if blocks is not None and not delay_cache_blocks:
                start = request.num_computed_tokens
                start += num_new_computed_tokens + num_external_computed_tokens
                clean = self._clean_position_after(request, start, num_new_tokens)
                if clean > start:
                    publish(request, min(clean, request.num_tokens))
            return blocks

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            clean = self._clean_positions.get(request.request_id, num_computed_tokens)
            if clean >= num_computed_tokens:
                publish(request, num_computed_tokens)

        manager.allocate_slots = allocate_slots
        manager.coordinator.cache_blocks = cache_blocks

    def _log_counters(self) -> None:
        """Beside vLLM's periodic statistics, in the scheduler's process."""
        logged_at, logged = self._last_log
        now = time.monotonic()
        if now - logged_at < envs.VLLM_LOG_STATS_INTERVAL:
            return
        counters = self.correction_counters
        num_polluted = self.num_polluted_tokens()
        if counters != logged or num_polluted:
            logger.info("%s, Polluted tokens now: %d", counters, num_polluted)
        self._last_log = (now, replace(counters))


def tails_decode(vllm_config: VllmConfig) -> bool:
    """Whether a prompt's last token, as a chunk of its own, may run as a decode.

    NOTE: it does in a full CUDA graph, and wherever the V2 runner runs a model with
    states: those are rolled back for drafts behind the token.
    """
    graphs = vllm_config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.has_full_cudagraphs():
        return True
    return vllm_config.use_v2_model_runner and vllm_config.model_config.is_hybrid


class TidalScheduler(CorrectionMixin, Scheduler):
    """vLLM's scheduler with correction; the one to subclass for `--scheduler-cls`."""


class TidalAsyncScheduler(CorrectionMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with correction."""


def _without(cached: CachedRequestData, req_ids: set[str]) -> CachedRequestData:
    kept = [i for i, req_id in enumerate(cached.req_ids) if req_id not in req_ids]

    def keep(values: list) -> list:
        return [values[i] for i in kept] if values else []

    return CachedRequestData(
        req_ids=keep(cached.req_ids),
        resumed_req_ids=cached.resumed_req_ids,
        new_token_ids=keep(cached.new_token_ids),
        all_token_ids=cached.all_token_ids,
        new_block_ids=keep(cached.new_block_ids),
        num_computed_tokens=keep(cached.num_computed_tokens),
        num_output_tokens=keep(cached.num_output_tokens),
    )
