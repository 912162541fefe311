"""The planted model that all servers and scripts here answer with."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tidal_vllm.planted import PlantedSpec


class Served(NamedTuple):
    spec: PlantedSpec
    folder: Path


@pytest.fixture(scope="package")
def served(planted) -> Served:
    return Served(*planted(num_layers=6))
