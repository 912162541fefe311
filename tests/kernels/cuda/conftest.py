import shutil

import pytest
import torch

from tests.kernels.cuda.emulator import CSRC, EMULATION, HERE, Emulator, built_once
from tests.kernels.cuda.gpu import Gpu
from tests.kernels.cuda.release import Release, build_release, build_sdist, copy_sources

WHERE = ["emulation", *(["gpu"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the CUDA kernels' source on the CPU")
    names = ("run.cpp", "emulated_device.cpp")
    sources = [*(HERE / "host" / name for name in names), *EMULATION, CSRC / "ops.cpp"]
    return built_once(tmp_path_factory, "run", sources)


@pytest.fixture(scope="module", params=WHERE)
def kernels_of_module(request):
    """The kernels' source on the CPU, and the extension where there is a GPU."""
    if request.param == "gpu":
        return Gpu()
    return Emulator(request.getfixturevalue("runner"))


@pytest.fixture
def kernels(kernels_of_module):
    return kernels_of_module


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    return build_sdist(copy_sources(folder / "sources"), folder / "out")


@pytest.fixture(scope="session")
def made(sdist, tmp_path_factory) -> Release:
    """The release with every target: a build of minutes, once for all tests of it."""
    return build_release(sdist, tmp_path_factory.mktemp("release"))
