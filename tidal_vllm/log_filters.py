"""vLLM's warnings that say nothing to a user of this package, and why.

Each is one logger of vLLM's and how the message begins. All else is let through.
"""

import logging

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
    # For the CPU build's own kernels and thread binding.
    "vllm.v1.worker.cpu_worker": [
        "libtcmalloc is not found in LD_PRELOAD.",
        "libiomp is not found in LD_PRELOAD.",
    ],
}


def install(table: dict[str, list[str]]) -> None:
    """Keep these messages out of this process's log; more than once is once.

    Args:
        table: Beginnings of messages, by the name of their logger.
    """
    for name, beginnings in table.items():
        logger = logging.getLogger(name)
        quiet = _Quiet(tuple(beginnings))
        if quiet not in logger.filters:
            logger.addFilter(quiet)


class _Quiet(tuple):
    """A filter of log records, equal to another of the same beginnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self)
