"""What the CPU default cannot run, refused before anything is started.

Changes vLLM at run time: `_try_inspect_model_cls` of the model registry.
"""

import re
import traceback
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from tidal_vllm.plan.resolve import drafts_itself, has_convolutions
from tidal_vllm.versions import BUILT_FOR_TORCH

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def refuse_what_needs_a_gpu(vllm_config: "VllmConfig") -> None:
    """Raise for a set-up that would fail once it has loaded, or at the first request.

    Raises:
        ValueError: With the key, its value and what is allowed.
    """
    _refuse_speculation_without_triton(vllm_config)
    model = vllm_config.model_config
    if model is None:
        return
    _refuse_what_has_no_pytorch_code(model)
    if model.is_moe:
        _refuse_quantised_experts(vllm_config)
        _refuse_adapters_beside_experts(vllm_config)


def _refuse_speculation_without_triton(vllm_config: "VllmConfig") -> None:
    """Refuse speculation without Triton.

    vLLM's sampler of drafts would fail in its first step.
    """
    from vllm.triton_utils import HAS_TRITON

    speculation = vllm_config.speculative_config
    if speculation is None or HAS_TRITON:
        return
    if not drafts_itself(vllm_config):  # that is in PyTorch: `tidal_vllm.cpu.drafts`
        raise ValueError(
            f"speculative_config.method = {speculation.method}: speculative decoding "
            "needs Triton, which is off without an accelerator; allowed: no "
            "speculative_config"
        )


def _refuse_what_has_no_pytorch_code(model_config: "ModelConfig") -> None:
    """Refuse quantisation and states that have no PyTorch code.

    vLLM looks for their kernels in the first step only.
    """
    from vllm.triton_utils import HAS_TRITON

    quantization = model_config.quantization
    if quantization is not None and "awq" in quantization:
        raise ValueError(
            f"quantization = {quantization}: its kernels need an accelerator; allowed "
            "None, or a method that vLLM runs in PyTorch (int8_per_channel_weight_only)"
        )
    keeps_states = model_config.is_hybrid or model_config.is_attention_free
    if keeps_states and not HAS_TRITON and not has_convolutions(model_config):
        raise ValueError(
            f"{model_config.architecture} keeps states (Mamba, linear attention) whose "
            "kernels need Triton, which is off without an accelerator; allowed are "
            "models with full attention, sliding windows and short convolutions"
        )


def _refuse_quantised_experts(vllm_config: "VllmConfig") -> None:
    quantization = vllm_config.model_config.quantization
    if quantization is not None:
        raise ValueError(
            f"quantization = {quantization}: this model is a mixture of experts, and "
            "quantised experts need an accelerator; allowed: a checkpoint that is not "
            "quantised"
        )


def _refuse_adapters_beside_experts(vllm_config: "VllmConfig") -> None:
    if vllm_config.lora_config is not None:
        raise ValueError(
            "enable_lora = True: this model is a mixture of experts, and LoRA for "
            "those needs an accelerator; allowed with this model: False"
        )


def explain_missing_packages() -> None:
    """Make vLLM say which package it lacks for a model.

    vLLM imports a model's code to inspect it. Where that fails, it shows the
    traceback of another process, and says that the log has details.
    """
    from vllm.model_executor.models import registry

    if hasattr(registry._ModelRegistry._try_inspect_model_cls, "says_what_is_missing"):
        return

    # NOTE: cached as vLLM's is; it asks about the same model several times.
    @lru_cache(maxsize=128)
    def inspect(model_arch, model):
        try:
            return model.inspect_model_cls()
        except Exception as error:
            if package := missing_package(error):
                raise ValueError(_needs(model_arch, package)) from None
            message = "Error in inspecting model architecture '%s'"
            registry.logger.exception(message, model_arch)
            return None

    def _try_inspect_model_cls(self, model_arch):
        model = self.models.get(model_arch)
        return None if model is None else inspect(model_arch, model)

    _try_inspect_model_cls.says_what_is_missing = True
    registry._ModelRegistry._try_inspect_model_cls = _try_inspect_model_cls


def missing_package(error: Exception) -> str | None:
    """The first package that an import asked for in vain, here or in a child."""
    text = "".join(traceback.format_exception(error))
    names = re.findall(r"No module named '(\w+)", text)
    return next((name for name in names if name != "vllm"), None)


def _needs(model_arch: str, package: str) -> str:
    said = f"model architecture = {model_arch}: vLLM's code for it needs {package}, "
    said += f"which is not installed; also for text alone. Install {package}"
    torch_version = version("torch")
    if package in BUILT_FOR_TORCH:
        said += f", built for torch {torch_version}"
        if "+cpu" in torch_version:
            said += (
                f", from where that torch came from: the {package} that pip finds by "
                "itself may be a CUDA build, which cannot be imported beside it"
            )
    return said
