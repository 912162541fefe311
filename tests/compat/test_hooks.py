"""What the package replaces or wraps in vLLM at run time is there, and is asked for.

docs/design.md lists every such change. A failure means: read the named place of the
package again before raising the supported range of vLLM. Changes whose guard stands in
another file of this folder are not repeated here.
"""

import ast
import importlib
import inspect
import logging
import signal
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops, envs
from vllm.config import SchedulerConfig, VllmConfig
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.utils import server_utils
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.triton_utils.dispatcher import register_kernels
from vllm.utils import network_utils
from vllm.v1.engine import core as engine_core
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker import cpu_worker as stock_cpu_worker
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu import model_runner as model_runner_v2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from tests.support.signatures import parameters
from tidal_vllm.cpu import drafts, shutdown
from tidal_vllm.cpu import log_filters as cpu_log_filters
from tidal_vllm.cpu.worker import update_short_conv
from tidal_vllm.engine import log_filters
from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.engine.metrics import CountingWorker, DecodeCounters
from tidal_vllm.engine.self_draft import SelfDraft
from tidal_vllm.names import ASYNC_SCHEDULER
from tidal_vllm.plugin import register

pytestmark = pytest.mark.compat


def strings_of(module: str) -> list[str]:
    """Every string of a module's source, f-strings by what stands before a value."""
    tree = ast.parse(Path(find_spec(module).origin).read_text())
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


class TestPlugin:
    """plugin.py"""

    def test_every_config_ends_with_the_platforms_check(self):
        complete = inspect.getsource(VllmConfig.__post_init__)
        assert "current_platform.check_and_update_config(self)" in complete
        assert parameters(Platform.check_and_update_config) == ["vllm_config"]

    def test_the_platform_in_use_is_wrapped_once(self):
        register()
        wrapped = type(current_platform).check_and_update_config
        assert wrapped.checks_tidal
        register()
        assert type(current_platform).check_and_update_config == wrapped


class TestLossless:
    """engine/lossless.py"""

    def test_the_config_of_drafts_is_made_by_the_arguments(self):
        register()
        wrapped = EngineArgs.create_speculative_config
        assert wrapped.offers_drafts
        register()
        assert EngineArgs.create_speculative_config is wrapped
        names = ["self", "target_model_config", "target_parallel_config"]
        assert parameters(wrapped) == names
        source = inspect.getsource(EngineArgs.create_engine_config)
        made = source.index("self.create_speculative_config(")
        # Both are decided by what it gives.
        assert made < source.index("_set_default_max_num_seqs_and_batched_tokens_args(")
        assert made < source.index("VllmConfig(")

    def test_the_drafter_is_called_by_name(self):
        """`SelfDraft` takes what the runner gives to vLLM's own proposer."""
        assert parameters(SelfDraft.propose) == parameters(DraftModelProposer.propose)
        for name in ("load_model", "initialize_attn_backend"):
            mine, theirs = getattr(SelfDraft, name), getattr(DraftModelProposer, name)
            assert parameters(mine) == parameters(theirs)
        assert hasattr(DraftModelProposer, "validate_same_kv_cache_group")
        source = inspect.getsource(GPUModelRunner)
        assert "self.drafter = DraftModelProposer(" in source
        assert "self.discard_request_mask.gpu" in source


class TestSetUp:
    """engine/setup_checks.py"""

    def test_the_scheduler_is_a_setting(self):
        config = SchedulerConfig.default_factory(scheduler_cls=ASYNC_SCHEDULER)
        assert config.get_scheduler_cls().__name__ == "TidalAsyncScheduler"

    def test_the_engines_process_inherits_the_environment(self):
        """In which it finds the warnings that were given."""
        source = inspect.getsource(engine_utils.CoreEngineProcManager)
        assert "context = get_mp_context()" in source
        assert "context.Process(" in source


class TestCommands:
    """calibrate/engine.py, demo/engines.py"""

    def test_vllm_reads_what_the_commands_set(self):
        """An unknown variable would be ignored, with a warning."""
        given = {"ENABLE_V1_MULTIPROCESSING", "USE_V2_MODEL_RUNNER", "LOGGING_LEVEL"}
        assert {f"VLLM_{name}" for name in given} <= envs.environment_variables.keys()


class TestCounters:
    """engine/metrics.py"""

    @pytest.mark.parametrize(
        "worker_class", [gpu_worker.Worker, stock_cpu_worker.CPUWorker]
    )
    def test_any_worker_tells_its_counters(self, worker_class):
        """vLLM makes the worker's class inherit from the extension."""
        assert not hasattr(worker_class, "decode_counters"), "vLLM would refuse it"
        extended = type("Extended", (worker_class, CountingWorker), {})
        group = AttentionGroup(TidalBackend, ["a layer"], None, 0)
        counters = DecodeCounters(decode_tokens=3)
        group.metadata_builders = [SimpleNamespace(counters=counters)]
        worker = object.__new__(extended)
        worker.model_runner = SimpleNamespace(attn_groups=[[group]])
        assert worker.decode_counters()["decode_tokens"] == 3

    @pytest.mark.parametrize("runner", [GPUModelRunner, model_runner_v2.GPUModelRunner])
    def test_both_runners_keep_their_builders_there(self, runner):
        assert "self.attn_groups" in inspect.getsource(runner)


FILTERED = log_filters.OF_THE_SCHEDULER | cpu_log_filters.OF_THE_CPU_PLATFORM


class TestLogFilters:
    """engine/log_filters.py, cpu/log_filters.py"""

    @pytest.mark.parametrize(
        ("module", "beginning"),
        [(module, text) for module, texts in FILTERED.items() for text in texts],
    )
    def test_vllm_still_logs_what_is_kept_out(self, module, beginning):
        """A logger is named like its module; values stand where a `%` stands."""
        found = (text.partition("%")[0] for text in strings_of(module))
        assert any(
            text.startswith(beginning) or (text.strip() and beginning.startswith(text))
            for text in found
        )

    def test_only_what_begins_so_is_kept_out(self):
        log_filters.install({"tests.hooks": ["Noise"]})
        log_filters.install({"tests.hooks": ["Noise"]})
        (quiet,) = logging.getLogger("tests.hooks").filters
        kept = [
            quiet.filter(logging.LogRecord("", 0, "", 0, text, None, None))
            for text in ("Noise of today", "News, not Noise")
        ]
        assert kept == [False, True]

    def test_torch_warns_of_what_ranks_call(self):
        warned = strings_of("torch.distributed.distributed_c10d")
        assert any(text.startswith(cpu_log_filters.DEPRECATED) for text in warned)
        with warnings.catch_warnings():
            cpu_log_filters.install_all()
            assert warnings.filters[0][0] == "ignore"


class TestCpuPlatform:
    """cpu/platform.py"""

    def test_the_end_of_a_process_empties_an_accelerators_caches(self):
        end = inspect.getsource(parallel_state.cleanup_dist_env_and_memory)
        assert "torch.accelerator.empty_cache()" in end
        assert "torch.accelerator.empty_host_cache()" in end
        assert torch.accelerator.empty_cache() is None
        assert torch.accelerator.empty_host_cache() is None

    def test_the_model_runner_is_chosen_by_the_environment(self):
        assert "VLLM_USE_V2_MODEL_RUNNER" in envs.environment_variables

    @pytest.mark.skipif(not find_spec("humming"), reason="left out without a GPU")
    def test_the_build_behind_vllms_back_asks_the_environment(self):
        folder = Path(find_spec("humming").origin).parent
        sources = (path.read_text() for path in folder.rglob("*.py"))
        assert any("HUMMING_DISABLE_PARALLEL_BUILD" in source for source in sources)

    @pytest.mark.parametrize("path", drafts.kernels())
    def test_kernels_of_drafts_have_our_parameters(self, path):
        module, _, name = path.rpartition(".")
        source = ast.parse(Path(find_spec(module).origin).read_text())
        (kernel,) = (
            node
            for node in source.body
            if isinstance(node, ast.FunctionDef) and node.name == name
        )
        names = [argument.arg for argument in kernel.args.args]
        assert parameters(drafts.kernels()[path]) == names

    def test_kernels_are_overridden_by_name(self):
        assert parameters(register_kernels) == ["overrides"]
        known = inspect.getsource(register_kernels)
        assert '"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel"' in known


class TestCpuWorker:
    """cpu/worker.py"""

    def test_short_convolutions_take_the_native_path(self):
        dispatch = inspect.getsource(importlib.import_module(ShortConv.__module__))
        assert "self.forward_cuda(hidden_states=hidden_states" in dispatch
        native = ShortConv.forward_native
        assert ShortConv.forward_cuda is native
        assert parameters(native) == ["self", "hidden_states", "output"]

    def test_the_op_of_a_short_convolution_has_our_parameters(self):
        wrapper = _custom_ops.causal_conv1d_update_cpu_vec
        assert parameters(wrapper) == parameters(update_short_conv)
        assert "torch.ops._C.causal_conv1d_update_cpu_vec(" in inspect.getsource(
            wrapper
        )
        assert callable(torch.ops._C.causal_conv1d_update_cpu_vec)

    def test_the_worker_asks_for_memory_of_one_numa_node(self):
        source = inspect.getsource(stock_cpu_worker)
        assert "torch.ops._C.init_cpu_memory_env([memory_node])" in source
        assert torch.ops._C.init_cpu_memory_env([0]) is None

    def test_the_worker_forbids_another_number_of_threads(self):
        """Once it does not, `TidalCpuWorker.init_device` can go."""
        source = inspect.getsource(stock_cpu_worker.CPUWorker.init_device)
        assert "torch.set_num_threads = skip_set_num_threads" in source


class TestCpuLora:
    """cpu/lora.py"""

    def test_prompt_logprobs_ask_the_model_for_logits(self):
        source = inspect.getsource(GPUModelRunner._get_prompt_logprobs_dict)
        assert "logits = self.model.compute_logits(prompt_hidden_states)" in source
        assert "prompt_hidden_states = hidden_states[" in source


class TestShutdown:
    """cpu/shutdown.py; each change is made once, by `install`."""

    @pytest.fixture(autouse=True)
    def installed(self):
        shutdown.install()

    def test_an_engine_is_shut_down_and_its_reader_cancelled(self):
        assert AsyncLLM.shutdown.is_orderly
        assert parameters(AsyncLLM.shutdown) == ["self", "timeout"]
        stock = inspect.getsource(importlib.import_module(AsyncLLM.__module__))
        assert 'handler = getattr(self, "output_handler", None)' in stock
        assert "engine_core.shutdown(timeout=timeout)" in stock
        assert "outputs = await engine_core.get_output_async()" in stock

    def test_the_reader_learns_of_the_engines_death(self):
        assert parameters(AsyncMPClient.get_output_async) == ["self"]
        stock = inspect.getsource(importlib.import_module(AsyncMPClient.__module__))
        assert "raise self._format_exception(outputs) from None" in stock
        assert "EngineDeadError(suppress_context=True)" in stock

    def test_the_wait_for_an_engine_drops_an_interrupt(self):
        """Once it does not, the wrapper of `zmq_socket_ctx` can go."""
        stock = inspect.getsource(network_utils.zmq_socket_ctx)
        assert "except KeyboardInterrupt:" in stock
        assert "with zmq_socket_ctx(" in inspect.getsource(engine_utils)
        assert engine_utils.zmq_socket_ctx is not network_utils.zmq_socket_ctx

    def test_the_server_waits_for_its_clients(self):
        assert parameters(launcher.NoSignalServer.shutdown) == ["self", "sockets"]
        serve = inspect.getsource(launcher.serve_http)
        assert "return server.shutdown()" in serve
        assert "loop.add_signal_handler(signal.SIGTERM" in serve

    def test_a_signal_before_the_server_runs_is_an_interrupt(self):
        source = inspect.getsource(entry)
        assert "def _interrupt_init(*_)" in source
        assert "signal.signal(signal.SIGTERM, _interrupt_init)" in source
        assert signal.getsignal(signal.SIGTERM) is not shutdown._exit

    def test_an_engines_process_has_a_name(self):
        """By which `end_with_parent` knows it."""
        assert 'else "EngineCore"' in inspect.getsource(engine_utils)

    def test_an_engine_lets_go_of_its_handlers_before_it_ends(self):
        source = inspect.getsource(engine_core.EngineCoreProc.run_engine_core)
        _, ending = source.split("signal.signal(signal.SIGINT, signal.SIG_DFL)")
        stop, end = map(ending.index, ("signal_callback.stop()", "core.shutdown()"))
        assert stop < end

    def test_a_server_freezes_its_heap(self):
        """Once it does not, `gc.unfreeze` can go."""
        assert "freeze_gc_heap()" in inspect.getsource(server_utils)
