"""The emulation: its instructions, the mistakes that it finds, any order of threads."""

import re
import subprocess
from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.cases import (
    KernelCase,
    assert_lse,
    exact_of,
    make_sets,
    run_dense,
    run_score,
    run_sparse,
)
from tests.kernels.cuda.emulator import (
    EMULATION,
    HERE,
    Emulator,
    built_once,
    sanitized_environment,
)
from tests.kernels.cuda.test_select_blocks import masses, select
from tests.support.rules import rule_of

pytestmark = pytest.mark.extended

SAYS = {
    "copy, wait, barrier, read": "ok",
    "mma": "ok",
    "ldmatrix": "ok",
    "e4m3 by shifts": "ok",
    "division": "ok",
    "a cache of too many units": r"kv_cache.size\(0\) is 2096129; allowed: .*512 bytes",
    "read without a barrier": "ldmatrix without a barrier after wait_copies",
    "end without a wait": "copies that nobody waited for",
    "copy from an odd address": "not a multiple of 16",
    "ballot that some lanes skip": "deadlock: .* at ballot",
    "two instructions at once": "while other lanes are at",
    "barrier that a warp skips": "deadlock: .* at sync_block",
    "shared memory past its end": "AddressSanitizer: heap-buffer-overflow",
    "publish, fence, barrier, count": "ok",
    "publish without a fence": "0 of 128 are seen",
    "count before all threads have fenced": "[0-9]+ of 128 are seen",
    "published numbers by an ordinary load": "0 of 128 are seen",
    "read before the wait for earlier kernels": "AddressSanitizer: use-after-poison",
    "never wait for earlier kernels": "the end without wait_for_earlier_kernels",
    "let later kernels start first": "let_later_kernels_start without wait_for_earlier",
}


@pytest.fixture(scope="session")
def self_test(tmp_path_factory):
    sources = [HERE / "host/self_test.cpp", *EMULATION]
    return built_once(tmp_path_factory, "self_test", sources)


@pytest.mark.parametrize("name", SAYS)
def test_it_says(self_test, name):
    done = subprocess.run(
        [str(self_test), name],
        capture_output=True,
        text=True,
        env=sanitized_environment(),
    )
    assert re.search(SAYS[name], done.stdout + done.stderr), done.stdout + done.stderr


def test_score_blocks_reads_no_byte_of_v(runner):
    """The last token's V lies outside the memory, as a read by dense_decode shows."""
    case = KernelCase(2, 1, 64, lens=(64,))
    batch = case.make()
    keys = batch.keys[0][:, 0].contiguous()
    overlapping = keys.new_zeros(65, 64).as_strided((4, 1, 16, 128), (1024, 64, 64, 1))
    overlapping.as_strided((64, 64), (64, 1)).copy_(keys)
    overlapping.untyped_storage().resize_(keys.nbytes)
    in_order = torch.arange(4, dtype=torch.int32)[None]
    batch = replace(batch, kv_cache=overlapping, block_table=in_order)
    kernels = Emulator(runner)
    got = run_score(kernels, batch, case, poison=False)
    assert_lse(got, exact_of(batch, case), batch)
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        run_dense(kernels, batch, case)


# Thread blocks and threads run in order, in reverse, and in three random orders.
SCHEDULES = (0, 1, 2, 3, 4)


def each_order(runner, results):
    first = None
    for schedule in SCHEDULES:
        now = results(Emulator(runner, schedule))
        if first is None:
            first = now
        for a, b in zip(now, first, strict=True):
            assert torch.equal(a, b), f"schedule {schedule}"


@pytest.mark.parametrize("size", [1, 32])
def test_dense_decode_in_any_order_of_threads(runner, size):
    """Three splits, of eight heads: so every warp leaves some of a split's result."""
    case = KernelCase(
        8, 1, 64, lens=(1300, -1, 33), select_block_size=size, block_size=32
    )
    batch = case.make()

    def results(kernels):
        got = run_dense(kernels, batch, case)
        return got["output"], got["lse"], got["block_lse"].nan_to_num(7.0)

    each_order(runner, results)


def test_splits_are_added_in_their_own_order(runner):
    """Four splits that weigh alike; any order but theirs loses one of the 2.0."""
    case = KernelCase(1, 1, 64, lens=(2048,), splits=4)
    batch = case.make()
    batch = replace(batch, query=torch.zeros_like(batch.query))
    of_splits = torch.tensor([2.0**30, -(2.0**30), 2.0, 2.0])
    of_blocks = of_splits.repeat_interleave(32).to(batch.kv_cache.dtype)
    blocks = batch.block_table[0, :128].long()
    batch.kv_cache[blocks, 0, :, 64:] = of_blocks[:, None, None]
    for schedule in SCHEDULES:
        kernels = Emulator(runner, schedule)
        assert (run_dense(kernels, batch, case)["output"] == 1.0).all(), schedule


def test_score_blocks_in_any_order_of_threads(runner):
    case = KernelCase(4, 2, 256, fp8=True, lens=(1300, -1, 33))
    batch = case.make()

    def results(kernels):
        got = run_score(kernels, batch, case)
        return got["lse"], got["block_lse"].nan_to_num(7.0)

    each_order(runner, results)


@pytest.mark.parametrize(
    "case", [KernelCase(4, 2, 256), KernelCase(4, 2, 96, fp8=True)], ids=str
)
def test_sparse_decode_in_any_order_of_threads(runner, case):
    case = KernelCase(**{**vars(case), "lens": (300, 40, 0, -1)})
    batch = case.make()
    blocks, lens = make_sets(batch, case, "kv_head")

    def results(kernels):
        got = run_sparse(kernels, batch, case, blocks, lens)
        return got["output"], got["lse"]

    each_order(runner, results)


@pytest.mark.parametrize("heads, blocks, levels", [(16, 1500, 50), (2, 17000, 4096)])
def test_select_blocks_in_any_order_of_threads(runner, heads, blocks, levels):
    """Of heads that threads share; of more masses than one round of them takes."""
    rule = rule_of(300, 1, 2, 9)
    lens = [blocks, -1, blocks * 3 // 5]
    mass = masses(3, heads, blocks, levels=levels)
    each_order(
        runner, lambda kernels: select(kernels, mass, lens, rule, num_sets=2)[1:]
    )
