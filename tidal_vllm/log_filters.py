"""vLLM's warnings that say nothing to a user of this package, and why.

Each is one logger of vLLM's and how the message begins. All else is let through.
"""

import logging
import warnings

OF_THE_SCHEDULER = {
    # Chosen with the backend, asynchronous where vLLM's own would be.
    "vllm.config.scheduler": ["Using custom scheduler class tidal_vllm.scheduler."],
}
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
    ],
}
# Python's warnings: of what vLLM calls between tensor-parallel ranks on a CPU.
DEPRECATED = "`torch.distributed.all_gather_into_tensor` is deprecated"


def install_all() -> None:
    """Both tables: for processes of the CPU platform."""
    install(OF_THE_SCHEDULER | OF_THE_CPU_PLATFORM)
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)


def install(table: dict[str, list[str]]) -> None:
    """Keep these messages out of this process's log; more than once is once.

    Args:
        table: Beginnings of messages, by the name of their logger.
    """
    for name, beginnings in table.items():
        logging.getLogger(name).addFilter(_Quiet(beginnings))


class _Quiet(tuple):
    """A filter of log records; a logger takes equal ones once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self)
