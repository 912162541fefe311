"""Folders that the demo on a pretrained model cannot use."""

import builtins
import json

import pytest

from tidal_vllm.demo import text


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "llama"}, "KeyError: 'added_tokens'"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, "contains custom code"),
    ],
    ids=["a damaged tokenizer", "code of its own"],
)
def test_one_line_and_no_question(tmp_path, monkeypatch, config, said):
    files = {
        "config.json": json.dumps(config),
        "code.py": "raise RuntimeError('it ran')",
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(builtins, "input", lambda question: "y")
    with pytest.raises(text.DemoError, match="is no model's folder") as refused:
        text._prompts(tmp_path, [10])
    assert said in str(refused.value) and "\n" not in str(refused.value)
