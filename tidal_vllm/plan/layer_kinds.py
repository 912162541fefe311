"""What each layer of a model does with its context, read from the model's config.

Takes a Hugging Face config object, and needs neither vLLM nor torch. vLLM's models
read the same fields; that a model was built accordingly is checked when it has been
(`plan.stages.check_full_layers`).
"""

import enum
from collections.abc import Sequence
from typing import Any

from tidal_vllm.validators import TidalConfigError


class LayerKind(enum.Enum):
    """What a layer keeps of the tokens that it has seen."""

    FULL = "full attention"
    WINDOW = "sliding window"
    STATE = "state"  # Mamba, linear attention, short convolution
    NONE = "none"  # an MLP alone


# Words of the fields in FIELDS: those of transformers, its older ones, and numbers.
WORDS = {
    "full_attention": LayerKind.FULL,
    "attention": LayerKind.FULL,
    "hybrid": LayerKind.FULL,  # beside a state
    1: LayerKind.FULL,
    "sliding_attention": LayerKind.WINDOW,
    "linear_attention": LayerKind.STATE,
    "mamba": LayerKind.STATE,
    "conv": LayerKind.STATE,
    0: LayerKind.STATE,
    "mlp": LayerKind.NONE,
    "moe": LayerKind.NONE,
}
# Where a config may say it, in the order in which vLLM looks.
FIELDS = ("layers_block_type", "attn_type_list", "layer_types")


def layer_kinds(
    text_config: Any, num_layers: int, window: int | None, has_state: bool
) -> tuple[LayerKind, ...]:
    """The kind of every layer of a model.

    Args:
        text_config: The Hugging Face config of the language model.
        num_layers: Its layer count. A field may go on for layers behind them.
        window: Tokens; None where there is no window, or vLLM was told to ignore it.
        has_state: Whether vLLM keeps a state for some of the layers.

    Raises:
        TidalConfigError: A word that is not known, a field that is too short, or
            states without a field that says where.
    """
    field = next((f for f in FIELDS if getattr(text_config, f, None)), None)
    if field is None:
        if has_state:
            allowed = (
                "the model keeps a state for some layers, and its config does not say "
                f"for which: must have one of {', '.join(FIELDS)}"
            )
            raise TidalConfigError("layer_types", None, allowed)
        kind = LayerKind.FULL if window is None else LayerKind.WINDOW
        return (kind,) * num_layers
    words = list(getattr(text_config, field))[:num_layers]
    if len(words) < num_layers:
        allowed = f"must say what each of the model's {num_layers} layers is"
        raise TidalConfigError(field, words, allowed)
    unknown = sorted({str(word) for word in words if word not in WORDS})
    if unknown:
        allowed = (
            f"the {', '.join(unknown)} layers cannot be run beside sparse decoding: "
            f"must be among {', '.join(w for w in WORDS if isinstance(w, str))}"
        )
        raise TidalConfigError(field, words, allowed)
    kinds = [WORDS[word] for word in words]
    if window is None:
        kinds = [LayerKind.FULL if k is LayerKind.WINDOW else k for k in kinds]
    return tuple(kinds)


def correction_obstacle(
    kinds: Sequence[LayerKind], has_state: bool, frees_blocks: bool
) -> str | None:
    """Why tokens cannot be computed a second time; None where they can.

    Args:
        has_state: Whether vLLM keeps a state for some of the layers.
        frees_blocks: Whether vLLM frees the KV behind a sliding window.
    """
    if has_state:
        return (
            "a correction computes tokens again, and this model's states cannot be "
            "rewound to the first of those tokens: must be null"
        )
    if frees_blocks and LayerKind.WINDOW in kinds:
        return (
            "a correction computes tokens again, and vLLM has freed the KV behind "
            "their sliding windows: must be null, or vLLM be started with "
            "--disable-hybrid-kv-cache-manager"
        )
    return None
