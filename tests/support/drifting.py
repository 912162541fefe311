"""A small model whose sparse layers err, and settings under which it does or not."""

from pathlib import Path
from typing import Any

from tests.support.models import build_random_model

NUM_LAYERS = 4
MAX_LEN = 1024
BLOCK_SIZE = 16
ROLES = {"dense_layers": [0], "select_layers": [1]}
# The model drifts: layers 2 and 3 see 32 tokens of each sequence that is longer.
SPARSE = ROLES | {
    "token_budget": 32,
    "select_block_size": 4,
    "recent_fraction": 0.25,
}
# The model is exact, but on the sparse path over all blocks.
EXACT = ROLES | {"token_budget": MAX_LEN, "min_sparse_len": 0}


def build_drifting_model(folder: Path, **fields: Any) -> Path:
    """A Llama of 2 query heads per KV head.

    Args:
        folder: Made; the checkpoint is written there, without a tokenizer.
        fields: Of the configuration, other than usual.
    """
    usual = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LEN,
    }
    return build_random_model(folder, "llama", **usual | fields)
