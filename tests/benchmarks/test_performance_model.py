"""The model of the kernels: its laws, what it was fitted to, and its page."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.model import __main__ as command
from benchmarks.model import (
    audit,
    design,
    machine_code,
    measured,
    page,
    splits,
    targets,
)
from benchmarks.model.attend import dense_decode, score_blocks, sparse_decode
from benchmarks.model.hardware import GPUS, SHAPES
from benchmarks.model.select import select_blocks
from benchmarks.model.step import decode_step, plan_of
from benchmarks.model.thread_blocks import Block, Kernel, run_blocks
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.steps import kv_read_share

ROOT = Path(__file__).parents[2]
H100, LLAMA = GPUS["h100"], SHAPES["llama-3.1-8b"]
DESIGNS = (design.AUDITED, design.TODAY, design.TRITON_AUDITED, design.TRITON)


@pytest.mark.parametrize("compared", audit.compare(), ids=lambda c: c.what)
def test_the_audited_kernels_take_what_the_audit_modelled(compared):
    """Within 10 %. The figures are from an audit of the kernels' machine code."""
    assert abs(compared.off) <= 0.1


@pytest.mark.parametrize(
    "case", measured.compare(), ids=lambda c: f"{c.kernels} {c.op}, {c.case}"
)
def test_the_kernels_take_what_an_h100_measured(case):
    """Within 10 %. Where the model was further off, constants were fitted to it."""
    assert abs(case.now / case.us - 1) <= 0.1


def test_the_inputs_are_what_an_h100_measured():
    found = records.read(measured.MEASURED)
    for record in found:
        if record.get("query") == "bandwidth":
            assert math.isclose(
                H100.read_tb_per_s, record["read_tb_per_s"], rel_tol=0.01
            )
            assert math.isclose(
                H100.copy_tb_per_s, record["copy_tb_per_s"], rel_tol=0.01
            )
        if record.get("query") == "empty graph":
            assert math.isclose(H100.empty_graph_us, record["median_us"], rel_tol=0.01)
        if record.get("implementation") == "flash_attn" and record["op"] == "dense":
            share = targets.FA_SHARES.get((record["batch"], record["context"]))
            assert share is None or abs(share - record["share_of_read"]) < 0.005


def test_the_tables_of_the_page_are_the_models():
    """`python -m benchmarks.model --write-page` makes them anew."""
    text = page.PAGE.read_text()
    assert text == page.written(text, page.tables())


def test_a_page_without_a_place_for_a_table_is_refused():
    with pytest.raises(ValueError, match="no <!-- table: targets -->"):
        page.written("<!-- table: inputs -->\n<!-- end of table -->", {"targets": ""})


# Thread blocks, by hand: 10 us before, 5 us after, 100 bytes per us to share.
SLOW = Kernel(resident=1, before_us=10, after_us=5, empty_us=2)


@pytest.mark.parametrize(
    ("blocks", "changes", "processors", "us", "tail"),
    [
        ([1000], {}, 1, 25, 0),
        ([1000, 1000], {}, 1, 50, 0),  # one after the other
        ([1000, 1000], {}, 2, 35, 0),  # they share
        ([1000, 1000], {"resident": 2}, 1, 35, 0),
        ([1000, 3000], {}, 2, 55, 20),  # the first ends at 35, the other has all then
        ([1000, 1000], {"block_rate": 40}, 2, 40, 0),
        ([0, 0, 1000], {}, 1, 29, 0),  # two blocks without work, 2 us each
    ],
    ids=[
        *("alone", "two waves", "two processors", "two on one", "tail", "block's rate"),
        "empty blocks",
    ],
)
def test_thread_blocks_by_hand(blocks, changes, processors, us, tail):
    kernel = dataclasses.replace(SLOW, **changes)
    run = run_blocks([Block(b) for b in blocks], kernel, processors, 100, spread=0)
    assert math.isclose(run.us, us)
    assert math.isclose(run.tail_us, tail)
    busy = sum(b > 0 for b in blocks)
    assert run.waves == busy / (processors * kernel.resident)


def test_only_the_last_block_of_a_unit_joins():
    kernel = dataclasses.replace(SLOW, join_us=7)
    blocks = [Block(1000, 0), Block(1000, 0), Block(1000, -1)]
    assert math.isclose(run_blocks(blocks, kernel, 1, 100, spread=0).us, 3 * 25 + 7)


def ops(gpu, kernels, shape, lens, block=16):
    yield dense_decode(gpu, kernels, shape, lens, block)
    yield score_blocks(gpu, kernels, shape, lens, block)
    yield sparse_decode(gpu, kernels, shape, lens, block)
    yield select_blocks(gpu, kernels, shape, lens, block)


@pytest.mark.parametrize("kernels", DESIGNS, ids=lambda d: d.name)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda g: g.name)
def test_no_op_undercuts_its_bytes_and_a_launch(gpu, kernels):
    for shape in (LLAMA, SHAPES["llama-3-70b"]):
        for rows, tokens in ((1, 512), (5, 4096), (16, 32768)):
            for op in ops(gpu, kernels, shape, (tokens,) * rows, 4):
                num_bytes = op.kv_bytes or op.other_bytes
                least = num_bytes / gpu.read_tb_per_s / 1e6 + gpu.launch_us
                assert op.us >= least, op
                assert op.share_of_read(gpu) < gpu.gather_share


@pytest.mark.parametrize("kernels", DESIGNS, ids=lambda d: d.name)
def test_a_longer_context_takes_longer(kernels):
    for rows in (1, 4):
        found = [
            [op.us for op in ops(H100, kernels, LLAMA, (1024 << i,) * rows)]
            for i in range(8)
        ]
        for shorter, longer in zip(found, found[1:], strict=False):
            assert all(s <= t for s, t in zip(shorter, longer, strict=True)), rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"token_budget": 3264, "select_block_size": 4},
        {"select_attends": "everything"},
        {"reselect_interval": 4},
        {"select_attends": "everything", "reselect_interval": 4},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "default",
)
@pytest.mark.parametrize("tokens", [2048, 32768, 131067])
@pytest.mark.parametrize("shape", [LLAMA, SHAPES["qwen3-8b"]], ids=lambda s: s.name)
def test_a_steps_bytes_are_the_share_that_the_plan_promises(shape, tokens, settings):
    config = TidalConfig(**settings)
    step = decode_step(H100, design.TODAY, shape, (tokens,) * 2, config, 0.85)
    wanted = kv_read_share(plan_of(shape, config), config, tokens)
    assert math.isclose(step.kv_bytes / step.dense_kv_bytes, wanted)


def test_no_even_sparse_batch_loses_by_todays_splits():
    """More than 2 %, over the splits that the audit found slow for small batches."""
    old = dataclasses.replace(design.TODAY, limit_splits=splits.limit_audited)
    for rows in (*range(1, 40), 40, 48, 53, 64, 72, 100, 128):
        lens = (4096,) * rows
        now, before = (sparse_decode(H100, d, LLAMA, lens) for d in (design.TODAY, old))
        assert now.us <= 1.02 * before.us, rows


@pytest.fixture
def counts(tmp_path):
    """Writes a file of counts, one entry with these changes."""
    entry = {
        "kernel": "sparse_decode",
        "stored": "bf16",
        "head_size": 128,
        "arch": "sm_90a",
        "select_block_size": None,
        "instructions_per_tile": 5000,
        "tile_bytes": 8192,
        "blocks_per_processor": 1,
        "shared_bytes": 101376,
    }

    def write(**changes) -> Path:
        made = {k: v for k, v in (entry | changes).items() if v != "left out"}
        path = tmp_path / "counts.json"
        path.write_text(json.dumps([made]))
        return path

    return write


def test_counted_instructions_are_what_is_predicted_with(counts):
    slow = design.today(counts())
    assert slow.loops["sparse_decode", "bf16", None].source == "counted, counts.json"
    lens = (4096,) * 16
    as_guessed = sparse_decode(H100, design.TODAY, LLAMA, lens)
    assert sparse_decode(H100, slow, LLAMA, lens).us > 2 * as_guessed.us
    assert dense_decode(H100, slow, LLAMA, lens) == dense_decode(
        H100, design.TODAY, LLAMA, lens
    )
    # Of blocks of 4 alone.
    small = design.today(counts(kernel="dense_decode", select_block_size=4))
    assert dense_decode(H100, small, LLAMA, lens, 4).us > 2 * as_guessed.us
    other = machine_code.read_loops(counts(head_size=64))
    assert other == machine_code.PROTOTYPE == machine_code.read_loops(Path("nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_bytes": "left out"}, r"entry 0 lacks \['tile_bytes'\]"),
        ({"instructions_per_tile": 0}, "instructions_per_tile = 0: allowed > 0"),
    ],
    ids=["a key", "a count"],
)
def test_counts_that_cannot_be_are_refused(counts, changes, message):
    with pytest.raises(ValueError, match=message):
        machine_code.read_loops(counts(**changes))


def test_what_the_command_says_is_marked_as_a_models(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command.main(["--batch", "2", "--context", "8192", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A MODEL'S NUMBERS, not measured")
    record = json.loads(out.read_text())
    assert record["source"] == "model, not measured"
    assert record["step_us"] < record["dense_us"]
    assert {op["op"] for op in record["ops"]} == {
        *("FlashAttention", "score_blocks", "select_blocks", "sparse_decode")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fa-share", "1.5"], "--fa-share: 1.5: allowed above 0, at most 1"),
        (["--batch", "0"], "--batch: 0: allowed integers from 1"),
        (["--budget", "100"], "tidal.token_budget = 100"),
        (["--fp8", "--kernels", "triton"], "--kernels triton: allowed with CUDA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    assert message in capsys.readouterr().err + str(refused.value)


def test_it_needs_no_torch():
    lines = "import sys, benchmarks.model.__main__; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
