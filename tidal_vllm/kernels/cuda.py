"""The decode ops of the CUDA extension, `csrc/`; cannot be imported where not built.

`tidal_vllm.kernels.arguments` says what the ops take, `tidal_vllm.kernels.reference`
what they compute. The kernels allocate nothing and never wait for the GPU, so a CUDA
graph can hold them. Results are the same bits from run to run, and those of a row do
not depend on the other rows. The kernels' source is tested under an emulation on the
CPU (tests/kernels/cuda), and was on an H100 (docs/gpu_results.md).

Of what `DecodeArgs` allows, the extension takes:
    query: bf16 or fp16, last dim contiguous; head_size 64, 96, 128 or 256.
    kv_cache: query's dtype, or fp8 e4m3 (float8_e4m3fn or uint8); all strides but the
        last are multiples of 16 bytes, the last is 1.
    select_block_size: 1, 2, 4, 8 or a multiple of 16 where block_lse is written.
Preconditions, which only the device could check: block_table and block_lse have room
for seq_lens, topk_blocks holds no negative block among the topk_lens first, and
workspace.arrivals and workspace.digit_counts hold zeros. Ops that share a workspace run
one after the other.

A wrong argument raises a ValueError, which names the argument, its value and what is
allowed.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch

from tidal_vllm.extension import LIBRARY
from tidal_vllm.kernels.arguments import DecodeArgs, Rule
from tidal_vllm.kernels.interface import Requirements

if not LIBRARY.exists():
    raise ImportError(f"{LIBRARY.name} is not in {LIBRARY.parent}")
try:
    torch.ops.load_library(LIBRARY)
except OSError as error:
    raise ImportError(f"{LIBRARY} cannot be loaded: {error.__cause__}") from error


def _in_order(op: Any) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """The function that puts arguments, given by name, into the order of op's schema.

    PyTorch needs about half as much time again for a call with keywords.
    """
    return itemgetter(*(argument.name for argument in op.default._schema.arguments))


# One schema serves the three ops that attend: AttendArguments of csrc/arguments.h.
_in_order_to_attend = _in_order(torch.ops.tidal.dense_decode)
_in_order_to_select = _in_order(torch.ops.tidal.select_blocks)


def cannot_run(needed: Requirements) -> str:
    """Why this GPU or its driver does not run the kernels that are needed; or "".

    Asks the driver, as a launch would: one older than the CUDA that the extension was
    built with refuses, and so does a GPU that the extension has no code for.
    """
    dtype = str(needed.dtype).removeprefix("torch.")
    stored = "float8_e4m3fn" if needed.fp8 else dtype
    index = needed.device.index
    if index is None:
        index = torch.cuda.current_device()
    try:
        for op in ("dense_decode", "score_blocks", "sparse_decode", "select_blocks"):
            torch.ops.tidal.occupancy(op, dtype, stored, needed.head_size, index)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@torch.library.register_fake("tidal::dense_decode")
@torch.library.register_fake("tidal::score_blocks")
@torch.library.register_fake("tidal::sparse_decode")
@torch.library.register_fake("tidal::select_blocks")
def _write_only(*args: object) -> None:
    """What a compiler sees: the written tensors keep their shapes."""


def dense_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Attend each row to its whole sequence: `reference.dense_decode`.

    Raises:
        ValueError: An argument is not as the module says.
    """
    _attend(
        torch.ops.tidal.dense_decode,
        args,
        seq_lens,
        output=args.output,
        block_lse=_wanted_block_lse(args),
    )


def score_blocks(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Leave the lse and block_lse of `dense_decode`, without V.

    Raises:
        ValueError: An argument is not as the module says.
    """
    _attend(
        torch.ops.tidal.score_blocks,
        args,
        seq_lens,
        block_lse=_wanted_block_lse(args),
    )


def sparse_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Attend each row to its chosen blocks: `reference.sparse_decode`.

    Raises:
        ValueError: An argument is not as the module says, or num_sets neither divides
            nor is divided by the number of KV heads.
    """
    _attend(
        torch.ops.tidal.sparse_decode,
        args,
        seq_lens,
        output=args.output,
        topk_blocks=args.topk_blocks,
        topk_lens=args.topk_lens,
    )


def select_blocks(args: DecodeArgs, seq_lens: torch.Tensor, rule: Rule) -> None:
    """Choose the blocks of each row's sets: `reference.select_blocks`.

    Raises:
        ValueError: An argument is not as the module says, or the rule's forced tokens
            may not fit its budget.
    """
    workspace = args.workspace
    given = {
        "block_lse": workspace.block_lse,
        "lse": workspace.lse,
        "seq_lens": seq_lens[: args.query.shape[0]],
        "topk_blocks": args.topk_blocks,
        "topk_lens": args.topk_lens,
        "mass": workspace.mass,
        "arrivals": workspace.arrivals,
        "digit_counts": workspace.digit_counts,
        "token_budget": rule.token_budget,
        "select_block_size": rule.select_block_size,
        "sink_tokens": rule.sink_tokens,
        "recent_tokens": rule.recent_tokens,
        "sparse_threshold": rule.sparse_threshold,
    }
    torch.ops.tidal.select_blocks(*_in_order_to_select(given))


def _wanted_block_lse(args: DecodeArgs) -> torch.Tensor | None:
    """The block_lse to write; None where nothing is selected."""
    return None if args.select_block_size is None else args.workspace.block_lse


def _attend(
    op: Callable[..., None],
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    *,
    output: torch.Tensor | None = None,
    block_lse: torch.Tensor | None = None,
    topk_blocks: torch.Tensor | None = None,
    topk_lens: torch.Tensor | None = None,
) -> None:
    """Call one of the three ops that attend."""
    workspace = args.workspace
    partial_out, partial_lse = workspace.partials(args.query.shape[0])
    given = {
        "query": args.query,
        "kv_cache": args.kv_cache,
        "block_table": args.block_table,
        "seq_lens": seq_lens,
        "lse": workspace.lse,
        "partial_lse": partial_lse,
        "arrivals": workspace.arrivals,
        "scale": args.scale,
        "k_scale": args.k_scale,
        "v_scale": args.v_scale,
        "select_block_size": args.select_block_size,
        "output": output,
        "partial_out": None if output is None else partial_out,
        "block_lse": block_lse,
        "topk_blocks": topk_blocks,
        "topk_lens": topk_lens,
    }
    op(*_in_order_to_attend(given))
