"""Where the kernels run: under Triton's interpreter, on a GPU, or not in this process.

`test_interpreted.py` runs the parity tests in a process of its own, as Triton must be
told before its import; with a GPU, this process runs them too, for CUDA as well.
"""

import os
from types import ModuleType

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
collect_ignore_glob = [] if INTERPRETED or HAS_GPU else ["parity/*"]

if INTERPRETED:
    from tests.support.interpreter import patch_once

    patch_once()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session", params=["triton", "cuda"] if HAS_GPU else ["triton"])
def kernels(request: pytest.FixtureRequest, device: torch.device) -> ModuleType:
    """The module under test, with the four decode ops."""
    from tidal_vllm.kernels import choose

    needed = {"head_size": 128, "dtype": torch.bfloat16}
    try:
        return choose(device, requested=request.param, **needed).ops
    except ValueError as refused:
        if request.param == "triton":
            raise
        pytest.skip(str(refused))
