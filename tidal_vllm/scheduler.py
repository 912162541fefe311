"""The public path of the schedulers, for `--scheduler-cls` and for subclasses."""

from tidal_vllm.engine.scheduler import TidalAsyncScheduler, TidalScheduler

__all__ = ["TidalAsyncScheduler", "TidalScheduler"]
