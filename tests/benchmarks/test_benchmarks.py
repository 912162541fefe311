"""The GPU benchmarks run and check what they time; nothing is timed here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels.decode_batch import DecodeBatch, Decoder, Shape, default_rule
from tidal_vllm.kernels import DecodeArgs, choose, reference

ROOT = Path(__file__).parents[2]
# Runs several scripts in one process: modules and arguments, as JSON.
RUN = """
import json, runpy, sys
for module, arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    print("script:", module, flush=True)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("ended:", end.code, flush=True)
"""


def run(*scripts: tuple[str, list[str]], **env: str) -> list[str]:
    """What each script printed, with how it ended in the last line."""
    jobs = [(f"benchmarks.{name}", arguments) for name, arguments in scripts]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(jobs)],
        env=os.environ | env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split("script: ")[1:]


# Each GPU benchmark, and the lines of ours that it checks.
SCRIPTS = {"dense_decode": 2, "sparse_decode": 3, "select": 2, "stack": 4}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    out = tmp_path_factory.mktemp("smoke") / "out.jsonl"
    given = ["--smoke", "--kernels", "triton", "--dtype", "float16", "--out", str(out)]
    jobs = [(f"kernels.bench_{name}", given) for name in SCRIPTS]
    jobs += [("kernels.bench_select", [])]
    interpreted = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    printed = run(*jobs, **interpreted)
    return out, dict(zip([*SCRIPTS, "without a GPU"], printed, strict=True))


@pytest.mark.extended
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(smoke, script):
    out, printed = smoke
    *lines, end = printed[script].splitlines()
    assert end == "ended: 0", printed[script]
    right = [line for line in lines if line.endswith("right")]
    assert sum(line.startswith("tidal triton") for line in right) == SCRIPTS[script]
    if script in ("dense_decode", "stack"):
        assert any(line.startswith("vllm TRITON_ATTN") for line in right)
    assert not out.exists()


@pytest.mark.extended
def test_nothing_is_timed_without_a_gpu(smoke):
    end = smoke[1]["without a GPU"].splitlines()[-1]
    assert end == "ended: no GPU here: only --smoke runs, and times nothing"


@pytest.mark.extended
def test_engines_with_dummy_weights(tmp_path):
    """TIDAL without sparse layers stands in for the dense backend of a GPU."""
    out = tmp_path / "out.jsonl"
    given = ["--dummy-weights", "--smoke", "--baseline", "TIDAL", "--out", str(out)]
    (printed,) = run(("engine.decode_engine", given))
    assert printed.endswith("ended: 0\n"), printed
    assert "no graphs: 132 tokens of 2 sequences as dense" in printed
    assert "2x96 tidal: " in printed
    assert not out.exists()


def spoil_after(decoder: Decoder, op: str, spoil: Callable[[DecodeArgs], None]) -> None:
    """Spoil what an op of the decoder leaves, and not what the oracle's leaves."""
    names = ("dense_decode", "score_blocks", "select_blocks", "sparse_decode")
    found = {name: getattr(reference, name) for name in names}
    stock = found[op]

    def spoilt(args: DecodeArgs, *more) -> None:
        stock(args, *more)
        spoil(args)

    found[op] = spoilt
    decoder.kernels = replace(decoder.kernels, ops=SimpleNamespace(**found))


class TestChecks:
    """What is wrong is not timed."""

    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        shape = Shape(4, 2, 32, dtype="float32")
        decodes = DecodeBatch.make(shape, 2, 200, torch.device("cpu"))
        kernels = choose("cpu", head_size=32, dtype=torch.float32)
        return Decoder(decodes, default_rule(64), kernels)

    def test_the_reference_is_right(self, decoder):
        decoder.check()

    @pytest.mark.parametrize("op", ["dense_decode", "sparse_decode"])
    def test_a_wrong_output_is_found(self, decoder, op):
        def spoil(args: DecodeArgs) -> None:
            args.output[1, 3, 7] += 0.05

        spoil_after(decoder, op, spoil)
        with pytest.raises(AssertionError, match="off by"):
            decoder.check()

    def test_another_choice_is_found(self, decoder):
        def spoil(args: DecodeArgs) -> None:
            args.topk_blocks[0, 0] = torch.arange(4)

        spoil_after(decoder, "select_blocks", spoil)
        with pytest.raises(AssertionError):
            decoder.check()

    def test_a_wrong_block_lse_is_found(self, decoder):
        def spoil(args: DecodeArgs) -> None:
            if args.select_block_size is not None:
                args.workspace.block_lse[0, 1, 3] += 0.5

        spoil_after(decoder, "dense_decode", spoil)
        with pytest.raises(AssertionError):
            decoder.check()
