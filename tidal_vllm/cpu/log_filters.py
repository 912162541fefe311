"""vLLM's warnings that say nothing to a user of the CPU platform, and why.

Changes vLLM at run time: the loggers in the table get a filter, and Python's warnings
get one.
"""

import warnings

from tidal_vllm.engine.log_filters import OF_THE_SCHEDULER, install

OF_THE_CPU_PLATFORM = {
    # Installed with vLLM, and off without a GPU: attention is PyTorch here.
    "vllm.platforms.cpu": ["Triton is not installed."],
    # Nothing is compiled here, whatever the user set; V1 runs without Triton.
    "vllm.config.vllm": [
        "Inductor compilation was disabled by user settings",
        "Model Runner V2 requires Triton; using the V1 model runner instead.",
    ],
    # Set by vLLM's own CPU worker; the next engine of the same process meets it.
    "vllm.platforms.interface": [
        "Unknown vLLM environment variable detected: VLLM_DIST_IDENT",
    ],
    # For the CPU build's own kernels and thread binding.
    "vllm.v1.worker.cpu_worker": [
        "libtcmalloc is not found in LD_PRELOAD.",
        "libiomp is not found in LD_PRELOAD.",
        "Speculative decoding on CPU without Intel OpenMP in LD_PRELOAD",
    ],
}
# Python's warnings: of what vLLM calls between tensor-parallel ranks on a CPU.
DEPRECATED = "`torch.distributed.all_gather_into_tensor` is deprecated"


def install_all() -> None:
    """Both tables: for processes of the CPU platform."""
    install(OF_THE_SCHEDULER | OF_THE_CPU_PLATFORM)
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
