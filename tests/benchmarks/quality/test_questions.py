"""How questions are put to a model, and how its answers come to scores."""

import pytest

from benchmarks.quality.harness.questions import questions
from benchmarks.quality.suites import TURN_END
from tests.support.models import byte_tokenizer

LONGEST = 20_000


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def perfect(asked, tokenizer, seen=None):
    """An engine that answers every turn rightly, and a list of what it was asked."""
    turns = iter(range(9))

    def answer(prompts, limits):
        turn = next(turns)
        if seen is not None:
            seen.append([tokenizer.decode(prompt) for prompt in prompts])
        said = [task.answer.split(TURN_END)[turn] for task in asked.of]
        found = [tokenizer(text)["input_ids"] for text in said]
        assert all(len(f) <= limit for f, limit in zip(found, limits, strict=True))
        assert max(map(len, prompts)) + max(limits) <= asked.room <= LONGEST
        return found

    return answer


@pytest.mark.parametrize("chat", [True, False])
def test_turn_by_turn_all_tasks_together(tokenizer, monkeypatch, chat):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template if chat else None)
    asked = questions("m", tokenizer, "multi_turn", 4000, 2, LONGEST)
    seen = []
    assert asked.scores(perfect(asked, tokenizer, seen)) == [1, 1]
    assert [len(prompts) for prompts in seen] == [2, 2, 2, 2]
    first, second = asked.of[0].answer.split(TURN_END)[:2]
    question = asked.of[0].follow_ups[1]
    quoted = [f"<assistant>{second}\n", f"<user>{question}\n<assistant>"]
    if not chat:
        quoted = [f"\n\nassistant: {second}\n\n", f"user: {question}"]
    assert all(text in seen[2][0] for text in [first, *quoted])
    assert seen[2][0].endswith(quoted[1])
    assert seen[0][0] != seen[0][1], "each task has a seed of its own"


def test_wrong_answers(tokenizer):
    asked = questions("m", tokenizer, "json_kv", 2000, 2, LONGEST)
    assert asked.scores(perfect(asked, tokenizer)) == [1, 1]
    nothing = [[], []]
    assert asked.scores(lambda prompts, limits: nothing) == [0, 0]


def test_planted_answers_are_exact(planted):
    _, folder = planted(hops=2)
    asked = questions(str(folder), None, "planted", 500, 3, 1000)
    right = [list(p.answer_token_ids) for p in asked.prompts]
    assert asked.scores(lambda prompts, limits: right) == [1, 1, 1]
    almost = [right[0], right[1][:-1], [*right[2][:-2], 9, right[2][-1]]]
    assert asked.scores(lambda prompts, limits: almost) == [1, 0, 0]


@pytest.mark.parametrize(
    ("suite", "length", "tasks", "said"),
    [
        ("nope", 2000, 1, "--suites nope: must be among planted, niah_single_1"),
        ("planted", 2000, 1, "--suites planted: m is no planted model's folder"),
        ("json_kv", 2000, 0, "--tasks 0: must be 1 or more"),
        ("json_kv", 10, 1, "--lengths 10: length=10 is too short"),
        ("json_kv", LONGEST, 1, f"needs {LONGEST + 1} tokens .* reads {LONGEST} at"),
        # It fits, but not with its answer.
        (
            "niah_multikey_3",
            LONGEST - 1,
            1,
            f"needs 20... tokens .* reads {LONGEST} at",
        ),
    ],
)
def test_refusals(tokenizer, suite, length, tasks, said):
    with pytest.raises(ValueError, match=said) as refused:
        questions("m", tokenizer, suite, length, tasks, LONGEST)
    assert "\n" not in str(refused.value)


def test_planted_questions_to_another_model(random_llama):
    with pytest.raises(ValueError, match="--suites planted: .* no planted.json"):
        questions(str(random_llama), None, "planted", 500, 1, 2048)
