"""Our CPU platform takes over only where vLLM has nothing, and TIDAL runs on both."""

import json

import pytest
from vllm import platforms

from tests.support.model_configs import write_model
from tests.support.processes import run_python
from tidal_vllm import plugin

BUILTIN = sorted(platforms.builtin_platform_plugins)


def test_takes_over_where_vllm_finds_no_device():
    assert plugin.cpu_platform() == "tidal_vllm.cpu.platform.TidalCpuPlatform"


@pytest.mark.parametrize("name", BUILTIN)
def test_steps_aside_where_vllm_finds_a_device(monkeypatch, name):
    detectors = platforms.builtin_platform_plugins
    monkeypatch.setitem(detectors, name, lambda: f"vllm.platforms.{name}.Platform")
    assert plugin.cpu_platform() is None


def test_a_detector_that_fails_found_nothing(monkeypatch):
    def fails():
        raise RuntimeError("driver of another century")

    monkeypatch.setitem(platforms.builtin_platform_plugins, "cuda", fails)
    assert plugin.cpu_platform() is not None


STOCK_CPU = """
import json, sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

asked = AttentionSelectorConfig(128, torch.float32, "auto", 16)
found = {"platform": type(current_platform).__name__}
load_general_plugins()
for name in ("TIDAL", "CPU_ATTN", "FLASH_ATTN"):
    chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum[name], asked)
    found[name] = chosen
found["none"] = current_platform.get_attn_backend_cls(None, asked)

def refusal(of, *args, **kwargs):
    try:
        of(*args, **kwargs)
    except ValueError as error:
        return str(error)

found["head_size"] = refusal(
    current_platform.get_attn_backend_cls,
    AttentionBackendEnum["TIDAL"],
    asked._replace(head_size=48),
)
def configure(**kwargs):
    return EngineArgs(
        model=sys.argv[1], skip_tokenizer_init=True, max_model_len=256, **kwargs
    ).create_engine_config()

tidal = {"additional_config": {"tidal": {"token_budget": 0}}}
found["setting"] = refusal(configure, attention_backend="TIDAL", **tidal)
found["unselected"] = refusal(configure, **tidal)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stock_cpu(model_root) -> dict:
    """What vLLM's own CPU platform says; the wheel has no kernels for it to run."""
    model = write_model(model_root, "llama")
    done = run_python(STOCK_CPU, model, VLLM_TARGET_DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stdout}


def test_vllms_cpu_platform_keeps_its_place(stock_cpu):
    assert stock_cpu["platform"] in ("CpuPlatform", "ZenCpuPlatform")


def test_vllms_cpu_platform_hands_out_tidal(stock_cpu):
    assert stock_cpu["TIDAL"] == "tidal_vllm.engine.backend.TidalBackend"


@pytest.mark.parametrize("asked_for", ["CPU_ATTN", "FLASH_ATTN", "none"])
def test_vllms_cpu_platform_otherwise_decides_as_before(stock_cpu, asked_for):
    assert "cpu_attn" in stock_cpu[asked_for]


def test_vllms_cpu_platform_refuses_what_tidal_cannot_run(stock_cpu):
    assert "head_size = 48: allowed [32," in stock_cpu["head_size"]


def test_settings_are_checked_early_on_every_platform(stock_cpu):
    assert "tidal.token_budget = 0: must be a positive" in stock_cpu["setting"]


def test_the_warning_of_ignored_settings_too(stock_cpu):
    assert stock_cpu["unselected"] is None
    assert "additional_config['tidal'] has no effect" in stock_cpu["log"]


def test_loading_the_plugins_again_changes_nothing():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def state():
        return (
            type(current_platform).check_and_update_config.__func__,
            type(current_platform).get_attn_backend_cls.__func__,
            list(AttentionBackendEnum.__members__),
        )

    plugin.register()
    before = state()
    plugin.register()
    assert state() == before
