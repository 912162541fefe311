"""Where the kernels run: under Triton's interpreter, on a GPU, or not in this process.

`test_interpreted.py` runs the parity tests in a process of its own, as Triton must be
told before its import; with a GPU, this process runs them too, for CUDA as well.
"""

import os

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
def kernels(request, device):
    """The module under test: the four decode ops over given tensors."""
    from tidal_vllm import kernels as ops

    case = {"head_size": 128, "dtype": torch.bfloat16}
    try:
        return ops.choose(device, requested=request.param, **case).module
    except ValueError as refused:
        if request.param == "triton":
            raise
        pytest.skip(str(refused))
