"""Tiny models as a config.json only: whoever reads a weight of theirs fails."""

import json
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ALL_FULL = ["full_attention"] * 6
INTERLEAVED = ["sliding_attention", "full_attention"] * 3

MODELS: dict[str, dict] = {
    "llama": {},
    "head_size_48": {"head_dim": 48},
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lacks_a_package": {"architectures": ["LacksAPackage"]},
    "encoder": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
    "sliding_window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    },
    "some_layers_slide": {"sliding_window": 64, "layer_types": INTERLEAVED},
    "never_slides": {"sliding_window": 256, "layer_types": INTERLEAVED},
    "no_layer_slides": {"sliding_window": 64, "layer_types": ALL_FULL},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        "sliding_window": 64,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "llama4": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "attention_chunk_size": 64,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"] * 3,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    },
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "num_hidden_layers": 8,
        "layer_types": ["conv", "full_attention"] * 4,
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    },
    "granite4": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 8,
        "layer_types": ["mamba", "attention"] * 4,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
        "position_embedding_type": "nope",
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 8,
        "layer_types": ["linear_attention", "full_attention"] * 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 0,
        "mlp_only_layers": [],
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_multiplier": 0.2,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "dual_chunk": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dual_chunk_attention_config": {
            "chunk_size": 128,
            "local_size": 16,
            "original_max_position_embeddings": 512,
        },
    },
    "block_diffusion": {"canvas_length": 32},
    "alibi": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": 6,
        "n_head": 2,
        "seq_length": 512,
    },
    "soft_cap": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "layer_types": ALL_FULL,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "kv_sharing": {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 64,
        "layer_types": ALL_FULL,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "sinks": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": None,
        "layer_types": ALL_FULL,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 256,
        },
    },
}


def write_model(root: Path, name: str) -> Path:
    """Write one of `MODELS` to a folder below `root`, or find it there."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | MODELS[name]))
    return folder
