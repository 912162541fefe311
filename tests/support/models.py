"""The small models under test, written as Hugging Face folders."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tidal_vllm.planted import PlantedSpec
from tidal_vllm.planted.build import MARKER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
NUM_LAYERS = 6
MAX_LEN = 2048
# Where the random models select in the tests that do not say otherwise.
ROLES = {"dense_layers": [0], "select_layers": [1, 3]}
# Their sparse layers see little: 8 blocks of 8 tokens.
NARROW = ROLES | {"token_budget": 64, "select_block_size": 8}

# What an LFM2 says besides: vLLM's reads more fields than transformers' has.
LFM2 = {
    "conv_dim": 192,
    "block_dim": 192,
    "block_ff_dim": 256,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True,
}

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


def build_random_model(folder: Path, family: str, **fields: Any) -> Path:
    """A random model with 3 heads per KV head.

    Args:
        folder: Made; the checkpoint is written there, without a tokenizer.
        family: "llama"; "qwen3" (norms on queries and keys); with sliding windows
            "exaone4" and "gemma3"; with short convolutions "lfm2"; mixtures of experts
            "mixtral", "qwen2_moe" and "glm4_moe".
        fields: Of the configuration, other than usual.
    """
    import transformers

    names = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "exaone4": ("Exaone4Config", "Exaone4ForCausalLM"),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        "lfm2": ("Lfm2Config", "Lfm2ForCausalLM"),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
        "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
        "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM"),
    }[family]
    config_class, model_class = (getattr(transformers, name) for name in names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**_SHAPE | fields))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # else zero: no bias
                buffer.normal_(std=0.3)
        model.save_pretrained(folder)
    return folder


def build_eagle_head(folder: Path, target: Path) -> Path:
    """An EAGLE head of one layer in the target's shape; vLLM makes up its weights.

    Args:
        folder: Made; the head's config is written there.
    """
    folder.mkdir(parents=True)
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens,)
    return torch.randint(8, VOCAB_SIZE, shape, generator=generator).tolist()


def random_arrivals(
    *requests: tuple[int, int, int],
) -> list[tuple[int, list[int], int]]:
    """What `asking.serve` takes, with a random prompt for each request.

    Args:
        requests: The engine's step before which a request arrives, the tokens of its
            prompt, and how many tokens it wants.
    """
    return [
        (step, random_prompt(num_tokens, seed=num_tokens), max_tokens)
        for step, num_tokens, max_tokens in requests
    ]


def hybrid_layers(spec: PlantedSpec, idle_after: Collection[int]) -> list[int]:
    """Where the layers of a planted model stand in `build_windowed_planted_model`."""
    before = [sum(idle < i for idle in idle_after) for i in range(spec.num_layers)]
    return [i + idle for i, idle in enumerate(before)]


def build_windowed_planted_model(
    folder: Path,
    planted: Path,
    spec: PlantedSpec,
    idle_after: Sequence[int],
    window: int,
) -> Path:
    """A planted model between sliding windows, whose answers stay the same.

    Its layer 0 looks at the token before, so it may slide; further layers with a
    window, which write nothing, stand behind some of its layers.

    Args:
        folder: Made; the checkpoint is written there.
        planted: The planted model of the spec.
        idle_after: Layers of it that another is put behind.
        window: Tokens, 2 or more.
    """
    at = hybrid_layers(spec, idle_after)
    copies = {at[i]: i for i in range(spec.num_layers)}
    copies |= {at[i] + 1: 1 for i in idle_after}
    slides = {at[0], *(at[i] + 1 for i in idle_after)}
    tensors = load_file(planted / "model.safetensors")
    made = {k: v for k, v in tensors.items() if not k.startswith("model.layers.")}
    for new, old in copies.items():
        prefix = f"model.layers.{old}."
        found = {k: v for k, v in tensors.items() if k.startswith(prefix)}
        for name, tensor in found.items():
            made[f"model.layers.{new}.{name.removeprefix(prefix)}"] = tensor.clone()
    folder.mkdir(parents=True)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((planted / "config.json").read_text())
    config |= {
        "num_hidden_layers": len(copies),
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if i in slides else "full_attention"
            for i in range(len(copies))
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", MARKER):
        (folder / name).write_text((planted / name).read_text())
    return folder
