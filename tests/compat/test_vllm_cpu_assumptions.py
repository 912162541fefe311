"""What the CPU default takes for granted inside vLLM; each breaks here first.

A failure means: read the named place of the package again before raising the
supported range of vLLM.
"""

import inspect
from importlib.metadata import version

import pytest
import torch
import vllm.v1.worker.cpu_worker as stock_cpu_worker
from vllm.config import CacheConfig, ParallelConfig
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.block_table import ComputeSlotMappingKernel
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.support.engines import runner
from tests.support.models import ROLES
from tests.support.signatures import parameters
from tidal_vllm.cpu.platform import TidalCpuPlatform
from tidal_vllm.cpu.worker import (
    TidalCpuModelRunner,
    TidalCpuWorker,
    compute_slot_mapping,
)
from tidal_vllm.engine import support
from tidal_vllm.engine.backend import TidalBackend

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def llm(engine, random_llama):
    return engine(random_llama, tidal=ROLES)


class TestPlatform:
    """cpu/platform.py"""

    def test_ours_is_in_use(self):
        assert isinstance(current_platform, TidalCpuPlatform)
        assert not current_platform.is_cpu()
        assert current_platform.is_out_of_tree()

    @pytest.mark.parametrize(
        "hook",
        [
            "get_attn_backend_cls",
            "check_and_update_config",
            "import_kernels",
            "register_triton_kernel_overrides",
            "pre_register_and_update",
            "get_punica_wrapper",
        ],
    )
    def test_hooks(self, hook):
        stock, ours = (getattr(cls, hook) for cls in (CpuPlatform, TidalCpuPlatform))
        assert len(parameters(stock)) == len(parameters(ours))

    def test_size_of_a_kv_block_that_nobody_asked_for(self):
        """What `backend.kv_block_size` expects; 0.33 sets it with the model."""
        early = inspect.getsource(CpuPlatform.check_and_update_config)
        late = inspect.getsource(CpuPlatform.update_block_size_for_backend)
        default = support.ON_CPU.default_block_size
        if version("vllm").startswith("0.32."):
            assert f"cache_config.block_size = {default}" in early
        else:
            assert f"(\n                backend_classes, {default}, vllm_config" in late
        assert TidalBackend.get_preferred_block_size(default) == default
        assert support.ON_GPU.default_block_size == CacheConfig().block_size

    def test_config_fields(self):
        assert ParallelConfig().worker_cls == "auto"
        assert CacheConfig().kv_cache_memory_bytes is None
        assert 0 < CacheConfig().gpu_memory_utilization < 1


class TestCpuWorker:
    """cpu/worker.py"""

    def test_the_worker_builds_its_runner_by_a_name_in_its_module(self, llm):
        source = inspect.getsource(stock_cpu_worker.CPUWorker.init_device)
        assert "= CPUModelRunner(" in source
        assert stock_cpu_worker.CPUModelRunner is TidalCpuModelRunner
        assert type(runner(llm)) is TidalCpuModelRunner

    @pytest.mark.parametrize(
        ("base", "name"),
        [
            (Worker, "_maybe_get_memory_pool_context"),
            (Worker, "determine_available_memory"),
            (Worker, "init_device"),
            (GPUModelRunner, "_sample"),
            (GPUModelRunner, "_bookkeeping_sync"),
            (GPUModelRunner, "_get_prompt_logprobs_dict"),
            (GPUModelRunner, "profile_run"),
        ],
    )
    def test_methods_that_are_overridden_or_called(self, base, name):
        assert callable(getattr(base, name))
        ours = TidalCpuWorker if base is Worker else TidalCpuModelRunner
        assert issubclass(ours, base)

    def test_the_runner_rewinds_generators_by_an_offset_that_the_cpu_lacks(self):
        """Once either changes, `TidalCpuModelRunner` can go."""
        source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
        assert "gen.set_offset(gen.get_offset() - 4)" in source
        assert "self.discard_request_mask.np[:num_reqs]" in source
        assert "self.input_batch.generators" in source
        with pytest.raises(RuntimeError, match="offset"):
            torch.Generator().get_offset()

    def test_the_slot_mapping_kernel_has_our_parameters(self):
        kernel = ComputeSlotMappingKernel.kernel
        names = getattr(kernel, "arg_names", None)  # of Triton, or of the override
        if names is None:
            names = parameters(getattr(kernel, "func", kernel))
        assert list(names) == parameters(compute_slot_mapping)
