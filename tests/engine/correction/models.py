"""The small model under test: random, and built to drift."""

from pathlib import Path

import torch

VOCAB_SIZE = 512
NUM_LAYERS = 4
MAX_LEN = 1024
BLOCK_SIZE = 16
BUDGET = 32
ROLES = {"dense_layers": [0], "select_layers": [1]}
# Drifts: layers 2 and 3 see 32 tokens of each sequence that is longer.
SPARSE = ROLES | {
    "token_budget": BUDGET,
    "select_block_size": 4,
    "recent_fraction": 0.25,
}
# Exact, but on the sparse path over all blocks; polluted tokens are counted from 32 on.
EXACT = ROLES | {"token_budget": MAX_LEN, "min_sparse_len": 0}


def build_random_llama(folder: Path, **fields) -> Path:
    """A Llama whose attention is far from uniform, so that sparse layers err.

    Args:
        fields: Of the configuration, other than usual.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_LEN,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    config = LlamaConfig(**usual | fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens,)
    return torch.randint(8, VOCAB_SIZE, shape, generator=generator).tolist()
