"""What the scheduler counts, and what it says with vLLM's periodic statistics."""

import logging

import pytest
from vllm import envs

from tests.support.asking import generate, sampling_params
from tests.support.drifting import SPARSE
from tests.support.engines import scheduler
from tests.support.models import random_prompt
from tests.support.watching import correcting
from tidal_vllm.engine.metrics import CorrectionCounters

PROMPT = random_prompt(80, seed=3)


@pytest.fixture
def llm(small_engine):
    return small_engine(SPARSE, disable_log_stats=False)


def test_polluted_tokens_now(llm):
    engine, core, seen = llm.llm_engine, scheduler(llm), []
    with correcting(llm, 6) as counters:
        engine.add_request("r", {"prompt_token_ids": PROMPT}, sampling_params(16))
        while engine.has_unfinished_requests():
            engine.step()
            seen.append(core.num_polluted_tokens())
    assert seen == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert counters == CorrectionCounters(1, 6, 8)


def test_without_correction(llm):
    with correcting(llm, None) as counters:
        generate(llm, [PROMPT], 16)
    assert counters == CorrectionCounters(0, 0, 15)


def test_logged_beside_vllms_statistics(llm, monkeypatch):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    ours = logging.getLogger("vllm.tidal.scheduler")
    ours.addHandler(handler)
    core = scheduler(llm)
    try:
        with correcting(llm, 6):
            monkeypatch.setattr(core, "_last_log", (-1e9, CorrectionCounters()))
            generate(llm, [PROMPT], 16)
            assert len(lines) == 0 or "Polluted" in lines[0]
            lines.clear()
            monkeypatch.setattr(envs, "VLLM_LOG_STATS_INTERVAL", 0.0, raising=False)
            generate(llm, [PROMPT], 16)
            logged = lines.copy()
        with correcting(llm, None):
            lines.clear()
            generate(llm, [PROMPT], 16)
    finally:
        ours.removeHandler(handler)
    assert (
        "Corrections: 2, Corrected tokens: 12, Longest polluted run: 8, "
        "Polluted tokens now: 7" in logged
    )
    assert lines == [], "of corrections that are off"
