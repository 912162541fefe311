"""What belongs to a draft model, told before vLLM marks its layers.

vLLM loads a draft (EAGLE, MTP, a model of its own) behind the target. The V1 model
runner gives it a config of its own, the V2 runner that of the target or a copy of it,
TIDAL and its settings included. A draft decodes densely, and its depth and shape are no
concern of the plan, which is the target's.
"""

from typing import TYPE_CHECKING

from tidal_vllm.plan.resolve import Startup, dense

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What vLLM tags the model with that is neither a draft nor a part with a tag.
_TARGET = "backbone"


def builds_draft(vllm_config: "VllmConfig") -> bool:
    """Whether the layer that is being constructed is one of a draft model.

    NOTE: `is_draft_layer` of vLLM's layers is set when the whole draft is built, and
    for EAGLE and MTP the V2 runner's current config is the target's. What tells them
    apart is the tag under which vLLM builds a draft, and by which its own attention
    selector knows one kind of them.
    """
    if vllm_config.speculative_config is None:
        return False
    from vllm.compilation import backends

    return backends.model_tag != _TARGET


def is_made_again(vllm_config: "VllmConfig") -> bool:
    """Whether this config is a copy, made beside layers that were built already.

    A draft's is: vLLM completes it when the target has been loaded.
    """
    return bool(vllm_config.compilation_config.static_forward_context)


def draft_startup(vllm_config: "VllmConfig") -> Startup:
    """What `resolve` says of a target, for a draft: all of it is dense."""
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    return dense("a draft model decodes densely", num_layers)
