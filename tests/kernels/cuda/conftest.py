import shutil

import pytest

from .emulator import Emulator, compile_runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the CUDA kernels' source on the CPU")
    return compile_runner(tmp_path_factory.mktemp("cuda") / "run")


@pytest.fixture
def emulator(runner):
    return Emulator(runner)
