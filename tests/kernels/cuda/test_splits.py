"""csrc/splits.h against plain Python: how many splits a batch and its rows get."""

import itertools
import subprocess

import pytest

from benchmarks.model import splits
from tests.kernels.cuda.emulator import CSRC, FLAGS
from tidal_vllm.kernels import workspace

PROGRAM = r"""
#include <cstdio>
#include "splits.h"
int main() {
  int n, m, processors, capacity, at_least, sparse;
  while (std::scanf("%d %d %d %d %d %d", &n, &m, &processors, &capacity, &at_least,
                    &sparse) == 6) {
    std::printf("%d\n",
                tidal::limit_splits(n, m, processors, capacity, at_least, sparse));
  }
  return 0;
}
"""
BATCHES = (1, 2, 3, 4, 7, 8, 9, 12, 16, 17, 24, 33, 53, 64, 72, 100, 128, 500, 65535)


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    """csrc/splits.h by many arguments at once."""
    folder = tmp_path_factory.mktemp("splits")
    source, program = folder / "splits.cpp", folder / "splits"
    source.write_text(PROGRAM)
    subprocess.run(["g++", *FLAGS, f"-I{CSRC}", source, "-o", program], check=True)

    def run(cases) -> list[int]:
        asked = "\n".join(" ".join(map(str, map(int, case))) for case in cases)
        done = subprocess.run(
            [program], input=asked, capture_output=True, text=True, check=True
        )
        return list(map(int, done.stdout.split()))

    return run


def test_the_performance_model_has_the_rule_of_the_kernels(limits):
    cases = [
        (rows, blocks, processors, capacity, at_least, sparse)
        for rows, blocks, processors in itertools.product(
            BATCHES, (1, 2, 8, 40), (1, 108, 132)
        )
        for capacity in (1, 3, splits.workspace_splits(rows))
        for at_least, sparse in ((8, False), (1, True))
    ]
    assert limits(cases) == [splits.limit_splits(*case) for case in cases]


def test_the_performance_model_has_the_workspaces_room():
    for rows in (0, *BATCHES):
        assert splits.workspace_splits(rows) == workspace.num_splits(rows)
