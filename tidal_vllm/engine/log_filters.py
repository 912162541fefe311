"""vLLM's warnings that say nothing to a user of this package, and why.

Each is one logger of vLLM's and how the message begins. All else is let through.

Changes vLLM at run time: the loggers in the table get a filter.
"""

import logging

OF_THE_SCHEDULER = {
    # Chosen with the backend, asynchronous where vLLM's own would be.
    "vllm.config.scheduler": ["Using custom scheduler class tidal_vllm.scheduler."],
}


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
