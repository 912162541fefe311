"""What the extension covers can be asked where it is not built."""

import pytest
import torch

from tidal_vllm.kernels.cuda_limits import uncovered
from tidal_vllm.kernels.interface import Requirements

NEEDED = {
    "device": torch.device("cuda"),
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "select_block_size": 16,
}


def reason(monkeypatch, capability=(9, 0), **changes) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return uncovered(Requirements(**NEEDED | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_cache_dtype": "fp8"}, {"select_block_size": None}],
    ids=["good", "fp8", "nothing selected"],
)
def test_it_covers(monkeypatch, changes):
    assert reason(monkeypatch, **changes) == ""


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"dtype": torch.float32},
            "dtype = torch.float32: allowed torch.bfloat16, torch.float16",
        ),
        ({"head_size": 80}, "head_size = 80: allowed 64, 96, 128, 256"),
        (
            {"kv_cache_dtype": "float16"},
            "kv_cache_dtype = float16 beside torch.bfloat16: allowed 'auto'",
        ),
        (
            {"select_block_size": 24},
            "select_block_size = 24: allowed 1, 2, 4, 8 and multiples of 16",
        ),
        ({"capability": (7, 5)}, "compute capability 7.5: allowed 8.0 and above"),
    ],
    ids=["fp32", "head size", "cache", "block", "Turing"],
)
def test_it_says_what_it_does_not_cover(monkeypatch, changes, wanted):
    assert reason(monkeypatch, **changes).startswith(wanted)
