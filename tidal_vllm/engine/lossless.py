"""Lossless mode as vLLM's speculative decoding: the target is its own draft model.

Changes vLLM at run time: `EngineArgs.create_speculative_config`.
"""

import sys
from typing import TYPE_CHECKING, Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.names import NAME

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

METHOD = "draft_model"


def offer_drafts() -> None:
    """Let `tidal.mode = "lossless"` stand for a speculative config.

    NOTE: vLLM decides on async scheduling and on the sizes of CUDA graphs before it
    asks the platform, so the config is made where vLLM makes its own.
    """
    module = sys.modules.get("vllm.engine.arg_utils")
    if module is None:  # no process that makes a config
        return
    stock = module.EngineArgs.create_speculative_config
    if hasattr(stock, "offers_drafts"):
        return

    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> "SpeculativeConfig | None":
        targets = target_model_config, target_parallel_config
        draft_tokens = _draft_tokens(self)
        if draft_tokens is None:
            return stock(self, *targets)
        return self_draft(draft_tokens, *targets)

    setattr(create_speculative_config, "offers_drafts", True)  # noqa: B010
    module.EngineArgs.create_speculative_config = create_speculative_config


def _draft_tokens(args: Any) -> int | None:
    """Tokens of a draft; None where the arguments ask for no lossless mode.

    Raises:
        ValueError: Another speculative config stands beside it.
    """
    backends = (args.attention_backend, args.attention_config.backend)
    names = {str(getattr(one, "name", one)).upper() for one in backends}
    if NAME not in names:
        return None
    config = TidalConfig.from_additional_config(args.additional_config)
    if config.mode != "lossless":
        return None
    given = args.speculative_config or args.spec_method or args.spec_model
    if given or args.spec_tokens:
        raise ValueError(
            f"speculative_config = {given or args.spec_tokens}: the model drafts for "
            "itself with tidal.mode = lossless; allowed None, or tidal.mode = sparse"
        )
    return config.draft_tokens


def self_draft(
    draft_tokens: int, target_model_config: Any, target_parallel_config: Any
) -> "SpeculativeConfig":
    """vLLM's config of a draft model that is the target itself."""
    from vllm.config import SpeculativeConfig

    target = target_model_config
    made = SpeculativeConfig(
        method=METHOD,
        model=target.model,
        revision=target.revision,
        code_revision=target.code_revision,
        quantization=target.quantization,
        num_speculative_tokens=draft_tokens,
        target_model_config=target,
        target_parallel_config=target_parallel_config,
    )
    # NOTE: vLLM reads the model's config again, without the target's overrides, and
    # takes some names for those of other methods.
    made.draft_model_config, made.method = target, METHOD
    return made
