"""Small models and engines for calibration, closed at the end of each module."""

from pathlib import Path

import pytest
import torch

from tidal_vllm.calibrate.engine import (
    CalibrationEngine,
    complete_settings,
    engine_kwargs,
    switches,
)
from tidal_vllm.config import TidalConfig
from tidal_vllm.profiles import search

CONFIG = TidalConfig(token_budget=64)
SMALL = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 26, "block_size": 16}


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_a_project(tmp_path, monkeypatch):
    """An empty project folder, and no profiles of the user's."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(search, "USER_DIR", str(tmp_path / "user"))


@pytest.fixture
def vllm_in_a_project(vllm_here, in_a_project):
    """The same, with vLLM's environment read anew."""
    from vllm import envs

    envs.disable_envs_cache()


@pytest.fixture(scope="module")
def start_engine(vllm_here):
    """`start_engine(model, config)`: an engine for calibration, SELECT at layer 2."""
    from vllm import envs

    running = []

    def start(model: Path, config: TidalConfig = CONFIG) -> CalibrationEngine:
        settings = complete_settings(config, [0, 1], [2])
        running.append(CalibrationEngine(engine_kwargs(str(model), settings, **SMALL)))
        return running[-1]

    envs.disable_envs_cache()
    with switches():
        yield start
        for engine in running:
            engine.close()
