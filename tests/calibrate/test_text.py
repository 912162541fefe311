"""Prompts that are stretches of a text."""

import pytest

from tidal_vllm.calibrate.text import TEXT, TextPrompts, is_text, read_text
from tidal_vllm.validators import TidalConfigError


class Bytes:
    """A tokenizer of bytes that begins every text with token 1."""

    def encode(self, text):
        return [1, *text.encode()]

    def decode(self, ids):
        return bytes(i for i in ids if i != 1).decode()


DOCUMENT = "".join(f"Sentence {n:03} of many. " for n in range(200))


@pytest.fixture
def prompts():
    made = TextPrompts("essay.txt", DOCUMENT, Bytes())
    made.cut(500, 16)
    return made


def test_stretches_begin_as_the_tokenizer_begins(prompts):
    asked = [prompts.prompt(number) for number in range(len(prompts))]
    for prompt in asked:
        assert len(prompt.token_ids) == 500
        assert prompt.token_ids[0] == 1 and 1 not in prompt.token_ids[1:]
        assert Bytes().decode(prompt.token_ids) in DOCUMENT
        assert prompt.kind == TEXT and not prompt.judged


def test_every_answer_is_another_part_of_the_text(prompts):
    ends = []
    for number in range(len(prompts)):
        text = Bytes().decode(prompts.prompt(number).token_ids)
        ends.append(DOCUMENT.index(text) + len(text))
    assert ends != sorted(ends), "the first few come from all over the text"
    ends.sort()
    assert all(b - a >= 16 for a, b in zip(ends, ends[1:], strict=False))
    assert ends[0] < 520 and ends[-1] > len(DOCUMENT) - 20
    assert prompts.prompt(len(prompts)) is None


def test_the_order_does_not_change(prompts):
    again = TextPrompts("essay.txt", DOCUMENT, Bytes())
    again.cut(500, 16)
    assert [again.prompt(n) for n in range(9)] == [prompts.prompt(n) for n in range(9)]


def test_bad_texts(tmp_path):
    made = TextPrompts("essay.txt", DOCUMENT, Bytes())
    with pytest.raises(TidalConfigError, match="too few for prompts of 9000"):
        made.cut(9000, 16)
    with pytest.raises(TidalConfigError, match="the model has no tokenizer"):
        TextPrompts("essay.txt", DOCUMENT, None)
    with pytest.raises(TidalConfigError, match="cannot be read"):
        read_text(str(tmp_path / "none.txt"))
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(TidalConfigError, match="holds no text"):
        read_text(str(tmp_path / "blank.txt"))


def test_what_is_a_text():
    assert is_text("text") and is_text("Essay.TXT") and is_text("notes.md")
    assert not is_text("builtin") and not is_text("p.jsonl")
    assert len(read_text("text")) > 400_000
