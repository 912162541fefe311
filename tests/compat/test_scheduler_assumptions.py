"""What engine/scheduler.py takes for granted inside vLLM; each breaks here first.

A failure means: read the named place of the package again before raising the
supported range of vLLM.
"""

import inspect
from importlib.metadata import version

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner

from tests.support.signatures import parameters

pytestmark = pytest.mark.compat

VLLM_0_32 = version("vllm").startswith("0.32.")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("_update_after_schedule", ["scheduler_output"]),
        ("_preempt_request", ["request", "timestamp"]),
        ("_free_request", ["request", "delay_free_blocks"]),
        ("_update_request_as_session", ["session", "update"]),
    ],
)
def test_methods_that_are_overridden(name, given):
    assert parameters(getattr(Scheduler, name))[1 : len(given) + 1] == given


def test_blocks_are_published_through_the_coordinator():
    publish = "self.coordinator.cache_blocks("
    for method in (KVCacheManager.allocate_slots, KVCacheManager.cache_blocks):
        assert inspect.getsource(method).count(publish) == 1
    assert parameters(KVCacheManager.allocate_slots)[1:4] == [
        *("request", "num_new_tokens", "num_new_computed_tokens")
    ]
    assert {"num_external_computed_tokens", "delay_cache_blocks"} <= {
        *parameters(KVCacheManager.allocate_slots)
    }


def test_where_a_step_publishes_what_it_learns():
    """0.32 under asynchronous scheduling, 0.33 with drafts to verify, too."""
    if VLLM_0_32:
        learns = AsyncScheduler._update_request_with_output
    else:
        learns = Scheduler.update_from_output
        assert "_update_request_with_output" not in vars(AsyncScheduler)
    assert "self.kv_cache_manager.cache_blocks(" in inspect.getsource(learns)


def test_a_session_keeps_what_was_computed():
    """And on 0.33 all but the last token, even if a correction is under way."""
    source = inspect.getsource(Scheduler._update_request_as_session)
    if VLLM_0_32:
        assert "del session._all_token_ids[num_computed_tokens:]" in source
    else:
        assert "assert keep_end >= session.num_computed_tokens" in source
        assert "del session._all_token_ids[keep_end:]" in source


def test_a_request_sits_out_until_the_step_in_its_field():
    source = inspect.getsource(Scheduler.schedule)
    counts = source.index("self.current_step += 1")
    assert counts < source.index(
        "self.current_step < request.next_decode_eligible_step"
    )


def test_v2_takes_a_known_request_that_is_announced_again():
    source = inspect.getsource(V2ModelRunner.add_requests)
    removes = source.index("self._remove_request(req_id)")
    assert removes < source.index("num_computed_tokens=new_req_data.num_computed_token")
    assert "overwrite=True" in source
    made = parameters(NewRequestData.from_request)
    assert made[:3] == ["request", "block_ids", "prefill_token_ids"]
    assert "uses_mrope" in made


def test_a_coordinator_says_whether_parts_of_blocks_are_found():
    """scheduler.py refuses a method that would not see the copies of such blocks."""
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

    assert KVCacheCoordinator.enable_partial_hash_hits is False
