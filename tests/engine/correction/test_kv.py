"""The KV of a live engine: drifting under sparse layers, dense once corrected."""

import pytest
import torch

from tests.support.asking import generate, sampling_params
from tests.support.drifting import BLOCK_SIZE, SPARSE
from tests.support.engines import scheduler
from tests.support.kv import kv_in, kv_of, relative_errors
from tests.support.models import random_prompt
from tests.support.watching import correcting

INTERVAL = 24
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
TOLERANCE = TOLERANCES["float32"]
PROMPT = random_prompt(100, seed=1)
# Layers behind the first SPARSE one: their input depends on what it saw.
DRIFTING = slice(3, None)


@pytest.fixture(scope="module")
def dense_kv(small_engine):
    """`dense_kv(tokens)`: KV that dense layers write for these tokens."""

    def compute(token_ids, dtype="float32"):
        llm = small_engine(max_num_batched_tokens=1024, dtype=dtype)
        core = scheduler(llm)
        engine = llm.llm_engine
        request = {"prompt_token_ids": token_ids}
        engine.add_request("dense", request, sampling_params(2))
        engine.step()
        (running,) = core.running
        blocks = core.kv_cache_manager.get_block_ids(running.request_id)[0]
        kv = kv_in(llm, list(blocks), 0, len(token_ids))
        engine.abort_request(["dense"])
        while core.requests:
            engine.step()
        return kv

    return compute


def snapshots(llm, interval, prompt=PROMPT, max_tokens=40):
    """Per step: tokens so far, the clean position, and the KV of all positions."""
    engine, found = llm.llm_engine, []
    core = scheduler(llm)
    with correcting(llm, interval):
        request = {"prompt_token_ids": prompt}
        engine.add_request("r", request, sampling_params(max_tokens))
        while engine.has_unfinished_requests():
            before = core.correction_counters.corrections
            engine.step()
            for request in core.running:
                computed = request.num_computed_tokens
                kv = kv_of(llm, request.request_id, 0, computed)
                tokens = list(request.all_token_ids)[:computed]
                corrected = core.correction_counters.corrections > before
                found.append((tokens, core.clean_position(request), kv, corrected))
    return found


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("max_num_batched_tokens", [256, 16], ids=["one", "split"])
def test_corrected_kv_is_dense(small_engine, dense_kv, max_num_batched_tokens, dtype):
    kwargs = {"max_num_batched_tokens": max_num_batched_tokens, "dtype": dtype}
    llm = small_engine(SPARSE, **kwargs)
    steps = snapshots(llm, INTERVAL)
    start = len(PROMPT)
    end = start + INTERVAL
    (after,) = [i for i, step in enumerate(steps) if step[1] == end + 1][:1]
    polluted = [i for i in range(after) if steps[i][1] == start][-1]
    tokens, clean, kv, _ = steps[after]
    assert clean == len(tokens)
    wanted = dense_kv(tokens, dtype)

    drifted_tokens, _, drifted, _ = steps[polluted]
    assert len(drifted_tokens) == end
    assert after - polluted == (1 if max_num_batched_tokens > end else 2)
    before = relative_errors(drifted[:, start:end], wanted[:, start:end])
    now = relative_errors(kv[:, start:end], wanted[:, start:end])
    everything = relative_errors(kv, wanted)
    print("before", before.tolist(), "after", now.tolist())
    assert kv.dtype is getattr(torch, dtype)
    assert everything.max() < TOLERANCES[dtype]
    assert now.max() < TOLERANCES[dtype]
    assert (before[DRIFTING] > 0.01).all()
    assert (before[DRIFTING] > 10 * now[DRIFTING]).all()


def test_without_correction_kv_stays_polluted(small_engine, dense_kv):
    llm = small_engine(SPARSE)
    tokens, clean, kv, _ = snapshots(llm, None)[-1]
    assert clean == len(PROMPT)
    errors = relative_errors(kv[:, clean:], dense_kv(tokens)[:, clean:])
    assert (errors[DRIFTING] > 0.01).all()


def test_clean_kv_is_dense_at_every_step(small_engine, dense_kv):
    """What the scheduler calls clean is what dense layers write, at any time."""
    llm = small_engine(SPARSE)
    steps = snapshots(llm, 5, max_tokens=60)
    wanted = dense_kv(steps[-1][0])
    ends = set()
    for _, clean, kv, _ in steps:
        errors = relative_errors(kv[:, :clean], wanted[:, :clean])
        assert errors.max() < TOLERANCE
        ends.add(clean)
    assert len(ends) >= 9


def test_decoded_tokens_of_a_short_sequence_are_clean(small_engine, dense_kv):
    """Up to the budget all blocks are kept: nothing is polluted, nothing corrected."""
    llm = small_engine(SPARSE)
    steps = snapshots(llm, 3, prompt=random_prompt(12, seed=2), max_tokens=19)
    tokens, clean, kv, _ = steps[-1]
    assert clean == len(tokens) == 29
    assert not any(corrected for *_, corrected in steps)
    assert relative_errors(kv, dense_kv(tokens)).max() < TOLERANCE


def test_nothing_is_computed_on_polluted_kv_and_called_clean(small_engine, dense_kv):
    """A correction in chunks of 4, 1 and 4: the single token runs as a decode."""
    llm = small_engine(SPARSE, max_num_batched_tokens=16)
    core = scheduler(llm)
    budget, seen = core.max_num_scheduled_tokens, []
    try:
        engine = llm.llm_engine
        with correcting(llm, 8):
            engine.add_request("r", {"prompt_token_ids": PROMPT}, sampling_params(40))
            while engine.has_unfinished_requests():
                split = core.running and core.running[0].is_prefill_chunk
                squeezed = split and core.max_num_scheduled_tokens == 4
                core.max_num_scheduled_tokens = 1 if squeezed else 4
                if not core.running or not core.running[0].num_output_tokens:
                    core.max_num_scheduled_tokens = budget
                engine.step()
                for request in core.running:
                    clean = core.clean_position(request)
                    kv = kv_of(llm, request.request_id, 0, clean)
                    seen.append((list(request.all_token_ids), clean, kv))
    finally:
        core.max_num_scheduled_tokens = budget
    wanted = dense_kv(seen[-1][0])
    for _, clean, kv in seen:
        assert relative_errors(kv, wanted[:, :clean]).max() < TOLERANCE


def test_kv_helper_reads_what_the_engine_wrote(small_engine, dense_kv):
    """The proofs above would pass on zeros: the cache must depend on the tokens."""
    one, other = (dense_kv(random_prompt(BLOCK_SIZE * 3, seed=i)) for i in (1, 2))
    assert relative_errors(one, other).min() > 0.5
    assert torch.equal(one, dense_kv(random_prompt(BLOCK_SIZE * 3, seed=1)))
    assert generate(small_engine(), [PROMPT], 1)
