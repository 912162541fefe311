"""Models, dtypes and backends that TIDAL cannot run: refused with the reason."""

import pytest
import torch

MODELS = {
    "head_size_48": ("head_size = 48", "allowed [32, 64, 80, 96, 112, 128"),
    "mla": ("use_mla = True", "allowed are models with separate K and V heads"),
    "encoder": ("attn_type = encoder_only", "allowed decoder"),
    "dual_chunk": (
        "dual_chunk_attention_config = {'chunk_size': 128, ",
        "allowed are models without dual chunk attention (Qwen2.5-1M)",
    ),
    "block_diffusion": (
        "canvas_length = 32",
        "allowed are models without block diffusion",
    ),
}
ARGUMENTS = {
    "kv_cache_fp8": (
        {"kv_cache_dtype": "fp8"},
        "kv_cache_dtype = fp8",
        "allowed ['auto', 'float16', 'bfloat16']",
    ),
    "backend_flash_attn": (
        {"attention_backend": "FLASH_ATTN"},
        "attention_backend = FLASH_ATTN: not available without an accelerator",
        "allowed: TIDAL (sparse decoding), or none (dense attention)",
    ),
    "backend_cpu_attn": (
        {"attention_backend": "CPU_ATTN"},
        "attention_backend = CPU_ATTN: not available without an accelerator",
        "allowed: TIDAL (sparse decoding), or none (dense attention)",
    ),
    "speculative_decoding_without_triton": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative_config.method = ngram: speculative decoding needs Triton",
        "allowed: no speculative_config",
    ),
    "quantised_experts": (
        {"model": "mixtral", "quantization": "fp8", "dtype": "bfloat16"},
        "quantization = fp8: this model is a mixture of experts",
        "allowed: a checkpoint that is not quantised",
    ),
    "adapters_beside_experts": (
        {"model": "mixtral", "enable_lora": True, "lora_target_modules": ["q_proj"]},
        "enable_lora = True: this model is a mixture of experts",
        "allowed with this model: False",
    ),
    "backend_of_one_kind_of_layer": (
        {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
        "attention_backend = FLASH_ATTN: not available without an accelerator",
        "allowed: TIDAL (sparse decoding), or none (dense attention)",
    ),
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}
# With speculative decoding: our settings, more of vLLM's, the message.
SPECULATION = {
    "reselect_interval": (
        {"reselect_interval": 4},
        {},
        "tidal.reselect_interval = 4: speculative decoding takes back tokens",
        "allowed with speculative_config: 1",
    ),
    "correction_interval": (
        {"correction_interval": 32},
        {},
        "tidal.correction_interval = 32: speculative decoding takes back tokens",
        "allowed with speculative_config: null",
    ),
    "attention_backend": (
        {},
        {"attention_backend": "tidal"},
        "speculative_config.attention_backend = TIDAL: a draft model decodes densely",
        "allowed None or another backend",
    ),
}
# What only a layer knows is refused when it is built.
LAYERS = {
    "alibi": "alibi_slopes = [0.0625, 0.00390625]: not supported by the TIDAL",
    "soft_cap": "logits_soft_cap = 50.0: not supported by the TIDAL",
    "kv_sharing": "kv_sharing_target_layer_name = model.layers.3.self_attn.attn: not",
    "sinks": "has_sink = True: allowed are models without attention sinks",
}
# A field of vLLM's question about a layer, a value, and the reply.
LAYER_FIELDS = {
    "head_size": (72, "head_size = 72: allowed [32,"),
    "dtype": (torch.float64, "dtype = torch.float64: allowed [torch.float32,"),
    "kv_cache_dtype": ("nvfp4", "kv_cache_dtype = nvfp4: allowed ['auto',"),
    "attn_type": ("encoder", "attn_type = encoder: allowed decoder"),
    "use_mla": (True, "use_mla = True: allowed"),
    "has_sink": (True, "has_sink = True: allowed"),
    "use_sparse": (True, "use_sparse = True: allowed"),
    "use_mm_prefix": (True, "use_mm_prefix = True: allowed"),
    "use_per_head_quant_scales": (True, "use_per_head_quant_scales = True: allowed"),
    "use_non_causal": (True, "use_non_causal = True: allowed"),
    "use_rswa": (True, "use_rswa = True: allowed"),
    "use_batch_invariant": (True, "VLLM_BATCH_INVARIANT = 1: allowed 0"),
    "use_pcp": (True, "prefill_context_parallel_size > 1: allowed 1"),
    "use_dcp": (True, "decode_context_parallel_size > 1: allowed 1"),
}
HARMLESS_FIELDS = {
    *("block_size", "has_sliding_window", "use_kv_connector"),
    "use_adaptive_verification",
}


@pytest.mark.parametrize("case", MODELS)
def test_refuses_model(refusal, model_root, case):
    given, allowed = MODELS[case]
    message = refusal(model=case, runner="pooling" if case == "encoder" else "auto")
    assert f"cannot run {model_root / case}: {given}" in message
    assert f": {allowed}" in message


# What vLLM would look for in the first step only, TIDAL selected or not.
NO_KERNELS = {
    "granite4": (
        {},
        "GraniteMoeHybridForCausalLM keeps states (Mamba, linear attention) whose ",
    ),
    "qwen3_next": ({}, "Qwen3NextForCausalLM keeps states"),
    "llama": (
        {"quantization_config": AWQ},
        "quantization = auto_awq: its kernels need an",
    ),
}


@pytest.mark.parametrize("model", NO_KERNELS)
def test_refuses_what_needs_an_accelerator(refusal, model):
    fields, reason = NO_KERNELS[model]
    given = {"hf_overrides": fields, "dtype": "float16", "attention_backend": None}
    message = refusal(model=model, **given)
    assert reason in message
    assert "; allowed " in message


def test_refuses_a_model_for_other_kernels_unselected_too(refusal):
    """Without an accelerator dense attention is ours as well."""
    assert "dual_chunk_attention_config = " in refusal(
        model="dual_chunk", attention_backend=None
    )


def test_an_mla_model_gives_that_one_reason(refusal):
    assert "head_size" not in refusal(model="mla").split("[type=")[0]


@pytest.mark.parametrize("case", ARGUMENTS)
def test_refuses_engine_argument(refusal, case):
    arguments, given, allowed = ARGUMENTS[case]
    message = refusal(**arguments)
    assert given in message
    assert allowed in message


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("torchvision", f"Install torchvision, built for torch {torch.__version__}"),
        ("a_package", "Install a_package ["),
    ],
)
def test_names_the_package_that_a_model_lacks(
    refusal, tmp_path, monkeypatch, package, advice
):
    from vllm.model_executor.models import ModelRegistry

    code = f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    (tmp_path / f"lacks_{package}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ModelRegistry.models, "LacksAPackage", None)
    ModelRegistry.register_model("LacksAPackage", f"lacks_{package}:Model")
    message = refusal(model="lacks_a_package")
    assert f"LacksAPackage: vLLM's code for it needs {package}, which" in message
    assert advice in message


@pytest.mark.parametrize("case", SPECULATION)
def test_refuses_with_speculative_decoding(refusal, monkeypatch, case):
    # As on a GPU: without Triton the platform refuses speculative decoding.
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    tidal, more, given, allowed = SPECULATION[case]
    speculation = {"method": "ngram", "num_speculative_tokens": 2} | more
    tidal = {"token_budget": 64, "select_layers": [2]} | tidal
    message = refusal(tidal, speculative_config=speculation)
    assert given in message
    assert allowed in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_accepts_dtype(configure, dtype):
    configure(dtype=dtype)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "float16", "bfloat16"])
def test_accepts_kv_cache_dtype(configure, kv_cache_dtype):
    configure(kv_cache_dtype=kv_cache_dtype)


def test_vllm_itself_refuses_other_dtypes(refusal):
    assert "float64" in refusal(dtype="float64")


@pytest.mark.parametrize("field", LAYER_FIELDS)
def test_refuses_layer(field):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from tidal_vllm.engine.backend import TidalBackend

    good = AttentionSelectorConfig(128, torch.bfloat16, "auto", 16)
    TidalBackend.require_supported(good)
    value, reply = LAYER_FIELDS[field]
    with pytest.raises(ValueError) as refused:
        TidalBackend.require_supported(good._replace(**{field: value}))
    assert str(refused.value).startswith(
        f"The TIDAL attention backend cannot run this model: {reply}"
    )


def test_every_field_that_vllm_asks_about_has_a_case():
    from vllm.v1.attention.selector import AttentionSelectorConfig

    fields = set(AttentionSelectorConfig._fields)
    assert fields == LAYER_FIELDS.keys() | HARMLESS_FIELDS


@pytest.mark.parametrize("case", LAYERS)
def test_refuses_layers_when_they_are_built(started, case):
    assert LAYERS[case] in started[case]["error"]


def test_refuses_arguments_that_only_some_models_give_their_layers(configure):
    from vllm.config import set_current_vllm_config

    from tidal_vllm.engine.attention import TidalImpl

    shape = {"num_heads": 2, "head_size": 32, "scale": 1.0}
    absent = {"sinks": None, "chunk_lookback": -1, "dual_chunk_attention_config": None}
    with set_current_vllm_config(configure()):
        TidalImpl(**shape, **absent)
        for given, reply in (
            ({"sinks": torch.ones(2)}, "sinks = a tensor of [2]: not supp"),
            ({"chunk_lookback": 1}, "chunk_lookback = 1: not supported by the TIDAL"),
            ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config = {}: "),
        ):
            with pytest.raises(ValueError) as refused:
                TidalImpl(**shape, **absent | given)
            assert str(refused.value).startswith(reply)
            assert f"allowed {absent[next(iter(given))]}" in str(refused.value)
