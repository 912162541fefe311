"""Engines and models, made once per session."""

import gc
import json
from pathlib import Path

import pytest

from .harness import core, engine_kwargs, generate, scheduler, start
from .models import build_random_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return build_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def engines(model):
    """`engines(tidal, **kwargs)`: an idle engine of this process, its cache empty.

    All are kept: the end of one would take vLLM's process groups from the others.
    """
    running = {}

    def find(tidal=None, folder=model, **kwargs):
        settings = [str(folder), engine_kwargs(tidal, **kwargs)]
        key = json.dumps(settings, sort_keys=True)
        if key not in running:
            running[key] = start(folder, tidal, **kwargs)
        llm = running[key]
        assert not scheduler(llm).requests
        assert llm.reset_prefix_cache(), "blocks are in use: a request never ended"
        return llm

    yield find
    gc.freeze()  # each engine collects garbage twice, which takes seconds
    for llm in running.values():
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def dense(engines):
    """`dense(prompts, max_tokens, ...)`: dense greedy answers, each run alone."""
    llm = engines()
    assert not hasattr(core(llm).scheduler, "correction_interval")
    known = {}

    def answer(prompts, max_tokens=16, **more):
        found = []
        for prompt in prompts:
            key = json.dumps([prompt, max_tokens, more], sort_keys=True)
            if key not in known:
                llm.reset_prefix_cache()
                (known[key],) = generate(llm, [prompt], max_tokens, **more)
            found.append(known[key])
        return found

    return answer
