"""The names under which vLLM knows this package: constants without any import."""

NAME = "TIDAL"
BACKEND_PATH = "tidal_vllm.engine.backend.TidalBackend"
CPU_PLATFORM_PATH = "tidal_vllm.cpu.platform.TidalCpuPlatform"
CPU_WORKER_PATH = "tidal_vllm.cpu.worker.TidalCpuWorker"
PUNICA_WRAPPER_PATH = "tidal_vllm.cpu.lora.TidalPunicaWrapper"
# An environment variable: the warnings that were given, and the process that gave each.
TOLD = "TIDAL_VLLM_TOLD"
# Public: users subclass these for vLLM's `--scheduler-cls`.
SYNC_SCHEDULER = "tidal_vllm.scheduler.TidalScheduler"
ASYNC_SCHEDULER = "tidal_vllm.scheduler.TidalAsyncScheduler"
