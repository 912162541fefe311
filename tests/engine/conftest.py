"""Models, made once for all tests."""

import dataclasses
from pathlib import Path

import pytest

from tests.engine.models import build_random_model


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory) -> Path:
    return build_random_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory) -> Path:
    return build_random_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """`planted(hops=2)` gives the spec and the model folder."""
    from tidal_vllm.planted import PlantedSpec, build_planted_model

    root = tmp_path_factory.mktemp("planted")

    def build(**fields):
        spec = PlantedSpec(**fields)
        name = "-".join(map(str, dataclasses.astuple(spec))).replace(" ", "")
        return spec, build_planted_model(root / name, spec)

    return build
