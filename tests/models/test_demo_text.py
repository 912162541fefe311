"""What the demo on a pretrained model asks, and what it cannot use."""

import builtins
import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest

from tidal_vllm.cli import main
from tidal_vllm.demo import text
from tidal_vllm.demo.engines import Answer, Answers
from tidal_vllm.fair_timing import Race
from tidal_vllm.planted import PlantedSpec
from tidal_vllm.planted.build import build_planted_model


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
        text._load(tmp_path)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.fixture(autouse=True)
def log_level(monkeypatch):
    """The demo sets it for its process, where it is not set: this is a shared one."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 4096 tokens, whose chat template is the message and no more."""
    spec = PlantedSpec(num_layers=4, max_position_embeddings=4096)
    return build_planted_model(tmp_path_factory.mktemp("demo") / "model", spec)


def without_template(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def refused(capsys, *arguments) -> str:
    assert main(["demo", *map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_question_stands_behind_the_document_in_the_chat_template(folder):
    tokenizer, longest = text._load(folder)
    assert longest == 4096
    alone = text._ask(tokenizer, [], "a question")
    with_document, continued = (
        text._prompts(tokenizer, [50], asked)[0] for asked in ("a question", None)
    )
    assert continued == tokenizer(text.python_documentation())["input_ids"][:50]
    assert with_document[-2:] == alone[-2:]
    assert with_document.count(tokenizer.bos_token_id) == 1
    assert len(with_document) == 50 + len(alone)


def test_a_question_needs_a_chat_template(folder, tmp_path, capsys):
    bare = shutil.copytree(folder, tmp_path / "bare")
    without_template(bare)
    tokenizer, _ = text._load(bare)
    assert text._question(tokenizer, bare, None) is None, "it continues"
    said = refused(capsys, "--model", bare, "--question", "What?")
    assert "--question needs a chat template" in said


@pytest.mark.parametrize("words", [[], ["--question", "What?"], ["--continue"]])
def test_what_is_asked_and_shown(folder, monkeypatch, capsys, words):
    sampled = {}

    def compare(dense, sparse, prompt, **sampling):
        sampled.update(sampling)
        answer = Answer("an answer", [5, 6], 0.1, 50.0)
        return Answers([answer] * 2, [answer] * 2, Race([0.1], [0.1]))

    engine = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=None))
    both = contextlib.nullcontext((engine, engine))
    monkeypatch.setattr(text, "dense_and_sparse", lambda *_: both)
    monkeypatch.setattr(text, "resolve", lambda _: SimpleNamespace(plan=0, config=0))
    monkeypatch.setattr(text, "format_plan", lambda *_: "the plan")
    monkeypatch.setattr(text, "compare", compare)
    command = ["demo", "--model", str(folder), "--contexts", "50"]
    assert main([*command, *words]) == 0
    printed = capsys.readouterr().out
    asks = words != ["--continue"]
    question = words[1] if len(words) == 2 else text.QUESTION
    assert (f"  asked   {question}\n" in printed) is asks
    assert ("  dense   an answer\n" in printed) is asks
    assert ("  dense   ...an answer\n" in printed) is not asks
    assert sampled.get("ignore_eos", False) is not asks, "an answer ends by itself"
    assert sampled.get("min_tokens", 0) == asks, "and has a decode step to be timed"


def test_question_and_template_count_as_context(folder, capsys):
    words = ["--model", folder, "--contexts", 4096 - 64]
    said = refused(capsys, *words, "--question", "one two three")
    assert "64 of them are its answer, 4 the question in its chat template" in said
    assert "at most 4028" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--question", "What?"], "go with --model"),
        (["--model", "x", "--question", " "], "is empty"),
        (["--model", "x", "--question", "What?", "--continue"], "not allowed with"),
    ],
)
def test_options_that_contradict_each_other(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert said in capsys.readouterr().err
