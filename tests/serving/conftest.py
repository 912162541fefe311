"""The planted model that all servers and scripts here answer with."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tidal_vllm.planted import PlantedSpec, build_planted_model


class Planted(NamedTuple):
    spec: PlantedSpec
    folder: Path


@pytest.fixture(scope="package")
def planted(tmp_path_factory) -> Planted:
    spec = PlantedSpec(num_layers=6)
    folder = tmp_path_factory.mktemp("planted") / "model"
    return Planted(spec, build_planted_model(folder, spec))
