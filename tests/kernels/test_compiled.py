"""Without a GPU: the kernels compile for real ones, keep to registers, load in 16 B."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended
ROOT = Path(__file__).parents[2]
# Shared memory of one program, in bytes: two of them fit on sm_90, and the default of
# the other GPUs is not exceeded by much.
MOST_SHARED = {
    "sm_80": 80_000,
    "sm_90": 110_000,
    "sm_100": 110_000,
    "sm_120": 50_000,
    "gfx942": 65_536,
}


@pytest.mark.parametrize("target", MOST_SHARED)
def test_compiles(target, tmp_path):
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_child", target],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {line["kernel"] for line in lines}
    assert kernels == {"attend_split", "merge_splits", "weigh_blocks", "choose_blocks"}
    for line in lines:
        assert line["spills"] == 0, line
        assert line["shared"] <= MOST_SHARED[target], line
        if target == "gfx942":
            continue
        # Where K and V go straight into shared memory, the loads overlap with work.
        if line["kernel"] == "attend_split":
            assert line["async_16_bytes"] >= 4, line
        # All loads of up to 32 heads at once, in 16 bytes.
        if line["kernel"] == "weigh_blocks":
            assert line["loads_16_bytes"] >= 8, line
    if target == "sm_90":
        attends = [line for line in lines if line["kernel"] == "attend_split"]
        check_that_values_are_not_read(attends)
        check_that_small_blocks_cost_no_more(attends)
        check_the_page(attends)


def check_that_values_are_not_read(attends: list[dict]) -> None:
    """`score_blocks` loads K alone; with fp8, V takes another way than 16 bytes."""
    for setup in {line["setup"] for line in attends if "fp8" not in line["setup"]}:
        loads = {
            line["op"]: line["async_16_bytes"]
            for line in attends
            if line["setup"] == setup
        }
        keys_and_values = min(loads["dense_decode"], loads["sparse_decode"])
        assert 2 * loads["score_blocks"] <= keys_and_values, (setup, loads)


def check_that_small_blocks_cost_no_more(attends: list[dict]) -> None:
    """Per byte of KV: as many instructions and wide loads as with blocks of 16."""
    of = {(line["setup"], line["op"]): line for line in attends}
    for op in ("dense_decode", "score_blocks", "sparse_decode"):
        plain = of["d128", op]
        for size in (4, 2, 1):
            small = of[f"d128, blocks of {size}", op]
            assert 0 < small["instructions"] <= 1.05 * plain["instructions"], small
            assert small["async_16_bytes"] == plain["async_16_bytes"], small


def check_the_page(attends: list[dict]) -> None:
    """The counts of docs/triton.md, within what another release of Triton changes."""
    page = (ROOT / "docs/triton.md").read_text()
    table = re.search(r"<!-- table: sm_90 -->\n(.*?)<!-- end", page, re.DOTALL)[1]
    of = {(line["setup"], line["op"]): line["instructions"] for line in attends}
    head, _, *rows = (
        [cell.strip(" `") for cell in row.strip("|").split("|")]
        for row in table.splitlines()
    )
    assert len(rows) == 5
    for setup, *counts in rows:
        for op, count in zip(head[1:], counts, strict=True):
            found = of[setup, op]
            assert abs(int(count) - found) <= 0.1 * found, (setup, op, found)
