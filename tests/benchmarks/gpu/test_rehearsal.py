"""The GPU run without a GPU: every step, each with its real script and arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.gpu.steps import STEPS
from tests.support.processes import child_environment

ROOT = Path(__file__).parents[3]
# Where every engine starts anew, minutes on a busy machine.
pytestmark = [pytest.mark.extended, pytest.mark.serial]


def rehearse(out: Path, steps: list[str]) -> list[dict]:
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", "--rehearse", "--out", out]
        + ["--steps", *steps],
        env=child_environment(PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = records.read(out / "results.jsonl")
    ended = {r["step"]: r["status"] for r in found if r["benchmark"] == "step"}
    assert ended == dict.fromkeys(steps, "passed")
    assert not [r for r in found if r.get("wrong") or "skipped" in r]
    assert {"results.jsonl", "run.log", "summary.md"} == set(os.listdir(out))
    return found


def test_the_kernels_need_no_vllm(tmp_path):
    found = rehearse(tmp_path, [step.name for step in STEPS if step.part == 1])
    ours = [r for r in found if r.get("right")]
    names = {(r["benchmark"], r["implementation"]) for r in ours}
    benches = ("attend", "select_blocks")
    assert names == {(b, name) for b in benches for name in ("cuda", "triton")} | {
        ("attend", "flash_attn"),
        ("stack", "flash_attn"),
        ("stack", "cuda"),
    }
    assert {r["op"] for r in ours if r["benchmark"] == "attend"} == {
        *("dense", "dense + block_lse", "score_blocks", "sparse")
    }


def test_the_engines(tmp_path):
    found = rehearse(tmp_path, [step.name for step in STEPS if step.part == 2])
    off, on = (r for r in found if r["benchmark"] == "planted")
    assert off["exact"] == on["exact"] == 8
    assert off["corrections"] == 0 < on["corrections"]
