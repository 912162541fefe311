"""What vLLM calls through entry points: `register` and `cpu_platform`.

vLLM calls both in every process (front end, engine core, workers), possibly
several times, before it parses its command line. So both are idempotent and
import nothing heavy before it is needed.

Changes vLLM at run time: how members of `AttentionBackendEnum` pickle, and
`check_and_update_config` of the platform class in use.
"""

import contextlib
import copyreg
import logging
from collections.abc import Callable

from tidal_vllm.engine import log_filters, lossless
from tidal_vllm.names import BACKEND_PATH, CPU_PLATFORM_PATH, NAME
from tidal_vllm.versions import unsupported_vllm

# vLLM configures handlers for the loggers below its own name only.
logger = logging.getLogger("vllm.tidal")


def register() -> None:
    """Make `--attention-backend tidal` known to vLLM (entry point)."""
    if reason := unsupported_vllm():
        logger.error("The TIDAL attention backend is off: %s", reason)
        with contextlib.suppress(Exception):
            _member()  # choosing it repeats the reason
        return
    _member()
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    copyreg.pickle(AttentionBackendEnum, _reduce_member)
    lossless.offer_drafts()
    log_filters.install(log_filters.OF_THE_SCHEDULER)
    platform_cls = type(current_platform)
    _check_setup_early(platform_cls)
    if f"{platform_cls.__module__}.{platform_cls.__name__}" == CPU_PLATFORM_PATH:
        from tidal_vllm.cpu import shutdown

        shutdown.end_once()
    if current_platform.is_cpu():
        from tidal_vllm.cpu.platform import accept_tidal

        accept_tidal(platform_cls)


def cpu_platform() -> str | None:
    """Offer our CPU platform where vLLM would find no device (entry point).

    Returns:
        The platform's class path, or None where one of vLLM's own platforms
        (an accelerator, or vLLM's CPU build) is present.
    """
    from vllm.platforms import builtin_platform_plugins

    if any(_detects(builtin) for builtin in builtin_platform_plugins.values()):
        return None
    if reason := unsupported_vllm():
        logger.error("The TIDAL CPU platform is off: %s", reason)
        return None
    return CPU_PLATFORM_PATH


def _detects(builtin: Callable[[], str | None]) -> bool:
    try:
        return builtin() is not None
    except Exception:  # vLLM takes a detector that fails for one that finds nothing
        return False


def _member():
    """The TIDAL member of vLLM's registry, registered on first use."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(NAME, BACKEND_PATH)
    return AttentionBackendEnum[NAME]


def _resolve_member(name: str):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return _member() if name == NAME else AttentionBackendEnum[name]


def _reduce_member(member):
    # NOTE: Enum pickles by value, and a spawned process unpickles vLLM's config
    # before it loads plug-ins: the value would be unknown there.
    return _resolve_member, (member.name,)


def _check_setup_early(platform_cls: type) -> None:
    """Refuse bad input where vLLM completes its config, before it starts anything.

    Args:
        platform_cls: The platform class in use; one that was already changed is
            left alone.
    """
    stock = platform_cls.check_and_update_config
    if hasattr(stock, "checks_tidal"):
        return

    def check_and_update_config(cls, vllm_config) -> None:
        from tidal_vllm.plan.resolve import has_settings, is_selected

        stock(vllm_config)
        if is_selected(vllm_config) or has_settings(vllm_config):
            from tidal_vllm.engine.setup_checks import check_setup

            check_setup(vllm_config)

    check_and_update_config.checks_tidal = True
    platform_cls.check_and_update_config = classmethod(check_and_update_config)
