"""Engines and models, made once per session."""

from pathlib import Path

import pytest

from tests.engine.correction.harness import core, engine_kwargs, generate, scheduler
from tests.engine.correction.models import build_random_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return build_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def engines(engine, model):
    """`engines(tidal, **kwargs)`: an idle engine of this process, its cache empty."""

    def find(tidal=None, folder=model, **kwargs):
        llm = engine(folder, **engine_kwargs(tidal, **kwargs))
        assert not scheduler(llm).requests
        return llm

    return find


@pytest.fixture(scope="session")
def dense(engines):
    """`dense(prompts, max_tokens, ...)`: dense answers, greedy by default.

    Args:
        max_tokens: Of each answer, or a list, one for each prompt.
    """
    llm = engines(max_num_seqs=16)
    assert not hasattr(core(llm).scheduler, "correction_interval")
    known: dict[str, list[int]] = {}

    def answer(prompts, max_tokens=16, **more):
        if isinstance(max_tokens, int):
            max_tokens = [max_tokens] * len(prompts)
        keys = [f"{prompt} {sorted(more.items())}" for prompt in prompts]
        asked = {}
        for key, prompt, count in zip(keys, prompts, max_tokens, strict=True):
            if count > max(len(known.get(key, ())), asked.get(key, ("", 0))[1]):
                asked[key] = prompt, count
        llm.reset_prefix_cache()
        found = (
            generate(llm, *zip(*asked.values(), strict=True), **more) if asked else []
        )
        known.update(zip(asked, found, strict=True))
        return [known[key][:n] for key, n in zip(keys, max_tokens, strict=True)]

    return answer
