"""Fixtures that several files of this folder use as they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.support.engines import Engines
from tests.support.written_kernels import written_kernels
from tidal_vllm.kernels import Kernels


@pytest.fixture(scope="module")
def llm(request: pytest.FixtureRequest, engine: Engines, random_llama: Path) -> LLM:
    """An engine under the test module's `ENGINE_SETTINGS`.

    Prompts arrive in chunks of 128 tokens, beside decodes.
    """
    settings = request.module.ENGINE_SETTINGS
    return engine(random_llama, tidal=settings, max_num_batched_tokens=128)


@pytest.fixture
def written() -> Iterator[Kernels]:
    """The kernels of `tests/support/written_kernels.py`, as `kernels = "triton"`."""
    with written_kernels() as made:
        yield made


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """The model whose fixture a test names as parameter, or else `random_llama`."""
    return request.getfixturevalue(getattr(request, "param", "random_llama"))
