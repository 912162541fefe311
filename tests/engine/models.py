"""The small models under test, written as Hugging Face folders."""

from pathlib import Path

import torch

VOCAB_SIZE = 512
NUM_LAYERS = 6
MAX_LEN = 2048
# Where the random models select in the tests that do not say otherwise.
ROLES = {"dense_layers": [0], "select_layers": [1, 3]}

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LEN,
    # Ten times the usual: attention is far from uniform, and answers vary.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def build_random_model(folder: Path, family: str, **fields) -> Path:
    """A random Llama, or Qwen3 (norms on queries and keys), with 3 heads per KV head.

    Args:
        folder: Made; the checkpoint is written there, without a tokenizer.
        family: "llama" or "qwen3".
        fields: Of the configuration, other than usual.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config_class(**_SHAPE | fields)).save_pretrained(folder)
    return folder


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens,)
    return torch.randint(8, VOCAB_SIZE, shape, generator=generator).tolist()
