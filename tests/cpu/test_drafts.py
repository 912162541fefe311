"""The PyTorch kernels around drafts give what vLLM's Triton kernels give."""

from collections import Counter

import pytest

from tests.support.draft_kernels_child import SEEDS
from tests.support.processes import run_interpreted
from tidal_vllm.cpu import drafts

pytestmark = [pytest.mark.extended, pytest.mark.compat]


def test_kernels_agree_with_vllms():
    log = run_interpreted("tests.support.draft_kernels_child", v2_runner=False)
    seen = Counter(line for line in log.splitlines() if line.startswith("same "))
    names = [path.rpartition(".")[2] for path in drafts.kernels()]
    assert seen == {f"same {name}": len(SEEDS) for name in names}
