"""What the doctor tries in a process of its own, since every part may break.

Each stage is what a run would do at that point; the first that fails ends the process.
"""

import importlib
import json
import os
import pickle
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import NamedTuple

import tidal_vllm
from tidal_vllm.child_process import last_words, run_python
from tidal_vllm.engine.metrics import COUNTING_WORKER
from tidal_vllm.names import CPU_PLATFORM_PATH, NAME
from tidal_vllm.plugin import cpu_platform, register

MARK = "tidal-vllm doctor: "  # vLLM logs to stdout too
TINY_CONTEXT, TINY_BUDGET, TINY_ANSWER = 400, 64, 8  # tokens
# Which of these modules can be imported depends on the machine; see "kernels".
KERNEL_MODULES = (
    *("tidal_vllm.kernels.cuda", "tidal_vllm.kernels.triton", "tidal_vllm._tidal_C"),
)
# These modules change vLLM, and are for the CPU platform alone.
CPU_MODULES = ("tidal_vllm.cpu.platform", "tidal_vllm.cpu.moe", "tidal_vllm.cpu.worker")


class Seen(NamedTuple):
    """What a stage found, and what should be better about it."""

    found: str
    advice: str = ""


def run_stages(names: list[str]) -> None:
    """Print a line of JSON before and after each stage; stop at the first failure."""
    for name in names:
        print(MARK + json.dumps([name]), flush=True)
        try:
            ok, seen = True, STAGES[name]()
        except Exception as error:
            ok, seen = False, Seen(f"{type(error).__name__}: {error}")
        line = [name, ok, shorten(seen.found, 300), seen.advice]
        print(MARK + json.dumps(line), flush=True)
        if not ok:
            return


def _import_dependencies() -> Seen:
    import transformers.models.llama.modeling_llama  # noqa: F401
    from vllm import LLM  # noqa: F401

    return Seen("torch, transformers and vllm import")


def _find_device() -> Seen:
    import torch
    from vllm.platforms import current_platform as device

    kind, where = device.device_type, type(device).__name__
    if not kind:
        if _may_load("tidal_cpu") and cpu_platform() is not None:
            importlib.import_module(CPU_PLATFORM_PATH.rpartition(".")[0])
        raise RuntimeError("vLLM found no device to run on")
    if kind == "cpu":
        cores = len(os.sched_getaffinity(0))
        return Seen(
            f"cpu, {torch.get_num_threads()} threads on {cores} cores ({where})"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"vLLM found a GPU that torch {torch.__version__} cannot use"
        )
    memory = device.get_device_total_memory() / 2**30
    return Seen(f"{kind}, {device.get_device_name()}, {memory:.0f} GiB ({where})")


def _may_load(plugin: str) -> bool:
    """Whether VLLM_PLUGINS lets vLLM load one of ours."""
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or plugin in allowed.split(",")


def _register() -> Seen:
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    if _may_load("tidal"):
        if "tidal" not in entry_points(group="vllm.general_plugins").names:
            raise RuntimeError("tidal_vllm's entry points are not installed")
        register()  # vLLM goes on without a plug-in that raises
    AttentionBackendEnum[NAME].get_class()
    return Seen(f"--attention-backend {NAME.lower()} is known to vLLM")


def _import_modules() -> Seen:
    """Import the modules that vLLM imports in mid-start, or in the first step."""
    from vllm.platforms import current_platform

    left_out = KERNEL_MODULES
    if not current_platform.is_cpu() and current_platform.device_type != "cpu":
        left_out += CPU_MODULES
    modules = pkgutil.walk_packages(tidal_vllm.__path__, "tidal_vllm.")
    names = [m.name for m in modules if not m.name.startswith(left_out)]
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ImportError(f"{name}: {type(error).__name__}: {error}") from error
    return Seen(f"all {len(names)} of tidal_vllm import")


def _reach_spawned_processes() -> Seen:
    """A spawned engine unpickles the backend's name before it has loaded a plug-in."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = pickle.dumps(AttentionBackendEnum[NAME])
    done = run_python(f"import pickle; print(pickle.loads({member!r}).name)")
    if done.returncode or NAME not in done.stdout.split():
        raise RuntimeError(last_words(done.stdout, done.returncode))
    return Seen("the backend's name reaches spawned processes")


def _describe_kernels() -> Seen:
    import torch
    from vllm.platforms import current_platform

    from tidal_vllm.kernels import describe

    kernels = describe(torch.device(current_platform.device_type))
    return Seen(kernels.reason, kernels.advice)


def _build_config() -> Seen:
    """All that vLLM and tidal_vllm decide before any process is started."""
    from vllm.engine.arg_utils import EngineArgs

    with TemporaryDirectory() as folder:
        arguments, _ = _tiny_model(Path(folder))
        config = EngineArgs(**arguments).create_engine_config()
    scheduler = config.scheduler_config.get_scheduler_cls().__name__
    return Seen(f"vLLM configures a tiny model, with {scheduler}")


def _run_engine() -> Seen:
    """An engine of a tiny model has to find what was hidden in its prompt."""
    import torch
    from vllm import LLM, SamplingParams

    from tidal_vllm.planted import make_prompt

    with TemporaryDirectory() as folder:
        arguments, spec = _tiny_model(Path(folder))
        prompt = make_prompt(spec, TINY_CONTEXT, 0.3, seed=0, chain_len=TINY_ANSWER)
        if torch.accelerator.is_available():  # others may use most of it
            arguments["gpu_memory_utilization"] = 0.4
        llm = LLM(**arguments, kv_cache_memory_bytes=1 << 28, disable_log_stats=False)
        try:
            (output,) = llm.generate(
                {"prompt_token_ids": prompt.prompt_token_ids},
                SamplingParams(temperature=0, max_tokens=len(prompt.answer_token_ids)),
                use_tqdm=False,
            )
            (counters, *_) = llm.collective_rpc("decode_counters")
        finally:
            llm.llm_engine.engine_core.shutdown()
    return judge_answer(
        list(output.outputs[0].token_ids), prompt.answer_token_ids, counters
    )


def judge_answer(given: list[int], planted: list[int], counters: dict) -> Seen:
    """Compare an answer with what was planted.

    Raises:
        RuntimeError: The answer is another one, or was not decoded sparsely.
    """
    if list(given) != list(planted):
        raise RuntimeError(f"the answer is {given}, planted was {planted}")
    steps = counters["sparse_steps"]
    if not steps:
        raise RuntimeError("the answer is right, but no step was sparse")
    return Seen(f"a planted answer is found, {steps} of its steps sparse")


def _tiny_model(folder: Path) -> tuple[dict, "tidal_vllm.planted.PlantedSpec"]:
    """The engine arguments for a model that is written to a folder, and its spec."""
    from tidal_vllm.planted import PlantedSpec, build_planted_model

    spec = PlantedSpec(num_layers=4, vocab_size=512, max_position_embeddings=2048)
    path = build_planted_model(folder / "planted", spec)
    tidal = {
        "token_budget": TINY_BUDGET,
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
    }
    arguments = {
        "model": str(path),
        "attention_backend": NAME,
        "additional_config": {"tidal": tidal},
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "worker_extension_cls": COUNTING_WORKER,
    }
    return arguments, spec


STAGES: dict[str, Callable[[], Seen]] = {
    "imports": _import_dependencies,
    "device": _find_device,
    "plug-in": _register,
    "modules": _import_modules,
    "spawn": _reach_spawned_processes,
    "kernels": _describe_kernels,
    "config": _build_config,
    "engine": _run_engine,
}
