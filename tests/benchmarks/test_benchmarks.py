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

from benchmarks.kernels import bench_stack, flash_attention, timing
from benchmarks.kernels.decode_batch import DecodeBatch, Shape, default_rule
from benchmarks.kernels.decoder import Decoder
from tests.support.models import build_random_model, byte_tokenizer
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


TRITON = ["--smoke", "--implementations", "triton", "--dtype", "float16"]
# Each GPU benchmark, and the lines of ours that it checks.
SCRIPTS = {
    "attend": (["kernels.bench_attend", *TRITON, "--select-blocks", "16", "4"], 8),
    "attend fp8": (["kernels.bench_attend", *TRITON, "--kv-cache-dtype", "fp8"], 4),
    "select": (["kernels.bench_select", *TRITON], 4),
    "stack": (["kernels.bench_stack", *TRITON], 4),
}


@pytest.fixture(scope="module")
def smoke() -> dict[str, str]:
    jobs = [(name, given) for (name, *given), _ in SCRIPTS.values()]
    jobs += [("kernels.bench_select", ["--implementations", "triton"])]
    interpreted = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    printed = run(*jobs, **interpreted)
    return dict(zip([*SCRIPTS, "without a GPU"], printed, strict=True))


@pytest.mark.extended
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(smoke, script):
    *lines, end = smoke[script].splitlines()
    assert end == "ended: 0", smoke[script]
    right = [line for line in lines if line.endswith("right")]
    ours = sum(line.startswith("triton ") for line in right)
    assert ours == SCRIPTS[script][1], smoke[script]
    if script == "stack":  # FlashAttention needs a GPU
        assert any(line.startswith("triton_attn all dense") for line in right)


@pytest.mark.extended
def test_nothing_is_timed_without_a_gpu(smoke):
    end = smoke["without a GPU"].splitlines()[-1]
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


@pytest.mark.extended
def test_engines_under_default_settings(tmp_path):
    """TIDAL without sparse layers stands in for FlashAttention."""
    folder = build_random_model(tmp_path, "llama")
    byte_tokenizer().save_pretrained(folder)
    given = [str(folder), "--baseline", "TIDAL", "--dtype", "float32"]
    given += ["--lengths", "60", "300", "--tokens", "6", "--token-budget", "64"]
    (printed,) = run(("gpu.default_settings", [*given, "--kv-cache-gib", "0.05"]))
    record, end = printed.splitlines()[-2:]
    assert end == "ended: 0", printed
    found = json.loads(record)
    assert found["equal"] == 2
    assert found["exact"]["counters"]["dense_steps"] == 5
    assert found["sparse"]["counters"]["sparse_steps"] == 5


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


ALONE = """
import argparse, os, sys
from benchmarks.kernels.alone import each_alone
def measure(name, args):
    print(name, args.size, flush=True)
    os._exit(139) if name == "breaks" else None
    return 0
parser = argparse.ArgumentParser()
parser.add_argument("--implementations", nargs="+")
parser.add_argument("--size", type=int)
sys.exit(each_alone(parser, ["one", "breaks", "other"], measure))
"""


@pytest.mark.parametrize(
    "given, status, printed",
    [
        ([], 139, ["one 3", "breaks 3", "other 3"]),
        (["--implementations", "other", "one"], 0, ["other 3", "one 3"]),
        (["--implementations", "none"], 2, []),
    ],
    ids=["all", "some", "unknown"],
)
def test_what_breaks_takes_no_other_implementation_along(
    tmp_path, given, status, printed
):
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    done = subprocess.run(
        [sys.executable, script, "--size", "3", *given],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.splitlines()) == (status, printed)


@pytest.fixture
def bench(tmp_path) -> timing.Bench:
    return timing.Bench("test", smoke=True, trials=1, out=tmp_path / "out.jsonl")


class TestCases:
    """A failure ends its own case."""

    @pytest.mark.parametrize("error", [AssertionError("off"), ValueError("no")])
    def test_a_failure_is_kept(self, bench, error):
        with bench.case({"batch": 1}, "cuda"):
            raise error
        (record,) = bench.records
        assert record["wrong"] == f"{type(error).__name__}: {error}"
        assert (record["batch"], bench.num_wrong) == (1, 1)

    def test_too_little_memory_is_nobodys_mistake(self, bench):
        with bench.case({}, "cuda"):
            raise torch.OutOfMemoryError("all taken")
        assert (bench.records[0].keys() & {"wrong", "skipped"}) == {"skipped"}

    def test_a_gpu_that_refuses_work_ends_the_process(self, bench, monkeypatch):
        def refuse() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        bench.device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "synchronize", refuse)
        with pytest.raises(SystemExit) as end, bench.case({}, "cuda"):
            raise RuntimeError("an illegal memory access was encountered")
        assert end.value.code == timing.POISONED
        assert "illegal" in bench.records[0]["wrong"]

    def test_a_stack_that_the_l2_may_hold_is_left_out(self, bench, monkeypatch):
        monkeypatch.setattr(timing.Bench, "l2_bytes", 1 << 30)
        args = SimpleNamespace(caches=2, layers=4, intervals=[1])
        case = {"batch": 1, "context": 96, "token_budget": 48}
        bench_stack._run(bench, Shape(4, 2, 32), case, "cuda", args)
        (record,) = bench.records
        assert record["skipped"].endswith("may be L2 hits")
        assert record["kv_caches"] == 2


def test_flash_attention_is_called_as_its_interface_says(monkeypatch):
    """The stand-in of a machine without a GPU takes nothing that it would refuse."""
    interface = SimpleNamespace(
        flash_attn_varlen_func=lambda q, k, v, out: None,
        get_scheduler_metadata=lambda batch_size: None,
    )
    found = flash_attention._stand_in(interface)
    with pytest.raises(TypeError, match="page_size"):
        found.schedule(batch_size=1, page_size=16)
    with pytest.raises(TypeError, match="softmax_scale"):
        found.attend(q=0, k=0, v=0, out=0, softmax_scale=1.0)


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
