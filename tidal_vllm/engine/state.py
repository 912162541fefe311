"""What the SELECT and SPARSE layers of an engine share, and what runs the layers."""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, max_decode_query_len
from vllm.v1.attention.selector import AttentionSelectorConfig

from tidal_vllm.engine.dense import choose_dense_backend
from tidal_vllm.engine.selection import Reuse, Selection
from tidal_vllm.kernels import Kernels, Workspace, choose
from tidal_vllm.plan.policy import choices_of_layers, num_sets
from tidal_vllm.plan.resolve import Startup, resolve

# Most bytes that the kernels' workspace may take. Where the longest sequences are many
# or very long it holds a part of the batch only, and layers go over the batch in parts.
WORKSPACE_LIMIT = 256 << 20


@dataclass(frozen=True)
class SparseState:
    """What the SELECT and SPARSE layers of an engine work with, at fixed addresses.

    Allocated with the first attention layer, so that vLLM's memory profiling counts it.
    """

    kernels: Kernels
    workspace: Workspace
    """Scratch of one layer, for `rows_per_pass` rows at a time."""
    selection: Selection
    reuse: Reuse | None
    """None where SELECT layers choose in every step."""
    choices: dict[int, int]
    """Index of the choice in `selection` that a layer writes or reads, by layer."""
    attends_to_chosen: bool
    """Whether SELECT layers attend to what they chose, not to everything."""
    rows_per_pass: int

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
        config, rule = startup.config, startup.rule
        num_rows = max_decode_rows(vllm_config)
        longest = rule.num_blocks(vllm_config.model_config.max_model_len)
        sets = num_sets(config.scope, num_heads, num_kv_heads)
        shape = (num_heads, sets, head_size, longest)

        def workspace(rows: int, device: torch.device) -> Workspace:
            return kernels.allocate_workspace(rows, *shape, device)

        rows, nowhere = num_rows, torch.device("meta")
        while rows > 1 and workspace(rows, nowhere).nbytes > WORKSPACE_LIMIT:
            rows = -(-rows // 2)
        stage = vllm_config.model_config.get_layers_start_end_indices(
            vllm_config.parallel_config
        )
        interval = config.reselect_interval
        choices = choices_of_layers(startup.plan, range(*stage), interval)
        count, kept = len({*choices.values()}), min(config.max_blocks, longest)
        selection = Selection.allocate(count, num_rows, sets, kept, device)
        reuse = Reuse.allocate(interval, num_rows, device) if interval > 1 else None
        return cls(
            kernels,
            workspace(rows, device),
            selection,
            reuse,
            choices,
            attends_to_chosen=config.select_attends == "chosen",
            rows_per_pass=rows,
        )

    def __str__(self) -> str:
        selection, workspace = (
            f"{buffers.nbytes / 2**20:.1f} MiB"
            for buffers in (self.selection, self.workspace)
        )
        if not self.workspace.nbytes:
            return f"selection {selection}"
        rows = f"{self.rows_per_pass} query tokens at a time"
        return f"selection {selection}, workspace {workspace} for {rows}"


def max_decode_rows(vllm_config: VllmConfig) -> int:
    """Query tokens of a step's decodes at most: one per sequence, and its drafts."""
    longest = max_decode_query_len(vllm_config)
    return vllm_config.scheduler_config.max_num_seqs * longest


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
    from vllm.platforms import current_platform

    startup, dtype = resolve(vllm_config), vllm_config.model_config.dtype
    kernels = None
    if startup.plan.sparse:
        kernels = choose(
            current_platform.device_type,
            requested=startup.config.kernels,
            head_size=head_size,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            select_block_size=startup.config.select_block_size,
        )
    asked = AttentionSelectorConfig(
        head_size,
        dtype,
        kv_cache_dtype,
        block_size=None,
        has_sliding_window=has_sliding_window,
    )
    return kernels, choose_dense_backend(asked, kernels)
