"""What the SELECT and SPARSE layers of an engine share, and what runs the layers."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, max_decode_query_len
from vllm.v1.attention.selector import AttentionSelectorConfig

from tidal_vllm.config import TidalConfig
from tidal_vllm.engine.dense import choose_dense_backend
from tidal_vllm.engine.draft_choice import DraftChoice
from tidal_vllm.engine.ranks import agreeing_ranks
from tidal_vllm.engine.reuse import EveryStep, Reuse
from tidal_vllm.engine.selection import Selection
from tidal_vllm.kernels import Kernels, Workspace, choose
from tidal_vllm.kernels.interface import FP8_CACHES
from tidal_vllm.methods.base import Method, create_method
from tidal_vllm.plan.resolve import Startup, resolve
from tidal_vllm.plan.rule import num_sets
from tidal_vllm.plan.steps import draft_selection_indices, selection_indices
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import TidalConfigError

# Most bytes that the kernels' workspace may take. Where the longest sequences are many
# or very long it holds a part of the batch only, and layers go over the batch in parts.
WORKSPACE_LIMIT = 512 << 20


@dataclass(frozen=True)
class SparseState:
    """What the SELECT and SPARSE layers of an engine work with, at fixed addresses.

    Allocated with the first attention layer, so that vLLM's memory profiling counts it.
    """

    kernels: Kernels
    workspace: Workspace
    """Scratch of one layer, for `max_part_rows` rows at a time."""
    selection: Selection
    method: Method
    """Fills the selection in SELECT layers."""
    reuse: EveryStep
    """Says in each step which rows choose; a `Reuse` where selections hold longer."""
    selection_index: dict[int, int]
    """Index in `selection` of what a layer writes or reads, by the layer's index."""
    max_part_rows: int
    """Decode rows that fit into the workspace."""
    drafts: DraftChoice | None = None
    """What drafts attend to, in lossless mode."""

    @classmethod
    def allocate(
        cls,
        startup: Startup,
        kernels: Kernels,
        vllm_config: VllmConfig,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device,
    ) -> "SparseState":
        """Allocate for the layers of one worker.

        Args:
            num_heads, num_kv_heads: Of this rank.
        """
        config, rule = startup.config, startup.rule
        max_rows, drafts = max_num_decode_tokens(vllm_config), None
        if config.draft_tokens is not None:  # a row of each request drafts
            max_rows = vllm_config.scheduler_config.max_num_seqs
            drafts = DraftChoice.allocate(config.draft_tokens, max_rows, device)
        max_blocks = rule.num_blocks(vllm_config.model_config.max_model_len)
        sets = num_sets(config.scope, num_heads, num_kv_heads)

        def workspace(num_rows: int, device: torch.device) -> Workspace:
            return kernels.allocate_workspace(
                num_rows, num_heads, sets, head_size, max_blocks, device
            )

        part_rows, nowhere = max_rows, torch.device("meta")
        while part_rows > 1 and workspace(part_rows, nowhere).nbytes > WORKSPACE_LIMIT:
            part_rows = -(-part_rows // 2)
        stage = vllm_config.model_config.get_layers_start_end_indices(
            vllm_config.parallel_config
        )
        interval = config.reselect_interval
        if drafts is None:
            indices = selection_indices(startup.plan, range(*stage), interval)
        else:
            indices = draft_selection_indices(startup.plan, range(*stage))
        selection = Selection.allocate(
            len({*indices.values()}),
            max_rows,
            sets,
            min(config.max_blocks, max_blocks),
            device,
        )
        keeps = interval > 1
        return cls(
            kernels=kernels,
            workspace=workspace(part_rows, device),
            selection=selection,
            method=create_method(
                config,
                rule,
                kernels,
                agreeing_ranks(config, vllm_config, num_heads, num_kv_heads),
            ),
            reuse=Reuse.allocate(interval, max_rows, device) if keeps else EveryStep(),
            selection_index=indices,
            max_part_rows=part_rows,
            drafts=drafts,
        )

    def __str__(self) -> str:
        selection, workspace = (
            f"{buffers.nbytes / 2**20:.1f} MiB"
            for buffers in (self.selection, self.workspace)
        )
        if not self.workspace.nbytes:
            return f"selection {selection}"
        rows = f"{self.max_part_rows} query tokens at a time"
        return f"selection {selection}, workspace {workspace} for {rows}"


def require_one_state(impls: dict[str, Any]) -> None:
    """SPARSE layers need the selection of SELECT layers: one for all of a worker."""
    names = list(impls)
    for name in names:
        if impls[name].state is not impls[names[0]].state:
            shapes = [
                f"{i.num_heads} query and {i.num_kv_heads} KV heads of {i.head_size}"
                for i in (impls[names[0]], impls[name])
            ]
            raise ValueError(
                f"{names[0]} has {shapes[0]}, {name} {shapes[1]}: sparse decoding "
                "needs full-attention layers of one shape; allowed for other models "
                "tidal.select_layers = []"
            )


def max_num_decode_tokens(vllm_config: VllmConfig) -> int:
    """Query tokens of a step's decodes at most: one per sequence, and its drafts."""
    per_sequence = max_decode_query_len(vllm_config)
    return vllm_config.scheduler_config.max_num_seqs * per_sequence


def choose_implementations(
    vllm_config: VllmConfig,
    head_size: int,
    kv_cache_dtype: str,
    has_sliding_window: bool = False,
) -> tuple[Kernels | None, type[AttentionBackend]]:
    """The kernels of SELECT and SPARSE layers, and the backend of everything else.

    Returns:
        No kernels where no layer is sparse.

    Raises:
        ValueError: Nothing covers the layer; says why.
    """
    startup, dtype = resolve(vllm_config), vllm_config.model_config.dtype
    kernels = None
    if startup.plan.sparse:
        kernels = _kernels_of(startup.config, head_size, dtype, kv_cache_dtype)
    layer = (head_size, kv_cache_dtype, has_sliding_window)
    return kernels, dense_backend_of(vllm_config, *layer, kernels)


def dense_backend_of(
    vllm_config: VllmConfig,
    head_size: int,
    kv_cache_dtype: str,
    has_sliding_window: bool,
    kernels: Kernels | None,
) -> type[AttentionBackend]:
    """The backend of a layer's dense attention.

    Args:
        kernels: Of the engine's SELECT and SPARSE layers, if there are any.

    Raises:
        ValueError: Nothing covers the layer; says why.
    """
    asked = AttentionSelectorConfig(
        head_size,
        vllm_config.model_config.dtype,
        kv_cache_dtype,
        block_size=None,
        has_sliding_window=has_sliding_window,
    )
    return choose_dense_backend(asked, kernels)


def _kernels_of(
    config: TidalConfig, head_size: int, dtype: torch.dtype, kv_cache_dtype: str
) -> Kernels:
    """The kernels that the configuration asks for, if its method can read the cache."""
    if METHODS[config.method].follows_keys and kv_cache_dtype in FP8_CACHES:
        allowed = (
            "reads the keys itself, in their own dtype, but kv_cache_dtype = "
            f"{kv_cache_dtype}: must be another method, or kv_cache_dtype be 'auto'"
        )
        raise TidalConfigError("tidal.method", config.method, allowed)
    return choose(
        current_platform.device_type,
        requested=config.kernels,
        head_size=head_size,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        select_block_size=config.select_block_size,
    )
