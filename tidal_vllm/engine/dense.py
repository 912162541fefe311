"""What runs everything but sparse decoding: vLLM's own dense backend, by composition.

Prefills, DENSE layers and steps that need no selection go to FlashAttention or Triton
attention as vLLM ships them: their backend class, their metadata builder, their impl.
Where neither runs, the PyTorch ops take the same three roles.
"""

from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tidal_vllm.engine.torch_dense import ReferenceBackend
from tidal_vllm.kernels import Kernels


def choose_dense_backend(
    asked: AttentionSelectorConfig,
    kernels: Kernels | None,
    capability: DeviceCapability | None = None,
) -> type[AttentionBackend]:
    """The dense backend to compose with.

    On an NVIDIA GPU FlashAttention where it covers the layer, else, and on other GPUs,
    Triton attention. On a CPU the PyTorch ops, except beside Triton kernels: both then
    run under Triton's interpreter.

    Raises:
        ValueError: Neither covers the layer; says why, backend by backend.
    """
    interpreted = kernels is not None and kernels.name == "triton"
    if current_platform.device_type == "cpu" and not interpreted:
        return ReferenceBackend
    reasons = {}
    for name in _candidates():
        try:
            backend = AttentionBackendEnum[name].get_class()
            found = backend.validate_configuration(
                device_capability=capability
                or current_platform.get_device_capability(),
                **asked._asdict(),
            )
            if not found and name == "FLASH_ATTN" and not _has_flash(asked.head_size):
                found = ["its compiled part does not load here"]
        except (ImportError, OSError) as error:
            found = [f"{type(error).__name__}: {error}"]
        if not found:
            return backend
        reasons[name] = ", ".join(found)
    raise ValueError(
        "no dense attention backend covers this set-up: "
        + "; ".join(f"{name}: {why}" for name, why in reasons.items())
    )


def _candidates() -> tuple[str, ...]:
    # On other GPUs vLLM's FLASH_ATTN is somebody else's, and not what it picks.
    return (*(["FLASH_ATTN"] if current_platform.is_cuda() else []), "TRITON_ATTN")


def _has_flash(head_size: int) -> bool:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    found = get_flash_attn_version(head_size=head_size, supports_fa4_hd256=True)
    return found is not None
