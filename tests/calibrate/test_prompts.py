"""The built-in prompts, and those of a file."""

import pytest

from tidal_vllm.calibrate.prompts import Prompt, built_in, from_file
from tidal_vllm.validators import TidalConfigError


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, with `encode` and `decode` as a model's tokenizer has them."""

    class Bytes:
        def encode(self, text):
            return [1, *text.encode()]

        def decode(self, ids):
            return bytes(i for i in ids if i != 1).decode()

    return Bytes()


def test_chains_have_their_answer_at_all_depths():
    made = built_in("none", None, 512, count=5, num_tokens=300)
    places = []
    for prompt in made:
        ids = list(prompt.token_ids)
        assert len(ids) == 300 and len(set(ids) & set(range(16))) == 0
        answer, asked = list(prompt.answer_ids), ids[-1]
        places.append(ids.index(asked))
        assert ids[places[-1] + 1 : places[-1] + 9] == answer
        assert ids.count(asked) == 2
        assert prompt.is_right([*answer, 0], None)
        assert not prompt.is_right(answer[::-1], None)
    assert places == sorted(places) and places[0] < 50 and places[-1] > 230
    assert made[0] != made[1]


@pytest.mark.parametrize("num_tokens", [600, 2000])
def test_prose_holds_its_needles(tokenizer, num_tokens):
    made = built_in("none", tokenizer, 256, count=6, num_tokens=num_tokens)
    assert {prompt.kind for prompt in made} == {"needle", "two hops"}
    for prompt in made:
        assert num_tokens - 80 < len(prompt.token_ids) <= num_tokens
        text = tokenizer.decode(prompt.token_ids)
        number, asked = prompt.answer_text, text.split()[-2]
        if prompt.kind == "two hops":
            (line,) = [s for s in text.split(". ") if s.startswith(f"{asked} has the")]
            asked = line.split()[-1].rstrip(".")
        assert f"The secret number of {asked} is {number}." in text
        assert prompt.is_right(tokenizer.encode(f" {number}."), tokenizer.decode)
        assert not prompt.is_right(tokenizer.encode(" 12"), tokenizer.decode)


def test_prose_that_cannot_be_that_short(tokenizer):
    with pytest.raises(TidalConfigError, match="the question alone takes"):
        built_in("none", tokenizer, 256, count=1, num_tokens=60)


def test_a_file_of_text(tokenizer):
    lines = [{"prompt": "ab", "answer": "c"}, {"prompt_token_ids": [5, 6]}]
    first, second = from_file("f", lines, tokenizer, 256)
    assert first.token_ids == (1, 97, 98) and first.is_right([99], tokenizer.decode)
    assert second == Prompt("file", (5, 6)) and not second.judged
