"""The CPU default: vLLM's V1 engine where there is neither GPU nor CPU build.

vLLM's CUDA wheel has no CPU kernels, but its scheduler, paged KV cache, model
code and HTTP server are Python: this platform runs them on PyTorch.

Changes vLLM at run time: `torch.accelerator.empty_cache` and `empty_host_cache`,
`get_attn_backend_cls` of vLLM's own CPU platform, eight Triton kernels, the environment
where it says nothing, and fields of the config.
"""

import os
import warnings
from typing import TYPE_CHECKING

import psutil
import torch
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum
from vllm.utils.mem_constants import GiB_bytes

from tidal_vllm.cpu import log_filters, shutdown
from tidal_vllm.cpu.refusals import explain_missing_packages, refuse_what_needs_a_gpu
from tidal_vllm.names import BACKEND_PATH, CPU_WORKER_PATH, NAME, PUNICA_WRAPPER_PATH
from tidal_vllm.plan.resolve import chosen_backends

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = init_logger("vllm.tidal.platform")


class TidalCpuPlatform(CpuPlatform):
    """vLLM on plain PyTorch, with TIDAL as its only attention backend.

    `OOT` makes vLLM's layers take their native PyTorch paths; `CPU` would take
    the CPU build's compiled ones.
    """

    _enum = PlatformEnum.OOT
    # Ray has no accelerator resource to reserve here; `ray start --num-gpus N`
    # gives it N logical slots under this name.
    ray_device_key: str = "GPU"
    # Inductor would call a C++ compiler in mid-request, and fail where there is none.
    simple_compile_backend: str = "eager"

    def __init__(self) -> None:
        super().__init__()
        log_filters.install_all()
        shutdown.end_with_parent()
        # vLLM takes the V2 runner wherever Triton is, even if only its interpreter,
        # which does not cover all of that runner.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        # One of vLLM's dependencies would start building CUDA programs behind its back.
        os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
        # NOTE: at its end, every process of vLLM's empties the accelerator's caches
        # wherever the platform is not its own CPU one; without one, that raises.
        torch.accelerator.empty_cache = lambda: None
        torch.accelerator.empty_host_cache = lambda: None

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        # The first one is what vLLM makes of an fp32 checkpoint: left as it is,
        # since half the bits are not faster in PyTorch's CPU matmuls.
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum | None",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        from tidal_vllm.engine.backend import TidalBackend

        if selected_backend is not None:
            _require_tidal(selected_backend.name)
        TidalBackend.require_supported(attn_selector_config)
        return BACKEND_PATH

    @classmethod
    def pre_register_and_update(
        cls, parser: "FlexibleArgumentParser | None" = None
    ) -> None:
        explain_missing_packages()

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        from vllm.config import CompilationMode, CUDAGraphMode
        from vllm.utils.torch_utils import startup_omp_num_threads

        for name in sorted(chosen_backends(vllm_config)):
            _require_tidal(name)
        if vllm_config.model_config is not None:
            from tidal_vllm.engine.setup_checks import refuse_model

            # This package also runs the model's dense attention.
            refuse_model(vllm_config.model_config)
        refuse_what_needs_a_gpu(vllm_config)
        parallel = vllm_config.parallel_config
        executor = parallel.distributed_executor_backend
        automatic_worker = parallel.worker_cls == "auto"
        _set_kv_cache_default(vllm_config)
        if vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
            # What the stock platform makes of it where a CPU has certain instructions.
            vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"
        super().check_and_update_config(vllm_config)
        if automatic_worker:
            parallel.worker_cls = CPU_WORKER_PATH
        # The stock platform starts a worker process of its own to bind OpenMP
        # threads with the CPU build's ops; there is nothing to bind here.
        parallel.distributed_executor_backend = executor
        # Attention is PyTorch on all cores; vLLM would leave one thread for serving.
        threads = startup_omp_num_threads(parallel.local_world_size)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        shutdown.install()
        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        compilation.custom_ops = ["none"]

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return PUNICA_WRAPPER_PATH

    @classmethod
    def import_kernels(cls) -> None:
        """There are none to import."""

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm.triton_utils import HAS_TRITON
        from vllm.triton_utils.dispatcher import register_kernels
        from vllm.utils.cpu_triton_utils import _batch_memcpy_impl

        from tidal_vllm.cpu import drafts
        from tidal_vllm.cpu.worker import compute_slot_mapping

        if HAS_TRITON:
            return
        with warnings.catch_warnings():
            # Its scan of all loaded modules touches deprecated attributes.
            warnings.simplefilter("ignore", FutureWarning)
            register_kernels(
                {
                    "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": (
                        compute_slot_mapping
                    ),
                    "vllm.v1.worker.mamba_utils.batch_memcpy_kernel": (
                        _batch_memcpy_impl
                    ),
                    **drafts.kernels(),
                }
            )


def _require_tidal(name: str) -> None:
    if name != NAME:
        raise ValueError(
            f"attention_backend = {name}: not available without an accelerator; "
            f"allowed: {NAME} (sparse decoding), or none (dense attention)"
        )


def _set_kv_cache_default(vllm_config: "VllmConfig") -> None:
    """Size the KV cache where the user stated nothing.

    The stock default reserves 92 % of the machine and refuses to start when other
    programs use more than the rest. Here: 4 GiB, more if one sequence of
    `max_model_len` needs more, never over half of the memory that is free now.
    """
    from tidal_vllm.engine.support import kv_block_size

    cache, model = vllm_config.cache_config, vllm_config.model_config
    stated = (
        cache.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or cache.gpu_memory_utilization != type(cache)().gpu_memory_utilization
    )
    if stated or model is None:
        return
    parallel = vllm_config.parallel_config
    token_bytes = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
        * model.dtype.itemsize
    )
    longest = model.max_model_len + 2 * kv_block_size(vllm_config)
    one_sequence = token_bytes * longest
    free = psutil.virtual_memory().available // parallel.world_size
    cache.kv_cache_memory_bytes = min(max(4 * GiB_bytes, one_sequence), free // 2)


def accept_tidal(platform_cls: type[CpuPlatform]) -> None:
    """Let vLLM's own CPU platform hand out TIDAL when it is asked for.

    Args:
        platform_cls: The platform class in use. Ours and one that was already
            changed are left alone.
    """
    stock = platform_cls.get_attn_backend_cls
    if issubclass(platform_cls, TidalCpuPlatform) or hasattr(stock, "accepts_tidal"):
        return

    def get_attn_backend_cls(
        cls, selected_backend, attn_selector_config, num_heads=None
    ) -> str:
        if selected_backend is not None and selected_backend.name == NAME:
            return TidalCpuPlatform.get_attn_backend_cls(
                selected_backend, attn_selector_config, num_heads
            )
        return stock(selected_backend, attn_selector_config, num_heads)

    get_attn_backend_cls.accepts_tidal = True
    platform_cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)
