"""The GPU benchmarks run and check what they time; nothing is timed here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tidal_vllm import ops

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    more = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, FOLDER / script, *arguments],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize(
    ("script", "ours"),
    [("dense_decode", 2), ("sparse_decode", 3), ("select", 2), ("stack", 4)],
)
def test_smoke(script, ours, tmp_path):
    out = tmp_path / "out.jsonl"
    given = ["--smoke", "--kernels", "triton", "--dtype", "float16", "--out", out]
    done = run(f"bench_{script}.py", *given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    right = [line for line in lines if line.endswith("right")]
    assert sum(line.startswith("tidal triton") for line in right) == ours
    if script in ("dense_decode", "stack"):
        assert any(line.startswith("vllm TRITON_ATTN") for line in right)
    assert not out.exists()


def test_engines_with_dummy_weights(tmp_path):
    """TIDAL without sparse layers stands in for the dense backend of a GPU."""
    out = tmp_path / "out.jsonl"
    given = ["--dummy-weights", "--smoke", "--baseline", "TIDAL", "--out", out]
    done = run("decode_engine.py", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no graphs: 132 tokens of 2 sequences as dense" in done.stdout
    assert "2x96 tidal: " in done.stdout
    assert not out.exists()


def test_nothing_is_timed_without_a_gpu():
    done = run("bench_select.py")
    assert done.returncode == 1
    assert "no GPU here: only --smoke runs, and times nothing" in done.stderr


class TestChecks:
    """What is wrong is not timed."""

    @pytest.fixture
    def decoder(self, monkeypatch):
        monkeypatch.syspath_prepend(FOLDER)
        from paged_case import Case, Decoder, Shape, rule_of

        torch.manual_seed(0)
        case = Case.make(Shape(4, 2, 32, dtype="float32"), 2, 200, torch.device("cpu"))
        kernels = ops.choose("cpu", head_size=32, dtype=torch.float32)
        return Decoder(case, rule_of(64), kernels)

    def test_the_reference_is_right(self, decoder):
        decoder.check()

    @pytest.mark.parametrize("op", ["dense_decode", "sparse_decode"])
    def test_a_wrong_output_is_found(self, decoder, monkeypatch, op):
        stock = getattr(ops.Kernels, op)

        def wrong(self, *args, **more):
            stock(self, *args, **more)
            more["output"][1, 3, 7] += 0.05

        monkeypatch.setattr(ops.Kernels, op, wrong)
        with pytest.raises(AssertionError, match="off by"):
            decoder.check()

    def test_another_choice_is_found(self, decoder, monkeypatch):
        stock = ops.Kernels.select_blocks

        def wrong(self, *args, **more):
            stock(self, *args, **more)
            more["topk_blocks"][0, 0] = torch.arange(4)

        monkeypatch.setattr(ops.Kernels, "select_blocks", wrong)
        with pytest.raises(AssertionError):
            decoder.check()

    def test_a_wrong_block_lse_is_found(self, decoder, monkeypatch):
        stock = ops.Kernels.dense_decode

        def wrong(self, *args, **more):
            stock(self, *args, **more)
            if more["select_block_size"]:
                more["workspace"].block_lse[0, 1, 3] += 0.5

        monkeypatch.setattr(ops.Kernels, "dense_decode", wrong)
        with pytest.raises(AssertionError):
            decoder.check()
