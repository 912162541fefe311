"""Which implementation of the decode ops runs: chosen once, at start-up, with a reason.

What the ops mean stands in `tidal_vllm.kernels.reference`.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch

from tidal_vllm.config import KERNELS
from tidal_vllm.extension import advise, how_to_build, stale
from tidal_vllm.kernels import cuda_limits, reference
from tidal_vllm.kernels.interface import Kernels, Requirements
from tidal_vllm.validators import TidalConfigError, check_choice


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

    "auto" takes the CUDA extension where it is built and covers what is needed, else
    Triton, else the reference; on the CPU always the reference.

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
    needed = Requirements(
        torch.device(device), head_size, dtype, kv_cache_dtype, select_block_size
    )
    if requested != "auto":
        reason, kernels = _CANDIDATES[requested](needed)
        if kernels is None:
            allowed = f"{reason}; allowed here: {_able(needed)}"
            raise TidalConfigError("tidal.kernels", requested, allowed)
        return kernels
    names = ("reference",) if needed.device.type == "cpu" else tuple(_CANDIDATES)
    reasons: list[str] = []
    for name in names:
        reason, kernels = _CANDIDATES[name](needed)
        if kernels is not None:
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            reason = kernels.reason + passed_over
            advice = kernels.advice or _advise(needed)
            return replace(kernels, reason=reason, advice=advice)
        reasons.append(reason)
    allowed = f"no implementation covers this set-up: {'; '.join(reasons)}"
    raise TidalConfigError("tidal.kernels", requested, allowed)


def describe(device: torch.device | str) -> Kernels:
    """What would run on a device for an ordinary model, for the doctor."""
    return choose(device, head_size=128, dtype=torch.bfloat16)


def _advise(needed: Requirements) -> str:
    """How to build the CUDA extension where it is missing and would be used."""
    if not _is_nvidia(needed.device):
        return ""
    module, reason = _load("tidal_vllm.kernels.cuda")
    if module is not None or cuda_limits.uncovered(needed):
        return ""
    return advise(reason)


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


def _able(needed: Requirements) -> str:
    able = [name for name, offer in _CANDIDATES.items() if offer(needed)[1] is not None]
    return ", ".join(map(repr, ["auto", *able] if able else ["none"]))


def _offer_cuda(needed: Requirements) -> tuple[str, Kernels | None]:
    if not _is_nvidia(needed.device):
        return f"the CUDA extension needs an NVIDIA GPU, not {needed.device.type}", None
    module, reason = _load("tidal_vllm.kernels.cuda")
    if module is None:
        return f"the CUDA extension is not built: {reason}", None
    reason = cuda_limits.uncovered(needed)
    if reason:
        return f"the CUDA extension does not cover {reason}", None
    reason = module.cannot_run(needed)
    if reason:
        return f"the CUDA extension does not run here: {reason}", None
    outdated = stale()
    advice = f"{outdated}. This builds it: {how_to_build()}" if outdated else ""
    return "", Kernels("cuda", "CUDA extension", module, True, advice)


def _offer_triton(needed: Requirements) -> tuple[str, Kernels | None]:
    module, reason = _load("tidal_vllm.kernels.triton.ops")
    if module is None:
        return f"Triton cannot be imported: {reason}", None
    reason = module.uncovered(needed)
    if reason:
        return f"the Triton kernels do not cover {reason}", None
    where = "interpreter (CPU)" if needed.device.type == "cpu" else needed.device.type
    return "", Kernels("triton", f"Triton kernels on {where}", module, capturable=True)


def _offer_reference(needed: Requirements) -> tuple[str, Kernels | None]:
    if needed.cache_dtype is None:
        reason = (
            f"the reference ops do not read kv_cache_dtype = {needed.kv_cache_dtype}"
        )
        return reason, None
    if needed.device.type == "cpu":
        return "", Kernels("reference", "PyTorch reference ops (CPU)", reference)
    return "", Kernels(
        "reference",
        f"PyTorch reference ops on {needed.device.type}: correct, not fast, "
        "without CUDA graphs, and not yet run on a GPU",
        reference,
    )


_CANDIDATES: dict[str, Callable[[Requirements], tuple[str, Kernels | None]]] = {
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
