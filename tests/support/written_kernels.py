"""Kernels as a GPU's are: they write into given tensors, and are told nothing else.

The reference ops behind the kernels' signatures, so that the engine's use of kernels
can be tested in fp32 and at speed. Outside what they must write they leave NaN.
"""

import dataclasses
import math
import sys
from contextlib import contextmanager

import pytest
import torch

from tidal_vllm.kernels import DecodeArgs, Kernels, Workspace, choosing, reference


def dense_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    _check(args, seq_lens)
    found = _result_of(reference.dense_decode, args, seq_lens)
    _write(args, seq_lens, found, output=True, block_lse=True)


def score_blocks(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    _check(args, seq_lens)
    found = _result_of(reference.score_blocks, args, seq_lens)
    _write(args, seq_lens, found, output=False, block_lse=True)


def sparse_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    _check(args, seq_lens)
    found = _result_of(reference.sparse_decode, args, seq_lens)
    _write(args, seq_lens, found, output=True, block_lse=False)


def select_blocks(args: DecodeArgs, seq_lens: torch.Tensor, rule) -> None:
    num_rows = seq_lens.shape[0]
    assert args.workspace.mass.shape[0] >= num_rows
    scratch = Workspace(
        lse=args.workspace.lse[:num_rows], block_lse=args.workspace.block_lse[:num_rows]
    )
    args = dataclasses.replace(args, workspace=scratch)
    reference.select_blocks(args, seq_lens, rule)


def _result_of(op, args: DecodeArgs, seq_lens: torch.Tensor) -> DecodeArgs:
    """What the reference makes of the same rows, in tensors of its own."""
    found = dataclasses.replace(
        args, output=torch.zeros_like(args.output), workspace=Workspace()
    )
    op(found, seq_lens)
    return found


def _check(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    assert (args.k_scale, args.v_scale) == (1.0, 1.0)
    num_rows, workspace = args.query.shape[0], args.workspace
    assert args.query.shape == args.output.shape
    assert seq_lens.shape[0] == num_rows <= workspace.lse.shape[0]
    partial_out, partial_lse = workspace.partials(num_rows)
    assert partial_out.shape[0] >= num_rows
    assert partial_out.shape[:-1] == partial_lse.shape
    for scratch in (workspace.lse, partial_out, partial_lse):
        scratch.fill_(math.nan)  # nothing outlives a layer


def _write(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    found: DecodeArgs,
    output: bool,
    block_lse: bool,
) -> None:
    """Copy all rows but those that are left out; of block_lse what a row has."""
    rows = (seq_lens >= 0).nonzero()[:, 0]
    args.workspace.lse[rows] = found.workspace.lse[rows]
    if output:
        args.output[rows] = found.output[rows]
    if block_lse:
        args.workspace.block_lse.fill_(math.nan)
        for row, seq_len in enumerate(seq_lens.tolist()):
            used = max(-(-seq_len // args.select_block_size), 0)
            sums = found.workspace.block_lse[row, :, :used]
            args.workspace.block_lse[row, :, :used] = sums


@contextmanager
def written_kernels():
    """Let `kernels = "triton"` of the configuration choose these."""
    made = Kernels("written", "for a test", sys.modules[__name__], capturable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choosing._CANDIDATES, "triton", lambda needed: ("", made))
        yield made
