"""What ties a measured profile to its model. Imports neither torch nor vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Whatever changes these changes which layer looks where. Names of newer and older
# versions of transformers stand side by side; what a config lacks counts as null.
_SHAPE_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "layer_types",
    "sliding_window",
    "num_experts",
    "num_local_experts",
)
# Which layers have full attention, where that is not said by "layer_types". Counted
# where they are present, so that other models keep the hash that they always had.
_PATTERN_KEYS = (
    "layers_block_type",
    "attn_type_list",
    "attn_layer_indices",
    "attn_layer_period",
    "attn_layer_offset",
)


def config_sha256(hf_config: Mapping[str, Any]) -> str:
    """The hash of a model's shape and positions, 64 hexadecimal digits.

    Args:
        hf_config: The text part of a Hugging Face config, as a mapping. Weights,
            dtype and special tokens do not count: a fine-tuned model has its base
            model's hash.
    """
    shape = {key: hf_config.get(key) for key in _SHAPE_KEYS}
    pattern = {key: hf_config[key] for key in _PATTERN_KEYS if key in hf_config}
    text = json.dumps(
        shape | pattern, sort_keys=True, separators=(",", ":"), default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()
