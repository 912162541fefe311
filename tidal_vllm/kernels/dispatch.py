"""Which implementation of the decode ops runs: chosen once, at start-up, with a reason.

What the ops mean stands in `reference`. The CUDA extension and the Triton kernels have
the same four functions, which write into given tensors; `Kernels` gives all of them one
face.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from tidal_vllm.config import KERNELS
from tidal_vllm.kernels import reference
from tidal_vllm.kernels.cuda_build import advise
from tidal_vllm.kernels.workspace import Workspace
from tidal_vllm.validators import TidalConfigError, check_choice

FP8_CACHES = ("fp8", "fp8_e4m3")
_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What the ops will be asked for, as far as an implementation may care."""

    device: torch.device
    head_size: int
    dtype: torch.dtype
    kv_cache_dtype: str
    """As in vLLM's configuration: "auto" is `dtype`."""
    select_block_size: int | None = None

    @property
    def fp8(self) -> bool:
        return self.kv_cache_dtype in FP8_CACHES

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """The KV cache's, where it is one of torch's plain floats."""
        if self.kv_cache_dtype == "auto":
            return self.dtype
        return _CACHE_DTYPES.get(self.kv_cache_dtype)


@dataclass(frozen=True)
class Kernels:
    """The decode ops of one engine; the reference's, or those of a module of kernels.

    A row of a negative length is left out: what an op writes keeps that row as it was.
    So several ops can share a batch and its output, and the device decides, within one
    CUDA graph, which rows are whose.

    Attributes:
        name: "reference", "triton" or "cuda".
        why: One line for the doctor and the start-up table.
        advice: What would make faster kernels run here, and how; mostly empty.
        module: Has dense_decode, score_blocks, select_blocks and sparse_decode over
            given tensors; None for the reference.
    """

    name: str
    why: str
    module: ModuleType | None = None
    advice: str = ""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the ops; the reference reads lengths."""
        return self.module is not None

    def allocate_workspace(
        self,
        max_num_seqs: int,
        num_heads: int,
        num_sets: int,
        head_size: int,
        max_blocks: int,
        device: torch.device,
    ) -> Workspace:
        """What these kernels need of `Workspace.allocate`; the reference: nothing."""
        if self.module is None:
            return Workspace()
        return Workspace.allocate(
            max_num_seqs, num_heads, num_sets, head_size, max_blocks, device
        )

    def dense_decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        output: torch.Tensor,
        workspace: Workspace,
        select_block_size: int | None = None,
    ) -> None:
        """`reference.dense_decode` into output, workspace.lse and workspace.block_lse.

        Args:
            query: [num_seqs, num_heads, head_size].
            k_scale, v_scale: What an fp8 cache's numbers are multiplied by; else 1.
            output: As query; written.
            select_block_size: Tokens; None leaves workspace.block_lse alone.
        """
        if self.module is None:
            found, workspace.lse, block_lse = reference.dense_decode(
                query,
                kv_cache,
                block_table,
                seq_lens,
                scale=scale,
                select_block_size=select_block_size,
            )
            _write_rows(found, seq_lens, output)
            if select_block_size is not None:
                workspace.block_lse = block_lse
            return
        num_seqs = query.shape[0]
        self.module.dense_decode(
            query,
            kv_cache,
            block_table,
            seq_lens,
            output,
            workspace.lse[:num_seqs],
            None if select_block_size is None else workspace.block_lse[:num_seqs],
            *workspace.partials(num_seqs),
            scale,
            k_scale,
            v_scale,
            select_block_size or 1,
        )

    def score_blocks(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        scale: float,
        k_scale: float = 1.0,
        workspace: Workspace,
        select_block_size: int,
    ) -> None:
        """`reference.score_blocks` into workspace.lse and workspace.block_lse.

        What `dense_decode` leaves for `select_blocks`, for half of the bytes.
        """
        if self.module is None:
            workspace.lse, workspace.block_lse = reference.score_blocks(
                query,
                kv_cache,
                block_table,
                seq_lens,
                scale=scale,
                select_block_size=select_block_size,
            )
            return
        num_seqs = query.shape[0]
        _, partial_lse = workspace.partials(num_seqs)
        self.module.score_blocks(
            query,
            kv_cache,
            block_table,
            seq_lens,
            workspace.lse[:num_seqs],
            workspace.block_lse[:num_seqs],
            partial_lse,
            scale,
            k_scale,
            select_block_size,
        )

    def select_blocks(
        self,
        seq_lens: torch.Tensor,
        *,
        rule,
        workspace: Workspace,
        topk_blocks: torch.Tensor,
        topk_lens: torch.Tensor,
    ) -> None:
        """`reference.select_blocks` of what `dense_decode` or `score_blocks` left.

        Args:
            rule: `tidal_vllm.plan.policy.SelectionRule`, or anything with its fields.
            topk_blocks: [>= num_seqs, num_sets, max_blocks] int32, written.
            topk_lens: [>= num_seqs, num_sets] int32, written.
        """
        if self.module is None:
            reference.select_blocks(
                workspace.block_lse,
                workspace.lse,
                seq_lens,
                rule=rule,
                topk_blocks=topk_blocks,
                topk_lens=topk_lens,
            )
            return
        num_seqs = seq_lens.shape[0]
        self.module.select_blocks(
            workspace.block_lse[:num_seqs],
            workspace.lse[:num_seqs],
            seq_lens,
            topk_blocks,
            topk_lens,
            workspace.mass,
            rule.token_budget,
            rule.select_block_size,
            rule.sink_tokens,
            rule.recent_tokens,
            rule.sparse_threshold,
        )

    def sparse_decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        topk_blocks: torch.Tensor,
        topk_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        output: torch.Tensor,
        workspace: Workspace,
        select_block_size: int,
    ) -> None:
        """`reference.sparse_decode` into output and workspace.lse.

        Args:
            topk_blocks: [>= num_seqs, num_sets, max_blocks] int32.
            topk_lens: [>= num_seqs, num_sets] int32.
            output: As query; written.
        """
        num_seqs = query.shape[0]
        if self.module is None:
            found, workspace.lse = reference.sparse_decode(
                query,
                kv_cache,
                block_table,
                topk_blocks[:num_seqs],
                topk_lens[:num_seqs],
                seq_lens,
                scale=scale,
                select_block_size=select_block_size,
            )
            _write_rows(found, seq_lens, output)
            return
        self.module.sparse_decode(
            query,
            kv_cache,
            block_table,
            topk_blocks,
            topk_lens,
            seq_lens,
            output,
            workspace.lse[:num_seqs],
            *workspace.partials(num_seqs),
            scale,
            k_scale,
            v_scale,
            select_block_size,
        )


def _write_rows(
    found: torch.Tensor, seq_lens: torch.Tensor, output: torch.Tensor
) -> None:
    """Copy all rows but those that are left out."""
    rows = seq_lens >= 0
    output[rows] = found[rows]


def choose(
    device: torch.device | str,
    *,
    requested: str = "auto",
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str = "auto",
    select_block_size: int | None = None,
) -> Kernels:
    """Choose the implementation of one engine.

    "auto" takes the CUDA extension where it is built and covers the case, else Triton,
    else the reference; on the CPU always the reference.

    Args:
        requested: `kernels` of the configuration.
        dtype: The query's.
        kv_cache_dtype: vLLM's word for the cache's.
        select_block_size: Tokens; None where nothing is selected.

    Raises:
        TidalConfigError: What was asked for cannot run; the message says why, and for
            "auto" why nothing can.
    """
    check_choice("tidal.kernels", requested, KERNELS)
    case = Case(
        torch.device(device), head_size, dtype, kv_cache_dtype, select_block_size
    )
    if requested != "auto":
        reason, kernels = _CANDIDATES[requested](case)
        if kernels is None:
            allowed = f"{reason}; allowed here: {_able(case)}"
            raise TidalConfigError("tidal.kernels", requested, allowed)
        return kernels
    names = ("reference",) if case.device.type == "cpu" else tuple(_CANDIDATES)
    reasons = []
    for name in names:
        reason, kernels = _CANDIDATES[name](case)
        if kernels is not None:
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            why = kernels.why + passed_over
            return replace(kernels, why=why, advice=_advise(case.device))
        reasons.append(reason)
    allowed = f"no implementation covers this set-up: {'; '.join(reasons)}"
    raise TidalConfigError("tidal.kernels", requested, allowed)


def describe(device: torch.device | str) -> Kernels:
    """What would run on a device for an ordinary model, for the doctor."""
    return choose(device, head_size=128, dtype=torch.bfloat16)


def _advise(device: torch.device) -> str:
    """How to build the CUDA extension where it could run, and cannot be loaded."""
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    module, reason = _load("tidal_vllm.kernels.cuda")
    return "" if module is not None else advise(reason)


def _able(case: Case) -> str:
    able = [name for name, offer in _CANDIDATES.items() if offer(case)[1] is not None]
    return ", ".join(map(repr, ["auto", *able] if able else ["none"]))


def _offer_cuda(case: Case) -> tuple[str, Kernels | None]:
    if case.device.type != "cuda" or torch.version.cuda is None:
        return f"the CUDA extension needs an NVIDIA GPU, not {case.device.type}", None
    module, reason = _load("tidal_vllm.kernels.cuda")
    if module is None:
        return f"the CUDA extension is not built: {reason}", None
    reason = module.why_not(case)
    if reason:
        return f"the CUDA extension does not cover {reason}", None
    return "", Kernels("cuda", "CUDA extension", module)


def _offer_triton(case: Case) -> tuple[str, Kernels | None]:
    module, reason = _load("tidal_vllm.kernels.triton.ops")
    if module is None:
        return f"Triton cannot be imported: {reason}", None
    reason = module.why_not(case)
    if reason:
        return f"the Triton kernels do not cover {reason}", None
    where = "interpreter (CPU)" if case.device.type == "cpu" else case.device.type
    return "", Kernels("triton", f"Triton kernels on {where}", module)


def _offer_reference(case: Case) -> tuple[str, Kernels | None]:
    if case.cache_dtype is None:
        reason = f"the reference ops do not read kv_cache_dtype = {case.kv_cache_dtype}"
        return reason, None
    if case.device.type == "cpu":
        return "", Kernels("reference", "PyTorch reference ops (CPU)")
    return "", Kernels(
        "reference",
        f"PyTorch reference ops on {case.device.type}: correct, not fast, "
        "without CUDA graphs, and not yet run on a GPU",
    )


_CANDIDATES: dict[str, Callable[[Case], tuple[str, Kernels | None]]] = {
    "cuda": _offer_cuda,
    "triton": _offer_triton,
    "reference": _offer_reference,
}


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """A module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError) as error:
        return None, str(error).splitlines()[0] if str(error) else repr(error)
